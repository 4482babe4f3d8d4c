"""Records by address, every read verified.

In: an address (shard, slot) and the index. Out: the Record, or a DamagedRecord with shard, key,
offset and cause. A record takes a few `pread`s; its crc32 and tar headers are checked, its media
are not decoded. `iter_records` yields a whole folder, `iter_plain` any WebDataset tars without an
index. Flow: index -> here -> video, stream.
"""

import contextlib
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from data_shards.shards.cache import ShardCache
from data_shards.shards.checksum import crc32
from data_shards.shards.index import MAX_JSON_BYTES, MAX_RECORD_BYTES, ShardIndex
from data_shards.shards.record import Record, from_members

_BLOCK: Final = tarfile.BLOCKSIZE
_HEAD_BYTES: Final = 16 * _BLOCK  # enough for the json of nearly all records
_FILE_TYPES: Final = (tarfile.REGTYPE, tarfile.AREGTYPE)
_EXTENSION: Final = re.compile(r"json|mp4|f[0-9]{1,4}\.jpg|peak\.jpg")
_HARMLESS: Final = (b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname")
_OCTAL: Final = re.compile(rb"[0-7]+")
_CAUSE_CHARS: Final = 500  # a cause may quote damaged content of any length


class DamagedRecord(ValueError):
    """A record whose bytes are not what the builder wrote."""

    def __init__(self, *, shard: str, key: str, offset: int, cause: str) -> None:
        if len(cause) > _CAUSE_CHARS:
            cause = f"{cause[:_CAUSE_CHARS]} ..."
        super().__init__(f"record {key} in {shard} at byte {offset}: {cause}")
        self.shard = shard  # file name of the tar
        self.key = key
        self.offset = offset  # of the record in the tar
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its fields, for data workers; the default would pickle the message only."""
        return _damaged_record, (self.shard, self.key, self.offset, self.cause)


def _damaged_record(shard: str, key: str, offset: int, cause: str) -> DamagedRecord:
    return DamagedRecord(shard=shard, key=key, offset=offset, cause=cause)


class ShardReader:
    """Random access to the records of a shard folder.

    Keeps at most `max_open` tars open. Safe to fork (reads never move a file position) and to
    pickle (without its open files); not thread-safe.
    """

    def __init__(self, folder: Path | str, index: ShardIndex, *, max_open: int = 64) -> None:
        if max_open < 1:
            raise ValueError(f"max_open must be at least 1, found {max_open}")
        self.folder = Path(folder)
        self.index = index
        self._max_open = max_open
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, slot: int) -> Record:
        """The record at an address.

        Raises:
            DamagedRecord: cut short, wrong checksum, or not the members of one record.
            FileNotFoundError: the tar of the shard is gone.
        """
        members = self.members(shard, slot)
        key = self.index.key(shard, slot)
        try:
            return from_members(key, members)
        except ValueError as error:
            cause = str(error).removeprefix(f"record {key}: ")
            raise self.damaged(shard, slot, cause) from error

    def members(self, shard: int, slot: int) -> dict[str, bytes]:
        """The members of a record, extension -> content, verified but not parsed.

        Raises:
            DamagedRecord, FileNotFoundError: like `read`.
        """
        entry = self.index.entries(shard)[slot]
        key = self.index.key(shard, slot)
        offset, size = int(entry["offset"]), int(entry["size"])
        try:
            if size > MAX_RECORD_BYTES:
                raise ValueError(f"a record may have {MAX_RECORD_BYTES} bytes, this one has {size}")
            clip = self._clip(shard, key, offset, size, int(entry["crc32"]))
            if clip is not None:
                return clip
            blocks = self.blocks(shard, offset, size)
            checksum = crc32(blocks)
            if checksum != entry["crc32"] and self.index.places is not None:
                # A cached copy may be damaged while the original is not: fetch it again, once.
                self.index.places.drop(self.index.shards[shard].name)
                blocks = self.blocks(shard, offset, size)
                checksum = crc32(blocks)
            if checksum != entry["crc32"]:
                raise ValueError(f"checksum must be {entry['crc32']:08x}, found {checksum:08x}")
            return untar(key, blocks)
        except ValueError as error:
            raise self.damaged(shard, slot, str(error)) from error
        except OSError as error:  # the storage fails; the record itself is not damaged
            error.add_note(f"while reading record {key} in shard {shard} at byte {offset}")
            raise

    def _clip(
        self, shard: int, key: str, offset: int, size: int, expected: int
    ) -> dict[str, bytes] | None:
        """The verified members of a record that is a json and a video, as most records are.

        None for any other or damaged record, which the caller then reads as a whole. The video is
        read into its own buffer: slicing it from the record would copy it into newly allocated
        memory, which takes longer than reading it.
        """
        if isinstance(self.index.places, ShardCache):
            return None
        descriptor = self._descriptor(shard)
        head = os.pread(descriptor, min(_HEAD_BYTES, size), offset)
        try:
            text = read_header(head[:_BLOCK])
            begin = _BLOCK + _padded(text.size)
            video = read_header(head[begin : begin + _BLOCK])
            begin += _BLOCK
            if (
                (text.name, video.name) != (f"{key}.json", f"{key}.mp4")
                or not {text.type, video.type} <= set(_FILE_TYPES)
                or min(text.size, video.size) < 0
                or begin + _padded(video.size) != size
            ):
                return None
            mp4 = _read_exactly(descriptor, video.size, offset + begin)
            end = begin + video.size
            padding = _read_exactly(descriptor, size - end, offset + end)
        except ValueError:
            return None
        if crc32(padding, crc32(mp4, crc32(head[:begin]))) != expected:
            return None
        return {"json": head[_BLOCK : _BLOCK + text.size], "mp4": mp4}

    def records(
        self, shards: Iterable[int] | None = None
    ) -> Iterator[tuple[int, int, Record | DamagedRecord]]:
        """(shard, slot, record) of all records in index order; a damaged one as its error.

        Args:
            shards: only these shards, in this order.

        Raises:
            FileNotFoundError: the tar of a shard is gone.
        """
        for shard in range(self.index.num_shards) if shards is None else shards:
            for slot in range(self.index.shards[shard].records):
                result: Record | DamagedRecord
                try:
                    result = self.read(shard, slot)
                except DamagedRecord as error:
                    result = error
                yield shard, slot, result

    def blocks(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a tar from `offset` on, not verified.

        Raises:
            ValueError: the tar is cut short.
            FileNotFoundError: the tar is gone.
        """
        cache, info = self.index.places, self.index.shards[shard]
        if not isinstance(cache, ShardCache):
            return _read_exactly(self._descriptor(shard), size, offset)
        with cache.open(info.name, info.bytes) as file:
            return _read_exactly(file.fileno(), size, offset)

    def expect(self, shards: Iterable[int]) -> None:
        """These shards will be read soon, in this order: prefetch those that are remote."""
        if self.index.places is not None:
            infos = [self.index.shards[shard] for shard in shards]
            self.index.places.prefetch((info.name, info.bytes) for info in infos)

    def damaged(self, shard: int, slot: int, cause: str) -> DamagedRecord:
        """The error for a record that is damaged, found on reading or on decoding it."""
        return DamagedRecord(
            shard=self.index.shards[shard].name,
            key=self.index.key(shard, slot),
            offset=int(self.index.entries(shard)[slot]["offset"]),
            cause=cause,
        )

    def close(self) -> None:
        """Close all open tars; later reads open them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            info = self.index.shards[shard]
            places = self.index.places
            path = self.folder / info.name if places is None else places.path(info.name, info.bytes)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{path}: the shard existed when the index was loaded and is gone; put it "
                    "back or copy the shard folder again"
                ) from error
            if len(self._descriptors) >= self._max_open:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = descriptor
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}


def iter_records(index: ShardIndex) -> Iterator[Record]:
    """All records of a shard folder in index order, with one tar open at a time.

    Raises:
        DamagedRecord: at the first damaged record; `ShardReader.records` goes on behind it.
    """
    reader = ShardReader(index.folder, index, max_open=1)
    try:
        for _, _, record in reader.records():
            if isinstance(record, DamagedRecord):
                raise record
            yield record
    finally:
        reader.close()


def _read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    blocks = os.pread(descriptor, size, offset)
    # One call returns at most 2 GiB, or less on some network file systems.
    while len(blocks) < size:
        more = os.pread(descriptor, size - len(blocks), offset + len(blocks))
        if not more:
            raise ValueError(f"the tar is cut short: must have {size} bytes, found {len(blocks)}")
        blocks += more
    return blocks


def _padded(size: int) -> int:
    """Bytes that a member's content occupies in a tar."""
    return size + -size % _BLOCK


def untar(key: str, blocks: bytes) -> dict[str, bytes]:
    """Members of one record's tar blocks: extension -> content.

    Raises:
        ValueError: broken headers, anything but regular files `{key}.{extension}` of a record, or
            a member that comes twice.
    """
    members: dict[str, bytes] = {}
    at = 0
    while at < len(blocks):
        try:
            info = read_header(blocks[at : at + _BLOCK])
        except ValueError as error:
            raise ValueError(f"at byte {at} of the record: {error}") from error
        at += _BLOCK
        if info.type == tarfile.XHDTYPE and 0 <= info.size <= len(blocks) - at:
            _require_harmless(blocks[at : at + info.size])
            at += _padded(info.size)
            continue
        if info.type not in _FILE_TYPES:
            raise ValueError(
                f"member {info.name!r} must be a regular file, found tar type {info.type!r}"
            )
        extension = info.name.removeprefix(f"{key}.")
        if extension == info.name or not _EXTENSION.fullmatch(extension):
            raise ValueError(f"member {info.name!r} does not belong to a record with this key")
        if extension in members:
            raise ValueError(f"member {info.name!r} comes twice")
        if not 0 <= info.size <= len(blocks) - at:
            raise ValueError(
                f"member {info.name!r} claims {info.size} bytes, {len(blocks) - at} are left"
            )
        if extension == "json" and info.size > MAX_JSON_BYTES:
            raise ValueError(
                f"member {info.name!r} may have {MAX_JSON_BYTES} bytes, found {info.size}"
            )
        members[extension] = blocks[at : at + info.size]
        at += _padded(info.size)
    return members


class Header(NamedTuple):
    """The fields of a tar header that a reader uses."""

    name: str
    size: int  # bytes of the content
    type: bytes


def read_header(block: bytes) -> Header:
    """Parse one tar header. Raises ValueError if it is not one."""
    # The plain form, which nearly all have, in a quarter of tarfile's time; tarfile parses others.
    size, stated = block[124:135], block[148:156].rstrip(b" \0")
    if (
        len(block) == _BLOCK
        and block[257:263] == b"ustar\0"
        and not block[345]  # no prefix of the name
        and _OCTAL.fullmatch(size)
        and block[135] in b" \0"
        and _OCTAL.fullmatch(stated)
        and sum(block) - sum(block[148:156]) + 8 * 32 == int(stated, 8)
    ):
        with contextlib.suppress(UnicodeDecodeError):
            name = block[:100].partition(b"\0")[0].decode("utf-8")
            return Header(name, int(size, 8), block[156:157])
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ValueError(f"no tar header: {error}") from error
    return Header(info.name, info.size, info.type)


def _require_harmless(extended: bytes) -> None:
    """Refuse extended headers (pax) that give a member another name, size or target; times and
    owners, which webdataset's writer adds, are accepted."""
    while extended:
        length, _, rest = extended.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 10 else 0
        keyword = rest.partition(b"=")[0]
        if not len(length) < size <= len(extended) or keyword not in _HARMLESS:
            raise ValueError(f"an extended header may not set {keyword[:40]!r}")
        extended = extended[size:]


def iter_plain(source: Path | str | Iterable[Path | str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of every sample of some tars or of all in a folder, as webdataset reads them.

    For tars without an index. webdataset verifies nothing: damage may pass, or end the iteration.

    Raises:
        FileNotFoundError: no tar there.
    """
    # Imported here because it takes seconds, and reading by index does not use it.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    if isinstance(source, (str, Path)):
        folder = Path(source)
        tars = sorted(folder.glob("*.tar")) if folder.is_dir() else [folder]
    else:
        tars = [Path(tar) for tar in source]
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if missing or not tars:
        raise FileNotFoundError(f"no tar to read: {', '.join(missing) or source}")
    for tar in tars:
        with tar.open("rb") as stream:  # webdataset's own opener leaves files open
            for sample in group_by_keys(tar_file_expander([{"url": str(tar), "stream": stream}])):
                members = {k: v for k, v in sample.items() if not k.startswith("__")}
                yield sample["__key__"], members
