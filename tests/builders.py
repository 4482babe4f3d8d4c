"""Builders that tests share: a small clip, a record, a shard folder, the blocks of a tar.

`from tests.builders import make_clip, make_record, make_shards, tar_blocks`.
"""

import functools
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.build.build import build_shards
from data_shards.media.video import encode_mp4
from data_shards.shards.record import Record, Video
from data_shards.tasks import Task

CLIP_FRAMES = 6


@functools.cache
def make_clip(seed: int = 0, frames: int = CLIP_FRAMES, *, size: int = 32, fps: int = 8) -> bytes:
    """An MP4 of square frames of random colors; another seed gives another clip."""
    shape = (frames, size, size, 3)
    return encode_mp4(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), fps=fps)


def make_record(key: str | int = 0, /, **changes: Any) -> Record:
    """A training record of the tasks MSA and ER; `changes` are fields of `Record`.

    Args:
        key: the key itself, or its number: 3 stands for "clip-3".
    """
    fields: dict[str, Any] = {
        "key": key if isinstance(key, str) else f"clip-{key}",
        "source": "test",
        "split": "train",
        "utterance": "Hello.",
        "speaker": "Ann",
        "sentiment": 1.0,
        "emotion": "joy",
        "tasks": (Task.MSA, Task.ER),
        "num_frames": CLIP_FRAMES,
        **changes,
    }
    if "media" not in fields:
        fields["media"] = Video(mp4=make_clip(frames=fields["num_frames"]))
    return Record(**fields)


def make_shards(
    folder: Path, records: int | Iterable[Any] = 6, *, per_shard: int = 1000, **options: Any
) -> Path:
    """Build a shard folder and return it.

    Args:
        records: what `build_shards` accepts, or how many of `make_record(0)`, `make_record(1)`, ...
        per_shard: most records in a shard.
        options: more arguments of `build_shards`.
    """
    if isinstance(records, int):
        records = [make_record(index) for index in range(records)]
    limits = {"provenance": {}, "max_records_per_shard": per_shard}
    build_shards(records, folder, **(limits | options))
    return folder


def tar_blocks(
    *members: tuple[str, bytes] | tuple[str, bytes, bytes], tar_format: int = tarfile.USTAR_FORMAT
) -> bytes:
    """The blocks of tar members (name, content[, type]), without the end mark of a tar."""
    blocks = b""
    for name, content, *kind in members:
        info = tarfile.TarInfo(name)
        info.type = kind[0] if kind else tarfile.REGTYPE
        info.size = len(content)
        if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info.linkname = "/etc/passwd"
        blocks += info.tobuf(tar_format) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
    return blocks
