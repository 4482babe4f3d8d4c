"""Decisions about records: read strictly, applied before storing, reported by the build."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_shards.build.build import build_shards
from data_shards.build.curation import Amendments, Decision, read_curation, write_curation
from data_shards.build.source_item import Skipped
from data_shards.jsonl import read_rows
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Record, Turn
from data_shards.tasks import Pair, Task
from launch import cli
from tests.builders import make_record


def pair_record(number: int = 0) -> Record:
    return make_record(
        number,
        utterance="Well.",
        conversation=(Turn(speaker="Ann", text="Well."),),
        target=1,
        sentiment=None,
        pairs=(Pair(1, "joy", 1),),
        tasks=(Task.ER, Task.ECPE),
    )


def read(tmp_path: Path, *lines: dict[str, Any]) -> dict[str, tuple[Decision, ...]]:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_curation([path])


def correct(name: str, value: Any) -> dict[str, Any]:
    return {"key": "clip-0", "action": "correct", "field": name, "value": value}


def test_what_decisions_do(tmp_path: Path) -> None:
    keep = {"key": "clip-0", "action": "keep", "reason": "fine"}
    assert Amendments(decisions=read(tmp_path, keep))(pair_record()) == pair_record()
    drop = {"key": "clip-0", "action": "drop", "reason": "black picture"}
    dropped = Amendments(decisions=read(tmp_path, drop))(pair_record())
    assert isinstance(dropped, Skipped) and dropped.detail == "black picture"
    fixes = [
        correct("emotion", "fear"),
        correct("utterance", "Oh \u2013 well."),
        correct("pairs", [[1, "fear", 1]]),
        correct("tasks", ["er"]),
        correct("sentiment", -1),
    ]
    fixed = Amendments(decisions=read(tmp_path, *fixes))(pair_record())
    assert isinstance(fixed, Record)
    assert (fixed.emotion, fixed.sentiment, fixed.tasks) == ("fear", -1.0, (Task.ER,))
    assert fixed.utterance == "Oh \u2013 well." and fixed.pairs == (Pair(1, "fear", 1),)
    assert fixed.media == pair_record().media
    assert Amendments(decisions=read(tmp_path, drop))(pair_record(1)) == pair_record(1)


def test_reasons_make_a_task(tmp_path: Path) -> None:
    amended = Amendments(reasons={"clip-0": "Her  smile\nsays it."})(pair_record())
    assert isinstance(amended, Record)
    assert amended.tasks == (Task.ER, Task.ERI, Task.ECPE)
    assert amended.reason == "Her smile says it."
    both = Amendments(
        reasons={"clip-0": "Her smile says it."}, decisions=read(tmp_path, correct("reason", "No."))
    )(pair_record())
    assert isinstance(both, Record) and both.reason == "No."  # people have the last word


def test_decisions_survive_their_file(tmp_path: Path) -> None:
    decisions = [
        Decision(key="a", action="keep"),
        Decision(key="b", action="drop", reason="x"),
        Decision(key="c", action="correct", field="emotion", value=None, reason="?"),
    ]
    write_curation(tmp_path / "c.jsonl", decisions)
    found = read_curation([tmp_path / "c.jsonl"])
    assert [found[key][0].to_json() for key in "abc"] == [d.to_json() for d in decisions]


def test_the_last_file_decides_about_a_key(tmp_path: Path) -> None:
    write_curation(tmp_path / "1", [Decision(key=k, action="drop") for k in "ab"])
    write_curation(tmp_path / "2", [Decision(key="a", action="keep")])
    found = read_curation([tmp_path / "1", tmp_path / "2"])
    assert {key: decisions[0].action for key, decisions in found.items()} == {
        "a": "keep",
        "b": "drop",
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"action": "keep"}], r"c\.jsonl:1: key: must be text, found None"),
        ([{"key": "a", "action": "burn"}], r"action: must be one of keep, drop, correct, found 'b"),
        ([{"key": "a", "action": "keep", "why": 1}], r"c\.jsonl:1: why: is not a field of a dec"),
        ([{"key": "a", "action": "keep", "reason": 1}], r"reason: must be text, found 1"),
        ([{"key": "a", "action": "correct", "field": "key", "value": 1}], r"a field of utterance"),
        ([{"key": "a", "action": "correct", "field": "emotion"}], r"needs a value and a field"),
        (
            [correct("emotion", "fear"), correct("emotion", "joy")],
            r"c\.jsonl:2: key clip-0: emotion is corrected to 'joy', but on .*c\.jsonl:1 to 'fear'",
        ),
        (
            [{"key": "a", "action": "keep"}, {"key": "a", "action": "drop"}],
            r"c\.jsonl:2: key a: drop contradicts keep on .*c\.jsonl:1; keep one of the lines",
        ),
    ],
)
def test_lines_are_checked(tmp_path: Path, lines: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, *lines)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("emotion", "glad", "emotion: must be one of neutral"),
        ("sentiment", "good", "sentiment: must be of type float"),
        ("pairs", [[2, "joy", 1]], "pairs: must have the record's target 1"),
        ("tasks", ["fer"], "expressions: must be given because the tasks name fer"),
    ],
)
def test_impossible_corrections_stop_the_build(
    tmp_path: Path, name: str, value: Any, rule: str
) -> None:
    amend = Amendments(decisions=read(tmp_path, correct(name, value)))
    message = rf"c\.jsonl:1: this correction is not possible: record clip-0: {rule}"
    with pytest.raises(ValueError, match=message):
        build_shards([pair_record()], tmp_path / "s", provenance={}, amend=amend, strict=False)


def test_rows_need_json_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(FileNotFoundError, match="no such file; give a thing"):
        list(read_rows(path, "a thing"))
    path.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:3: must be a JSON object, found \[1\]"):
        list(read_rows(path, "a thing"))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: must be a JSON object: "):
        list(read_rows(path, "a thing"))
    path.write_bytes(b'{"a": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"x\.jsonl: must be UTF-8: "):
        list(read_rows(path, "a thing"))


def test_build_reads_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_curation(
        tmp_path / "c.jsonl",
        [
            Decision(key="syn-train-000001", action="drop", reason="odd"),
            Decision(key="syn-train-000002", action="keep"),
            Decision(key="syn-train-000003", action="correct", field="speaker", value="Zoe"),
            Decision(key="syn-train-999999", action="drop"),
        ],
    )
    (tmp_path / "r.jsonl").write_text(
        '{"key": "syn-train-000000", "reason": "So it is."}\n{"key": "syn-test-0", "reason": "No."}'
    )
    words = ["build", "synthetic", "--clips", "4", "--out", str(tmp_path / "s"), "--json"]
    words += ["--curation", str(tmp_path / "c.jsonl"), "--reasons", str(tmp_path / "r.jsonl")]
    assert cli.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["records"] == 3 and report["skipped"] == {"synthetic": {"curation": 1}}
    assert report["curation"] == {
        "keep": 1,
        "drop": 1,
        "correct": 1,
        "reasons": 1,
        "reasons_of_other_clips": 1,
        "unknown_keys": ["syn-train-999999"],
    }
    index = ShardIndex.load(tmp_path / "s")
    assert index.provenance["curation"][0]["name"] == "c.jsonl"
    assert set(index.provenance["versions"]) >= {"python", "av", "numpy", "pillow"}
    reader = ShardReader(tmp_path / "s", index)
    assert reader.read(0, 0).reason == "So it is."
    assert reader.read(0, 2).speaker == "Zoe"
    reader.close()
    assert cli.main(words) == 0  # nothing is left to do
    again = json.loads(capsys.readouterr().out)
    assert again["already_built"] and again["fingerprint"] == report["fingerprint"]
    assert cli.main([*words, "--seed", "1"]) == 2
    assert "must be new or empty" in capsys.readouterr().err
