"""Preview shows the texts that training uses, from an index, a plain folder of tars or one tar."""

import json
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.build.build import BuildOptions, build_shards
from data_shards.inspection.preview import preview
from data_shards.media.mp4 import mp4_seconds
from data_shards.shards.record import Record, Turn
from data_shards.tasks import INSTRUCTION, Pair, Task
from launch import cli
from tests.builders import make_clip, make_record


def records() -> list[Record]:
    word = make_record(
        0,
        utterance="Well.",
        sentiment=-1.0,
        emotion=None,
        tasks=(Task.MSA,),
        notes={"identity": 3},
    )
    turns = (Turn(speaker="Ann", text="We won!"), Turn(speaker="Bob", text="No way."))
    pair = replace(
        word,
        key="clip-1",
        utterance="No way.",
        conversation=turns,
        target=2,
        emotion="surprise",
        pairs=(Pair(2, "surprise", 1),),
        expressions=("Jaw Drop",),
        peak_frame=2,
        tasks=(Task.FER, Task.ECPE),
        notes={},
    )
    return [word, pair, replace(word, key="clip-2")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_shards(records(), tmp_path / "shards", provenance={}, max_records_per_shard=2)
    return tmp_path / "shards"


def test_what_is_shown(folder: Path) -> None:
    first, second = preview(folder, 2)
    assert first == {
        "key": "clip-0",
        "source": "test",
        "split": "train",
        "tasks": {
            "msa": {
                "query": f"The person says: Well. <sentiment> {INSTRUCTION[Task.MSA]}",
                "answer": "Negative.",
            }
        },
        "num_frames": 6,
        "peak_frame": None,
        "duration_s": 0.75,
        "stored": "video",
        "media_bytes": len(make_clip()),
        "notes": {"identity": 3},
    }
    assert list(second["tasks"]) == ["fer", "ecpe"]
    assert second["tasks"]["fer"]["answer"] == "Jaw Drop"
    assert second["tasks"]["ecpe"]["answer"] == "2_surprise,1"
    assert second["tasks"]["ecpe"]["query"].startswith("1. Ann: We won!\n2. Bob: No way.\n<emo")


def test_choice_of_records(folder: Path) -> None:
    assert [r["key"] for r in preview(folder, 99)] == ["clip-0", "clip-1", "clip-2"]
    [only] = preview(folder, task=Task.ECPE, give_emotion=True)
    assert only["key"] == "clip-1" and list(only["tasks"]) == ["ecpe"]
    assert only["tasks"]["ecpe"]["query"].endswith("Emotion: surprise")
    assert preview(folder, task=Task.ERI) == []


def test_plain_tars(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_shards.shards.open.default_cache_folder", lambda: tmp_path / "cache")
    whole = preview(folder, 99)
    one = preview(folder / "shard-000000.tar", 99)
    (folder / "index.json").unlink()
    assert preview(folder, 99) == whole
    assert one == whole[:2]
    with tarfile.open(folder / "shard-000001.tar") as tar:
        assert tar.getnames() == ["clip-2.json", "clip-2.mp4"]


def test_extracted_frames_and_save(tmp_path: Path) -> None:
    options = BuildOptions(frames="extracted", frames_per_clip=2, frame_size=28)
    build_shards(records()[1:2], tmp_path / "s", options=options, provenance={})
    [shown] = preview(tmp_path / "s", save=tmp_path / "look")
    assert (shown["stored"], shown["duration_s"], shown["num_frames"]) == ("2 frames", None, 6)
    names = ["clip-1.f0.jpg", "clip-1.f1.jpg", "clip-1.peak.jpg"]
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == names
    assert (
        sum(path.stat().st_size for path in (tmp_path / "look").iterdir()) == (shown["media_bytes"])
    )


def test_save_video(folder: Path, tmp_path: Path) -> None:
    preview(folder, 1, save=tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "clip-0.mp4").read_bytes() == make_clip()


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such folder; build it"):
        preview(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"neither index\.json nor a"):
        preview(tmp_path)
    with pytest.raises(ValueError, match="number of records must be at least 1, found 0"):
        preview(tmp_path, 0)


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def test_duration_of_the_movie_header() -> None:
    old = struct.pack(">IIIII", 0, 0, 0, 600, 1500) + bytes(80)
    new = struct.pack(">IQQIQ", 1 << 24, 0, 0, 1000, 2500) + bytes(80)
    for header in (old, new):
        mp4 = box(b"ftyp", b"isom") + box(b"moov", box(b"udta", b"") + box(b"mvhd", header))
        assert mp4_seconds(mp4) == 2.5
    large = struct.pack(">I4sQ", 1, b"free", 20) + b"free"
    assert mp4_seconds(large + box(b"moov", box(b"mvhd", old))) == 2.5
    assert mp4_seconds(box(b"moov", box(b"mvhd", bytes(100)))) is None  # time scale 0
    assert mp4_seconds(b"") is None


@given(st.one_of(st.binary(max_size=80), st.integers(0, 2000).map(lambda n: make_clip()[:n])))
def test_duration_never_raises(content: bytes) -> None:
    mp4_seconds(content)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preview", str(folder), "-n", "2"]) == 0
    text = capsys.readouterr().out
    assert "clip-0  [test/train]  6 frames, 0.75 s, video, " in text
    assert "  msa   q: The person says: Well. <sentiment> Please" in text
    assert "        a: Negative." in text
    assert "  notes identity=3" in text
    assert "peak 2, video" in text
    assert "\n          2. Bob: No way." in text
    assert cli.main(["preview", str(folder), "--task", "eri"]) == 0
    assert capsys.readouterr().out == "no such record\n"
    assert cli.main(["preview", str(folder), "--task", "eri", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"records": []}
    with pytest.raises(SystemExit):
        cli.main(["preview", str(folder), "--task", "asr"])
