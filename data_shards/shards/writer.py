"""One shard: a record as tar blocks, and the tar with its side files, durable when finished.

In: records in their stored form, one after the other. Out: `NAME.tar`, `NAME.idx`, `NAME.keys`, and
the ShardInfo for index.json. Equal records give equal bytes.
Flow: build -> here -> index.
"""

import hashlib
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from data_shards.files import flush_to_disk
from data_shards.shards.checksum import crc32
from data_shards.shards.index import (
    ENTRY_DTYPE,
    LENGTH_MAX,
    MAX_JSON_BYTES,
    MAX_RECORD_BYTES,
    ShardInfo,
    sidecar,
)
from data_shards.shards.record import Record, to_members

_BLOCK: Final = tarfile.BLOCKSIZE
_NAME_MAX: Final = 100  # longer names would need tar extensions that not every reader knows


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A record as tar blocks, with the values of its index entry."""

    key: str
    mask: int
    num_frames: int
    text_chars: int
    blocks: bytes  # headers and padded contents of all members


def pack_record(record: Record) -> Packed:
    """The tar blocks of a record.

    Raises:
        ValueError: the key is too long for a tar, or the record too large.
    """
    pieces = []
    for extension, content in to_members(record).items():
        info = tarfile.TarInfo(f"{record.key}.{extension}")
        if len(info.name) > _NAME_MAX:
            raise ValueError(
                f"record {record.key}: key and extension may have {_NAME_MAX} characters in a tar, "
                f"found {len(info.name)}; shorten the key"
            )
        if extension == "json" and len(content) > MAX_JSON_BYTES:
            raise ValueError(
                f"record {record.key}: its texts may have {MAX_JSON_BYTES} bytes, found "
                f"{len(content)}; shorten the conversation"
            )
        info.size = len(content)  # mtime, uid and gid are 0, the mode is 0644
        pieces += [info.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % _BLOCK)]
    blocks = b"".join(pieces)
    if len(blocks) > MAX_RECORD_BYTES:
        raise ValueError(
            f"record {record.key}: may have {MAX_RECORD_BYTES} bytes, found {len(blocks)}; cut the "
            "clip"
        )
    return Packed(
        key=record.key,
        mask=record.mask,
        num_frames=record.num_frames,
        text_chars=text_chars(record),
        blocks=blocks,
    )


def text_chars(record: Record) -> int:
    """Length of a record's text in characters, for the index."""
    return len(record.utterance) + sum(
        len(turn.speaker) + len(turn.text) for turn in record.conversation
    )


class ShardWriter:
    """Writes one tar from start to end, then its side files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._entries: list[tuple[int, ...]] = []
        self._keys: list[str] = []

    def is_full(self, num_bytes: int, max_records: int, max_bytes: int) -> bool:
        """Whether `num_bytes` more would exceed a limit."""
        return len(self._keys) >= max_records or self._file.tell() + num_bytes > max_bytes

    def add(self, packed: Packed) -> None:
        """Append a record."""
        self._entries.append(
            (
                self._file.tell(),
                len(packed.blocks),
                crc32(packed.blocks),
                packed.mask,
                min(packed.num_frames, LENGTH_MAX),
                min(packed.text_chars, LENGTH_MAX),
            )
        )
        self._keys.append(packed.key)
        self._file.write(packed.blocks)

    def finish(self) -> ShardInfo:
        """End the tar and write `.idx` and `.keys`; all three are flushed to disk on return."""
        # Two empty blocks end a tar; the size is a multiple of 20 blocks, as from the tar command.
        end = self._file.tell() + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE))
        num_bytes = self._file.tell()
        self.close()
        entries = np.array(self._entries, dtype=ENTRY_DTYPE)
        idx = entries.tobytes()
        keys = "".join(f"{key}\n" for key in self._keys).encode("ascii")
        sidecar(self._path, ".idx").write_bytes(idx)
        sidecar(self._path, ".keys").write_bytes(keys)
        for path in (*shard_files(self._path), self._path.parent):
            flush_to_disk(path)
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


def shard_files(tar: Path) -> tuple[Path, Path, Path]:
    """The three files of a shard."""
    return tar, sidecar(tar, ".idx"), sidecar(tar, ".keys")
