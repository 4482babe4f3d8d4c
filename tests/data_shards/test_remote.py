"""Remote shard folders: the same records as local ones, each file fetched once, in bounded room."""

import http.server
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards import fetch
from data_shards.build import build_shards
from data_shards.cache import CacheTooSmall, ShardCache
from data_shards.fetch import download, is_remote
from data_shards.index import ShardIndex
from data_shards.plan import StageSpec, plan_stages
from data_shards.reader import DamagedRecord, ShardReader
from data_shards.record import Record, Video
from data_shards.remote import CacheOptions, default_cache_folder, open_index
from data_shards.sampler import WeightedTaskSampler
from data_shards.stream import StepStream, ViewOptions
from data_shards.tasks import Task
from data_shards.video import encode_mp4

NUM_SHARDS, PER_SHARD = 8, 3


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3)).astype(np.uint8)
    record = Record(
        key="clip_0",
        source="test",
        split="train",
        utterance="Hello.",
        speaker="Ann",
        sentiment=0.5,
        emotion="joy",
        tasks=(Task.MSA, Task.ER),
        num_frames=4,
        media=Video(mp4=encode_mp4(frames, 25)),
    )
    folder = tmp_path_factory.mktemp("remote") / "shards"
    records = [replace(record, key=f"clip_{n}") for n in range(NUM_SHARDS * PER_SHARD)]
    build_shards(records, folder, provenance={}, max_records_per_shard=PER_SHARD)
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with byte ranges, and fails as a test says."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.requests: Counter[str] = Counter()
        self.failures = 0  # so many answers are 503
        self.cuts = 0  # so many answers end in the middle
        self.ranges = True
        self.wait_s = 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, server = self.path.lstrip("/"), self.server
        server.requests[name] += 1
        time.sleep(server.wait_s)
        path = Path(self.directory) / name
        if server.failures > 0:
            server.failures -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content, start = path.read_bytes(), 0
        if (asked := self.headers.get("Range")) and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        content = content[start:]
        if server.cuts > 0:
            server.cuts -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(built, tmp_path / "origin"))


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.01)
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def options(tmp_path: Path, max_bytes: int = 2**30) -> CacheOptions:
    return CacheOptions(folder=tmp_path / "cache", max_bytes=max_bytes)


def read_all(index: ShardIndex) -> list[Record]:
    reader = ShardReader(index.folder, index)
    return [reader.read(*index.address(number)) for number in range(index.num_records)]


def cache_of(index: ShardIndex) -> ShardCache:
    assert isinstance(index.places, ShardCache)
    return index.places


def test_addresses_are_told_from_folders() -> None:
    assert is_remote("http://host/a") and is_remote("s3://bucket/a")
    assert not is_remote("a/b") and not is_remote(Path("http://host")) and not is_remote("C:/a")


def test_every_user_has_a_cache_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared machine the second user could not write into the folder of the first."""
    folders = set()
    for user in (1001, 1002):
        monkeypatch.setattr(os, "getuid", lambda user=user: user)
        folders.add(default_cache_folder())
    assert len(folders) == 2


def test_records_are_those_of_the_folder(built: Path, server: Server, tmp_path: Path) -> None:
    local, index = ShardIndex.load(built), open_index(server.url, options(tmp_path))
    assert index.fingerprint == local.fingerprint
    assert read_all(index) == read_all(local) == read_all(index)
    assert set(server.requests.values()) == {1} and len(server.requests) == 1 + 3 * NUM_SHARDS
    # Another start asks for index.json only.
    assert read_all(open_index(server.url + "/", options(tmp_path)))[0].key == "clip_0"
    assert server.requests["index.json"] == 2 and server.requests["shard-000001.tar"] == 1


def test_a_dataset_built_anew_is_another_one(server: Server, folder: Path, tmp_path: Path) -> None:
    first = open_index(server.url, options(tmp_path))
    keys = [record.key for record in read_all(first)]
    shutil.rmtree(folder)
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    record = replace(read_all(first)[0], media=Video(mp4=encode_mp4(frames, 25)))
    build_shards([replace(record, key=f"new_{n}") for n in range(4)], folder, provenance={})
    second = open_index(server.url, options(tmp_path))
    assert [record.key for record in read_all(second)] == [f"new_{n}" for n in range(4)]
    assert [record.key for record in read_all(first)] == keys  # whoever still runs is not disturbed


@pytest.mark.parametrize(
    ("trouble", "requests"),
    [({"failures": 3}, 4), ({"cuts": 3}, 4), ({"cuts": 1, "ranges": False}, 3)],
)
def test_broken_transfers_go_on(
    server: Server, built: Path, tmp_path: Path, trouble: dict[str, Any], requests: int
) -> None:
    index = open_index(server.url, options(tmp_path))
    index.entries(0), index.keys(0)
    for name, value in trouble.items():
        setattr(server, name, value)
    record = ShardReader(index.folder, index).read(0, 1)
    assert record.key == "clip_1"
    assert server.requests["shard-000000.tar"] == requests


def test_a_server_that_never_answers_well_is_an_error(server: Server, tmp_path: Path) -> None:
    index = open_index(server.url, options(tmp_path))
    server.failures = 10**9
    with pytest.raises(OSError, match=r"idx: 5 attempts in a row failed, .* 503"):
        index.entries(3)
    server.failures = 0
    assert len(index.entries(3)) == PER_SHARD  # and nothing stays broken
    server.cuts, server.ranges = 10**9, False
    with pytest.raises(
        OSError, match=r"5 attempts in a row failed, .*(ended after|parts of a file)"
    ):
        download(f"{server.url}/shard-000001.tar", tmp_path / "x", index.shards[1].bytes)
    with pytest.raises(OSError, match="attempts in a row failed"):
        download("http://127.0.0.1:9/a", tmp_path / "x", None)


def test_what_is_missing_or_larger_is_said_at_once(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/index\.json: the server answers 404"):
        open_index(f"{server.url}/none", options(tmp_path))
    index = open_index(server.url, options(tmp_path))
    with (folder / "shard-000002.tar").open("ab") as tar:
        tar.write(b"more")
    with pytest.raises(ValueError, match=r"shard-000002\.tar: must have \d+ bytes .* sends more"):
        ShardReader(index.folder, index).read(2, 0)
    assert sum(server.requests.values()) < 8
    with pytest.raises(ValueError, match=r"nothing here opens gopher:// .*pip install -e \.\[s3\]"):
        open_index("gopher://host/a", options(tmp_path))


def test_the_room_is_bounded(server: Server, tmp_path: Path) -> None:
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
            target=read_all, args=(open_index(server.url, options(tmp_path / "small", room)),)
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
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_processes_of_a_machine_fetch_each_file_once(server: Server, tmp_path: Path) -> None:
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


def test_what_a_killed_process_left_is_cleared(
    server: Server, folder: Path, tmp_path: Path
) -> None:
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


def test_a_wrong_copy_is_fetched_again_and_a_wrong_original_is_damage(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    index = open_index(server.url, options(tmp_path))
    reader = ShardReader(index.folder, index)
    reader.read(1, 1)
    offset = int(index.entries(1)[1]["offset"]) + 700
    flip(cache_of(index).folder / "shard-000001.tar", offset)
    assert reader.read(1, 1).key == "clip_4" and server.requests["shard-000001.tar"] == 2
    flip(folder / "shard-000001.tar", offset)
    cache_of(index).drop("shard-000001.tar")
    with pytest.raises(DamagedRecord, match=r"clip_4 in shard-000001\.tar at byte \d+: checksum"):
        reader.read(1, 1)
    assert server.requests["shard-000001.tar"] == 4
    assert reader.read(1, 0).key == "clip_3"
    # Side files are under the seal of index.json.
    flip(folder / "shard-000005.idx", 3)
    with pytest.raises(
        ValueError, match=rf"{server.url}/shard-000005\.idx: does not fit idx_sha256"
    ):
        index.entries(5)
    flip(folder / "shard-000005.idx", 3)  # put right there, and asked for again
    assert len(index.entries(5)) == PER_SHARD


def test_a_wrong_copy_of_a_side_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    """What a power cut leaves: the right length, other bytes. No start would get further."""
    first = open_index(server.url, options(tmp_path))
    expected = first.entries(2).tolist(), first.keys(2)
    for suffix in ("idx", "keys"):
        path = cache_of(first).folder / f"shard-000002.{suffix}"
        path.write_bytes(bytes(path.stat().st_size))
    index = open_index(server.url, options(tmp_path))
    assert (index.entries(2).tolist(), index.keys(2)) == expected
    assert server.requests["shard-000002.idx"] == server.requests["shard-000002.keys"] == 2


def test_a_file_may_be_removed_as_soon_as_it_is_there(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def stream_of(index: ShardIndex, rank: int = 0, world_size: int = 1) -> StepStream:
    half = Fraction(1, 2)
    spec = StageSpec(name="s", rates=((Task.MSA, half), (Task.ER, half)), take=20)
    stage = plan_stages(index, [spec], seed=1, block_shards=2).stages["s"]
    sampler = WeightedTaskSampler(
        stage, index, global_batch_size=4, rank=rank, world_size=world_size
    )
    reader = ShardReader(index.folder, index)
    return StepStream(sampler, reader, ViewOptions(num_frames=2, image_size=28))


def identity(stream: StepStream) -> list[tuple[int, str]]:
    return [(s.position, s.record.key) for step in range(len(stream)) for s in stream[step]]


def test_a_stream_is_the_local_one_and_fetches_in_the_order_of_the_plan(
    server: Server, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of two blocks of two shards, two ranks: every shard about once."""
    monkeypatch.setattr("data_shards.stream.AHEAD_SAMPLES", 4)
    local = ShardIndex.load(built)
    room = sum(shard.bytes for shard in local.shards[:5])
    index = open_index(server.url, options(tmp_path, room))
    assert identity(stream_of(index)) == identity(stream_of(local))
    tars = [number for name, number in server.requests.items() if name.endswith(".tar")]
    assert len(tars) == NUM_SHARDS and sum(tars) <= NUM_SHARDS + 1


def test_the_next_shards_are_on_their_way(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(server.url, options(tmp_path))
    stream = stream_of(index)
    stream[0]
    deadline = time.monotonic() + 20
    while sum(name.endswith(".tar") for name in server.requests) < NUM_SHARDS:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = sum(server.requests.values())
    [stream[step] for step in range(len(stream))]
    assert sum(n for name, n in server.requests.items() if name.endswith(".tar")) == NUM_SHARDS
    assert sum(server.requests.values()) - before <= 2 * NUM_SHARDS  # side files


def test_fsspec_opens_the_other_schemes(built: Path, tmp_path: Path) -> None:
    """Its local file system stands for them here; s3 has a test of its own."""
    index = open_index(f"file://{built}", options(tmp_path))
    assert read_all(index) == read_all(ShardIndex.load(built))
    with pytest.raises(FileNotFoundError, match=r"nowhere/index\.json: .*check the address"):
        open_index(f"file://{tmp_path}/nowhere", options(tmp_path))


def test_the_index_of_a_server_is_checked_like_a_local_one(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    document = json.loads((folder / "index.json").read_text())
    document["shards"][0]["name"] = "../../outside.tar"
    (folder / "index.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="name must be a plain file name"):
        open_index(server.url, options(tmp_path))
