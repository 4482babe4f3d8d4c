"""Statistics: counts per task, class and label, and lengths, by hand-made records."""

from pathlib import Path
from typing import Any

import pytest

from data_shards.build.build import build_shards
from data_shards.inspection.counts import cause_position, summary
from data_shards.inspection.stats import stats
from data_shards.shards.record import Record, Turn
from data_shards.tasks import Pair, Task
from launch import cli
from launch.verbs.data.stats import report_text
from tests.builders import make_record


def make(key: str, tasks: tuple[Task, ...], **changes: Any) -> Record:
    turns = tuple(Turn(speaker="Ann", text=f"Turn {n}.") for n in range(1, 4))
    fields = {
        "utterance": "Turn 3.",
        "conversation": turns,
        "target": 3,
        "expressions": ("Smile", "Dimpler"),
        "reason": "She smiles.",
        "pairs": (Pair(3, "joy", 1), Pair(3, "joy", 3)),
        "num_frames": 4,
        "peak_frame": 0,
    }
    return make_record(key, tasks=tasks, **(fields | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [
        make("a", (Task.MSA, Task.ER)),
        make("b", (Task.MSA, Task.ER), sentiment=-2.0, emotion="anger", split="test"),
        make("c", (Task.FER,), expressions=("Smile",), num_frames=8),
        make("d", (Task.ERI, Task.ECPE)),
        make("e", (Task.ECPE,), pairs=()),
    ]
    build_shards(records, tmp_path / "s", provenance={}, max_records_per_shard=3)
    return tmp_path / "s"


def test_counts(folder: Path) -> None:
    report = stats(folder)
    assert (report["records"], report["shards"]) == (5, 2)
    assert report["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert report["tasks"] == {"msa": 2, "er": 2, "fer": 1, "eri": 1, "ecpe": 2}
    assert report["classes"] == {"msa+er": 2, "fer": 1, "ecpe": 1, "eri+ecpe": 1}
    assert report["sources"] == {"test": 5}
    assert report["tasks_by_source"]["test"] == report["tasks"]
    (msa, *_) = report["table_one"]
    assert (msa["name"], msa["found"], msa["parts"]) == ("msa", 2, {"test": 2})
    assert report["splits"] == {"train": 4, "test": 1}
    assert report["labels"] == {
        "msa": {"negative": 1, "positive": 1},
        "er": {"anger": 1, "joy": 1},
        "fer": {"Smile": 1},
        "ecpe": {"joy": 2},
    }
    assert report["cause_place"] == {"2 before": 1, "self": 1}
    assert report["pairs_per_target"]["max"] == 2 and report["pairs_per_target"]["min"] == 0


def test_lengths(folder: Path) -> None:
    lengths = stats(folder)["lengths"]
    assert lengths["frames"] == {"min": 4, "mean": 4.8, "median": 4, "p95": 7.2, "max": 8}
    assert lengths["utterance words"]["max"] == 2
    assert lengths["turns"]["mean"] == 3
    assert lengths["seconds"]["max"] == 1.0  # 8 frames at 8 a second
    assert lengths["eri answer chars"]["max"] == len("She smiles.")
    assert lengths["ecpe answer chars"]["max"] == len("3_joy,1;3_joy,3")
    assert "msa query chars" in lengths


def test_index_only_reads_no_record(folder: Path) -> None:
    whole = stats(folder)
    tar = folder / "shard-000000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    report = stats(folder, index_only=True)
    assert set(whole) - set(report) == {
        "sources",
        "tasks_by_source",
        "splits",
        "labels",
        "pairs_per_target",
        "cause_place",
    }
    assert report["classes"] == whole["classes"] and list(report["lengths"]) == ["frames"]
    with pytest.raises(
        ValueError, match=r"record a in shard-000000\.tar at byte 0: checksum.*emoverse lint"
    ):
        stats(folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        stats(tmp_path / "none")


def test_summary() -> None:
    assert summary([]) == {}
    assert summary([3]) == {"min": 3, "mean": 3, "median": 3, "p95": 3, "max": 3}
    assert summary(range(101))["p95"] == 95


def test_place_of_a_cause() -> None:
    assert [cause_position(3, cause) for cause in (1, 2, 3, 4)] == [
        "2 before",
        "1 before",
        "self",
        "1 after",
    ]


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    squeezed = [" ".join(line.split()) for line in lines]
    assert squeezed[0].startswith(f"{folder}: 5 records in 2 shards, ")
    for expected in (
        "sources: test 5",
        "splits: train 4, test 1",
        "msa 2 40.0%",
        "eri+ecpe 1 20.0%",
        "er: emotion",
        "anger 1 50.0%",
        "pairs per target: mean 1.0, max 2",
        "frames 4 4.8 4 7.2 8",
    ):
        assert expected in squeezed
    assert cli.main(["stats", str(folder), "--index-only"]) == 0
    short = capsys.readouterr().out
    assert "anger" not in short and "entries per task" in short


def test_long_label_tables_are_cut_for_people() -> None:
    report = {
        "folder": "f",
        "records": 0,
        "shards": 1,
        "bytes": 0,
        "tasks": {},
        "classes": {},
        "labels": {"fer": {f"Phrase {n}": 1 for n in range(20)}},
        "lengths": {},
    }
    text = report_text(report)
    assert "Phrase 11" in text and "Phrase 12" not in text and "... and 8 more" in text
