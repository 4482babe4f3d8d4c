"""A build in several processes: same bytes for any number, killed at any moment, bad clips."""

import fcntl
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_shards.build.build import BuildOptions, build_shards
from data_shards.build.journal import work_folder
from data_shards.build.source_item import RecordFactory, Skipped
from data_shards.inspection.lint import lint
from data_shards.shards.index import ShardIndex
from data_shards.shards.record import Record, Video
from data_shards.tasks import Task
from tests.builders import make_record

RECORDS, PER_SHARD = 40, 5


def make(number: int, pause_s: float = 0.0) -> Record | Skipped:
    """Clip `number`; every seventh is missing, and one is damaged."""
    time.sleep(pause_s)
    if number % 7 == 3:
        return Skipped(
            key=f"clip-{number}", source="test", split="train", reason="missing", detail="no file"
        )
    media = {"media": Video(mp4=b"broken")} if number == 12 else {}
    return make_record(
        number, utterance=f"Word {number}.", sentiment=None, tasks=(Task.ER,), **media
    )


def items(pause_s: float = 0.0) -> Iterator[RecordFactory]:
    return (partial(make, number, pause_s) for number in range(RECORDS))


def build(out: Path, *, workers: int = 1, pause_s: float = 0.0, **more: object) -> ShardIndex:
    return build_shards(
        items(pause_s),
        out,
        provenance={"corpus": "test"},
        max_records_per_shard=PER_SHARD,
        strict=False,
        workers=workers,
        **more,  # type: ignore[arg-type]
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed build in one process gives."""
    folder = tmp_path_factory.mktemp("whole") / "shards"
    build(folder)
    return files(folder)


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], workers: int
) -> None:
    build(tmp_path / "a", workers=workers)
    assert files(tmp_path / "a") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_extracted_frames_do_not_depend_on_workers(tmp_path: Path) -> None:
    options = BuildOptions(frames="extracted", frame_size=28)
    for workers in (1, 3):
        build(tmp_path / str(workers), workers=workers, options=options)
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_clips_that_are_left_out_are_counted_and_listed(tmp_path: Path) -> None:
    index = build(tmp_path / "a")
    missing = [f"clip-{number}" for number in range(RECORDS) if number % 7 == 3]
    assert index.num_records == RECORDS - len(missing) - 1
    assert index.provenance["skipped"] == {"test": {"media-damaged": 1, "missing": len(missing)}}
    rows = [
        json.loads(line) for line in (tmp_path / "a" / "skipped.jsonl").read_text().splitlines()
    ]
    assert sorted(row["key"] for row in rows) == sorted([*missing, "clip-12"])
    damaged = next(row for row in rows if row["key"] == "clip-12")
    assert damaged["detail"].startswith("cannot read the video")
    assert lint(tmp_path / "a", decode=True).ok


def test_strict_stops_at_the_first_of_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="record clip-3: missing: no file; without strict"):
        build_shards(items(), tmp_path / "a", provenance={}, workers=2)
    assert list(tmp_path.iterdir()) == []


def run_in_child(out: Path, done: Any) -> None:
    def progress(number: int) -> None:
        done.value = number

    build(out, workers=2, pause_s=0.002, progress=progress)
    os._exit(0)  # nothing of pytest's own may run at the end of a fork


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def kill_after(out: Path, items: int, seconds: float) -> None:
    """Start the build, kill it with SIGKILL some time after so many items, wait for its workers.

    Time alone would hit a busy machine before the first item, every time.
    """
    context = multiprocessing.get_context("fork")
    done = context.Value("i", 0, lock=False)
    child = context.Process(target=run_in_child, args=(out, done))
    child.start()
    assert child.pid is not None
    while done.value < items and child.is_alive():
        time.sleep(0.0005)
    time.sleep(seconds)
    listing = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    workers = [int(pid) for pid in listing.read_text().split()] if listing.exists() else []
    child.kill()
    child.join()
    end = time.monotonic() + 10
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < end, "a worker outlives the build"
        time.sleep(0.01)
    child.close()


def test_a_build_that_is_killed_at_any_moment_ends_with_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """Twenty builds are killed at a random moment, half of them twice; the next start finishes."""
    draw = random.Random(0)
    resumed = 0
    for number in range(20):
        out = tmp_path / f"{number}" / "shards"
        for _ in range(1 + number % 2):
            if not out.exists():
                kill_after(out, draw.randrange(RECORDS + 1), draw.uniform(0, 0.01))
        done: list[int] = []
        if not out.exists():
            build(out, workers=2, progress=done.append)
        resumed += bool(done) and done[0] > 1
        assert files(out) == whole
        left = work_folder(out)  # a kill between the last rename and the tidying leaves it
        assert not left.exists() or not (left / "shards").exists()
    assert resumed >= 8


def stop_at(number: int, steps: list[int]) -> None:
    if steps[-1] == number:
        raise KeyboardInterrupt


def interrupted(out: Path, at: int) -> None:
    steps: list[int] = []

    def progress(done: int) -> None:
        steps.append(done)
        stop_at(at, steps)

    with pytest.raises(KeyboardInterrupt):
        build(out, progress=progress)


def test_finished_shards_are_not_made_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "shards"
    interrupted(out, 23)
    work = work_folder(out)
    made = {path.name: path.stat().st_mtime_ns for path in (work / "shards").glob("*.tar")}
    assert len(made) == 4  # three finished, one begun
    done: list[int] = []
    build(out, progress=done.append)
    assert done[:2] == [19, 20] and done[-1] == RECORDS
    kept = [n for n, at in made.items() if (out / n).stat().st_mtime_ns == at]
    assert sorted(kept) == [f"shard-{n:06d}.tar" for n in range(3)]
    assert files(out) == whole and not work.exists()


def test_a_finished_shard_that_was_changed_is_made_again(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "shards"
    interrupted(out, 23)
    tar = work_folder(out) / "shards" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    done: list[int] = []
    build(out, progress=done.append)
    assert 1 < done[0] < 19
    assert files(out) == whole


def test_another_build_may_not_go_on(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "shards"
    interrupted(out, 23)
    other = {"corpus": "other"}
    with pytest.raises(ValueError, match=r"another provenance\.corpus \('test' there, 'other' h"):
        build_shards(items(), out, provenance=other, max_records_per_shard=PER_SHARD)
    with pytest.raises(ValueError, match=r"limits.max_records_per_shard \(5 there, 6 here\)"):
        build_shards(items(), out, provenance={"corpus": "test"}, max_records_per_shard=6)
    done: list[int] = []
    build(out, fresh=True, progress=done.append)
    assert done[0] == 1 and files(out) == whole


def hold(path: Path, ready: "multiprocessing.synchronize.Event") -> None:
    stream = path.open("w")
    fcntl.lockf(stream, fcntl.LOCK_EX)
    ready.set()
    signal.pause()


def test_two_builds_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    work_folder(out).mkdir()
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(work_folder(out) / "lock", ready))
    other.start()
    try:
        assert ready.wait(10)
        with pytest.raises(ValueError, match=r"another build of .* is running .* is locked"):
            build(out)
    finally:
        other.kill()
        other.join()
    build(out)  # the lock ends with its process


def test_an_interrupted_first_shard_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "shards", 4)
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_workers_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, found 0"):
        build(tmp_path / "a", workers=0)


def test_amendments_are_made_before_storing(tmp_path: Path) -> None:
    def amend(record: Record) -> Record | Skipped:
        return replace(record, emotion="anger")

    index = build_shards(
        [make(0)],
        tmp_path / "a",
        provenance={},
        amend=amend,
    )
    assert b'"emotion":"anger"' in (tmp_path / "a" / index.shards[0].name).read_bytes()
