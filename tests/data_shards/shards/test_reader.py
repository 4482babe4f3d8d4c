"""Random access to records, and that every kind of damage is found and named."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_shards.shards.checksum import crc32
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import (
    DamagedRecord,
    ShardReader,
    iter_plain,
    iter_records,
    read_header,
    untar,
)
from data_shards.shards.record import Record, to_members
from tests.builders import make_record, make_shards, tar_blocks


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [make_record(f"clip_{n}", utterance="Hello." * n) for n in range(6)]


@pytest.fixture(scope="module")
def built(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("reader") / "shards", records, per_shard=3)


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(built, tmp_path / "shards"))


def open_reader(folder: Path, **options: int) -> ShardReader:
    return ShardReader(folder, ShardIndex.load(folder), **options)


def test_records_come_back_equal(built: Path, records: list[Record]) -> None:
    reader = open_reader(built)
    assert list(reader.records()) == [(n // 3, n % 3, record) for n, record in enumerate(records)]
    assert [record for _, _, record in reader.records([1, 0])] == records[3:] + records[:3]
    assert list(iter_records(reader.index)) == records
    assert reader.read(1, 0) == records[3]  # in any order
    reader.close()
    assert reader.read(0, 2) == records[2]  # and after closing


def test_a_clip_is_read_in_parts_and_anything_else_in_one_piece(
    built: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ShardReader, "blocks", None)  # calling it would fail
        in_parts = [open_reader(built).members(0, slot) for slot in range(3)]
    monkeypatch.setattr(ShardReader, "_clip", lambda *_: None)
    assert in_parts == [open_reader(built).members(0, slot) for slot in range(3)]
    assert in_parts == [to_members(record) for record in records[:3]]


def test_a_text_of_many_kilobytes_is_read_in_one_piece(
    records: list[Record], tmp_path: Path
) -> None:
    record = replace(records[0], utterance="Hello. " * 5000)
    make_shards(tmp_path / "shards", [record])
    assert list(open_reader(tmp_path / "shards").records()) == [(0, 0, record)]


@given(content=st.binary(max_size=3000), before=st.integers(0, 2**32 - 1))
def test_the_quick_checksum_is_zlibs(content: bytes, before: int) -> None:
    assert crc32(content, before) == zlib.crc32(content, before)


def test_only_some_tars_are_open(built: Path, records: list[Record]) -> None:
    reader = open_reader(built, max_open=1)
    assert [reader.read(shard, 0).key for shard in (0, 1, 0, 1)] == ["clip_0", "clip_3"] * 2
    assert len(reader._descriptors) == 1
    with pytest.raises(ValueError, match="max_open must be at least 1, found 0"):
        open_reader(built, max_open=0)


def _read_in_child(reader: ShardReader, queue: "multiprocessing.Queue[list[str]]") -> None:
    queue.put([reader.read(shard, slot).key for shard in (1, 0) for slot in range(3)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_crosses_to_workers(built: Path, method: str, records: list[Record]) -> None:
    reader = open_reader(built)
    reader.read(0, 0)
    if method == "spawn":  # what a spawned worker receives, without the seconds of starting one
        copy = pickle.loads(pickle.dumps(reader))
        assert copy._descriptors == {} and [record for _, _, record in copy.records()] == records
        return
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[list[str]] = context.Queue()
    children = [context.Process(target=_read_in_child, args=(reader, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [record for _, _, record in reader.records()] == records
    for _ in children:
        assert queue.get(timeout=30) == [f"clip_{n}" for n in (3, 4, 5, 0, 1, 2)]
    for child in children:
        child.join()


def damaged_keys(folder: Path, index: ShardIndex | None = None) -> dict[str, str]:
    """Key -> cause of all damaged records."""
    reader = ShardReader(folder, index or ShardIndex.load(folder))
    errors = [result for _, _, result in reader.records() if isinstance(result, DamagedRecord)]
    return {error.key: error.cause for error in errors}


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_one_flipped_bit_damages_one_record(folder: Path, data: st.DataObject) -> None:
    """Header, json, video or padding: the record is found, named, and the only one lost."""
    index = ShardIndex.load(folder)
    slot = data.draw(st.integers(0, 2))
    entry = index.entries(1)[slot]
    at = int(entry["offset"]) + data.draw(st.integers(0, int(entry["size"]) - 1))
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    intact = path.read_bytes()
    path.write_bytes(content)
    try:
        damaged = damaged_keys(folder)
    finally:
        path.write_bytes(intact)
    assert list(damaged) == [f"clip_{3 + slot}"]
    assert "checksum must be" in damaged[f"clip_{3 + slot}"]


def test_the_error_says_where(folder: Path) -> None:
    reader = open_reader(folder)
    offset = int(reader.index.entries(1)[1]["offset"])
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[offset + 600] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedRecord) as caught:
        reader.read(1, 1)
    error = caught.value
    assert (error.shard, error.key, error.offset) == ("shard-000001.tar", "clip_4", offset)
    assert str(error).startswith(f"record clip_4 in shard-000001.tar at byte {offset}: checksum")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.offset == offset


@pytest.mark.parametrize("inside", [True, False])
def test_a_tar_cut_short_after_loading(folder: Path, inside: bool) -> None:
    """Inside a record or exactly between two: what is whole can still be read."""
    index = ShardIndex.load(folder)
    end = int(index.entries(1)[1]["offset"]) + (700 if inside else 0)
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:end])
    damaged = damaged_keys(folder, index)
    assert list(damaged) == ["clip_4", "clip_5"]
    assert all("cut short" in cause for cause in damaged.values())
    with pytest.raises(ValueError, match=r"shard-000001\.tar: must have \d+ bytes"):
        ShardIndex.load(folder)


def test_a_tar_that_disappears(folder: Path) -> None:
    reader = open_reader(folder)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="is gone; put it back or copy"):
        reader.read(1, 0)


REGULAR = tarfile.REGTYPE


@pytest.mark.parametrize(
    ("blocks", "rule"),
    [
        (
            tar_blocks(("k.json", b"", tarfile.SYMTYPE)),
            "must be a regular file, found tar type b'2'",
        ),
        (
            tar_blocks(("k.json", b"", tarfile.CHRTYPE)),
            "must be a regular file, found tar type b'3'",
        ),
        (tar_blocks(("k.json", b"", tarfile.DIRTYPE)), "must be a regular file"),
        (tar_blocks(("x", b"11 path=ab\n", tarfile.XHDTYPE)), "may not set b'path'"),
        (tar_blocks(("x", b"99 mtime=1\n", tarfile.XHDTYPE)), "may not set b'mtime'"),
        (tar_blocks(("x", b"garbage", tarfile.XHDTYPE)), "extended header may not set"),
        (tar_blocks(("x", b"", tarfile.XGLTYPE)), "must be a regular file"),
        (tar_blocks(("../k.json", b"{}", REGULAR)), "does not belong to a record with this key"),
        (tar_blocks(("/k.json", b"{}", REGULAR)), "does not belong"),
        (tar_blocks(("k.a/../json", b"{}", REGULAR)), "does not belong"),
        (tar_blocks(("other.json", b"{}", REGULAR)), "does not belong"),
        (tar_blocks(("k", b"{}", REGULAR)), "does not belong"),
        (tar_blocks(("k.pickle", b"", REGULAR)), "does not belong"),
        (tar_blocks(("k.pyd", b"", REGULAR)), "does not belong"),
        (tar_blocks(("k.json", b"{}", REGULAR), ("k.json", b"{}", REGULAR)), "comes twice"),
        (tar_blocks(("k.mp4", b"x" * 600, REGULAR))[:1024], "claims 600 bytes, 512 are left"),
        (bytes(512), "at byte 0 of the record: no tar header"),
        (b"garbage" * 200, "at byte 0 of the record: no tar header"),
        (tar_blocks(("k.json", b"{}", REGULAR))[:-512], "claims 2 bytes, 0 are left"),
    ],
)
def test_only_the_members_of_the_record_are_taken(blocks: bytes, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        untar("k", blocks)


@settings(max_examples=150, deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120),
    size=st.sampled_from([0, 1, 511, 10**6, 8**11 - 1]),
    changes=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=2),
    tar_format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]),
)
def test_the_quick_way_to_read_a_header_is_tarfiles(
    name: str, size: int, changes: list[tuple[int, int]], tar_format: int
) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        block = bytearray(info.tobuf(tar_format, "utf-8", "strict")[:512])
    except ValueError:  # too long for this format
        return
    for at, value in changes:
        block[at] = value
    try:
        expected = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        with pytest.raises(ValueError, match="no tar header"):
            read_header(bytes(block))
        return
    found = read_header(bytes(block))
    if found.type not in (tarfile.AREGTYPE, tarfile.DIRTYPE):  # tarfile knows folders by a slash
        assert found == (expected.name, expected.size, expected.type)


def test_a_header_with_a_negative_size_is_refused() -> None:
    blocks = bytearray(tar_blocks(("k.json", b"{}", REGULAR)))
    blocks[124:136] = b"\xff" * 11 + b"\x00"  # base-256 for -256
    checksum = sum(blocks[:148]) + 8 * 32 + sum(blocks[156:512])
    blocks[148:156] = b"%06o\0 " % checksum
    with pytest.raises(ValueError, match="claims -256 bytes"):
        untar("k", bytes(blocks))


def replace_record(folder: Path, members: dict[str, bytes]) -> None:
    """Write other members over record (0, 0), with a checksum that fits: a wrong builder."""
    blocks = tar_blocks(
        *((f"clip_0.{name}", content, REGULAR) for name, content in members.items())
    )
    path = folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[: len(blocks)] = blocks
    path.write_bytes(content)
    idx = folder / "shard-000000.idx"
    entries = np.array(ShardIndex.load(folder).entries(0))
    entries[0]["size"], entries[0]["crc32"] = len(blocks), zlib.crc32(blocks)
    idx.write_bytes(entries.tobytes())
    document = json.loads((folder / "index.json").read_text())
    document["shards"][0]["idx_sha256"] = hashlib.sha256(entries.tobytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("missing", "cause"), [("mp4", "members: must be json, mp4"), ("json", "json: must be among")]
)
def test_a_missing_member(folder: Path, records: list[Record], missing: str, cause: str) -> None:
    members = to_members(records[0])
    del members[missing]
    replace_record(folder, members)
    damaged = damaged_keys(folder)
    assert list(damaged) == ["clip_0"] and damaged["clip_0"].startswith(cause)


def test_a_failing_disk_is_not_a_damaged_record(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("data_shards.shards.reader.os.pread", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        open_reader(built).read(0, 1)
    assert "while reading record clip_1 in shard 0" in caught.value.__notes__[0]


def test_short_reads_are_continued(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(
        "data_shards.shards.reader.os.pread",
        lambda fd, size, offset: pread(fd, min(size, 1000), offset),
    )
    assert open_reader(built).read(0, 1).key == "clip_1"


def test_plain_tars_are_streamed(built: Path, records: list[Record], tmp_path: Path) -> None:
    expected = [(record.key, to_members(record)) for record in records]
    assert list(iter_plain(built)) == expected
    assert list(iter_plain(str(built / "shard-000001.tar"))) == expected[3:]
    assert list(iter_plain([built / "shard-000001.tar"])) == expected[3:]
    foreign = tmp_path / "foreign.tar"
    with tarfile.open(foreign, "w") as tar:
        info = tarfile.TarInfo("a/b.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    assert list(iter_plain(foreign)) == [("a/b", {"txt": b"hi"})]
    for nothing in (tmp_path / "none.tar", [], tmp_path / "a"):
        with pytest.raises(FileNotFoundError, match="no tar to read"):
            list(iter_plain(nothing))
