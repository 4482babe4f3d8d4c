"""FER labels from ready csv files, and from a shard folder by running OpenFace."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from data_shards.annotate.action_units import FerOptions
from data_shards.annotate.fer import annotate_folder
from data_shards.annotate.openface import INTENSITY_AUS, PRESENCE_AUS, Faces, write_openface
from data_shards.build.build import build_shards
from data_shards.media.video import encode_mp4
from data_shards.shards.record import Record, Video
from data_shards.tasks import Task
from launch import cli

# A stand-in for OpenFace's program, same arguments, same file: a row per frame of the clip, a
# smile in the third; no file for a grey clip.
PROGRAM = """#!{python}
import sys
sys.path.insert(0, {root!r})
import numpy as np
from pathlib import Path
from data_shards.media.video import count_frames, decode_frames
from data_shards.annotate.openface import Faces, INTENSITY_AUS, PRESENCE_AUS, write_openface
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
mp4 = Path(words["-f"]).read_bytes()
count = count_frames(mp4)
if decode_frames(mp4, [0]).std() < 5:
    print("Could not find a face")
    sys.exit(0)
intensity = np.zeros((count, 17)); presence = np.zeros((count, 18), bool)
intensity[2, INTENSITY_AUS.index("AU12")] = 3; presence[2, PRESENCE_AUS.index("AU12")] = True
rows = np.arange(count)
write_openface(Path(words["-out_dir"]) / (words["-of"] + ".csv"), Faces(
    frame_R=rows, face_id_R=rows * 0, timestamp_R=rows / 10, confidence_R=rows * 0 + 0.98,
    success_R=rows >= 0, intensity_RI=intensity, presence_RC=presence))
"""
ROOT = Path(__file__).resolve().parents[3]
SMILE = 4  # the frame


def smile() -> Faces:
    """Six frames of one face; AU06 and AU12 at their highest in frame 4."""
    rows = np.arange(6)
    intensity, presence = np.zeros((6, 17)), np.zeros((6, 18), dtype=bool)
    for au in ("AU06", "AU12"):
        intensity[SMILE, INTENSITY_AUS.index(au)] = 3.0
        presence[SMILE, PRESENCE_AUS.index(au)] = True
    return Faces(
        frame_R=rows,
        face_id_R=np.zeros(6, dtype=np.int64),
        timestamp_R=rows / 10,
        confidence_R=np.full(6, 0.98),
        success_R=np.ones(6, dtype=bool),
        intensity_RI=intensity,
        presence_RC=presence,
    )


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_openface(tmp_path / "a.csv", smile())
    write_openface(tmp_path / "b.csv", smile(), spaced=False)
    lines = [{"key": k, "emotion": e} for k, e in (("a", "joy"), ("b", "fear"), ("c", "joy"))]
    emotions = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "emotions.jsonl").write_text(emotions + "\n\n")
    words = ["annotate", "fer", str(tmp_path)]
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "out": str(tmp_path / "fer.jsonl"),
        "clips": 3,
        "annotated": 1,
        "not_annotated": {"no-common-au": 1, "no-csv": 1},
        "openface": {},
    }
    assert [json.loads(line) for line in (tmp_path / "fer.jsonl").read_text().splitlines()] == [
        {
            "key": "a",
            "peak_frame": 4,
            "aus": ["AU06", "AU12"],
            "phrases": ["Cheek Raiser", "Lip Corner Puller"],
        }
    ]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"1 of 3 clips annotated -> {tmp_path / 'fer.jsonl'}",
        "  1 not annotated: no-common-au",
        "  1 not annotated: no-csv",
    ]
    out = tmp_path / "other.jsonl"
    more = ["--out", str(out), "--on-empty", "neutral", "--ties", "last", "--json"]
    assert cli.main([*words, *more]) == 0
    assert json.loads(capsys.readouterr().out)["annotated"] == 2
    assert len(out.read_text().splitlines()) == 2


def test_command_defaults_are_the_papers_reading() -> None:
    args = cli.parse(["annotate", "fer", "dir"])
    for name in FerOptions.__dataclass_fields__:
        value = getattr(args, name)
        assert (tuple(value) if isinstance(value, list) else value) == getattr(FerOptions(), name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "emotions.jsonl:1: must be a JSON object"),
        ("[1]", "emotions.jsonl:1: must be a JSON object, found [1]"),
        ('{"key": "a"}', "emotions.jsonl:1: emotion: must be text, found None"),
        ('\n{"key": 1, "emotion": "joy"}', "emotions.jsonl:2: key: must be text, found 1"),
        ('{"key": "a/b", "emotion": "joy"}', "record key: must be letters"),
        (
            '{"key": "a", "emotion": "joy"}\n{"key": "a", "emotion": "fear"}',
            "emotions.jsonl:2: key: must be unique, found 'a' again",
        ),
    ],
)
def test_damaged_emotions_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "emotions.jsonl").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        annotate_folder(tmp_path)
    assert not list(tmp_path.glob("fer*"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such folder; give a shard folder"):
        annotate_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"emotions\.jsonl: no such file; give a JSONL of"):
        annotate_folder(tmp_path)


# --- a shard folder


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "FeatureExtraction"
    path.write_text(PROGRAM.format(python=sys.executable, root=str(ROOT)))
    path.chmod(0o755)
    return path


def record(key: str, emotion: str | None, *, face: bool = True, **notes: bool) -> Record:
    rgb = np.full((5, 32, 32, 3), 128, np.uint8)
    if face:
        rgb[:, ::8] = 10
    return Record(
        key=key,
        source="test",
        split="train",
        utterance="Hi.",
        speaker="All",
        sentiment=1.0,
        emotion=emotion,
        tasks=(Task.MSA,),
        num_frames=5,
        notes=dict(notes),
        media=Video(mp4=encode_mp4(rgb, fps=10)),
    )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    records = [
        record("a", "joy"),
        record("b", "joy", group_speaker=True),
        record("c", None),
        record("d", "joy", face=False),
    ]
    build_shards(records, tmp_path / "shards", provenance={})
    return tmp_path / "shards"


def test_openface_measures_the_clips_of_a_shard_folder(
    shards: Path,
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    csvs = tmp_path / "csv"
    report = annotate_folder(shards, csv_folder=csvs, openface=str(program))
    assert report["openface"] == {"failed": 1, "measured": 2}
    assert (report["clips"], report["annotated"]) == (3, 2)
    assert report["not_annotated"] == {"no-csv": 1}
    rows = [json.loads(line) for line in (csvs / "fer.jsonl").read_text().splitlines()]
    assert [(row["key"], row["peak_frame"]) for row in rows] == [("a", 2), ("b", 2)]
    assert "Could not find a face" in (csvs / "d.failed").read_text()
    assert sorted(path.name for path in csvs.iterdir()) == [
        "a.csv",
        "b.csv",
        "d.failed",
        "fer.jsonl",
    ]
    # Again, found by its name: what is there is kept.
    monkeypatch.setenv("PATH", str(program.parent))
    words = ["annotate", "fer", str(shards), "--csv", str(csvs), "--group-speakers", "skip"]
    assert cli.main([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["openface"] == {"failed": 1, "there": 2}
    assert again["annotated"] == 1 and again["not_annotated"]["group-speaker"] == 1
    assert cli.main(words) == 0
    assert "  OpenFace: 2 there" in capsys.readouterr().out.splitlines()


def test_without_openface_ready_csv_files_serve(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="a shard folder needs --csv FOLDER"):
        annotate_folder(shards)
    csvs = tmp_path / "csv"
    with pytest.raises(FileNotFoundError, match="FaceLandmarkVidMulti is not on the PATH; install"):
        annotate_folder(shards, csv_folder=csvs, faces="multi")
    with pytest.raises(FileNotFoundError, match="--openface: no program nowhere; give the path of"):
        annotate_folder(shards, csv_folder=csvs, openface="nowhere")
    csvs.mkdir()
    write_openface(csvs / "a.csv", smile())
    report = annotate_folder(shards, csv_folder=csvs)
    assert (report["annotated"], report["not_annotated"]) == (1, {"no-csv": 2})
