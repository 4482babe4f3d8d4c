"""Findings of lint about a record's content, and the quarantine list that a build reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.build.build import build_shards
from data_shards.build.curation import Amendments, read_curation
from data_shards.inspection.lint import lint
from data_shards.inspection.lint_content import ContentLimits
from data_shards.shards.record import Record, Turn, Video
from data_shards.tasks import Pair, Task
from launch import cli
from tests.builders import make_clip, make_record


def word_record(number: int, **changes: Any) -> Record:
    notes = {"season": 1, "episode": 2, "start_s": float(number)}
    media = Video(mp4=make_clip(number))
    return make_record(
        number, **{"utterance": f"Word {number}.", "notes": notes, "media": media, **changes}
    )


TURNS = (Turn(speaker="Ann", text="Hey!"), Turn(speaker="Bob", text="Word 1."))
PAIR = {"conversation": TURNS, "target": 2, "tasks": (Task.ECPE,)}


def warnings_of(tmp_path: Path, *records: Record, **limits: float) -> list[tuple[str, str]]:
    build_shards(records, tmp_path / "s", provenance={})
    report = lint(tmp_path / "s", limits=ContentLimits(**limits))
    assert report.problems == () and report.ok
    return [(warning.key, warning.cause) for warning in report.warnings]


def test_a_good_record_has_no_warning(tmp_path: Path) -> None:
    fear = word_record(
        1, **PAIR, emotion="fear", pairs=(Pair(2, "fear", 1),), expressions=("Jaw Drop",)
    )
    assert warnings_of(tmp_path, word_record(0), fear) == []


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"utterance": " "}, "the utterance is empty"),
        ({"expressions": ("Ears wiggle",)}, "the phrase 'Ears wiggle' is in no phrase table"),
        ({"media": Video(mp4=make_clip(0))}, "has the same media as clip-0"),
        (
            {"utterance": "Word 0.", "notes": word_record(0).notes},
            "has the same words at the same time as clip-0",
        ),
        (
            {"conversation": (TURNS[0], Turn(speaker="Bob", text=" ")), "target": 1},
            "turn 2 of the conversation is empty",
        ),
        (
            {**PAIR, "pairs": (Pair(2, "fear", 1),)},
            "the pairs say fear, the label joy",
        ),
    ],
)
def test_suspicious_content(tmp_path: Path, changes: dict[str, Any], cause: str) -> None:
    assert warnings_of(tmp_path, word_record(0), word_record(1, **changes)) == [("clip-1", cause)]


def test_durations(tmp_path: Path) -> None:
    found = warnings_of(tmp_path, word_record(0), max_seconds=0.5)
    assert found == [("clip-0", "lasts 0.75 s, usual are 0.2 to 0.5 s")]
    with pytest.raises(ValueError, match="min-seconds must be from 0 to max-seconds, found 3 and"):
        ContentLimits(min_seconds=3, max_seconds=2)


def test_the_same_clip_may_serve_two_sources(tmp_path: Path) -> None:
    other = word_record(1, source="other", media=Video(mp4=make_clip(0)))
    same_words = word_record(2, utterance="Word 0.")
    assert warnings_of(tmp_path, word_record(0), other, same_words) == []


def test_quarantine_is_a_curation_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [word_record(n) for n in range(3)] + [
        word_record(3, utterance=""),
        word_record(4, media=Video(mp4=make_clip(0))),
    ]
    build_shards(records, tmp_path / "s", provenance={})
    tar = tmp_path / "s" / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 255
    tar.write_bytes(content)
    out = tmp_path / "quarantine.jsonl"
    words = ["lint", str(tmp_path / "s"), "--quarantine", str(out)]
    assert cli.main(words) == 1
    assert [row["key"] for row in map(json.loads, out.read_text().splitlines())] == ["clip-0"]
    assert cli.main([*words, "--strict", "--json"]) == 1
    capsys.readouterr()
    decisions = read_curation([out])
    assert set(decisions) == {"clip-0", "clip-3"}  # clip-4's twin could not be read
    assert decisions["clip-3"][0].reason == "the utterance is empty"
    index = build_shards(
        records, tmp_path / "t", provenance={}, amend=Amendments(decisions=decisions)
    )
    assert index.keys(0) == ("clip-1", "clip-2", "clip-4")
    assert index.provenance["skipped"] == {"test": {"curation": 2}}
    assert cli.main(["lint", str(tmp_path / "t"), "--strict"]) == 0
    assert cli.main(["lint", str(tmp_path / "t"), "--strict", "--max-seconds", "0.5"]) == 1


def test_an_answer_that_does_not_parse_back_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record has one: the constructor refuses it. So the parser is made stricter here."""
    build_shards([word_record(0)], tmp_path / "s", provenance={})
    from data_shards.inspection import lint_content

    parse: Callable[..., Any] = lint_content.parse_answer
    monkeypatch.setattr(
        lint_content, "parse_answer", lambda task, text, strict: parse(task, "Odd.", strict=True)
    )
    report = lint(tmp_path / "s")
    assert not report.ok
    assert report.problems[0].cause == (
        "the msa answer 'Positive.' does not parse back (not-exact)"
    )
