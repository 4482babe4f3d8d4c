"""Entry point to every shard folder: local, remote, or tars without an index.

In: the value of `data.shards`, and a cache for remote files. Out: a ShardIndex, from which
`ShardReader` reads records the same way in all cases. Flow: config -> here -> index, plan, reader.
"""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data_shards.files import write_atomically
from data_shards.shards.cache import CacheTooSmall, ShardCache
from data_shards.shards.fetch import download, is_remote
from data_shards.shards.index import INDEX_FILE, ShardIndex
from data_shards.shards.scan import scan_tars

_GIB: Final = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """A folder on a local disk, shared by a user's processes on the machine, and its size."""

    folder: Path
    max_bytes: int = 64 * _GIB


def default_cache_folder() -> Path:
    """A folder per user below the system's folder for temporary files, because users on the same
    machine cannot write into each other's folders."""
    return Path(tempfile.gettempdir()) / f"emoverse-cache-{os.getuid()}"


def open_index(source: str | Path, cache: CacheOptions | None = None) -> ShardIndex:
    """The index of a shard folder, local or remote, with or without an index.json.

    Args:
        source: a folder, a tar, or an address such as https://host/folder or s3://bucket/folder.
        cache: for remote files and for indexes of scanned tars.

    Raises:
        FileNotFoundError, ValueError: see `ShardIndex.load`.
        CacheTooSmall: the cache cannot hold two of the largest shards.
        OSError: the server cannot be reached.
    """
    cache = cache or CacheOptions(folder=default_cache_folder())
    if is_remote(source):
        return _open_remote(str(source), cache)
    folder = Path(source)
    if folder.is_file() or (folder.is_dir() and not (folder / INDEX_FILE).exists()):
        return scan_tars(folder, cache.folder)
    return ShardIndex.load(folder)


def _open_remote(url: str, cache: CacheOptions) -> ShardIndex:
    """Always fetches index.json, so that a rebuilt dataset is noticed; other files on first use."""
    url = url.rstrip("/")
    cache.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.folder, prefix=".index-") as work:
        path = Path(work) / INDEX_FILE
        download(f"{url}/{INDEX_FILE}", path, None)
        index_bytes = path.read_bytes()
    name = hashlib.sha256(url.encode() + b"\n" + index_bytes).hexdigest()[:16]
    files = ShardCache(url, cache.folder / f"shards-{name}", cache.max_bytes)
    # index.json is stored outside the folder from which the cache removes files.
    folder = cache.folder / f"index-{name}"
    write_atomically(folder / INDEX_FILE, index_bytes)
    index = ShardIndex.load(folder, store=files, source=url)
    largest = max(index.shards, key=lambda shard: shard.bytes)
    if 2 * largest.bytes > cache.max_bytes:
        raise CacheTooSmall(
            f"data.cache_gib: must hold two shards at least, {largest.name} has {largest.bytes} "
            f"bytes, found {cache.max_bytes} bytes; raise it to hold two blocks of shards"
        )
    return index
