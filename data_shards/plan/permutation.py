"""Keyed permutations: a shuffle of n items that stores nothing per item.

In: n and a 64-bit key. Out: a bijection of 0..n-1, computed point by point in both directions: a
Feistel network over the smallest power of two that holds n, applied again until the image lies
below n (cycle walking: Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002).
All keys of a plan are derived from its seed by sha256 (`derive_key`), all mixing is the 64-bit
finalizer below, so the sampling order is the same on every machine and in every version.
"""

import hashlib
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

_MASK_64: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
_ROUNDS: Final = 6  # even, so that halves of unequal width are back in their positions
_MIN_BITS: Final = 6  # with halves below 3 bits small permutations are not equally likely
_SMALL: Final = 256  # below this size, single points are faster than a call of numpy


def derive_key(seed: int, *parts: str | int) -> int:
    """A 64-bit key for one purpose: the first 8 bytes of sha256 over seed and parts."""
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")


@overload
def mix64(word: int) -> int: ...
@overload
def mix64(word: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def mix64(word: Any) -> Any:
    """A bijection of 64-bit words in which every input bit moves every output bit.

    It is the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014); element-wise for
    uint64 arrays, whose products wrap as the mask does for integers.
    """
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK_64
    return word ^ (word >> 31)


class Permutation:
    """A keyed bijection of 0..size-1; calling it maps one point, `inverse` maps it back."""

    __slots__ = ("_high_bits", "_low_bits", "_round_keys", "size")

    def __init__(self, size: int, key: int) -> None:
        assert 1 <= size < 1 << 62, f"a permutation of {size} items"
        bits = max(_MIN_BITS, (size - 1).bit_length())
        self.size = size
        self._high_bits = bits // 2
        self._low_bits = bits - bits // 2
        self._round_keys = [
            mix64((key + round_ * _GOLDEN) & _MASK_64) for round_ in range(1, 1 + _ROUNDS)
        ]

    def __call__(self, point: int) -> int:
        """The image of a point."""
        assert 0 <= point < self.size, f"point {point} of {self.size}"
        point = self._encrypt(point)
        while point >= self.size:
            point = self._encrypt(point)
        return point

    def inverse(self, image: int) -> int:
        """The point that has this image."""
        assert 0 <= image < self.size, f"image {image} of {self.size}"
        image = self._decrypt(image)
        while image >= self.size:
            image = self._decrypt(image)
        return image

    def table(self) -> NDArray[np.int64]:
        """All images in order, [size]: for small sets such as shards and blocks."""
        if self.size < _SMALL:
            return np.array([self(point) for point in range(self.size)], dtype=np.int64)
        images = self._encrypt(np.arange(self.size, dtype=np.uint64))
        while (outside := np.flatnonzero(images >= self.size)).size:
            images[outside] = self._encrypt(images[outside])
        return images.astype(np.int64)

    @overload
    def _encrypt(self, word: int) -> int: ...
    @overload
    def _encrypt(self, word: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def _encrypt(self, word: Any) -> Any:
        """One pass over the power of two. The halves swap widths in every round."""
        high_bits, low_bits = self._high_bits, self._low_bits
        high, low = word >> low_bits, word & ((1 << low_bits) - 1)
        for key in self._round_keys:
            mask = (1 << high_bits) - 1
            high, low = low, high ^ (mix64((low + key) & _MASK_64) & mask)
            high_bits, low_bits = low_bits, high_bits
        return (high << low_bits) | low

    def _decrypt(self, word: int) -> int:
        high_bits, low_bits = self._high_bits, self._low_bits
        high, low = word >> low_bits, word & ((1 << low_bits) - 1)
        for key in reversed(self._round_keys):
            high_bits, low_bits = low_bits, high_bits
            mask = (1 << high_bits) - 1
            high, low = low ^ (mix64((high + key) & _MASK_64) & mask), high
        return (high << low_bits) | low
