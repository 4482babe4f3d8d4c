"""The answers of systems that never look: the best constant, or for ECPE rules of neighbourhood.

Rows with training references and rows to answer go in, the same rows answered by rule come out; the
metrics of `scoring.py` then treat them like any model's. Each rule is the strongest constant that
is cheap to find, so that beating it means something.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from data_shards.tasks import Answer, Pair, Task
from emoverse.evaluation.metrics import Row, reason_emotion, rouge_l, set_f1

# The rules that stand beside every model; the first is the one that the summary compares with.
RULES: dict[Task, tuple[str, ...]] = {
    **dict.fromkeys((Task.MSA, Task.ER, Task.FER, Task.ERI), ("majority",)),
    Task.ECPE: ("self+previous", "self"),
}
MAX_FACES = 2000  # training answers that the constant phrase set is fitted on
MAX_REASONS = 60  # training reasons among which the most central one is looked for


def most_frequent(names: Sequence[str]) -> str:
    """The most frequent name; of equally frequent ones the first in the alphabet."""
    counts = Counter(names)
    return min(counts, key=lambda name: (-counts[name], name))


def best_constant_phrases(references: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The phrase set whose mean F1 over the true sets is highest, by local search.

    Starts from the empty set and from the most frequent answers, then adds, drops or swaps single
    phrases while the mean grows; deterministic. `references` is any non-empty sample of answers.
    """
    answers = Counter(tuple(sorted(set(reference))) for reference in references[:MAX_FACES])
    phrases = sorted({phrase for answer in answers for phrase in answer})
    cache: dict[frozenset[str], float] = {}

    def total(candidate: frozenset[str]) -> float:
        if candidate not in cache:
            phrases = tuple(candidate)
            cache[candidate] = sum(set_f1(phrases, true) * n for true, n in answers.items())
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
    return max(distinct, key=lambda reason: sum(rouge_l(reason, other) for other in distinct))


def neighbour_pairs(target: int, emotion: str, *, previous: int = 1) -> tuple[Pair, ...]:
    """ECPE by rule: the target utterance and the ones before it are the causes."""
    causes = range(max(1, target - previous), target + 1)
    return tuple(Pair(target, emotion, cause) for cause in causes)


def _pair_emotions(rows: Sequence[Row]) -> list[str]:
    return [item.emotion for row in rows for item in row.reference if isinstance(item, Pair)]


def rule_rows(
    rule: str, task: Task, training: Sequence[Row], rows: Sequence[Row], *, give_emotion: bool
) -> list[Row]:
    """`rows` answered by one of the task's RULES, fitted on the references of `training`.

    majority: MSA, ER: the most frequent label (and, beside answers that are numbers, the mean
    intensity). FER: the best constant phrase set. ERI: the most frequent emotion with its most
    central reason. self, self+previous (ECPE): `neighbour_pairs` with the gold emotion where the
    query gives it, else with the most frequent emotion of pairs. Without training references the
    evaluated ones are used, which can only favour the rule.
    """
    assert rule in RULES[task]
    fit = training or rows
    if not fit:
        return []
    constant: Answer | None = None
    number: float | None = None
    emotion = ""
    if task in (Task.MSA, Task.ER):
        constant = most_frequent([str(row.reference) for row in fit])
        known = [row.sentiment for row in fit if row.sentiment is not None]
        if task is Task.MSA and known and any(row.number is not None for row in rows):
            number = sum(known) / len(known)
    elif task is Task.FER:
        constant = best_constant_phrases([tuple(map(str, row.reference)) for row in fit])
    elif task is Task.ERI:
        emotions = [(row, reason_emotion(row) or "") for row in fit]
        emotion = most_frequent([name for _, name in emotions])
        constant = central_reason([str(row.reference) for row, name in emotions if name == emotion])
    else:
        emotion = most_frequent(_pair_emotions(fit) or ["neutral"])

    def answer(row: Row) -> Answer:
        if constant is not None:
            return constant
        gold = row.emotion if give_emotion and row.emotion else emotion
        return neighbour_pairs(row.target, gold, previous=int(rule == "self+previous"))

    return [
        dataclasses.replace(
            row, value=answer(row), response="", status="parsed", number=number, judge=None
        )
        for row in rows
    ]


def majority_rows(
    task: Task, training: Sequence[Row], rows: Sequence[Row], *, give_emotion: bool
) -> list[Row]:
    """`rule_rows` of the task's first rule: the answer that is stored beside the model's."""
    return rule_rows(RULES[task][0], task, training, rows, give_emotion=give_emotion)
