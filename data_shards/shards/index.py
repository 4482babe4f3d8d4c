"""The index of a shard folder: load, verify, select; numpy only.

A folder holds `NAME.tar`, `NAME.idx` (one fixed-size entry per record) and `NAME.keys` (one key per
line) per shard, and one `index.json`. In: the folder. Out: the byte range, tasks and length
estimates of each record, without opening a tar. A record's address is (shard, slot): the index of
its shard in the folder, and its own index in the shard. Flow: build -> here -> plan, sampler,
reader.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_shards.shards.record import SCHEMA_VERSION, validate_key
from data_shards.tasks import TASKS

INDEX_FILE: Final = "index.json"

# 21 bytes per record. [offset, offset + size) are all tar blocks of the record, crc32 covers them.
# `frames` and `text_chars` are length estimates; larger values are stored as LENGTH_MAX.
ENTRY_DTYPE: Final = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc32", "<u4"),
        ("tasks", "u1"),
        ("frames", "<u2"),
        ("text_chars", "<u2"),
    ]
)
LENGTH_MAX: Final = 2**16 - 1
# Upper limits of what a reader loads into memory; the builder refuses more.
MAX_RECORD_BYTES: Final = 2**28
MAX_JSON_BYTES: Final = 2**20

T = TypeVar("T", bound=Sized)

_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_-]+\.tar")
_ALL_TASKS: Final = 2 ** len(TASKS) - 1
# Records whose side files are kept in memory; a plan reads a few blocks of shards at a time.
_CACHED_RECORDS: Final = 2**21


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """The entry of one shard in index.json."""

    name: str  # file name of the tar
    bytes: int  # size of the tar
    records: int
    classes: Mapping[int, int]  # task mask -> number of records that serve exactly these tasks
    idx_sha256: str
    keys_sha256: str

    def to_json(self) -> dict[str, Any]:
        classes = {str(mask): self.classes[mask] for mask in sorted(self.classes)}
        return {
            "name": self.name,
            "bytes": self.bytes,
            "records": self.records,
            "classes": classes,
            "idx_sha256": self.idx_sha256,
            "keys_sha256": self.keys_sha256,
        }

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """The inverse of `to_json`. Raises ValueError with the field, the rule and the value."""
        fields = ("name", "bytes", "records", "classes", "idx_sha256", "keys_sha256")
        if not isinstance(document, dict) or set(document) != set(fields):
            raise ValueError(f"a shard must have the fields {', '.join(fields)}, found {document}")
        for field in ("bytes", "records"):
            if not _is_count(document[field]) or document[field] == 0:
                raise ValueError(f"{field} must be a whole number above 0, found {document[field]}")
        if not isinstance(document["name"], str) or not _SHARD_NAME.fullmatch(document["name"]):
            raise ValueError(f"name must be a plain file name *.tar, found {document['name']!r}")
        for field in ("idx_sha256", "keys_sha256"):
            if not isinstance(document[field], str) or len(document[field]) != 64:
                raise ValueError(f"{field} must be 64 hexadecimal digits, found {document[field]}")
        classes = _classes_from_json(document["classes"])
        if sum(classes.values()) != document["records"]:
            raise ValueError(
                f"classes must sum to records, found {sum(classes.values())} and "
                f"{document['records']}"
            )
        return cls(**{**document, "classes": classes})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _classes_from_json(document: Any) -> dict[int, int]:
    if not isinstance(document, dict):
        raise ValueError(f"classes must map task masks to counts, found {document!r}")
    classes = {}
    for mask, count in document.items():
        if not mask.isdecimal() or not 1 <= int(mask) <= _ALL_TASKS or not _is_count(count):
            raise ValueError(
                f"classes must map masks 1..{_ALL_TASKS} to counts, found {mask!r}: {count!r}"
            )
        classes[int(mask)] = count
    return classes


class Places(Protocol):
    """Access to the files of a dataset that are not in the folder of index.json."""

    def path(self, name: str, size: int | None) -> Path:
        """A file by its name in index.json; `size` is its exact size, None if it is not known."""

    def read(self, name: str, size: int | None) -> bytes:
        """The content of a file, even if a concurrent process may remove it."""

    def drop(self, name: str) -> None:
        """The content of a file is wrong: forget a local copy, so that it is fetched again."""

    def prefetch(self, files: Iterable[tuple[str, int | None]]) -> None:
        """These files (name, size) will be read soon, in this order."""


class ShardIndex:
    """A loaded index. `load` checks the folder; a shard's sidecar files are read on first use."""

    def __init__(
        self,
        folder: Path,
        shards: tuple[ShardInfo, ...],
        options: Mapping[str, Any],
        provenance: Mapping[str, Any],
        *,
        places: Places | None = None,
        source: str = "",
    ) -> None:
        self.folder = folder
        self.places = places  # None: all files are in the folder
        self.source = source or str(folder)  # as the user wrote it, for messages
        self.shards = shards
        self.options = options
        self.provenance = provenance
        self.fingerprint = fingerprint_of(shards)
        self._first = (0, *accumulate(shard.records for shard in shards))
        self._entries: OrderedDict[int, NDArray[np.void]] = OrderedDict()
        self._keys: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    @classmethod
    def load(cls, folder: Path | str, *, places: Places | None = None, source: str = "") -> Self:
        """Read and check index.json, and that every file it names is there with its exact size.

        With `places` the other files are elsewhere and are checked when they are fetched.

        Raises:
            FileNotFoundError: the folder or a file is missing.
            ValueError: another schema version, or files that do not match index.json.
        """
        folder = Path(folder)
        path = folder / INDEX_FILE
        if not folder.is_dir():
            raise FileNotFoundError(
                f"shard folder {folder}: no such folder; build it with 'emoverse build' or correct "
                "the path"
            )
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing, so {folder} is not a finished shard folder; build it with "
                "'emoverse build'"
            )
        document = _read_document(path)
        shards = []
        for position, item in enumerate(document["shards"]):
            try:
                shards.append(ShardInfo.from_json(item))
            except ValueError as error:
                raise ValueError(f"{path}: shards[{position}]: {error}; {_REBUILD}") from error
        names = {shard.name for shard in shards}
        if not shards or len(names) < len(shards):
            raise ValueError(
                f"{path}: must list at least one shard and none twice, found {len(shards)} shards "
                f"with {len(names)} names; {_REBUILD}"
            )
        if places is None:
            for shard in shards:
                _require_files(folder, shard)
        return cls(
            folder,
            tuple(shards),
            document["options"],
            document["provenance"],
            places=places,
            source=source,
        )

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    @property
    def num_records(self) -> int:
        return self._first[-1]

    def class_counts(self, shard: int | None = None) -> dict[int, int]:
        """Task mask -> number of records with exactly this mask, of one shard or of all."""
        shards = self.shards if shard is None else (self.shards[shard],)
        counts: dict[int, int] = {}
        for info in shards:
            for mask, count in info.classes.items():
                counts[mask] = counts.get(mask, 0) + count
        return {mask: counts[mask] for mask in sorted(counts) if counts[mask]}

    def entries(self, shard: int) -> NDArray[np.void]:
        """The shard's entries [records] of ENTRY_DTYPE, read-only.

        Raises:
            ValueError: the file is not the one that index.json describes.
        """
        if shard not in self._entries:
            _keep(self._entries, shard, self._load_entries(shard))
        self._entries.move_to_end(shard)
        return self._entries[shard]

    def keys(self, shard: int) -> tuple[str, ...]:
        """The keys of a shard's records in slot order. Raises ValueError like `entries`."""
        if shard not in self._keys:
            _keep(self._keys, shard, self._load_keys(shard))
        self._keys.move_to_end(shard)
        return self._keys[shard]

    def key(self, shard: int, slot: int) -> str:
        return self.keys(shard)[slot]

    def slots(self, shard: int, mask: int) -> NDArray[np.int64]:
        """Slots of the shard's records that serve exactly the tasks of `mask`, ascending."""
        return np.flatnonzero(self.entries(shard)["tasks"] == mask)

    def ordinal(self, shard: int, slot: int) -> int:
        """Index of a record in the whole dataset, from 0."""
        return self._first[shard] + slot

    def address(self, ordinal: int) -> tuple[int, int]:
        """(shard, slot) of a record by its index in the dataset: the inverse of `ordinal`."""
        if not 0 <= ordinal < self.num_records:
            raise ValueError(f"record number must be 0..{self.num_records - 1}, found {ordinal}")
        shard = bisect_right(self._first, ordinal) - 1
        return shard, ordinal - self._first[shard]

    def _side_file(self, name: str, size: int | None, sha256: str) -> bytes | None:
        """Content of a side file; None if its checksum differs from index.json."""
        for _ in range(1 if self.places is None else 2):
            # Read, not mapped: truncating a mapped file kills the process without a message.
            if self.places is None:
                content = (self.folder / name).read_bytes()
            else:
                content = self.places.read(name, size)
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
            if self.places is not None:  # a cached copy may be damaged while the original is not
                self.places.drop(name)
        return None

    def _load_entries(self, shard: int) -> NDArray[np.void]:
        info = self.shards[shard]
        name, size = sidecar(Path(info.name), ".idx").name, info.records * ENTRY_DTYPE.itemsize
        path = f"{self.source}/{name}"
        content = self._side_file(name, size, info.idx_sha256)
        if content is None:
            raise ValueError(_changed(path, "idx_sha256"))
        if len(content) != size:
            raise ValueError(_changed(path, "records"))
        entries: NDArray[np.void] = np.frombuffer(content, dtype=ENTRY_DTYPE)
        masks, counts = np.unique(entries["tasks"], return_counts=True)
        classes = dict(zip(masks.tolist(), counts.tolist(), strict=True))
        ends = entries["offset"] + entries["size"]  # wraps around only if offset > ends
        ordered = bool(
            np.all(entries["offset"] < ends) and np.all(entries["offset"][1:] >= ends[:-1])
        )
        ordered = ordered and int(ends[-1]) <= info.bytes
        stated = {mask: count for mask, count in info.classes.items() if count}
        if classes != stated or not ordered:
            raise ValueError(_changed(path, "classes and bytes"))
        return entries

    def _load_keys(self, shard: int) -> tuple[str, ...]:
        info = self.shards[shard]
        name = sidecar(Path(info.name), ".keys").name
        content = self._side_file(name, None, info.keys_sha256)
        keys = () if content is None else tuple(content.decode("ascii", "replace").splitlines())
        if len(keys) != info.records:
            raise ValueError(_changed(f"{self.source}/{name}", "keys_sha256 and records"))
        for key in keys:
            validate_key(key)
        return keys

    def __getstate__(self) -> dict[str, Any]:
        """Pickled without its caches: a data worker reads the entries of its own shards."""
        return {**self.__dict__, "_entries": OrderedDict(), "_keys": OrderedDict()}


_REBUILD: Final = "build the folder again with 'emoverse build'"


def sidecar(tar: Path, suffix: str) -> Path:
    """Path of the side file of a tar: `.idx` (entries) or `.keys`."""
    return tar.with_suffix(suffix)


def fingerprint_of(shards: tuple[ShardInfo, ...]) -> str:
    """sha256 over every shard's name, size, entries (checksums, tasks, lengths) and keys."""
    digest = hashlib.sha256()
    for shard in shards:
        line = f"{shard.name} {shard.bytes} {shard.idx_sha256} {shard.keys_sha256}\n"
        digest.update(line.encode("ascii"))
    return digest.hexdigest()


def write_index(
    folder: Path,
    shards: tuple[ShardInfo, ...],
    *,
    options: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write index.json: equal arguments give equal bytes."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "options": dict(options),
        "provenance": dict(provenance),
        "shards": [shard.to_json() for shard in shards],
    }
    text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
    (folder / INDEX_FILE).write_text(text, encoding="ascii")


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON, found: {error}; {_REBUILD}") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version: this program reads version {SCHEMA_VERSION}, found "
            f"{version!r}; {_REBUILD}"
        )
    assert isinstance(document, dict)
    for field, kind in (("shards", list), ("options", dict), ("provenance", dict)):
        if not isinstance(document.get(field), kind):
            raise ValueError(
                f"{path}: {field}: must be a {kind.__name__}, found {document.get(field)!r}; "
                f"{_REBUILD}"
            )
    return document


def _require_files(folder: Path, shard: ShardInfo) -> None:
    tar = folder / shard.name
    sizes = {tar: shard.bytes, sidecar(tar, ".idx"): shard.records * ENTRY_DTYPE.itemsize}
    for path in (*sizes, sidecar(tar, ".keys")):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing, but {INDEX_FILE} lists shard {shard.name}; copy the shard "
                "folder again or build it again"
            )
    for path, size in sizes.items():
        actual = path.stat().st_size
        if actual != size:
            raise ValueError(
                f"{path}: must have {size} bytes according to {INDEX_FILE}, found {actual}: the "
                "file is cut short or belongs to another build; copy the shard folder again or "
                "build it again"
            )


def _changed(path: str, field: str) -> str:
    return (
        f"{path}: does not fit {field} in {INDEX_FILE}: the file was changed or damaged; copy the "
        "shard folder again or build it again"
    )


def _keep(cache: OrderedDict[int, T], shard: int, value: T) -> None:
    cache[shard] = value
    while len(cache) > 1 and sum(len(cached) for cached in cache.values()) > _CACHED_RECORDS:
        cache.popitem(last=False)
