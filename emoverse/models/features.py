"""A cache of the frozen vision tower's features, worthwhile for small bases.

In:  the frames of a record's views, each sent through the tower alone, so that a stored value does
     not depend on the rest of a batch.
Out: the same features for every later epoch, stage and process, from one memory-mapped file.
File: header, one flag per (record, view), then fixed slots; sparse, so unused slots cost nothing.
A flag is the slot's checksum, written after the data: a torn write is never read.
Legend: F frames, H and W pixels, P visual tokens of a frame, C feature channels.
"""

import hashlib
import json
import os
import shutil
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_shards.media.pixels import blank_pixels
from data_shards.shards.index import ShardIndex
from emoverse.models.emoverse import EmoVerse, to_tensor

VIEWS = ("clip", "peak")
ALIGNMENT = 4096
FORMAT = 1
WRITTEN = 0x80000000  # set in every flag, so that no checksum looks like "absent"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheKey:
    """Everything that a stored value depends on, and the file's size with it."""

    vision: str  # vision_fingerprint of the base
    shards: str  # fingerprint of the shard index
    num_records: int
    frames_per_clip: int
    image_size: int
    tokens: int  # visual tokens per frame
    channels: int
    dtype: str  # float32 or bfloat16: the tower's own, so nothing is rounded

    @property
    def frame_bytes(self) -> int:
        return self.tokens * self.channels * DTYPES[self.dtype].itemsize

    @property
    def slots_start(self) -> int:
        """Bytes before the first slot: header and flags, each padded to pages."""
        flags = 4 * len(VIEWS) * self.num_records
        return ALIGNMENT + -(-flags // ALIGNMENT) * ALIGNMENT

    @property
    def file_bytes(self) -> int:
        return self.slots_start + self.num_records * (self.frames_per_clip + 1) * self.frame_bytes

    def frames(self, view: str) -> int:
        return self.frames_per_clip if view == "clip" else 1

    def slot_start(self, ordinal: int, view: str) -> int:
        """First byte of a slot. A record's slots are adjacent: its clip, then its peak frame."""
        before = ordinal * (self.frames_per_clip + 1)
        before += 0 if view == "clip" else self.frames_per_clip
        return self.slots_start + before * self.frame_bytes

    def flag_index(self, ordinal: int, view: str) -> int:
        if not 0 <= ordinal < self.num_records:
            raise IndexError(f"record {ordinal} of a cache for {self.num_records} records")
        return ordinal * len(VIEWS) + VIEWS.index(view)


def cache_key(
    model: EmoVerse, index: ShardIndex, frames_per_clip: int, *, resize: str = "exact"
) -> CacheKey:
    """The key for `model`'s tower on the records of `index`; `resize` as in ViewOptions."""
    architecture = model.architecture
    weight = model.native.model.vision_tower.embeddings.cls_token
    names = {dtype: name for name, dtype in DTYPES.items()}
    return CacheKey(
        vision=vision_fingerprint(model) + ("" if resize == "exact" else f" {resize}"),
        shards=index.fingerprint,
        num_records=index.num_records,
        frames_per_clip=frames_per_clip,
        image_size=architecture.vision.image_size,
        tokens=architecture.visual_tokens_per_frame,
        channels=architecture.feature_channels,
        dtype=names[weight.dtype],
    )


def vision_fingerprint(model: EmoVerse) -> str:
    """sha256 over the vision tower's weights and the torch that runs it."""
    digest = hashlib.sha256(torch.__version__.encode())
    for name, value in sorted(model.native.model.vision_tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureCache:
    """One open cache file. Safe to share between processes: equal keys hold equal values.

    Raises (from the constructor):
        ValueError: the disk has no room, or the file belongs to another key.
    """

    def __init__(self, folder: str | Path, key: CacheKey) -> None:
        self.key = key
        self._folder = Path(folder)
        name = hashlib.sha256(_header(key)).hexdigest()[:16]
        self.path = self._folder / f"features-{name}.bin"
        if not self.path.exists():
            self._create()
        with open(self.path, "rb") as file:
            header = file.read(ALIGNMENT)
        if header.rstrip(b"\0") != _header(key) or self.path.stat().st_size != key.file_bytes:
            raise ValueError(
                f"{self.path} does not match its name; delete it, the features will be computed "
                "again"
            )
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        flags = self._bytes[ALIGNMENT : ALIGNMENT + 4 * len(VIEWS) * key.num_records]
        self._flags = flags.view(np.uint32)
        self._checked = np.zeros(len(self._flags), dtype=bool)

    def __reduce__(self) -> tuple[Any, ...]:
        """A spawned worker opens the file again; by default pickle would copy the mapping."""
        return FeatureCache, (self._folder, self.key)

    def has(self, ordinal: int, view: str) -> bool:
        """Is this view stored and whole? Checked against its checksum once per process."""
        index = self.key.flag_index(ordinal, view)
        flag = int(self._flags[index])
        if flag and not self._checked[index]:
            self._checked[index] = flag == _checksum(self._slot(ordinal, view))
        return bool(flag and self._checked[index])

    def get(self, ordinal: int, view: str) -> NDArray[np.float32]:
        """Features F, P, C as float32 (exact, also when bfloat16 is stored).

        Raises:
            KeyError: not stored; ask has() first.
        """
        if not self.has(ordinal, view):
            raise KeyError(f"{self.path} has no features of record {ordinal}, view {view}")
        stored = torch.from_numpy(self._slot(ordinal, view).copy()).view(DTYPES[self.key.dtype])
        shape = (self.key.frames(view), self.key.tokens, self.key.channels)
        values: NDArray[np.float32] = stored.view(shape).float().numpy()
        return values

    def put(self, ordinal: int, view: str, features_FPC: Tensor) -> None:
        """Store one view. Several processes may store the same value at the same time.

        Raises:
            ValueError: another shape or dtype than the key's.
            OSError: the disk is full (plain writes report it; a mapping would kill the process).
        """
        shape = (self.key.frames(view), self.key.tokens, self.key.channels)
        dtype = DTYPES[self.key.dtype]
        if tuple(features_FPC.shape) != shape or features_FPC.dtype != dtype:
            raise ValueError(
                f"features of view {view} must be {dtype} of shape {shape}, found "
                f"{features_FPC.dtype} of shape {tuple(features_FPC.shape)}"
            )
        data = features_FPC.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
        _write_all(self._descriptor, data.data, self.key.slot_start(ordinal, view))
        flag = _checksum(data).to_bytes(4, "little")
        offset = ALIGNMENT + 4 * self.key.flag_index(ordinal, view)
        _write_all(self._descriptor, memoryview(flag), offset)

    def _slot(self, ordinal: int, view: str) -> NDArray[np.uint8]:
        start = self.key.slot_start(ordinal, view)
        return self._bytes[start : start + self.key.frames(view) * self.key.frame_bytes]

    def _create(self) -> None:
        """Create the empty file under a temporary name; the first of several processes wins."""
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < self.key.file_bytes:
            raise ValueError(
                f"model.cache_features requires up to {self.key.file_bytes / 2**30:.1f} GiB in "
                f"{self._folder}, which has {free / 2**30:.1f} GiB free; make room or set "
                "model.cache_features: false"
            )
        temporary = self.path.with_suffix(f".tmp{os.getpid()}")
        with open(temporary, "wb") as file:
            file.write(_header(self.key))
            file.truncate(self.key.file_bytes)
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return  # another process was faster; its file is the same
        finally:
            temporary.unlink()


class KeyedFeatures:
    """The cache by record key, as the stream and the encoder use it."""

    def __init__(self, cache: FeatureCache, ordinals: Mapping[str, int]) -> None:
        self.cache = cache
        self.ordinals = ordinals

    def wants_frames(self, key: str, view: str) -> bool:
        """For StepStream: decode only what is not stored."""
        return not self.cache.has(self.ordinals[key], view)

    def __call__(self, key: str, view: str) -> NDArray[np.float32] | None:
        """For EncodeOptions.features."""
        ordinal = self.ordinals[key]
        return self.cache.get(ordinal, view) if self.cache.has(ordinal, view) else None


def record_ordinals(index: ShardIndex) -> dict[str, int]:
    """Record key -> ordinal."""
    return {
        key: index.ordinal(shard, slot)
        for shard in range(index.num_shards)
        for slot, key in enumerate(index.keys(shard))
    }


def compute_features(
    model: EmoVerse, frames_FHWC: NDArray[np.uint8], tower: nn.Module | None = None
) -> Tensor:
    """Features of one view alone, on the CPU, as the cache stores them: F, P, C.

    `tower`: a copy of the vision tower to use instead of the model's own.
    """
    device = model.native.lm_head.weight.device
    return model.vision_features(to_tensor(frames_FHWC).to(device), tower).detach().cpu()


def blank_feature(model: EmoVerse) -> NDArray[np.float32]:
    """Features P, C of one grey frame: all that the text-only baseline ever sees."""
    blank = blank_pixels(1, model.architecture.vision.image_size)
    values: NDArray[np.float32] = compute_features(model, blank)[0].float().numpy()
    return values


def _header(key: CacheKey) -> bytes:
    text = json.dumps({"format": FORMAT, **asdict(key)}, sort_keys=True).encode()
    assert len(text) <= ALIGNMENT
    return text


def _checksum(data: NDArray[np.uint8]) -> int:
    return zlib.crc32(data.data) | WRITTEN


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)
