"""Tables behind a metric: the confusion matrix, scores per class, and calibration of the answers.

Rows of `scoring.py` go in, small frozen tables come out, for metrics.json and the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_shards.tasks import EMOTIONS, POLARITIES, Task
from emoverse.evaluation.metrics import (
    Row,
    as_pairs,
    as_phrases,
    concluded_emotion,
    phrase_exact,
    predicted_polarity,
    reason_emotion,
    reference_polarity,
)

LABELLED = (Task.MSA, Task.ER, Task.ERI)
NUM_BINS = 10


def labels_of(row: Row) -> tuple[str | None, str | None]:
    """Answered and true class of an MSA (N/N), ER or ERI (concluded emotion) row."""
    if row.task is Task.MSA:
        return predicted_polarity(row), reference_polarity(row)
    predicted = None if row.value is None else str(row.value)
    if row.task is Task.ERI:
        return concluded_emotion(predicted or ""), reason_emotion(row)
    return predicted, str(row.reference)


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """`counts[i][j]`: clips of true class `classes[i]` answered `answers[j]` (last: no class)."""

    classes: tuple[str, ...]
    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def confusion(task: Task, rows: Sequence[Row]) -> Confusion | None:
    """The confusion matrix of MSA (N/N), ER and ERI's concluded emotion; None for set answers."""
    if task not in LABELLED:
        return None
    classes = POLARITIES if task is Task.MSA else EMOTIONS
    counts = [[0] * (len(classes) + 1) for _ in classes]
    for row in rows:
        predicted, true = labels_of(row)
        if true in classes:
            column = classes.index(predicted) if predicted in classes else len(classes)
            counts[classes.index(true)][column] += 1
    return Confusion(
        classes=classes, answers=(*classes, "none"), counts=tuple(tuple(c) for c in counts)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemScore:
    """Precision, recall and F1 of one phrase (FER) or one emotion's pairs (ECPE)."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def _items(row: Row) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """(class, item) of answer and reference: phrases, pairs, or the one label of the clip."""
    if row.task is Task.FER:
        predicted, true = (set(as_phrases(answer)) for answer in (row.value, row.reference))
        return {(one, one) for one in predicted}, {(one, one) for one in true}
    if row.task is Task.ECPE:
        pairs = (as_pairs(answer) for answer in (row.value, row.reference))
        found = [{(pair.emotion, str(pair)) for pair in one} for one in pairs]
        return found[0], found[1]
    label, reference = labels_of(row)
    if reference is None:  # nothing to agree with, as in the metric
        return set(), set()
    return ({(label, label)} if label is not None else set()), {(reference, reference)}


def item_scores(rows: Sequence[Row]) -> tuple[ItemScore, ...]:
    """Scores per class (MSA, ER, ERI), phrase (FER) or emotion of pairs (ECPE), by support."""
    tables: dict[str, list[int]] = {}
    for row in rows:
        predicted, true = _items(row)
        for column, items in enumerate((predicted & true, predicted, true)):
            for name, _ in items:
                tables.setdefault(name, [0, 0, 0])[column] += 1
    found = [
        ItemScore(
            name=name,
            precision=hit / predicted if predicted else 0.0,
            recall=hit / true if true else 0.0,
            f1=2 * hit / (predicted + true),
            support=true,
        )
        for name, (hit, predicted, true) in tables.items()
    ]
    return tuple(sorted(found, key=lambda item: (-item.support, item.name)))


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBin:
    """Answers whose confidence lies in [low, high): how many, mean confidence, share right."""

    low: float
    high: float
    n: int
    confidence: float
    right: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """`error`: mean over answers of |confidence - share right| of their bin (ECE, 10 bins)."""

    bins: tuple[CalibrationBin, ...]
    error: float
    n: int


def answered_right(row: Row) -> bool | None:
    """Whether the whole answer is right; None where "right" has no meaning (free text)."""
    if row.task is Task.ERI:
        return None
    if row.task is Task.FER:
        return bool(phrase_exact(row)[0])
    if row.task is Task.ECPE:
        return row.value is not None and as_pairs(row.value) == as_pairs(row.reference)
    predicted, true = labels_of(row)
    return predicted == true


def calibration(answers: Sequence[tuple[Row, float | None]]) -> Calibration | None:
    """Confidence of the answers against the share of right ones, in NUM_BINS equal bins.

    answers: rows with the probability that the model gave to the whole answer. None without any.
    """
    known = [
        (right, p)
        for row, p in answers
        if p is not None and (right := answered_right(row)) is not None
    ]
    if not known:
        return None
    correct = np.array([float(one) for one, _ in known])
    confidence = np.array([p for _, p in known])
    places = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    bins, error = [], 0.0
    for bin_index in range(NUM_BINS):
        inside = places == bin_index
        n = int(inside.sum())
        predicted, hit = (float(one[inside].mean()) if n else 0.0 for one in (confidence, correct))
        error += n / len(known) * abs(predicted - hit)
        bins.append(
            CalibrationBin(
                low=bin_index / NUM_BINS,
                high=(bin_index + 1) / NUM_BINS,
                n=n,
                confidence=predicted,
                right=hit,
            )
        )
    return Calibration(bins=tuple(bins), error=error, n=len(known))
