"""The `paper` mode: each described behaviour of the authors' script, and where ours differs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.tasks import EMOTIONS, Pair, Task, format_answer, parse_answer
from emoverse.evaluation.metrics import PAIR_EMOTIONS, Row
from emoverse.evaluation.registry import METRICS
from emoverse.paper.authors_script import (
    DIFFERENCES,
    ScriptResult,
    Text,
    emoverse_ecf2,
    emoverse_emotion,
    emoverse_sentiment,
    other_ecf2,
    other_emotion,
    other_sentiment,
    script_results,
)


def texts(*pairs: tuple[str, str]) -> list[Text]:
    return [Text(f"k{i}", said, label) for i, (said, label) in enumerate(pairs)]


def test_sentiment_is_exact_text_and_neutral_is_wrong() -> None:
    found = emoverse_sentiment(
        texts(
            ("Positive.", "Positive."),
            ("positive", "Positive."),
            (" Positive.", "Positive."),
            ("Neutral.", "Positive."),
            ("Negative.", "Negative."),
            ("Positive.", "Neutral."),  # another label is left out
        )
    )
    assert found.values == {
        "recall_positive": 0.25,
        "recall_negative": 1.0,
        "accuracy": pytest.approx(2 / 5),
    }


@pytest.mark.parametrize("given_texts", [[], texts(("Positive.", "Positive."))])
def test_sentiment_without_a_class_is_undefined(given_texts: list[Text]) -> None:
    found = emoverse_sentiment(given_texts)
    assert found.values == {} and "divides by zero: no record is labelled" in (
        found.undefined or ""
    )


def test_the_inflated_count_of_baseline_models() -> None:
    right = [Text(f"k{i}", "positive", "Positive.", 1.0) for i in range(100)]
    by_name = {one.function: one for one in script_results(Task.MSA, right)}
    assert by_name["other_sentiment"].values["accuracy"] == 1.0
    assert by_name["compute_other_pos"].values["accuracy"] == pytest.approx(1.8387)
    zero = [*right, Text("z", "negative", "Positive.", 0.0)]
    by_name = {one.function: one for one in script_results(Task.MSA, zero)}
    assert by_name["compute_other_pos"].values["accuracy"] == pytest.approx(1.8387)  # left out
    assert by_name["other_sentiment"].values["accuracy"] == pytest.approx(100 / 101)
    unknown = [one._replace(sentiment=None) for one in right]  # no number is no zero
    by_name = {one.function: one for one in script_results(Task.MSA, unknown)}
    assert by_name["compute_other_pos"].values["accuracy"] == pytest.approx(1.8387)


def test_substring_search_of_baseline_models() -> None:
    cases = {
        "not happy but anger": "Anger.",
        "unhappy": "Happy.",
        "Happy": "Neutral.",
        "nothing": "Neutral.",
        "so sad": "Sadness.",
    }
    found = other_emotion(texts(*cases.items()))
    assert found.values["accuracy"] == 1.0
    assert other_sentiment(texts(("nothing at all", "Negative."))).values == {"accuracy": 1.0}


@pytest.mark.parametrize("bad", ["Joy.", "happy", "", "Happy"])
def test_an_unknown_emotion_stops_the_script(bad: str) -> None:
    found = emoverse_emotion(texts(("Happy.", "Happy."), (bad, "Happy.")))
    assert found.undefined == f"stops at the answer {bad!r} of k1"
    found = emoverse_emotion(texts(("Happy.", bad)))
    assert "stops at the label" in (found.undefined or "")


ALL_SIX = texts(*((f"1_{name},1", f"1_{name},1") for name in PAIR_EMOTIONS))


def test_pairs_are_compared_as_texts() -> None:
    assert emoverse_ecf2(ALL_SIX).values == {"f1": 1.0, "weighted_f1": 1.0}
    for odd in ("1_joy,1; 1_joy,2", "U1_joy,1;1_joy,2", "1_joy,1 yes;1_joy,2"):
        found = emoverse_ecf2([*ALL_SIX, *texts((odd, "1_joy,1;1_joy,2"))])
        # one of the two pairs is right: 7 hits, 8 said, 8 true
        assert found.values["f1"] == pytest.approx(7 / 8), odd


def test_a_repeated_pair_gives_an_f1_above_one() -> None:
    thrice = texts(*((";".join([f"1_{n},1"] * 3), f"1_{n},1") for n in PAIR_EMOTIONS))
    assert emoverse_ecf2(thrice).values["f1"] == pytest.approx(1.5)


def test_neutral_costs_micro_precision_only_and_empty_labels_are_free() -> None:
    found = emoverse_ecf2([*ALL_SIX, *texts(("1_neutral,1;1_joy,1", "1_joy,1"), ("9_joy,9", ""))])
    assert found.values["weighted_f1"] == 1.0
    assert found.values["f1"] == pytest.approx(2 * (7 / 8) / (1 + 7 / 8))


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "stops at the pair ''"),
        ("1_joy,1;", "stops at the pair ''"),
        ("joy,1", "no '_'"),
    ],
)
def test_what_stops_the_pair_scorer(response: str, reason: str) -> None:
    assert reason in (emoverse_ecf2(texts((response, "1_joy,1"))).undefined or "")
    assert "surprise is never predicted" in (emoverse_ecf2(ALL_SIX[1:]).undefined or "")
    assert "nothing is right" in (emoverse_ecf2(texts(("1_joy,2", "1_joy,1"))).undefined or "")


def test_any_integer_is_a_cause_for_baseline_models() -> None:
    said = [Text(one.key, "In 2024, utterance 1.", one.label) for one in ALL_SIX]
    found = other_ecf2(said)
    assert found.values["f1"] == pytest.approx(2 * 0.5 / 1.5)  # the emotion is given away
    twice = [Text(one.key, "1 1", one.label) for one in ALL_SIX]
    assert other_ecf2(twice).values["f1"] == pytest.approx(4 / 3)
    free = [*said, Text("no-pair", "1 2 3", "")]  # false causes of an empty label cost nothing
    assert other_ecf2(free) == found
    silent = [Text(one.key, "none", one.label) for one in ALL_SIX]
    assert "divides by zero" in (other_ecf2(silent).undefined or "")


def test_tasks_without_a_script_have_no_result_and_no_difference() -> None:
    for task in Task:
        assert bool(script_results(task, ALL_SIX)) == (task in DIFFERENCES)


exact_pairs = st.builds(
    lambda name, cause: (Pair(1, name, cause),), st.sampled_from(PAIR_EMOTIONS), st.integers(1, 3)
)


@given(st.lists(st.tuples(exact_pairs, exact_pairs), max_size=10))
def test_on_exact_answers_the_script_and_ours_agree(
    answers: list[tuple[tuple[Pair, ...], tuple[Pair, ...]]],
) -> None:
    """Six right pairs make every division defined; then micro and weighted F1 are ours."""
    answers = answers + [((Pair(1, n, 1),),) * 2 for n in PAIR_EMOTIONS]
    script = emoverse_ecf2(
        texts(*(tuple(format_answer(Task.ECPE, a) for a in pair) for pair in answers))
    )
    rows = [
        Row(key=str(i), task=Task.ECPE, reference=true, value=said)
        for i, (said, true) in enumerate(answers)
    ]
    ours = {one.name: one.value(rows) for one in METRICS[Task.ECPE]}
    assert script.values["f1"] == pytest.approx(ours["pair_f1"])
    assert script.values["weighted_f1"] == pytest.approx(ours["weighted_f1"])


@given(st.lists(st.tuples(st.sampled_from(EMOTIONS), st.sampled_from(EMOTIONS)), min_size=1))
def test_on_exact_emotions_the_script_and_ours_agree(pairs: list[tuple[str, str]]) -> None:
    script = emoverse_emotion(
        texts(*(tuple(format_answer(Task.ER, word) for word in pair) for pair in pairs))
    )
    rows = [
        Row(
            key=str(i),
            task=Task.ER,
            reference=true,
            value=parse_answer(Task.ER, format_answer(Task.ER, said), strict=True).value,
        )
        for i, (said, true) in enumerate(pairs)
    ]
    for name, value in script.values.items():
        ours = next(one for one in METRICS[Task.ER] if one.name == name)
        assert value == pytest.approx(ours.value(rows))


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=5))
def test_no_text_makes_the_paper_mode_raise(pairs: list[tuple[str, str]]) -> None:
    for task in Task:
        for found in script_results(task, texts(*pairs)):
            assert isinstance(found, ScriptResult)
            assert bool(found.values) != bool(found.undefined)


def test_an_emotion_without_a_right_pair_has_f1_0() -> None:
    """The script raises only where an emotion is never predicted or never true."""
    wrong_joy = [
        text._replace(response=text.response.replace(",1", ",2")) if "joy" in text.label else text
        for text in ALL_SIX
    ]
    result = emoverse_ecf2(wrong_joy)
    assert result.undefined is None
    assert result.values["weighted_f1"] == pytest.approx(5 / 6)
