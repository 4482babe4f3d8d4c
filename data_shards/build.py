"""Records to a shard folder: tars that any WebDataset reader can iterate, plus the index.

In: an iterator of records, read once. Out: a finished folder, or nothing: everything is written to
a temporary folder beside it, which gets the final name at the end. Equal records and options give
equal bytes. Memory: one record, one shard's entries, and the keys seen so far.
Flow: sources, annotate -> here -> index, reader.
"""

import hashlib
import os
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from data_shards.index import (
    ENTRY_DTYPE,
    LENGTH_MAX,
    ShardIndex,
    ShardInfo,
    sidecar,
    write_index,
)
from data_shards.pixels import jpeg_encode, resize_frame
from data_shards.record import Frames, Record, Video, to_members
from data_shards.video import clip_indices, count_frames, decode_frames

_BLOCK: Final = tarfile.BLOCKSIZE
_NAME_MAX: Final = 100  # longer names would need tar extensions that not every reader knows
_SIZE_MAX: Final = 2**32 - 1  # field `size` of the index


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How media are stored; index.json records it."""

    frames: Literal["video", "extracted"] = "video"  # mp4, or the sampled frames as JPEG
    frames_per_clip: int = 8  # number of frames, if extracted
    frame_size: int = 448  # height and width in pixels, if extracted
    jpeg_quality: int = 90  # 1 to 100, if extracted

    def __post_init__(self) -> None:
        if self.frames not in ("video", "extracted"):
            raise ValueError(f"frames: must be 'video' or 'extracted', found {self.frames!r}")
        if self.frames_per_clip < 1 or self.frame_size < 1 or not 1 <= self.jpeg_quality <= 100:
            raise ValueError(
                "frames_per_clip and frame_size must be at least 1 and jpeg_quality 1 to 100, "
                f"found {self.frames_per_clip}, {self.frame_size} and {self.jpeg_quality}"
            )


def build_shards(
    records: Iterable[Record],
    out_dir: Path | str,
    *,
    options: BuildOptions | None = None,
    provenance: Mapping[str, Any],
    max_records_per_shard: int = 1000,
    max_bytes: int = 2**28,
    progress: Callable[[int], None] | None = None,
) -> ShardIndex:
    """Write a shard folder and load its index.

    Args:
        provenance: where the records come from; JSON values, kept in index.json as they are.
        max_bytes: size at which a tar ends, unless a single record is larger.
        progress: called with the number of records written so far, once per record.

    Raises:
        ValueError: the folder is not empty, no or too large a record, a key that comes twice, or
            a clip that does not decode to the record's `num_frames`.
    """
    out_dir = Path(out_dir)
    options = options or BuildOptions()
    if max_records_per_shard < 1 or max_bytes < 1:
        raise ValueError(
            "max_records_per_shard and max_bytes must be at least 1, found "
            f"{max_records_per_shard} and {max_bytes}"
        )
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(
            f"build: the output folder must be new or empty, found {out_dir}; remove it or name "
            "another one"
        )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work_dir = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        shards = _write_shards(
            records, work_dir, options, max_records_per_shard, max_bytes, progress
        )
        write_index(work_dir, shards, options=asdict(options), provenance=provenance)
        ShardIndex.load(work_dir)
        _make_durable(work_dir)
        work_dir.rename(out_dir)  # replaces an empty folder, refuses any other
    except BaseException:
        shutil.rmtree(work_dir)
        raise
    return ShardIndex.load(out_dir)


def extract_frames(record: Record, count: int, size: int, quality: int) -> Record:
    """The record with its video replaced by JPEGs: `count` clip frames and the peak frame.

    Raises:
        ValueError: no video to extract from, or it is damaged; names the key.
    """
    if not isinstance(record.media, Video):
        raise ValueError(f"record {record.key}: frames can be extracted from a video only")
    wanted = list(clip_indices(record.num_frames, count))
    if record.peak_frame is not None:
        wanted.append(record.peak_frame)
    try:
        frames = decode_frames(record.media.mp4, wanted)
    except ValueError as error:
        raise ValueError(f"record {record.key}: {error}") from error
    jpegs = [jpeg_encode(resize_frame(frame, size), quality) for frame in frames]
    peak = jpegs[count] if record.peak_frame is not None else None
    return replace(record, media=Frames(jpegs=tuple(jpegs[:count]), peak_jpeg=peak))


def _write_shards(
    records: Iterable[Record],
    folder: Path,
    options: BuildOptions,
    max_records: int,
    max_bytes: int,
    progress: Callable[[int], None] | None,
) -> tuple[ShardInfo, ...]:
    seen: set[str] = set()
    shards: list[ShardInfo] = []
    writer: _ShardWriter | None = None
    try:
        for record in records:
            if record.key in seen:
                raise ValueError(
                    f"record {record.key}: a key must be unique in the dataset, found it twice; "
                    "rename one of the records in its source"
                )
            seen.add(record.key)
            blocks = _tar_blocks(_stored_form(record, options))
            if writer is not None and writer.is_full(len(blocks), max_records, max_bytes):
                shards.append(writer.finish())
                writer = None
            if writer is None:
                writer = _ShardWriter(folder / f"shard-{len(shards):06d}.tar")
            writer.add(record, blocks)
            if progress is not None:
                progress(len(seen))
        if writer is None:
            raise ValueError("build: the source gave no record; check its path, split and limits")
        shards.append(writer.finish())
    finally:
        if writer is not None:
            writer.close()
    return tuple(shards)


def _stored_form(record: Record, options: BuildOptions) -> Record:
    if isinstance(record.media, Video):
        try:
            num_frames = count_frames(record.media.mp4)
        except ValueError as error:
            raise ValueError(
                f"record {record.key}: {error}; remove the clip or make it again"
            ) from error
        if num_frames != record.num_frames:
            raise ValueError(
                f"record {record.key}: num_frames must be what the video has, found "
                f"{record.num_frames}, the video has {num_frames}"
            )
    if options.frames == "video":
        return record
    return extract_frames(record, options.frames_per_clip, options.frame_size, options.jpeg_quality)


def _tar_blocks(record: Record) -> bytes:
    """Headers and padded contents of all members of a record, nothing that varies between runs."""
    parts = []
    for extension, content in to_members(record).items():
        info = tarfile.TarInfo(f"{record.key}.{extension}")
        if len(info.name) > _NAME_MAX:
            raise ValueError(
                f"record {record.key}: key and extension may have {_NAME_MAX} characters in a tar, "
                f"found {len(info.name)}; shorten the key"
            )
        info.size = len(content)  # mtime, uid and gid are 0, the mode is 0644
        parts += [info.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % _BLOCK)]
    blocks = b"".join(parts)
    if len(blocks) > _SIZE_MAX:
        raise ValueError(
            f"record {record.key}: may have {_SIZE_MAX} bytes, found {len(blocks)}; cut the clip"
        )
    return blocks


class _ShardWriter:
    """Writes one tar from start to end, then its side files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._entries: list[tuple[int, ...]] = []
        self._keys: list[str] = []

    def is_full(self, num_bytes: int, max_records: int, max_bytes: int) -> bool:
        """Whether `num_bytes` more would pass a limit."""
        return len(self._keys) >= max_records or self._file.tell() + num_bytes > max_bytes

    def add(self, record: Record, blocks: bytes) -> None:
        text_chars = len(record.utterance) + sum(
            len(turn.speaker) + len(turn.text) for turn in record.conversation
        )
        self._entries.append(
            (
                self._file.tell(),
                len(blocks),
                zlib.crc32(blocks),
                record.mask,
                min(record.num_frames, LENGTH_MAX),
                min(text_chars, LENGTH_MAX),
            )
        )
        self._keys.append(record.key)
        self._file.write(blocks)

    def finish(self) -> ShardInfo:
        """End the tar, write `.idx` and `.keys`."""
        # Two empty blocks end a tar; the whole is a multiple of 20 blocks, as tar itself writes.
        end = self._file.tell() + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE))
        num_bytes = self._file.tell()
        self.close()
        entries = np.array(self._entries, dtype=ENTRY_DTYPE)
        idx = entries.tobytes()
        keys = "".join(f"{key}\n" for key in self._keys).encode("ascii")
        sidecar(self._path, ".idx").write_bytes(idx)
        sidecar(self._path, ".keys").write_bytes(keys)
        return ShardInfo(
            name=self._path.name,
            bytes=num_bytes,
            records=len(entries),
            classes=dict(Counter(entries["tasks"].tolist())),
            idx_sha256=hashlib.sha256(idx).hexdigest(),
            keys_sha256=hashlib.sha256(keys).hexdigest(),
        )

    def close(self) -> None:
        self._file.close()


def _make_durable(folder: Path) -> None:
    """Flush every file to disk before the rename publishes it; mkdtemp's private mode ends here."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
