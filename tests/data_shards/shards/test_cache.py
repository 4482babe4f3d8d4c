"""The cache of a machine: bounded, shared by processes, and no file in it is ever half there."""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.shards.cache import CacheTooSmall, ShardCache
from data_shards.shards.index import ShardIndex
from data_shards.shards.open import CacheOptions, open_index
from data_shards.shards.reader import ShardReader, iter_records

NUM_SHARDS = 8


def options(tmp_path: Path, max_bytes: int = 2**30) -> CacheOptions:
    return CacheOptions(folder=tmp_path / "cache", max_bytes=max_bytes)


def cache_of(index: ShardIndex) -> ShardCache:
    assert isinstance(index.store, ShardCache)
    return index.store


def test_the_room_is_bounded(server: Any, tmp_path: Path) -> None:
    """Room for three shards: at no moment more, for two readers and their prefetch threads."""
    index = open_index(server.url, options(tmp_path))
    room = 3 * index.shards[0].bytes + 4096
    index = open_index(server.url, options(tmp_path / "small", room))
    cache, most, done = cache_of(index), 0, threading.Event()
    for shard in range(NUM_SHARDS):
        index.entries(shard), index.keys(shard)
    server.wait_s = 0.05  # so that transfers overlap

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            with cache._locked(".room"):  # nothing is removed between two looks at sizes
                files = [path for path in cache.folder.iterdir() if path.is_file()]
                most = max(most, sum(size_of(path) for path in files))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    readers = [
        threading.Thread(
            target=list,
            args=(iter_records(open_index(server.url, options(tmp_path / "small", room))),),
        )
        for _ in range(2)
    ]
    cache.prefetch((shard.name, shard.bytes) for shard in index.shards)
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
    done.set()
    watcher.join()
    assert index.shards[0].bytes < most <= room
    with pytest.raises(CacheTooSmall, match=r"data\.cache_gib: must hold two shards at least"):
        open_index(server.url, options(tmp_path, index.shards[0].bytes))


def test_a_file_that_gets_its_name_during_a_count_is_counted(
    server: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two transfers, room for one: the first ends while the second looks at what is there."""
    first, second = (folder / f"shard-00000{n}.tar" for n in (0, 1))
    size = first.stat().st_size
    cache = ShardCache(server.url, tmp_path / "cache", size * 3 // 2)
    server.wait_s, list_all = 0.1, Path.iterdir

    def slow_listing(path: Path) -> Iterator[Path]:
        found, end = list(list_all(path)), time.monotonic() + 0.3
        while time.monotonic() < end and not (cache.folder / first.name).exists():
            time.sleep(0.01)
        return iter(found)

    transfer = threading.Thread(target=cache.path, args=(first.name, size))
    transfer.start()
    while not list(cache.folder.glob(".part-*")):
        time.sleep(0.01)
    monkeypatch.setattr(Path, "iterdir", slow_listing)
    assert cache.path(second.name, second.stat().st_size).is_file()
    transfer.join()
    assert [path.name for path in cache.folder.glob("*.tar")] == [second.name]


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_some(url: str, cache: CacheOptions, first: int) -> None:
    index = open_index(url, cache)
    reader = ShardReader(index.folder, index)
    for number in range(index.num_records):
        reader.read(*index.address((first + number) % index.num_records))


def test_processes_of_a_machine_fetch_each_file_once(server: Any, tmp_path: Path) -> None:
    server.wait_s = 0.01
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_read_some, args=(server.url, options(tmp_path), 5 * child))
        for child in range(4)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    requests = dict(server.requests)
    assert requests.pop("index.json") == 4 and set(requests.values()) == {1}


def test_what_a_killed_process_left_is_cleared(server: Any, folder: Path, tmp_path: Path) -> None:
    server.wait_s = 30.0
    cache = ShardCache(server.url, tmp_path / "cache", 10**6)
    child = multiprocessing.get_context("fork").Process(
        target=cache.path, args=("shard-000000.tar", 10**5)
    )
    child.start()
    while not list(cache.folder.glob(".part-*")):
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    server.wait_s = 0.0
    size = (folder / "shard-000001.tar").stat().st_size
    cache.max_bytes = size + 10  # the left-over would not leave room enough
    assert cache.path("shard-000001.tar", size).is_file()
    assert not list(cache.folder.glob(".part-*"))


def test_a_file_may_be_removed_as_soon_as_it_is_there(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may need its room before this one has opened it."""
    index, path_of, removed = open_index(server.url, options(tmp_path)), ShardCache.path, Counter()

    def remove_once(cache: ShardCache, name: str, size: int | None) -> Path:
        path = path_of(cache, name, size)
        if not removed[name]:
            path.unlink()
        removed[name] += 1
        return path

    monkeypatch.setattr(ShardCache, "path", remove_once)
    assert ShardReader(index.folder, index).read(4, 1).key == "clip_13"
    assert removed == {f"shard-000004.{suffix}": 2 for suffix in ("idx", "keys", "tar")}
