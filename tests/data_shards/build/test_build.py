"""Building shard folders: deterministic, atomic, readable by plain webdataset."""

import gc
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_shards.build.build import BuildOptions, build_shards, extract_frames
from data_shards.build.source_item import Skipped
from data_shards.media.pixels import jpeg_decode
from data_shards.media.video import clip_indices, encode_mp4
from data_shards.shards.index import ENTRY_DTYPE, ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Frames, Record, Turn, Video, from_members
from data_shards.tasks import Task

NUM_FRAMES = 12


@pytest.fixture(scope="module")
def mp4() -> bytes:
    """Frame j is a flat grey of 20 * j."""
    levels = np.arange(NUM_FRAMES, dtype=np.uint8).reshape(-1, 1, 1, 1) * 20
    return encode_mp4(np.broadcast_to(levels, (NUM_FRAMES, 32, 32, 3)).copy(), 25)


def make_record(mp4: bytes, number: int, **changes: object) -> Record:
    record = Record(
        key=f"clip_{number:03d}",
        source="test",
        split="train",
        utterance="Hello there.",
        speaker="Ann",
        sentiment=1.0,
        emotion="joy",
        expressions=("Smile",) if number % 2 else None,
        tasks=(Task.MSA, Task.ER, Task.FER) if number % 2 else (Task.MSA, Task.ER),
        num_frames=NUM_FRAMES,
        peak_frame=7 if number % 2 else None,
        media=Video(mp4=mp4),
    )
    return replace(record, **changes)


def make_records(mp4: bytes, count: int) -> Iterator[Record]:
    return (make_record(mp4, number) for number in range(count))


def test_same_records_give_the_same_bytes(tmp_path: Path, mp4: bytes) -> None:
    first = build_shards(make_records(mp4, 7), tmp_path / "a", provenance={"seed": 1})
    second = build_shards(make_records(mp4, 7), tmp_path / "b", provenance={"seed": 1})
    assert first.fingerprint == second.fingerprint
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["index.json", "shard-000000.idx", "shard-000000.keys", "shard-000000.tar"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_tar_is_plain_ustar_without_traces_of_the_machine(tmp_path: Path, mp4: bytes) -> None:
    build_shards(make_records(mp4, 3), tmp_path / "a", provenance={})
    path = tmp_path / "a" / "shard-000000.tar"
    with tarfile.open(path, "r:") as tar:
        infos = tar.getmembers()
    assert [info.name for info in infos] == [
        f"clip_{number:03d}.{extension}" for number in range(3) for extension in ("json", "mp4")
    ]
    for info in infos:
        assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
        assert info.type == tarfile.REGTYPE and not info.pax_headers
    assert path.stat().st_size % tarfile.RECORDSIZE == 0


# webdataset leaves its tars open for the garbage collector, called here to keep that in this test.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_the_tars(tmp_path: Path, mp4: bytes) -> None:
    webdataset = pytest.importorskip("webdataset")
    build_shards(make_records(mp4, 5), tmp_path / "a", provenance={}, max_records_per_shard=2)
    urls = [str(path) for path in sorted((tmp_path / "a").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()
    assert [sample["__key__"] for sample in samples] == [f"clip_{n:03d}" for n in range(5)]
    for number, sample in enumerate(samples):
        members = {name: sample[name] for name in sample if not name.startswith("__")}
        assert sorted(members) == ["json", "mp4"] and members["mp4"] == mp4
        assert from_members(sample["__key__"], members) == make_record(mp4, number)


def test_limits_cut_shards(tmp_path: Path, mp4: bytes) -> None:
    by_count = build_shards(
        make_records(mp4, 7), tmp_path / "a", provenance={}, max_records_per_shard=3
    )
    assert [shard.records for shard in by_count.shards] == [3, 3, 1]
    one = int(by_count.entries(0)["size"][0])
    by_size = build_shards(make_records(mp4, 7), tmp_path / "b", provenance={}, max_bytes=2 * one)
    assert {shard.records for shard in by_size.shards} <= {1, 2}
    tiny = build_shards(make_records(mp4, 3), tmp_path / "c", provenance={}, max_bytes=1)
    assert [shard.records for shard in tiny.shards] == [1, 1, 1]
    with pytest.raises(ValueError, match="must be at least 1, found 0"):
        build_shards(make_records(mp4, 3), tmp_path / "d", provenance={}, max_records_per_shard=0)


def test_index_says_what_was_built(tmp_path: Path, mp4: bytes) -> None:
    turns = (Turn(speaker="Ann", text="12345"), Turn(speaker="Bob", text="1234567"))
    records = [make_record(mp4, 0), make_record(mp4, 1, conversation=turns, target=1)]
    counts: list[int] = []
    index = build_shards(
        records, tmp_path / "a", provenance={"corpus": "test"}, progress=counts.append
    )
    assert counts == [1, 2]
    document = json.loads((tmp_path / "a" / "index.json").read_text())
    assert document["provenance"] == {"corpus": "test"} == index.provenance
    assert document["options"]["frames"] == "video"
    entries = index.entries(0)
    assert entries["tasks"].tolist() == [0b011, 0b111]
    assert entries["frames"].tolist() == [NUM_FRAMES, NUM_FRAMES]
    assert entries["text_chars"].tolist() == [12, 12 + 3 + 5 + 3 + 7]
    assert ENTRY_DTYPE.itemsize <= 24


def test_a_record_may_be_longer_than_its_estimates(tmp_path: Path, mp4: bytes) -> None:
    index = build_shards(
        [make_record(mp4, 0, utterance="x" * 70_000)], tmp_path / "a", provenance={}
    )
    assert index.entries(0)["text_chars"].tolist() == [65_535]


def test_extracted_frames(tmp_path: Path, mp4: bytes) -> None:
    options = BuildOptions(frames="extracted", frames_per_clip=4, frame_size=16, jpeg_quality=95)
    index = build_shards(make_records(mp4, 2), tmp_path / "a", options=options, provenance={})
    assert index.options == {
        "frames": "extracted",
        "frames_per_clip": 4,
        "frame_size": 16,
        "jpeg_quality": 95,
    }
    reader = ShardReader(tmp_path / "a", index)
    without_peak, with_peak = (reader.read(0, slot).media for slot in range(2))
    assert isinstance(without_peak, Frames) and isinstance(with_peak, Frames)
    assert without_peak.peak_jpeg is None and with_peak.peak_jpeg is not None
    levels = [jpeg_decode(jpeg).mean() for jpeg in (*with_peak.jpegs, with_peak.peak_jpeg)]
    expected = [20 * j for j in (*clip_indices(NUM_FRAMES, 4), 7)]
    np.testing.assert_allclose(levels, expected, atol=4)
    assert jpeg_decode(with_peak.jpegs[0]).shape == (16, 16, 3)


def test_frames_are_extracted_from_intact_videos_only(mp4: bytes) -> None:
    extracted = extract_frames(make_record(mp4, 1), 4, 16, 90)
    with pytest.raises(ValueError, match=r"record clip_001: frames can be extracted from a video"):
        extract_frames(extracted, 4, 16, 90)
    with pytest.raises(ValueError, match="record clip_000: cannot decode the video"):
        extract_frames(make_record(b"broken", 0), 4, 16, 90)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="frames: must be 'video' or 'extracted', found 'jpeg'"):
        BuildOptions(frames="jpeg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="jpeg_quality 1 to 100, found 8, 448 and 101"):
        BuildOptions(jpeg_quality=101)


def test_a_folder_in_use_is_refused(tmp_path: Path, mp4: bytes) -> None:
    out = tmp_path / "a"
    out.mkdir()
    build_shards(make_records(mp4, 1), out, provenance={})  # an empty folder is fine
    before = sorted(out.iterdir())
    with pytest.raises(ValueError, match="output folder must be new or empty, found"):
        build_shards(make_records(mp4, 1), out, provenance={})
    assert sorted(out.iterdir()) == before
    usual = tmp_path / "usual"
    usual.mkdir()
    assert out.stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"key": "clip_000"}, "record clip_000: a key must be unique in the dataset"),
        ({"media": Video(mp4=b"broken")}, "record clip_002: cannot read the video"),
        ({"num_frames": 13}, "record clip_002: num_frames must be what the video has, found 13"),
        ({"key": "k" * 98}, "may have 100 characters in a tar, found 103; shorten the key"),
    ],
)
def test_a_bad_record_stops_the_build_and_leaves_nothing(
    tmp_path: Path, mp4: bytes, changes: dict[str, object], rule: str
) -> None:
    records = [*make_records(mp4, 2), make_record(mp4, 2, **changes)]
    with pytest.raises(ValueError, match=rule):
        build_shards(records, tmp_path / "a", provenance={})
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_folder_is_filled(tmp_path: Path, mp4: bytes) -> None:
    """As a project folder links to scratch; also one whose folder is not there yet."""
    (tmp_path / "scratch" / "empty").mkdir(parents=True)
    for name in ("empty", "new"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "scratch" / name)
        assert build_shards(make_records(mp4, 3), link, provenance={}).num_records == 3
        assert link.is_symlink() and (tmp_path / "scratch" / name / "index.json").is_file()
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["empty", "new"]


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    tmp_path: Path, mp4: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Iterator[Record]:
        raise AssertionError("no record may be asked for")
        yield

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is the working directory, .* name a folder in it"):
        build_shards(never(), ".", provenance={})
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(ValueError, match=r"volume is a mount point, .* name a folder in it"):
        build_shards(never(), "volume", provenance={})
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]
    assert build_shards(make_records(mp4, 1), "volume/a", provenance={}).num_records == 1


def test_a_source_that_fails_or_is_empty_leaves_nothing(tmp_path: Path, mp4: bytes) -> None:
    def failing() -> Iterator[Record]:
        yield make_record(mp4, 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(failing(), tmp_path / "a", provenance={})
    with pytest.raises(ValueError, match="the source gave no record"):
        build_shards([], tmp_path / "a", provenance={})
    gone = Skipped(key="k", source="s", split="t", reason="media-missing", detail="no file k.mp4")
    said = r"no record; .*; left out were 2 media-missing; the first: k: .*: no file k\.mp4"
    with pytest.raises(ValueError, match=said):
        build_shards([gone, gone], tmp_path / "a", provenance={}, strict=False)
    assert list(tmp_path.iterdir()) == []


def test_records_are_streamed(tmp_path: Path, mp4: bytes) -> None:
    """The builder takes a record only after it has written the one before."""
    taken: list[int] = []
    written: list[int] = []

    def source() -> Iterator[Record]:
        for number in range(5):
            assert len(written) == number
            taken.append(number)
            yield make_record(mp4, number)

    index = build_shards(source(), tmp_path / "a", provenance={}, progress=written.append)
    assert isinstance(index, ShardIndex) and written == [1, 2, 3, 4, 5]
