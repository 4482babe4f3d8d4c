"""The metrics against worked examples and scikit-learn, their errors against theory, the rules."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from data_shards.tasks import EMOTIONS, Answer, Pair, Task
from emoverse.evaluation.baselines import (
    best_constant_phrases,
    central_reason,
    majority_rows,
    neighbour_pairs,
)
from emoverse.evaluation.intervals import paired_difference, score, scores
from emoverse.evaluation.metrics import Metric, Row, concluded_emotion, rouge_l, set_f1
from emoverse.evaluation.registry import METRICS, primary
from emoverse.evaluation.tables import confusion, item_scores
from emoverse.report.summary import clearly_better


def rows_of(
    task: Task, truths: list[Answer], values: list[Answer | None], **fields: object
) -> list[Row]:
    return [
        dataclasses.replace(Row(key=f"k{i}", task=task, reference=truth, value=value), **fields)
        for i, (truth, value) in enumerate(zip(truths, values, strict=True))
    ]


def msa_rows(sentiments: list[float], values: list[str | None]) -> list[Row]:
    return [
        Row(key=f"k{i}", task=Task.MSA, reference="?", value=value, sentiment=sentiment)
        for i, (sentiment, value) in enumerate(zip(sentiments, values, strict=True))
    ]


def metric(task: Task, name: str) -> Metric:
    return next(one for one in METRICS[task] if one.name == name)


def value(task: Task, name: str, rows: list[Row]) -> float:
    return score(metric(task, name), rows).value


# --- against the oracle ---

labels = st.sampled_from(EMOTIONS)
answers = st.one_of(st.none(), labels)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(labels, answers), min_size=1, max_size=40))
def test_emotion_metrics_equal_the_oracle_with_an_extra_class(
    pairs: list[tuple[str, str | None]],
) -> None:
    truths, said = [t for t, _ in pairs], [v or "unparseable" for _, v in pairs]
    rows = rows_of(Task.ER, list(truths), [v for _, v in pairs])
    oracle = f1_score(truths, said, average="weighted", zero_division=0)
    assert value(Task.ER, "accuracy", rows) == pytest.approx(accuracy_score(truths, said))
    assert value(Task.ER, "weighted_f1", rows) == pytest.approx(oracle)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([-2.5, -0.2, 0.0, 0.4, 3.0]),
            st.sampled_from(["positive", "negative", None]),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_sentiment_metrics_equal_the_oracle(pairs: list[tuple[float, str | None]]) -> None:
    rows = msa_rows([s for s, _ in pairs], [v for _, v in pairs])
    for name, kept in (("nn", pairs), ("np", [p for p in pairs if p[0] != 0])):
        truths = ["positive" if s >= 0 else "negative" for s, _ in kept]
        said = [v or "unparseable" for _, v in kept]
        found = [value(Task.MSA, f"{kind}_{name}", rows) for kind in ("acc2", "f1")]
        if not kept:
            assert all(map(math.isnan, found))
            continue
        oracle = f1_score(truths, said, average="weighted", zero_division=0)
        assert found == pytest.approx([accuracy_score(truths, said), oracle])


phrase_sets = st.lists(st.sampled_from(["Lips part", "Brow lower", "Cheek raise"]), unique=True)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(phrase_sets, phrase_sets), min_size=1, max_size=15))
def test_phrase_metrics_equal_the_oracle(pairs: list[tuple[list[str], list[str]]]) -> None:
    names = ["Lips part", "Brow lower", "Cheek raise"]
    truths, said = (
        np.array([[name in pair[side] for name in names] for pair in pairs]) for side in (0, 1)
    )
    rows = rows_of(Task.FER, [tuple(t) for t, _ in pairs], [tuple(s) for _, s in pairs])
    mean = f1_score(truths, said, average="samples", zero_division=1.0)
    assert value(Task.FER, "phrase_f1", rows) == pytest.approx(mean)
    if truths.any():
        pooled = f1_score(truths, said, average="micro", zero_division=0)
        assert value(Task.FER, "phrase_f1_micro", rows) == pytest.approx(pooled)


# --- worked examples ---


def test_neutral_sentiment_is_positive_in_nn_and_left_out_in_np() -> None:
    rows = msa_rows([0.0, 0.0, -1.0, 2.0], ["positive", "negative", "negative", "positive"])
    assert value(Task.MSA, "acc2_nn", rows) == 0.75
    assert value(Task.MSA, "acc2_np", rows) == 1.0
    assert score(metric(Task.MSA, "acc2_np"), rows).n == 2


def test_always_positive_gives_the_published_rule_baseline_of_mosei() -> None:
    rows = msa_rows([-1.0] * 1350 + [0.0] * 1025 + [1.0] * 2280, ["positive"] * 4655)
    assert value(Task.MSA, "acc2_nn", rows) == pytest.approx(0.710, abs=5e-4)
    assert value(Task.MSA, "acc2_np", rows) == pytest.approx(0.628, abs=5e-4)


def test_always_neutral_gives_the_published_rule_baseline_of_meld() -> None:
    support = {"neutral": 1256, "joy": 402, "anger": 345, "surprise": 281, "sadness": 208}
    support |= {"disgust": 68, "fear": 50}
    truths: list[Answer] = [name for name, n in support.items() for _ in range(n)]
    rows = rows_of(Task.ER, truths, ["neutral"] * len(truths))
    assert value(Task.ER, "accuracy", rows) == pytest.approx(0.481, abs=5e-4)
    assert value(Task.ER, "weighted_f1", rows) == pytest.approx(0.313, abs=5e-4)


def test_pair_f1_on_sets_with_wrong_emotions_and_empty_answers() -> None:
    rows = rows_of(
        Task.ECPE,
        [
            (Pair(3, "joy", 1), Pair(3, "joy", 3)),
            (Pair(2, "anger", 2),),
            (Pair(4, "fear", 1),),
            (),
        ],
        [
            (Pair(3, "joy", 3), Pair(3, "joy", 3)),  # a repeated pair counts once
            (Pair(2, "sadness", 2),),
            None,
            (),
        ],
    )
    assert value(Task.ECPE, "pair_f1", rows) == pytest.approx(2 * 1 / (2 + 4))
    # joy: P 1/1, R 1/2, support 2; anger, fear: 0; support 1 each
    assert value(Task.ECPE, "weighted_f1", rows) == pytest.approx((2 / 3) * 2 / 4)
    assert value(Task.ECPE, "cause_f1", rows) == pytest.approx(2 * 2 / (2 + 4))


def test_equal_pairs_of_two_conversations_do_not_meet() -> None:
    pair = (Pair(1, "joy", 1),)
    rows = rows_of(Task.ECPE, [pair, ()], [(), pair])
    assert value(Task.ECPE, "pair_f1", rows) == 0.0


def test_unparseable_phrases_are_wrong_even_where_no_phrase_is_true() -> None:
    rows = rows_of(Task.FER, [(), ("Lips part",)], [None, ("lips part",)])
    assert value(Task.FER, "phrase_f1", rows) == 0.5
    assert value(Task.FER, "exact", rows) == 0.5


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        ("the cat sat on the mat", "the cat is on a mat", 2 * 4 / 12),
        ("a b c d", "d c b a", 2 * 1 / 8),
        ("", "words", 0.0),
        ("", "", 1.0),
    ],
)
def test_rouge_l(answer: str, truth: str, expected: float) -> None:
    assert rouge_l(answer, truth) == pytest.approx(expected)
    assert rouge_l(truth, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("The brows are low. So the person feels anger.", "anger"),
        ("She looks happy. This shows sadness", "sadness"),
        ("He is not happy but angry.", "anger"),
        ("The person is UNHAPPY.", "sadness"),
        ("He feels joy because of the sad old song.", "joy"),
        ("Because of the joyful news, he feels fear.", "fear"),
        ("Joy is in her words. The lips part.", None),
        ("   ", None),
        ("", None),
    ],
)
def test_concluded_emotion(reason: str, expected: str | None) -> None:
    assert concluded_emotion(reason) == expected


def test_emotion_agreement_uses_the_label_then_the_true_reason_and_skips_neither() -> None:
    truth, none = "The words are kind. The person feels joy.", "The lips part."
    rows = [
        Row(key="a", task=Task.ERI, reference=truth, value="So he is happy.", emotion="joy"),
        Row(key="b", task=Task.ERI, reference=truth, value="So he is sad."),
        Row(key="c", task=Task.ERI, reference=none, value="So he is sad."),
        Row(key="d", task=Task.ERI, reference=truth, value=None, emotion="joy"),
    ]
    found = score(primary(Task.ERI), rows)
    assert (found.value, found.n) == (pytest.approx(1 / 3), 3)


# --- errors and differences ---


def coin_rows(n: int, chance: float, seed: int, task: Task = Task.ER) -> list[Row]:
    hits = np.random.default_rng(seed).random(n) < chance
    return rows_of(task, ["joy"] * n, ["joy" if hit else "anger" for hit in hits])


def test_standard_error_and_interval_of_a_share() -> None:
    rows = coin_rows(400, 0.7, seed=1)
    found = score(primary(Task.ER), rows)
    expected = math.sqrt(found.value * (1 - found.value) / 399)
    assert found.standard_error == pytest.approx(expected)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(expected, rel=0.06)
    assert score(primary(Task.ER), rows) == found  # the seed is fixed


def test_bootstrap_error_of_a_pooled_metric_follows_theory() -> None:
    """One pair per clip: micro F1 is then a share of hits, whose error is known."""
    hits = np.random.default_rng(3).random(500) < 0.6
    rows = rows_of(
        Task.ECPE,
        [(Pair(1, "joy", 1),)] * 500,
        [(Pair(1, "joy", 1 if hit else 2),) for hit in hits],
    )
    found = score(primary(Task.ECPE), rows)
    assert found.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 500), rel=0.08)


def test_paired_error_is_smaller_than_unpaired_and_zero_for_equal_systems() -> None:
    a = coin_rows(300, 0.6, seed=5)
    b = [dataclasses.replace(r, value="anger") if i % 20 == 0 else r for i, r in enumerate(a)]
    for one in METRICS[Task.ER]:
        same = paired_difference(one, a, a)
        assert (same.value, same.standard_error) == (0.0, 0.0)
        apart = paired_difference(one, a, b)
        unpaired = math.hypot(score(one, a).standard_error, score(one, b).standard_error)
        assert 0 < apart.standard_error < 0.6 * unpaired
        assert apart.value == pytest.approx(score(one, a).value - score(one, b).value)


def test_paired_difference_keeps_to_common_clips() -> None:
    a, b = coin_rows(50, 0.9, seed=1), coin_rows(30, 0.2, seed=2)
    assert paired_difference(primary(Task.ER), a, b).n == 30
    other = [dataclasses.replace(row, key=f"x{row.key}") for row in b]
    with pytest.raises(ValueError, match=r"no clip in common .*evaluate both on the same shards"):
        paired_difference(primary(Task.ER), a, other)


def test_a_single_clip_is_no_clear_gain() -> None:
    right, wrong = (rows_of(Task.ER, ["joy"], [said]) for said in ("joy", "anger"))
    gap = paired_difference(primary(Task.ER), right, wrong)
    assert gap.value == 1 and math.isnan(gap.standard_error)
    assert not clearly_better(gap)
    assert clearly_better(
        paired_difference(primary(Task.ER), coin_rows(9, 1, 1), coin_rows(9, 0, 1))
    )


def test_n_counts_what_the_metric_counts() -> None:
    """Sentiment 0 is in no N/P metric, a target without a true pair in none that gives targets."""
    rows = msa_rows([0, 1, -1, 0, 2], ["positive"] * 5)
    counts = {name: found.n for name, found in scores(Task.MSA, rows).items()}
    assert counts == {"acc2_nn": 5, "f1_nn": 5, "acc2_np": 3, "f1_np": 3}
    assert paired_difference(metric(Task.MSA, "f1_np"), rows, rows).n == 3
    pair = (Pair(1, "joy", 1),)
    pairs = rows_of(Task.ECPE, [pair, (), ()], [pair, (), pair])
    counts = {name: found.n for name, found in scores(Task.ECPE, pairs).items()}
    assert counts == dict.fromkeys(("pair_f1", "weighted_f1", "cause_f1"), 1) | dict.fromkeys(
        ("official_weighted_f1", "official_f1"), 3
    )
    without = pairs[1:]
    gap = paired_difference(primary(Task.ECPE), without, without)
    assert gap.n == 0 and math.isnan(gap.value) and math.isnan(gap.standard_error)


def test_a_difference_counts_what_one_side_alone_gets_wrong() -> None:
    """No phrase is true: who says none adds nothing to the pooled counts, who says one does."""
    right, wrong = (rows_of(Task.FER, [("a",), ()], [("a",), said]) for said in ((), ("b",)))
    gap = paired_difference(metric(Task.FER, "phrase_f1_micro"), right, wrong)
    assert (gap.value, gap.n) == (pytest.approx(1 - 2 / 3), 2)


def test_no_rows_and_no_support_give_nan_not_an_error() -> None:
    for task in Task:
        for found in scores(task, []).values():
            assert math.isnan(found.value) and found.n == 0
    rows = rows_of(Task.ECPE, [(), ()], [(), ()])
    assert math.isnan(value(Task.ECPE, "pair_f1", rows))


# --- tables ---


def test_confusion_has_a_column_for_answers_without_a_class() -> None:
    table = confusion(Task.ER, rows_of(Task.ER, ["joy", "joy", "anger"], ["joy", None, "fear"]))
    assert table is not None
    joy = table.classes.index("joy")
    assert table.counts[joy][joy] == 1 and table.counts[joy][-1] == 1
    assert sum(map(sum, table.counts)) == 3
    assert table.answers[-1] == "none"
    reasons = [Row(key="a", task=Task.ERI, reference="x", value="He is sad.", emotion="fear")]
    found = confusion(Task.ERI, reasons)
    assert found is not None
    assert found.counts[EMOTIONS.index("fear")][EMOTIONS.index("sadness")] == 1
    assert confusion(Task.FER, []) is None


def test_item_scores_of_phrases_and_pairs() -> None:
    faces = rows_of(Task.FER, [("a", "b"), ("a",)], [("a",), ("b",)])
    by_name = {item.name: item for item in item_scores(faces)}
    assert (by_name["a"].precision, by_name["a"].recall, by_name["a"].support) == (1.0, 0.5, 2)
    assert by_name["b"].f1 == 0.0
    pairs = rows_of(Task.ECPE, [(Pair(1, "joy", 1),)], [(Pair(1, "joy", 1), Pair(1, "joy", 2))])
    assert item_scores(pairs)[0].precision == 0.5
    known = rows_of(Task.ER, ["joy", "joy", "fear"], ["joy", "fear", None])
    (joy, fear) = item_scores(known)
    assert (joy.name, joy.precision, joy.recall, joy.support) == ("joy", 1.0, 0.5, 2)
    assert (fear.precision, fear.recall, fear.f1) == (0.0, 0.0, 0.0)


# --- baselines ---


def test_best_constant_phrases_beats_every_seen_answer() -> None:
    rng = np.random.default_rng(0)
    truths = [
        tuple(
            n
            for n, p in zip("abcdef", (0.8, 0.6, 0.5, 0.2, 0.1, 0.05), strict=True)
            if rng.random() < p
        )
        or ("a",)
        for _ in range(200)
    ]
    best = best_constant_phrases(truths)

    def mean(answer: tuple[str, ...]) -> float:
        return sum(set_f1(answer, truth) for truth in truths) / len(truths)

    assert all(mean(best) >= mean(truth) for truth in set(truths))
    assert best == ("a", "b", "c")


def test_majority_answers_of_each_task() -> None:
    train = rows_of(Task.ER, ["joy", "joy", "fear"], [None] * 3)
    rows = rows_of(Task.ER, ["fear", "joy"], [None] * 2)
    assert [r.value for r in majority_rows(Task.ER, train, rows, give_emotion=False)] == ["joy"] * 2
    # without training truths the evaluated ones are used; a tie goes to the first name
    own = majority_rows(Task.ER, [], rows, give_emotion=False)
    assert [r.value for r in own] == ["fear", "fear"]
    assert majority_rows(Task.ER, [], [], give_emotion=False) == []

    reasons = rows_of(
        Task.ERI, ["A b c. It is joy.", "A b d. It is joy.", "Z. It is fear."], [None] * 3
    )
    constant = majority_rows(Task.ERI, reasons, reasons, give_emotion=False)[0].value
    assert concluded_emotion(str(constant)) == "joy"
    assert central_reason(["a b c", "a b d", "x y z"]) == "a b c"


@pytest.mark.parametrize("give_emotion", [True, False])
def test_the_neighbour_rule_of_ecpe(give_emotion: bool) -> None:
    train = rows_of(Task.ECPE, [(Pair(2, "joy", 1),)], [None])
    rows = rows_of(
        Task.ECPE, [(Pair(3, "fear", 2), Pair(3, "fear", 3))], [None], target=3, emotion="fear"
    )
    rows.append(dataclasses.replace(rows[0], key="first", target=1))
    found = majority_rows(Task.ECPE, train, rows, give_emotion=give_emotion)
    emotion = "fear" if give_emotion else "joy"
    assert (
        found[0].value == neighbour_pairs(3, emotion) == (Pair(3, emotion, 2), Pair(3, emotion, 3))
    )
    assert found[1].value == (Pair(1, emotion, 1),)
    assert value(Task.ECPE, "pair_f1", found[:1]) == (1.0 if give_emotion else 0.0)


def test_scoring_needs_no_torch() -> None:
    modules = "emoverse.evaluation.baselines, emoverse.evaluation.intervals"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
