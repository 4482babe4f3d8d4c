"""A media file that changes between two starts of a build is noticed, and its shard made again."""

import functools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.build.build import build_shards
from data_shards.build.journal import work_folder
from data_shards.build.source_item import FileItem, Skipped
from data_shards.media.video import encode_mp4
from data_shards.shards.index import ShardIndex
from data_shards.shards.record import Record, Video
from data_shards.tasks import Task
from launch import cli
from tests.builders import make_clip

CLIPS, PER_SHARD, MISSING = 30, 5, 9


@functools.cache
def other_clip() -> bytes:
    """Another clip of as many frames and bytes (a decoder passes over the box `free`)."""
    rng = np.random.default_rng(1)
    found = encode_mp4(rng.integers(0, 200, (6, 32, 32, 3), dtype=np.uint8), fps=8)
    return _padded(found, len(make_clip()) - len(found))


def _padded(mp4: bytes, number: int) -> bytes:
    assert number >= 8
    return mp4 + number.to_bytes(4, "big") + b"free" + bytes(number - 8)


def read(path: Path) -> Record | Skipped:
    where = {"key": path.stem, "source": "test", "split": "train"}
    if not path.exists():
        return Skipped(**where, reason="missing", detail="")
    return Record(
        **where,
        utterance="Hello.",
        speaker="Ann",
        emotion="joy",
        tasks=(Task.ER,),
        num_frames=6,
        media=Video(mp4=path.read_bytes()),
    )


def file_item(path: Path) -> FileItem:
    return FileItem(make=partial(read, path), path=path)


def build(folder: Path, out: Path, **more: Any) -> ShardIndex:
    items = [file_item(folder / f"{number}.mp4") for number in range(CLIPS)]
    limits: dict[str, Any] = {"max_records_per_shard": PER_SHARD, "strict": False}
    return build_shards(items, out, provenance={}, **limits, **more)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_at(number: int) -> Callable[[int], None]:
    def progress(done: int) -> None:
        if done == number:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A file per clip but one; the build of them was stopped with four of six shards finished."""
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(CLIPS):
        if number != MISSING:
            (folder / f"{number}.mp4").write_bytes(make_clip())
    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path / "shards", progress=stop_at(23))
    assert len(list((work_folder(tmp_path / "shards") / "done").iterdir())) == 4
    return folder


def replaced(folder: Path) -> str:
    (folder / "8.mp4").write_bytes(other_clip())
    return "8.mp4"


def longer_and_dated_back(folder: Path) -> str:
    path = folder / "8.mp4"
    before = path.stat()
    path.write_bytes(_padded(make_clip(), 16))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path.name


def removed(folder: Path) -> str:
    (folder / "8.mp4").unlink()
    return "8.mp4"


def found_again(folder: Path) -> str:
    (folder / f"{MISSING}.mp4").write_bytes(make_clip())
    return f"{MISSING}.mp4"


@pytest.mark.parametrize("change", [replaced, longer_and_dated_back, removed, found_again])
def test_a_changed_file_is_noticed_by_the_next_start(
    tmp_path: Path, media: Path, change: Callable[[Path], str]
) -> None:
    """The file is in the second shard: the first is kept, all others are made again."""
    name = change(media)
    done: list[int] = []
    told: list[str] = []
    build(media, tmp_path / "shards", progress=done.append, notice=told.append, workers=2)
    assert done[:2] == [5, 6]
    (sentence,) = told
    assert sentence.startswith(f"{media / name} has changed since it was read: 3 finished shards")
    build(media, tmp_path / "fresh")
    assert files(tmp_path / "shards") == files(tmp_path / "fresh")


def test_files_that_stay_the_same_are_not_read_again(tmp_path: Path, media: Path) -> None:
    (media / "28.mp4").write_bytes(other_clip())  # in no finished shard
    done: list[int] = []
    told: list[str] = []
    build(media, tmp_path / "shards", progress=done.append, notice=told.append)
    assert done[:2] == [21, 22] and told == []  # 20 records, and the one that is missing
    build(media, tmp_path / "fresh")
    assert files(tmp_path / "shards") == files(tmp_path / "fresh")


def test_a_file_that_changes_while_it_is_read_counts_as_changed(tmp_path: Path) -> None:
    path = tmp_path / "1.mp4"
    path.write_bytes(make_clip())

    def read_then_replace() -> Record | Skipped:
        record = read(path)
        path.write_bytes(other_clip())
        return record

    (tmp_path / "2.mp4").write_bytes(make_clip())
    second = file_item(tmp_path / "2.mp4")
    first = FileItem(make=read_then_replace, path=path)
    out, told = tmp_path / "shards", list[str]()
    with pytest.raises(KeyboardInterrupt):
        build_shards(
            [first, second], out, provenance={}, max_records_per_shard=1, progress=stop_at(2)
        )
    assert len(list((work_folder(out) / "done").iterdir())) == 1
    items = [file_item(path), second]
    build_shards(items, out, provenance={}, max_records_per_shard=1, notice=told.append)
    assert told == [f"{path} has changed since it was read: 1 finished shard is built again"]
    assert other_clip() in (out / "shard-000000.tar").read_bytes()


# --- through the verb


@pytest.fixture
def swift(tmp_path: Path) -> Iterator[list[str]]:
    """The command that builds four clips of a file of ms-swift."""
    rows = []
    for number in range(4):
        (tmp_path / f"{number}.mp4").write_bytes(make_clip())
        query = f'"query": "Hello {number}. <emotion> Which?", "response": "Happy."'
        rows.append(f'{{{query}, "videos": ["{number}.mp4"]}}\n')
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    words = ["build", "swift", tmp_path / "rows.jsonl", "--out", tmp_path / "out"]
    yield [str(word) for word in (*words, "--shard-records", 1)]


def test_the_verb_says_which_file_has_changed(
    tmp_path: Path,
    swift: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("data_shards.build.source_build.Progress", lambda total, unit: stop_at(3))
        assert cli.main(swift) == 75
    (tmp_path / "0.mp4").write_bytes(other_clip())
    assert cli.main(swift) == 0
    told = capsys.readouterr().err
    assert f"build: {tmp_path / '0.mp4'} has changed since it was read: 2 finished shards" in told
    assert other_clip() in (tmp_path / "out" / "shard-000000.tar").read_bytes()
