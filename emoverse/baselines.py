"""The answers of a system that never looks: the best constant, or for ECPE the neighbour rule.

Rows with training truths and rows to answer go in, the same rows answered by rule come out; the
metrics of `scoring.py` then treat them like any model's. Each rule is the strongest constant that
is cheap to find, so that beating it means something.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from data_shards.tasks import Answer, Pair, Task
from emoverse.scoring import Row, reason_emotion, rouge_l, set_f1

MAX_FACES = 2000  # training answers that the constant phrase set is fitted on
MAX_REASONS = 60  # training reasons among which the most central one is looked for


def most_frequent(names: Sequence[str]) -> str:
    """The most frequent name; of equally frequent ones the first in the alphabet."""
    counts = Counter(names)
    return min(counts, key=lambda name: (-counts[name], name))


def best_constant_phrases(truths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The phrase set whose mean F1 over the true sets is highest, by local search.

    Starts from the empty set and from the most frequent answers, then adds, drops or swaps single
    phrases while the mean grows; deterministic. `truths` is any non-empty sample of answers.
    """
    answers = Counter(tuple(sorted(set(truth))) for truth in truths[:MAX_FACES])
    phrases = sorted({phrase for answer in answers for phrase in answer})
    cache: dict[frozenset[str], float] = {}

    def total(candidate: frozenset[str]) -> float:
        if candidate not in cache:
            said = tuple(candidate)
            cache[candidate] = sum(set_f1(said, true) * n for true, n in answers.items())
        return cache[candidate]

    starts = [frozenset[str](), *(frozenset(answer) for answer, _ in answers.most_common(3))]
    best = starts[0]
    for start in starts:
        current = start
        while True:
            near = [current ^ {phrase} for phrase in phrases]
            near += [current - {out} | {new} for out in current for new in phrases]
            step = max(near, key=lambda c: (total(c), sorted(c)), default=current)
            if total(step) <= total(current):
                break
            current = step
        if total(current) > total(best):
            best = current
    return tuple(sorted(best))


def central_reason(reasons: Sequence[str]) -> str:
    """The reason with the highest mean ROUGE-L to the others (first MAX_REASONS distinct ones)."""
    distinct = sorted(set(reasons))[:MAX_REASONS]
    return max(distinct, key=lambda one: sum(rouge_l(one, other) for other in distinct))


def neighbour_pairs(target: int, emotion: str) -> tuple[Pair, ...]:
    """ECPE by rule: the target utterance and the one before it are the causes."""
    causes = (target - 1, target) if target > 1 else (target,)
    return tuple(Pair(target, emotion, cause) for cause in causes)


def _pair_emotions(rows: Sequence[Row]) -> list[str]:
    return [item.emotion for row in rows for item in row.truth if isinstance(item, Pair)]


def majority_rows(
    task: Task, training: Sequence[Row], rows: Sequence[Row], *, give_emotion: bool
) -> list[Row]:
    """`rows` answered by the task's rule, fitted on the truths of `training`.

    MSA, ER: the most frequent label. FER: the best constant phrase set. ERI: the most frequent
    emotion with its most central reason. ECPE: `neighbour_pairs` with the gold emotion where the
    query gives it, else with the most frequent emotion of pairs. Without training truths the
    evaluated ones are used, which can only favour the baseline.
    """
    fit = training or rows
    if not fit:
        return []
    constant: Answer | None = None
    emotion = ""
    if task in (Task.MSA, Task.ER):
        constant = most_frequent([str(row.truth) for row in fit])
    elif task is Task.FER:
        constant = best_constant_phrases([tuple(map(str, row.truth)) for row in fit])
    elif task is Task.ERI:
        emotions = [(row, reason_emotion(row) or "") for row in fit]
        emotion = most_frequent([name for _, name in emotions])
        constant = central_reason([str(row.truth) for row, name in emotions if name == emotion])
    else:
        emotion = most_frequent(_pair_emotions(fit) or ["neutral"])

    def answer(row: Row) -> Answer:
        if constant is not None:
            return constant
        gold = row.emotion if give_emotion and row.emotion else emotion
        return neighbour_pairs(row.target, gold)

    return [
        dataclasses.replace(row, value=answer(row), response="", status="parsed") for row in rows
    ]
