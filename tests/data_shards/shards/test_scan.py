"""Tars without an index: one pass makes it, and everything works as with a built folder."""

import io
import multiprocessing
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.shards.index import ShardIndex
from data_shards.shards.open import CacheOptions, open_index
from data_shards.shards.reader import DamagedRecord, ShardReader
from data_shards.shards.record import Record, to_members
from data_shards.tasks import Task
from tests.builders import make_record


@pytest.fixture(scope="module")
def records() -> list[Record]:
    tasks = (Task.MSA, Task.ER)
    return [
        make_record(f"clip_{n}", tasks=tasks[: 1 + (n + 1) % 2], num_frames=4) for n in range(7)
    ]


def write_tar(path: Path, records: list[Record], tar_format: int = tarfile.PAX_FORMAT) -> None:
    """As webdataset's writer does it: times with fractions, hence extended headers."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for record in records:
            for extension, content in to_members(record).items():
                info = tarfile.TarInfo(f"{record.key}.{extension}")
                info.size, info.mtime, info.uname = len(content), 1.5, "bigdata"
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(records: list[Record], tmp_path: Path) -> Path:
    """Uneven tars in three formats: four records, one, none, two; names that no build gives."""
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "train.0.tar", records[:4])
    write_tar(folder / "train.1.tar", records[4:5], tarfile.USTAR_FORMAT)
    write_tar(folder / "train.2.tar", [])
    write_tar(folder / "train.3.tar", records[5:], tarfile.GNU_FORMAT)
    return folder


def scan(folder: Path) -> ShardIndex:
    return open_index(folder, CacheOptions(folder=folder.parent / "cache"))


def test_scanned_tars_read_like_built_ones(folder: Path, records: list[Record]) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    index = scan(folder)
    assert [shard.name for shard in index.shards] == ["train_0.tar", "train_1.tar", "train_3.tar"]
    assert [shard.records for shard in index.shards] == [4, 1, 2]
    assert index.class_counts() == {1: 3, 3: 4} and index.options == {"frames": "video"}
    reader = ShardReader(index.folder, index)
    assert [reader.read(*index.address(number)) for number in range(7)] == records
    assert index.entries(0)["frames"].tolist() == [4] * 4
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    # The same tars are not read again, changed ones are.
    stamp = (index.folder / "index.json").stat().st_mtime_ns
    assert scan(folder).folder == index.folder
    assert (index.folder / "index.json").stat().st_mtime_ns == stamp
    write_tar(folder / "train.1.tar", records[4:5], tarfile.PAX_FORMAT)
    assert scan(folder).folder != index.folder


def test_webdatasets_own_writer_is_understood(records: list[Record], tmp_path: Path) -> None:
    from webdataset import TarWriter

    folder = tmp_path / "tars"
    folder.mkdir()
    with TarWriter(str(folder / "a.tar")) as writer:
        for record in records:
            writer.write({"__key__": record.key, **to_members(record)})
    index = scan(folder)
    reader = ShardReader(index.folder, index)
    assert [reader.read(0, slot) for slot in range(7)] == records


def test_damage_after_the_scan_is_found(folder: Path) -> None:
    index = scan(folder)
    path = folder / "train.0.tar"
    content = bytearray(path.read_bytes())
    content[int(index.entries(0)[2]["offset"]) + 1600] ^= 1
    path.write_bytes(content)
    reader = ShardReader(index.folder, index)
    with pytest.raises(DamagedRecord, match=r"clip_2 in train_0\.tar at byte \d+: checksum"):
        reader.read(0, 2)
    reader.close()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.0\.tar: the shard existed .* is gone"):
        reader.read(0, 1)


def _scan_and_count(folder: Path, out: "multiprocessing.Queue[tuple[int, str]]") -> None:
    index = scan(folder)
    out.put((index.num_records, str(index.folder)))


def test_one_process_makes_the_index_for_all(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    out: multiprocessing.Queue[tuple[int, str]] = context.Queue()
    children = [context.Process(target=_scan_and_count, args=(folder, out)) for _ in range(4)]
    for child in children:
        child.start()
    found = {out.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert len(found) == 1 and found.pop()[0] == 7
    assert len([path for path in (folder.parent / "cache").iterdir() if path.is_dir()]) == 1


def test_a_scan_that_was_killed_begins_again(folder: Path) -> None:
    index = scan(folder)
    shutil.move(index.folder, index.folder.with_name(f".{index.folder.name}.new"))
    os.remove(index.folder.with_name(f".{index.folder.name}.new") / "index.json")
    assert scan(folder).num_records == 7


def cut(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:at])


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan(folder)


def test_what_is_wrong_is_named(folder: Path, records: list[Record], tmp_path: Path) -> None:
    path = folder / "train.0.tar"
    whole = path.read_bytes()
    cut(path, 3000)
    refuse(folder, r"train\.0\.tar: member '.*' at byte \d+ claims .* cut short")
    end = whole.index(b"clip_2.json") - 1024  # exactly between two records
    path.write_bytes(whole[:end])
    refuse(folder, rf"train\.0\.tar: ends at byte {end} without the end mark of a tar")
    path.write_bytes(b"")
    refuse(folder, r"ends at byte 0 without the end mark of a tar")
    path.write_bytes(b"garbage!" * 1000)
    refuse(folder, r"train\.0\.tar: at byte 0: no tar header")
    write_tar(path, [records[0], records[1], records[0]])
    refuse(folder, r"record clip_0 at byte \d+: a key must be unique .* it is in train\.0\.tar too")
    write_tar(path, [records[0], replace(records[1], key="clip_6")])
    refuse(folder, r"train\.3\.tar: record clip_6 at byte \d+: a key must be unique")
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("clip_9.cls")
        tar.addfile(info)
    refuse(folder, r"record clip_9 at byte 0: member 'clip_9\.cls' does not belong to a record")
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("clip_9.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    refuse(folder, "must be a regular file")
    write_tar(path, [])
    for number in (1, 3):
        write_tar(folder / f"train.{number}.tar", [])
    refuse(folder, "its tars hold no record")
    shutil.copy(path, folder / "train_0.tar")
    refuse(folder, "two tars have the same name but for special characters")
    with pytest.raises(FileNotFoundError, match=r"neither index\.json nor a \*\.tar is there"):
        open_index(tmp_path / "tars" / "..", CacheOptions(folder=tmp_path / "cache"))
