"""An index for tars that have none, made by one pass over each of them.

In: WebDataset tars of our records, whichever program wrote them; they are not changed. Out: a
folder with the side files and the index.json that `ShardIndex.load` reads. If several processes
scan the same tars at once, one makes the index and the others wait. Memory: one record, and the
entries of one shard. Flow: tars -> here -> index.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from data_shards.shards.checksum import crc32
from data_shards.shards.index import (
    ENTRY_DTYPE,
    INDEX_FILE,
    LENGTH_MAX,
    MAX_RECORD_BYTES,
    ShardIndex,
    ShardInfo,
    sidecar,
    write_index,
)
from data_shards.shards.reader import read_header, untar
from data_shards.shards.record import Frames, Record, from_members
from data_shards.shards.writer import text_chars

_BLOCK: Final = tarfile.BLOCKSIZE


class ScannedFiles:
    """Files of a scanned dataset: side files in one folder, tars in their own."""

    def __init__(self, folder: Path, tars: dict[str, Path]) -> None:
        self._folder = folder
        self._tars = tars

    def path(self, name: str, size: int | None) -> Path:
        return self._tars.get(name, self._folder / name)

    def read(self, name: str, size: int | None) -> bytes:
        return self.path(name, size).read_bytes()

    def drop(self, name: str) -> None:
        """No file is a copy, so none can be fetched again."""

    def prefetch(self, files: Iterable[tuple[str, int | None]]) -> None:
        """All files are local."""


def scan_tars(source: Path, index_root: Path) -> ShardIndex:
    """The index of a folder's tars, or of one tar, made unless it exists.

    Args:
        index_root: folder of indexes, one subfolder per state of the tars (names, sizes, times).

    Raises:
        FileNotFoundError: there is no tar.
        ValueError: a tar is damaged or holds something else; names tar, key and offset.
    """
    tars = sorted(source.glob("*.tar")) if source.is_dir() else [source]
    if not tars:
        raise FileNotFoundError(
            f"{source}: neither {INDEX_FILE} nor a *.tar is there; build the folder with 'emoverse "
            "build' or correct the path"
        )
    digest = hashlib.sha256()
    for tar in tars:
        status = tar.stat()
        digest.update(f"{tar.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    out = index_root / f"scan-{digest.hexdigest()[:16]}"
    index_root.mkdir(parents=True, exist_ok=True)
    with (index_root / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.is_dir():
            work = index_root / f".{out.name}.new"
            shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
            work.mkdir()
            _write_index_of(tars, work)
            os.rename(work, out)
    return ShardIndex.load(out, store=ScannedFiles(out, _names(tars)))


def _names(tars: Sequence[Path]) -> dict[str, Path]:
    """Shard name -> tar; names may only have letters, digits, '_' and '-'."""
    names = {re.sub(r"[^A-Za-z0-9_-]", "_", tar.stem) + ".tar": tar for tar in tars}
    if len(names) < len(tars):
        raise ValueError(
            f"{tars[0].parent}: two tars have the same name but for special characters; rename one"
        )
    return names


def _write_index_of(tars: Sequence[Path], out: Path) -> None:
    shards: list[ShardInfo] = []
    seen: dict[str, str] = {}
    options: dict[str, str | int] = {}
    for name, tar in _names(tars).items():
        entries, keys = [], []
        with tar.open("rb") as stream:
            for record, offset, blocks in _records(stream, tar):
                if record.key in seen:
                    raise ValueError(
                        f"{tar}: record {record.key} at byte {offset}: a key must be unique in the "
                        f"dataset, it is in {seen[record.key]} too; are members of one record "
                        "apart from each other?"
                    )
                seen[record.key] = tar.name
                options = options or _options(record)
                entries.append(
                    (
                        offset,
                        len(blocks),
                        crc32(blocks),
                        record.mask,
                        min(record.num_frames, LENGTH_MAX),
                        min(text_chars(record), LENGTH_MAX),
                    )
                )
                keys.append(record.key)
        if not entries:  # an empty tar is not a shard: it has no record to plan
            continue
        idx = np.array(entries, dtype=ENTRY_DTYPE)
        lines = "".join(f"{key}\n" for key in keys).encode("ascii")
        sidecar(out / name, ".idx").write_bytes(idx.tobytes())
        sidecar(out / name, ".keys").write_bytes(lines)
        shards.append(
            ShardInfo(
                name=name,
                bytes=tar.stat().st_size,
                records=len(entries),
                classes=dict(Counter(idx["tasks"].tolist())),
                idx_sha256=hashlib.sha256(idx.tobytes()).hexdigest(),
                keys_sha256=hashlib.sha256(lines).hexdigest(),
            )
        )
    if not shards:
        raise ValueError(f"{tars[0].parent}: its tars hold no record; build the folder again")
    provenance = {"source": "scan", "tars": str(tars[0].parent)}
    write_index(out, tuple(shards), options=options, provenance=provenance)


def _options(record: Record) -> dict[str, str | int]:
    """The build options that index.json states, as far as a record shows them."""
    if isinstance(record.media, Frames):
        return {"frames": "extracted", "frames_per_clip": len(record.media.jpegs)}
    return {"frames": "video"}


def _records(stream: BinaryIO, tar: Path) -> Iterator[tuple[Record, int, bytes]]:
    """(record, offset, tar blocks) of each record: successive members with equal keys."""
    key, offset, blocks = "", 0, b""
    for name, start, member in _members(stream, tar):
        member_key = name.rpartition("/")[2].partition(".")[0] if name else ""
        if member_key != key and key:
            yield _record(tar, key, offset, blocks), offset, blocks
            blocks = b""
        if not blocks:
            key, offset = member_key, start
        blocks += member
        if len(blocks) > MAX_RECORD_BYTES:
            raise ValueError(
                f"{tar}: record {key} at byte {offset}: a record may have {MAX_RECORD_BYTES} bytes"
            )
    if blocks:
        yield _record(tar, key, offset, blocks), offset, blocks


def _record(tar: Path, key: str, offset: int, blocks: bytes) -> Record:
    try:
        return from_members(key, untar(key, blocks))
    except ValueError as error:
        cause = str(error).removeprefix(f"record {key}: ")
        raise ValueError(f"{tar}: record {key} at byte {offset}: {cause}") from error


def _members(stream: BinaryIO, tar: Path) -> Iterator[tuple[str, int, bytes]]:
    """(name, offset, blocks) of each member with its extended header, up to the end mark."""
    start, size = 0, os.fstat(stream.fileno()).st_size
    while True:
        blocks = b""
        while True:
            header = stream.read(_BLOCK)
            if len(header) < _BLOCK:
                raise ValueError(
                    f"{tar}: ends at byte {start} without the end mark of a tar: it is cut short"
                )
            if not blocks and not any(header):
                _require_end(stream, tar, start)
                return
            try:
                info = read_header(header)
            except ValueError as error:
                raise ValueError(f"{tar}: at byte {start + len(blocks)}: {error}") from error
            padded = info.size + -info.size % _BLOCK
            if not 0 <= padded <= size - stream.tell():
                raise ValueError(
                    f"{tar}: member {info.name!r} at byte {start + len(blocks)} claims {info.size} "
                    f"bytes, {size - stream.tell()} are left: the tar is cut short"
                )
            if padded > MAX_RECORD_BYTES:
                raise ValueError(
                    f"{tar}: member {info.name!r} at byte {start + len(blocks)} has {info.size} "
                    f"bytes, a record may have {MAX_RECORD_BYTES}"
                )
            blocks += header + stream.read(padded)
            if info.type != tarfile.XHDTYPE:
                break
        yield info.name, start, blocks
        start += len(blocks)


def _require_end(stream: BinaryIO, tar: Path, end: int) -> None:
    """Raise ValueError if anything but empty blocks follows the end mark at byte `end`."""
    while chunk := stream.read(2**20):
        if any(chunk):
            more = os.fstat(stream.fileno()).st_size - end
            raise ValueError(
                f"{tar}: {more} bytes follow its end mark at byte {end} and are not empty; are "
                "these several tars in one file? Make a file of each"
            )
