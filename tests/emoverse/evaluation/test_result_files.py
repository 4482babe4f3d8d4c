"""Result files of other systems are read, scored, and refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.tasks import POLARITIES, Pair, Task
from emoverse.evaluation.metrics import Row, acc2_nn, acc2_np, pair_counts
from emoverse.evaluation.parsing import MODES, Mode, read_text
from emoverse.evaluation.registry import METRICS
from emoverse.evaluation.result_files import expected_rows, read_results, score_results
from tests.builders import make_record, make_shards


def swift2(**fields: Any) -> dict[str, Any]:
    return {"system": None, "history": [], "images": ["128258/9.png"], **fields}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_result_files_of_ms_swift_are_scored(tmp_path: Path) -> None:
    asked = "The person says: hm. <emotion> Please determine"
    talk = "1. Anna: hm\n2. Ben: no\n<emotion cause-pair> Please extract Target 2: no"
    messages = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": f"<video>{asked}"},
        {"role": "assistant", "content": "happy"},
    ]
    path = write(
        tmp_path / "results.jsonl",
        swift2(query=asked, response="Happy.", label="Happy."),
        {"response": "happy", "labels": "Happy.", "logprobs": None, "messages": messages},
        swift2(query=f"{asked} now", response="who knows", label="Anger."),
        swift2(query=talk, response="2_joy,1;2_joy,2", label="2_joy,1"),
    )
    found = read_results(path)
    assert [one.row.task for one in found] == [Task.ER] * 3 + [Task.ECPE]
    assert [one.row.key for one in found] == [
        "128258/9.png",
        "line-2",
        "128258/9.png#2",
        "128258/9.png",
    ]
    assert [one.row.status for one in found[:3]] == ["parsed", "repaired", "unparseable"]
    assert found[3].row.target == 2 and found[3].row.emotion == "joy" and found[3].row.conversation
    metrics = score_results(path)
    er = metrics["tasks"]["er"]
    assert er["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert er["majority_fitted_on"] == "evaluated records"
    ecpe = metrics["tasks"]["ecpe"]
    assert ecpe["metrics"]["pair_f1"]["value"] == pytest.approx(2 / 3)
    assert set(ecpe["baselines"]) == {"self", "self+previous"}
    assert er["paper"]["script"][0]["undefined"].startswith("stops at the answer 'happy'")
    assert er["paper"]["counted_otherwise"] == 1
    strict = score_results(path, mode="strict")
    assert strict["tasks"]["er"]["unparseable"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"response": "Happy.", "label": "Happy."}, "the task is not known: no key 'task'"),
        ({"task": "emotion", "response": "", "label": ""}, "task: must be one of msa, er"),
        ({"task": "er", "response": "Happy."}, "'response' and 'label' .* must be texts"),
        ({"task": "er", "response": "Happy.", "label": "so-so"}, "the label 'so-so' is no er"),
        (["Happy."], "a line must be a JSON object"),
        *(
            (
                {"task": "msa", "response": "Positive.", "label": "Positive.", "sentiment": one},
                "sentiment: must be a number from -3 to 3, found ",
            )
            for one in ("0.0", float("nan"), 7, True)
        ),
    ],
)
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl:1: not a result: {message}"):
        read_results(path)


def test_the_last_question_of_a_conversation_is_the_one_that_is_answered(tmp_path: Path) -> None:
    """Earlier turns may ask for another task; a query that names two tasks says nothing."""
    asked = [{"role": "user", "content": f"{name} Please"} for name in ("<sentiment>", "<emotion>")]
    line = {"response": "Happy.", "label": "Happy.", "messages": asked}
    (found,) = read_results(write(tmp_path / "turns.jsonl", line))
    assert (found.row.task, found.question) == (Task.ER, "<emotion> Please")
    both = swift2(query="<emotion> or <sentiment>?", response="Happy.", label="Happy.")
    with pytest.raises(ValueError, match="the task is not known"):
        read_results(write(tmp_path / "both.jsonl", both))


def test_missing_and_empty_result_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file; give a jsonl file"):
        read_results(tmp_path / "no.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"response": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl:1: must be UTF-8: "):
        read_results(tmp_path / "latin.jsonl")
    with pytest.raises(ValueError, match="holds no answer"):
        read_results(write(tmp_path / "empty.jsonl"))
    named = write(tmp_path / "named.jsonl", {"response": "Happy.", "labels": "Happy."})
    assert read_results(named, task=Task.ER)[0].row.reference == "joy"


@pytest.mark.parametrize(
    ("text", "number", "value"),
    [
        ("1.4", 1.4, "positive"),
        (" -0.2 ", -0.2, "negative"),
        ("0", 0.0, "positive"),
        ("+2.", 2.0, "positive"),
        ("2.5.", 2.5, "positive"),
        ("4", None, None),
        ("1.2 or so", None, None),
        ("Negative.", None, "negative"),
    ],
)
def test_an_intensity_is_one_number_on_the_scale(
    text: str, number: float | None, value: str | None
) -> None:
    row = Row(key="a", task=Task.MSA, reference="positive", value=None)
    found, rule = read_text(row, text)
    assert (found.number, found.value) == (number, value)
    if number is not None:
        assert (found.status, rule) == ("repaired", "number")
        assert read_text(row, text, mode="strict")[0].value is None


def test_pairs_of_a_result_are_pairs(tmp_path: Path) -> None:
    line = {"task": "ecpe", "response": "", "label": "3_joy,1", "id": 7}
    (found,) = read_results(write(tmp_path / "r.jsonl", line))
    assert found.row.reference == (Pair(3, "joy", 1),)
    assert found.row.value == () and found.row.key == "7"


@given(st.text(max_size=40), st.sampled_from(list(Task)), st.sampled_from(MODES))
def test_reading_never_raises_and_says_what_it_did(text: str, task: Task, mode: Mode) -> None:
    found, rule = read_text(
        Row(key="a", task=task, reference="positive", value=None), text, mode=mode
    )
    assert found.response == text and rule
    assert (found.value is None) == (found.status == "unparseable")
    assert mode != "strict" or found.status != "repaired"
    if found.number is not None:
        assert -3 <= found.number <= 3 and found.value in POLARITIES


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        ("1_disgust,1;1_love,2;9_confusion,2", [1, 3, 1]),
        ("1_disgust,1;-1_fear,1", [1, 2, 1]),
        ("1_disgust,1;1_joy,2.7", [1, 2, 1]),
        ("1_disgust,1;0_joy,1", [1, 2, 1]),
        ("1_disgust,1;x_joy,y;x_joy,y", [1, 2, 1]),
        ("1_love,1", [0, 1, 1]),
        ("- 1_disgust,1", [1, 1, 1]),
        ("The pair is 1_disgust,1.", [1, 1, 1]),
        ("1_disgust,1", [1, 1, 1]),
    ],
)
def test_an_unreadable_pair_is_a_wrong_pair(answer: str, counts: list[float]) -> None:
    row = Row(key="a", task=Task.ECPE, reference=(Pair(1, "disgust", 1),), value=None)
    row, _ = read_text(row, answer)
    assert pair_counts(row) == counts
    precision, recall = counts[0] / counts[1], counts[0] / counts[2]
    f1 = 2 * precision * recall / (precision + recall) if counts[0] else 0.0
    for name in ("pair_f1", "cause_f1", "official_f1"):
        metric = next(metric for metric in METRICS[Task.ECPE] if metric.name == name)
        assert metric.value([row]) == pytest.approx(f1, abs=1e-6), name


def test_a_neutral_sentiment_is_a_predicted_zero_on_request() -> None:
    def scores(sentiment: float, mode: Mode) -> tuple[list[float], list[float]]:
        label = "positive" if sentiment >= 0 else "negative"
        row = Row(key="a", task=Task.MSA, reference=label, value=None, sentiment=sentiment)
        row, _ = read_text(row, "Neutral.", mode=mode)
        return acc2_nn(row), acc2_np(row)

    # MMSA: 0 is non-negative in N/N and negative in N/P, where references of 0 do not count.
    assert scores(1.0, "mmsa") == ([1, 1], [0, 1])
    assert scores(-1.0, "mmsa") == ([0, 1], [1, 1])
    assert scores(0.0, "mmsa") == ([1, 1], [0, 0])
    assert scores(1.0, "tolerant") == ([0, 1], [0, 1])
    assert scores(1.0, "strict") == ([0, 1], [0, 1])


def er_line(key: str, answer: str, label: str = "Happy.") -> dict[str, Any]:
    return {"task": "er", "id": key, "response": answer, "label": label}


def test_missing_clips_count_as_wrong(tmp_path: Path) -> None:
    expected = write(tmp_path / "all.jsonl", *(er_line(key, "") for key in "abcd"))
    path = write(tmp_path / "r.jsonl", er_line("a", "Happy."), er_line("c", "Anger."))
    er = score_results(path, expect=expected)["tasks"]["er"]
    assert er["n"] == 4 and er["metrics"]["accuracy"]["value"] == 0.25
    assert er["answers"] == {"missing": 2, "parsed": 2}
    assert score_results(path)["tasks"]["er"]["metrics"]["accuracy"]["value"] == 0.5


def test_what_is_not_expected_is_refused(tmp_path: Path) -> None:
    expected = write(tmp_path / "all.jsonl", er_line("a", ""), er_line("b", ""))
    path = write(tmp_path / "r.jsonl", er_line("a", "Happy."), er_line("x", "Happy."))
    with pytest.raises(ValueError, match=r"1 answers are to clips that are not expected.* er of x"):
        score_results(path, expect=expected)
    path = write(tmp_path / "r.jsonl", er_line("a", "Happy.", label="Fear."))
    with pytest.raises(ValueError, match=r"er of a: the label must be 'joy'.*found 'fear'"):
        score_results(path, expect=expected)


@pytest.mark.parametrize("extra", [{}, {"query": "1. A: hm <emotion cause-pair> Please"}])
def test_a_repeated_answer_is_refused(tmp_path: Path, extra: dict[str, str]) -> None:
    line = {"task": "ecpe", "id": "c1", "response": "1_joy,1", "label": "1_joy,1", **extra}
    path = write(tmp_path / "r.jsonl", line, line)
    with pytest.raises(ValueError, match=r"r.jsonl:2: .*ecpe of c1 is answered on line 1 already"):
        read_results(path)


def test_shards_give_the_intensity_that_a_file_lacks(tmp_path: Path) -> None:
    shards = make_shards(
        tmp_path / "shards", [make_record(f"clip_{n}", sentiment=0.5) for n in range(3)]
    )
    keys = [row.key for row in expected_rows(shards, [Task.MSA]).values()]
    lines = [{"task": "msa", "id": key, "response": "1.5", "label": "Positive."} for key in keys]
    msa = score_results(write(tmp_path / "r.jsonl", *lines), expect=shards)["tasks"]["msa"]
    assert msa["metrics"]["mae"]["value"] == pytest.approx(1.0)  # every clip has 0.5
