"""Remote shard folders: the same records as local ones, each file fetched once, in bounded room."""

import io
import json
import os
import shutil
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.build.build import build_shards
from data_shards.media.video import encode_mp4
from data_shards.plan.plan import StageSpec, plan_stages
from data_shards.plan.sampler import WeightedTaskSampler
from data_shards.shards.cache import ShardCache
from data_shards.shards.fetch import download, is_remote
from data_shards.shards.index import ShardIndex
from data_shards.shards.open import CacheOptions, default_cache_folder, open_index
from data_shards.shards.reader import DamagedRecord, ShardReader, iter_records
from data_shards.shards.record import Video
from data_shards.stream import StepStream, ViewOptions
from data_shards.tasks import Task

NUM_SHARDS, PER_SHARD = 8, 3


def options(tmp_path: Path, max_bytes: int = 2**30) -> CacheOptions:
    return CacheOptions(folder=tmp_path / "cache", max_bytes=max_bytes)


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


def test_records_are_those_of_the_folder(built: Path, server: Any, tmp_path: Path) -> None:
    local, index = ShardIndex.load(built), open_index(server.url, options(tmp_path))
    assert index.fingerprint == local.fingerprint
    assert list(iter_records(index)) == list(iter_records(local)) == list(iter_records(index))
    assert set(server.requests.values()) == {1} and len(server.requests) == 1 + 3 * NUM_SHARDS
    # Another start asks for index.json only.
    assert next(iter_records(open_index(server.url + "/", options(tmp_path)))).key == "clip_0"
    assert server.requests["index.json"] == 2 and server.requests["shard-000001.tar"] == 1


def test_a_dataset_built_anew_is_another_one(server: Any, folder: Path, tmp_path: Path) -> None:
    first = open_index(server.url, options(tmp_path))
    keys = [record.key for record in iter_records(first)]
    shutil.rmtree(folder)
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    record = replace(next(iter_records(first)), media=Video(mp4=encode_mp4(frames, 25)))
    build_shards([replace(record, key=f"new_{n}") for n in range(4)], folder, provenance={})
    second = open_index(server.url, options(tmp_path))
    assert [record.key for record in iter_records(second)] == [f"new_{n}" for n in range(4)]
    assert [
        record.key for record in iter_records(first)
    ] == keys  # whoever still runs is not disturbed


@pytest.mark.parametrize(
    ("trouble", "requests"),
    [({"failures": 3}, 4), ({"cuts": 3}, 4), ({"cuts": 1, "ranges": False}, 3)],
)
def test_broken_transfers_go_on(
    server: Any, built: Path, tmp_path: Path, trouble: dict[str, Any], requests: int
) -> None:
    index = open_index(server.url, options(tmp_path))
    index.entries(0), index.keys(0)
    for name, value in trouble.items():
        setattr(server, name, value)
    record = ShardReader(index.folder, index).read(0, 1)
    assert record.key == "clip_1"
    assert server.requests["shard-000000.tar"] == requests


def test_a_server_that_never_answers_well_is_an_error(server: Any, tmp_path: Path) -> None:
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
    server: Any, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/index\.json: the server responds 404"):
        open_index(f"{server.url}/none", options(tmp_path))
    index = open_index(server.url, options(tmp_path))
    with (folder / "shard-000002.tar").open("ab") as tar:
        tar.write(b"more")
    with pytest.raises(ValueError, match=r"shard-000002\.tar: must have \d+ bytes .* sends more"):
        ShardReader(index.folder, index).read(2, 0)
    assert sum(server.requests.values()) < 8
    with pytest.raises(ValueError, match=r"no driver opens gopher:// .*pip install -e \.\[s3\]"):
        open_index("gopher://host/a", options(tmp_path))


def test_a_wrong_copy_is_fetched_again_and_a_wrong_original_is_damage(
    server: Any, folder: Path, tmp_path: Path
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


def test_a_wrong_copy_of_a_side_file_is_fetched_again(server: Any, tmp_path: Path) -> None:
    """What a power cut leaves: the right length, other bytes. No start would get further."""
    first = open_index(server.url, options(tmp_path))
    expected = first.entries(2).tolist(), first.keys(2)
    for suffix in ("idx", "keys"):
        path = cache_of(first).folder / f"shard-000002.{suffix}"
        path.write_bytes(bytes(path.stat().st_size))
    index = open_index(server.url, options(tmp_path))
    assert (index.entries(2).tolist(), index.keys(2)) == expected
    assert server.requests["shard-000002.idx"] == server.requests["shard-000002.keys"] == 2


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
    server: Any, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert list(iter_records(index)) == list(iter_records(ShardIndex.load(built)))
    with pytest.raises(FileNotFoundError, match=r"nowhere/index\.json: .*check the address"):
        open_index(f"file://{tmp_path}/nowhere", options(tmp_path))


def test_a_drivers_own_errors_are_failed_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As botocore's, which are no OSError: a network that fails, or keys that are missing."""

    class Driver:
        failures = 1

        def open(self, path: str, mode: str, cache_type: str) -> io.BytesIO:
            self.failures -= 1
            if self.failures >= 0:
                raise RuntimeError("Could not connect to the endpoint")
            return io.BytesIO(b"whole")

    driver = Driver()
    monkeypatch.setattr("data_shards.shards.fetch._PAUSE_S", 0.0)
    monkeypatch.setattr("data_shards.shards.fetch._file_system", lambda url: (driver, url))
    assert download("s3://bucket/a", tmp_path / "a", None) == 5
    driver.failures = 99
    with pytest.raises(OSError, match=r"5 attempts in a row failed, .*RuntimeError: Could not"):
        download("s3://bucket/b", tmp_path / "b", None)


def test_the_index_of_a_server_is_checked_like_a_local_one(
    server: Any, folder: Path, tmp_path: Path
) -> None:
    document = json.loads((folder / "index.json").read_text())
    document["shards"][0]["name"] = "../../outside.tar"
    (folder / "index.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="name must be a plain file name"):
        open_index(server.url, options(tmp_path))
