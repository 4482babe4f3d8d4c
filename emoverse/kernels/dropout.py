"""Dropout that is replayed, not stored: a mask is a pure function of (seed, stream, row, column).

Random bits: Philox 4x32 with 7 rounds (Salmon et al., SC 2011), counter (row, column // 8, stream,
0), key = the seed. Its four words are cut into eight 16-bit numbers, low half first; column c has
number c % 8. An element is kept if its number is at least `threshold`. The Triton kernels draw the
same bits, so forward, backward, recomputation, CPU and GPU agree bit for bit.
Legend: T tokens, K input features of a linear layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
LEVELS = 1 << 16


class Dropout(NamedTuple):
    """One mask. `p` 0 keeps everything."""

    p: float
    seed: int  # 0 <= seed < 2^63
    stream: int  # tells apart the masks that share a seed

    @property
    def threshold(self) -> int:
        """Numbers below are dropped: p in units of 2^-16."""
        return round(self.p * LEVELS)

    @property
    def scale(self) -> float:
        """What kept values are multiplied by: exact for the rounded p."""
        return LEVELS / (LEVELS - self.threshold)


def draw_seed() -> int:
    """A fresh seed from torch's default generator on the CPU; costs no synchronisation.

    Activation checkpointing restores that generator, so a recomputed layer draws its seed again.
    """
    return int(torch.randint(0, 2**62, ()).item())


def keep_mask(dropout: Dropout, rows: int, columns: int, device: torch.device) -> Tensor:
    """True where an element is kept: T, K."""
    numbers = _random_16_bits(dropout, rows, columns, device)
    return numbers >= dropout.threshold


def drop(x_TK: Tensor, dropout: Dropout | None) -> Tensor:
    """Kept values times `scale`, the others 0. No gradient of its own: callers replay it."""
    if dropout is None or dropout.threshold == 0:
        return x_TK
    keep = keep_mask(dropout, *x_TK.shape, x_TK.device)
    return x_TK.mul(dropout.scale).mul_(keep)


def _random_16_bits(dropout: Dropout, rows: int, columns: int, device: torch.device) -> Tensor:
    groups = -(-columns // 8)
    shape = (rows, groups)
    # int64 holds a 32-bit word; products of two words wrap around, of which only bits are used.
    c0 = torch.arange(rows, device=device).unsqueeze(1).expand(shape).contiguous()
    c1 = torch.arange(groups, device=device).expand(shape).contiguous()
    c2 = torch.full(shape, dropout.stream, device=device, dtype=torch.int64)
    c3 = torch.zeros(shape, device=device, dtype=torch.int64)
    key = [dropout.seed & WORD, dropout.seed >> 32 & WORD]
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(key[0]), low1
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(key[1]), low0
        key = [(word + step) & WORD for word, step in zip(key, KEY_STEPS, strict=True)]
    words = torch.stack((c0, c1, c2, c3), dim=-1).to(torch.int32)
    # Little-endian: the low half of each word comes first.
    halves = words.view(torch.uint16).reshape(rows, groups * 8)
    return halves[:, :columns].to(torch.int32)


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of 32-bit words."""
    product = words * factor
    return (product >> 32).bitwise_and_(WORD), product.bitwise_and_(WORD)
