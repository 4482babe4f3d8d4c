"""The literature's definitions: published rule baselines on real labels, oracles, invariants."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from data_shards.tasks import EMOTIONS, Pair, Task
from emoverse.evaluation.baselines import RULES, neighbour_pairs, rule_rows
from emoverse.evaluation.intervals import score
from emoverse.evaluation.metrics import PAIR_EMOTIONS, Metric, Row
from emoverse.evaluation.registry import METRICS

LABELS = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_labels = pytest.mark.skipif(
    not (LABELS / "labels").is_dir(), reason="the real annotation files are not on this machine"
)


def metric(task: Task, name: str) -> Metric:
    return next(one for one in METRICS[task] if one.name == name)


def percent(task: Task, name: str, rows: list[Row]) -> float:
    return round(100 * metric(task, name).value(rows), 1)


# --- the real test sets ---

Targets = list[tuple[int, str, int, tuple[Pair, ...]]]  # conversation, emotion, number, true pairs


def ecf2_targets() -> Targets:
    """Every non-neutral utterance of the ECF 2.0 test set with its true pairs."""
    pairs: dict[tuple[int, int], list[Pair]] = {}
    for one in json.loads((LABELS / "labels" / "gold_subtask2_test_pairs.json").read_text()):
        for effect, cause in one["emotion-cause_pairs"]:
            number, emotion = effect.split("_")
            key = (one["conversation_ID"], int(number))
            pairs.setdefault(key, []).append(Pair(int(number), emotion, int(cause)))
    conversations = json.loads((LABELS / "ECF2" / "Subtask_2_test.json").read_text())
    return [
        (
            one["conversation_ID"],
            turn["emotion"],
            turn["utterance_ID"],
            tuple(sorted(pairs.get((one["conversation_ID"], turn["utterance_ID"]), ()))),
        )
        for one in conversations
        for turn in one["conversation"]
        if turn["emotion"] != "neutral"
    ]


def ecpe_rows(answer: Callable[[int, str], tuple[Pair, ...]]) -> list[Row]:
    return [
        Row(
            key=f"{conversation}-{number}",
            task=Task.ECPE,
            reference=truth,
            value=answer(number, emotion),
            emotion=emotion,
            target=number,
            conversation=str(conversation),
        )
        for conversation, emotion, number, truth in ecf2_targets()
    ]


def only_previous(number: int, emotion: str) -> tuple[Pair, ...]:
    return (Pair(number, emotion, number - 1),) if number > 1 else ()


@needs_labels
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda n, e: neighbour_pairs(n, e, previous=0), (57.8, 57.7, 56.8, 56.7)),
        (lambda n, e: neighbour_pairs(n, e, previous=1), (66.5, 66.4, 65.0, 65.0)),
        (lambda n, e: neighbour_pairs(n, e, previous=2), (60.6, 60.6, 59.1, 59.1)),
        (only_previous, (34.8, 34.8, 34.3, 34.4)),
        (lambda n, e: neighbour_pairs(n, e, previous=n), (33.8, 33.8, 32.9, 33.0)),
    ],
    ids=["self", "self+previous", "self+2", "previous", "all"],
)
def test_both_ecpe_protocols_give_the_known_rule_baselines_of_ecf2(
    rule: Callable[[int, str], tuple[Pair, ...]], expected: tuple[float, ...]
) -> None:
    rows = ecpe_rows(rule)
    names = ("pair_f1", "weighted_f1", "official_f1", "official_weighted_f1")
    assert tuple(percent(Task.ECPE, name, rows) for name in names) == expected


@needs_labels
def test_the_stored_rules_of_ecpe_are_those_of_the_table() -> None:
    rows = ecpe_rows(lambda n, e: ())
    assert len(rows) == 1821 and sum(len(row.reference) for row in rows) == 2462
    found = {
        rule: percent(Task.ECPE, "pair_f1", rule_rows(rule, Task.ECPE, [], rows, give_emotion=True))
        for rule in RULES[Task.ECPE]
    }
    assert found == {"self+previous": 66.5, "self": 57.8}


@needs_labels
def test_constant_answers_on_the_real_labels_of_mosei_and_meld() -> None:
    numbers = json.loads((LABELS / "labels" / "mosei_test_labels.json").read_text())
    values = next(v for v in numbers.values() if isinstance(v, list) and isinstance(v[0], float))
    rows = [
        Row(key=str(i), task=Task.MSA, reference="?", value="positive", sentiment=value)
        for i, value in enumerate(values)
    ]
    assert (percent(Task.MSA, "acc2_nn", rows), percent(Task.MSA, "acc2_np", rows)) == (71.0, 62.8)
    names = json.loads((LABELS / "labels" / "meld_test_labels.json").read_text())
    emotions = next(
        v for v in names.values() if isinstance(v, list) and str(v[0]).lower() in EMOTIONS
    )
    rows = [
        Row(key=str(i), task=Task.ER, reference=name, value="neutral")
        for i, name in enumerate(emotions)
    ]
    assert (percent(Task.ER, "accuracy", rows), percent(Task.ER, "weighted_f1", rows)) == (
        48.1,
        31.3,
    )


# --- sentiment as a number ---


def number_rows(pairs: list[tuple[float, float | None]]) -> list[Row]:
    return [
        Row(key=str(i), task=Task.MSA, reference="?", value=None, sentiment=true, number=said)
        for i, (true, said) in enumerate(pairs)
    ]


def test_halves_are_rounded_to_even_and_values_are_clipped() -> None:
    rows = number_rows([(0.0, 0.5), (2.0, 1.5), (2.0, 2.5), (3.0, 7.0), (-3.0, -2.5)])
    assert metric(Task.MSA, "acc7").value(rows) == 4 / 5  # -2.5 rounds to -2
    assert metric(Task.MSA, "acc5").value(rows) == 1.0
    assert metric(Task.MSA, "acc3").value(rows) == 1.0
    assert metric(Task.MSA, "mae").value(rows) == (0.5 + 0.5 + 0.5 + 4.0 + 0.5) / 5


def test_a_predicted_zero_is_non_negative_but_not_positive() -> None:
    rows = number_rows([(1.0, 0.0), (-1.0, 0.0), (0.0, 0.0)])
    assert metric(Task.MSA, "acc2_nn").value(rows) == 2 / 3
    assert metric(Task.MSA, "acc2_np").value(rows) == 1 / 2


def test_without_numbers_no_regression_metric_and_unreadable_is_as_far_as_can_be() -> None:
    words = [Row(key="a", task=Task.MSA, reference="?", value="positive", sentiment=1.0)]
    assert math.isnan(metric(Task.MSA, "mae").value(words))
    assert score(metric(Task.MSA, "acc7"), words).n == 0
    rows = number_rows([(1.0, 1.0), (1.0, None), (-2.0, None)])
    assert metric(Task.MSA, "mae").value(rows) == (0 + 4 + 5) / 3
    assert metric(Task.MSA, "acc3").value(rows) == 1 / 3


scale = st.floats(-3.5, 3.5, width=16)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(scale, scale), min_size=3, max_size=30))
def test_number_metrics_equal_the_oracles(pairs: list[tuple[float, float]]) -> None:
    true, said = (np.array(side) for side in zip(*pairs, strict=True))
    rows = number_rows(pairs)
    for limit in (3, 2, 1):
        same = np.round(np.clip(said, -limit, limit)) == np.round(np.clip(true, -limit, limit))
        assert metric(Task.MSA, f"acc{2 * limit + 1}").value(rows) == pytest.approx(same.mean())
    assert metric(Task.MSA, "mae").value(rows) == pytest.approx(np.abs(said - true).mean())
    assert metric(Task.MSA, "acc2_nn").value(rows) == pytest.approx(
        ((said >= 0) == (true >= 0)).mean()
    )
    expected = f1_score(true >= 0, said >= 0, average="weighted", zero_division=0)
    assert metric(Task.MSA, "f1_nn").value(rows) == pytest.approx(expected)
    kept = true != 0
    if kept.any():
        hits = (said[kept] > 0) == (true[kept] > 0)
        assert metric(Task.MSA, "acc2_np").value(rows) == pytest.approx(hits.mean())
        expected = f1_score(true[kept] > 0, said[kept] > 0, average="weighted", zero_division=0)
        assert metric(Task.MSA, "f1_np").value(rows) == pytest.approx(expected)
    found = metric(Task.MSA, "corr").value(rows)
    if np.std(true) > 1e-3 and np.std(said) > 1e-3:
        assert found == pytest.approx(np.corrcoef(true, said)[0, 1], abs=1e-6)
    elif np.ptp(true) == 0 or np.ptp(said) == 0:
        assert math.isnan(found)


# --- pairs ---

few_pairs = st.lists(
    st.builds(Pair, st.integers(1, 3), st.sampled_from(EMOTIONS[:4]), st.integers(1, 3)),
    max_size=3,
).map(lambda pairs: tuple(sorted(set(pairs))))
answered = st.lists(st.tuples(st.integers(0, 2), few_pairs, few_pairs), min_size=1, max_size=12)


def official_oracle(rows: list[Row]) -> tuple[float, float]:
    """Micro and weighted F1 over [conversation, target, cause, emotion] items, without neutral."""
    said = {(r.conversation, p) for r in rows for p in r.value or () if p.emotion != "neutral"}
    true = {(r.conversation, p) for r in rows for p in r.reference if p.emotion != "neutral"}

    def f1(said: set[object], true: set[object]) -> float:
        precision = len(said & true) / (len(said) + 1e-8)
        recall = len(said & true) / (len(true) + 1e-8)
        return 2 * precision * recall / (precision + recall + 1e-8)

    weighted = math.nan
    if true:
        weighted = sum(
            f1(*({item for item in items if item[1].emotion == name} for items in (said, true)))
            * sum(item[1].emotion == name for item in true)
            / len(true)
            for name in PAIR_EMOTIONS
        )
    return f1(said, true), weighted


@settings(max_examples=80, deadline=None)
@given(answered)
def test_the_official_protocol_equals_plain_sets(
    items: list[tuple[int, tuple[Pair, ...], tuple[Pair, ...]]],
) -> None:
    rows = [
        Row(key=str(i), task=Task.ECPE, reference=true, value=said, conversation=f"c{group}")
        for i, (group, true, said) in enumerate(items)
    ]
    micro, weighted = official_oracle(rows)
    assert metric(Task.ECPE, "official_f1").value(rows) == pytest.approx(micro)
    found = metric(Task.ECPE, "official_weighted_f1").value(rows)
    assert found == pytest.approx(weighted, nan_ok=True)


def test_a_target_without_cause_counts_in_the_official_protocol_only() -> None:
    right = Row(
        key="a",
        task=Task.ECPE,
        reference=(Pair(1, "joy", 1),),
        value=(Pair(1, "joy", 1),),
        conversation="c",
    )
    false = Row(key="b", task=Task.ECPE, reference=(), value=(Pair(2, "joy", 2),), conversation="c")
    assert metric(Task.ECPE, "pair_f1").value([right, false]) == 1.0
    assert metric(Task.ECPE, "official_f1").value([right, false]) == pytest.approx(2 / 3)
    again = dataclasses.replace(false, key="d", value=right.value)  # said twice, a set counts once
    assert metric(Task.ECPE, "official_f1").value([right, again]) == pytest.approx(1.0)
    assert score(metric(Task.ECPE, "official_f1"), [right, again]).n == 1


def test_neutral_pairs_are_ignored_officially_and_cost_precision_in_the_papers_protocol() -> None:
    true = (Pair(1, "joy", 1),)
    row = Row(key="a", task=Task.ECPE, reference=true, value=(*true, Pair(1, "neutral", 2)))
    assert metric(Task.ECPE, "official_f1").value([row]) == pytest.approx(1.0)
    assert metric(Task.ECPE, "pair_f1").value([row]) == pytest.approx(2 / 3)
    assert metric(Task.ECPE, "weighted_f1").value([row]) == 1.0


# --- what holds for every metric ---

words = st.sampled_from(["a", "b", "c", "joy because", "he is sad"])
SAID_AND_TRUE = {
    Task.MSA: (st.sampled_from(["positive", "negative"]), st.sampled_from(["positive"])),
    Task.ER: (st.sampled_from(EMOTIONS), st.sampled_from(EMOTIONS)),
    Task.FER: (st.lists(words, min_size=1, max_size=3).map(tuple),) * 2,
    Task.ERI: (words, words),
    Task.ECPE: (few_pairs, few_pairs),
}


@st.composite
def any_rows(draw: st.DrawFn) -> list[Row]:
    task = draw(st.sampled_from(list(Task)))
    said, true = SAID_AND_TRUE[task]
    numbers = task is Task.MSA and draw(st.booleans())
    return [
        Row(
            key=str(i),
            task=task,
            reference=draw(true),
            value=draw(st.one_of(st.none(), said)),
            sentiment=draw(st.floats(-3, 3, width=16)),
            number=draw(st.one_of(st.none(), st.floats(-3, 3, width=16))) if numbers else None,
            emotion=draw(st.sampled_from(EMOTIONS)),
            conversation=draw(st.sampled_from("xyz")),
        )
        for i in range(draw(st.integers(1, 8)))
    ]


@settings(max_examples=120, deadline=None)
@given(any_rows(), st.randoms(use_true_random=False))
def test_every_metric_is_bounded_and_does_not_care_for_the_order(
    rows: list[Row], shuffler: random.Random
) -> None:
    mixed = shuffler.sample(rows, len(rows))
    for one in METRICS[rows[0].task]:
        found = one.value(rows)
        assert one.value(mixed) == pytest.approx(found, nan_ok=True, abs=1e-9)
        low, high = {"mae": (0, 6), "corr": (-1, 1)}.get(one.name, (0, 1))
        assert math.isnan(found) or low <= found <= high + 1e-9


@settings(max_examples=120, deadline=None)
@given(any_rows())
def test_saying_a_thing_twice_or_nothing_readable_raises_no_share_of_right_answers(
    rows: list[Row],
) -> None:
    task = rows[0].task
    if task in (Task.FER, Task.ECPE):
        twice = [
            dataclasses.replace(row, value=row.value and row.value + row.value) for row in rows
        ]
        for one in METRICS[task]:
            assert one.value(twice) == pytest.approx(one.value(rows), nan_ok=True)
    unread = [
        dataclasses.replace(row, value=None, number=None if i else row.number)
        for i, row in enumerate(rows)
    ]
    for one in METRICS[task]:
        if one.per_clip and one.name != "mae":
            before, after = one.value(rows), one.value(unread)
            assert math.isnan(after) or after <= before + 1e-9
