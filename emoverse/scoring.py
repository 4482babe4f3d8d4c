"""The metrics of the five tasks as pure functions: rows (truth, parsed answer) in, numbers out.

Every metric is `finish(sum over clips of contribution(row))`; `significance.py` needs no more than
this form for values, intervals and paired differences.
An answer that cannot be parsed (`value is None`) is wrong; it is never dropped.
Stands after generate -> parse in `evaluate.py` and under `report.py`. Torch-free; scikit-learn is
only the oracle of the tests. Shares are fractions of 1, not percent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_shards.tasks import EMOTIONS, POLARITIES, Answer, Pair, Task, polarity

Floats = NDArray[np.float64]

PAIR_EMOTIONS = tuple(name for name in EMOTIONS if name != "neutral")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One answered (record, task) entry: what was true, what was said, and what the rules need."""

    key: str
    task: Task
    truth: Answer
    value: Answer | None
    response: str = ""
    status: str = "parsed"
    sentiment: float | None = None
    emotion: str | None = None
    target: int = 0


# --- the word rules ---

EMOTION_WORDS: dict[str, str] = {
    **{name: name for name in EMOTIONS},
    **dict.fromkeys(("calm", "neutrality"), "neutral"),
    **dict.fromkeys(("surprised", "surprising", "astonished", "amazed"), "surprise"),
    **dict.fromkeys(("afraid", "fearful", "scared", "frightened"), "fear"),
    **dict.fromkeys(("sad", "sorrow", "unhappy"), "sadness"),
    **dict.fromkeys(("happy", "happiness", "joyful", "glad"), "joy"),
    **dict.fromkeys(("disgusted", "disgusting"), "disgust"),
    **dict.fromkeys(("angry", "furious"), "anger"),
}

_CAUSE = re.compile(r"\b(?:because|since|due to)\b")


def concluded_emotion(reason: str) -> str | None:
    """The emotion that a free-text reason ends in, or None.

    Rule: only the last sentence counts, and of it the part before "because" (since, due to), unless
    no emotion is named there; the last emotion word in it decides (whole words, any case, the forms
    of `EMOTION_WORDS`). "The words sound sad. She feels joy because of the sad old song." -> joy.
    A reason whose last sentence names no emotion concludes nothing, whatever was said before.
    """
    sentences = [part for part in re.split(r"[.!?\n]+", reason.lower()) if part.strip()]
    if not sentences:
        return None
    for part in (_CAUSE.split(sentences[-1])[0], sentences[-1]):
        named = [EMOTION_WORDS[w] for w in re.findall(r"[a-z]+", part) if w in EMOTION_WORDS]
        if named:
            return named[-1]
    return None


def rouge_l(answer: str, truth: str) -> float:
    """ROUGE-L F-measure (beta 1) of lower-cased alphanumeric tokens, in [0, 1].

    Longest common subsequence L of the two token lists: P = L/len(answer), R = L/len(truth),
    F = 2PR/(P+R); two empty texts agree fully, an empty one against a full one scores 0.
    """
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, truth))
    if not a or not b:
        return float(a == b)
    longest = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = longest[j]
            longest[j] = diagonal + 1 if word == other else max(above, longest[j - 1])
            diagonal = above
    return 2 * longest[-1] / (len(a) + len(b))


def set_f1(answer: Sequence[str], truth: Sequence[str]) -> float:
    """F1 of two sets of phrases; two empty sets agree fully."""
    said, true = set(answer), set(truth)
    return 2 * len(said & true) / (len(said) + len(true)) if said or true else 1.0


# --- contributions: one clip -> a short vector that may be summed over clips ---


def _phrases(answer: Answer | None) -> tuple[str, ...]:
    """Phrases without regard to case, the parser's rule for equal phrases."""
    return tuple(str(item).casefold() for item in answer) if isinstance(answer, tuple) else ()


def _pairs(answer: Answer | None) -> set[Pair]:
    items = answer if isinstance(answer, tuple) else ()
    return {item for item in items if isinstance(item, Pair)}


def _counts(said: set[str], true: set[str]) -> list[float]:
    return [float(len(said & true)), float(len(said)), float(len(true))]


def _one_hot_counts(said: str | None, true: str, classes: Sequence[str]) -> list[float]:
    """Per class (hit, said, true). A value outside the classes is the extra, unsupported class."""
    return [
        float(flag)
        for name in classes
        for flag in (said == true == name, said == name, true == name)
    ]


def _true_polarity(row: Row) -> str:
    """Non-negative is positive, as MMSA's Has0 columns; without a number the label itself."""
    return str(row.truth) if row.sentiment is None else polarity(row.sentiment)


def _acc2_nn(row: Row) -> list[float]:
    return [float(row.value == _true_polarity(row)), 1.0]


def _acc2_np(row: Row) -> list[float]:
    return [0.0, 0.0] if row.sentiment == 0 else _acc2_nn(row)


def _f1_nn(row: Row) -> list[float]:
    said = str(row.value) if row.value is not None else None
    return _one_hot_counts(said, _true_polarity(row), POLARITIES)


def _f1_np(row: Row) -> list[float]:
    return [0.0] * (3 * len(POLARITIES)) if row.sentiment == 0 else _f1_nn(row)


def _accuracy(row: Row) -> list[float]:
    return [float(row.value == row.truth), 1.0]


def _emotion_counts(row: Row) -> list[float]:
    said = str(row.value) if row.value is not None else None
    return _one_hot_counts(said, str(row.truth), EMOTIONS)


def _phrase_f1(row: Row) -> list[float]:
    # None is not the empty set: an unparseable answer is wrong even where no phrase is true.
    said = row.value is not None
    return [set_f1(_phrases(row.value), _phrases(row.truth)) if said else 0.0, 1.0]


def _phrase_exact(row: Row) -> list[float]:
    same = row.value is not None and set(_phrases(row.value)) == set(_phrases(row.truth))
    return [float(same), 1.0]


def _phrase_counts(row: Row) -> list[float]:
    return _counts(set(_phrases(row.value)), set(_phrases(row.truth)))


def reason_emotion(row: Row) -> str | None:
    """The emotion an ERI answer should conclude: the record's label, else the true reason's."""
    return row.emotion if row.emotion is not None else concluded_emotion(str(row.truth))


def _emotion_agreement(row: Row) -> list[float]:
    true = reason_emotion(row)
    if true is None:  # nothing to agree with: the clip does not count
        return [0.0, 0.0]
    return [float(row.value is not None and concluded_emotion(str(row.value)) == true), 1.0]


def _rouge_l(row: Row) -> list[float]:
    return [rouge_l(str(row.value), str(row.truth)) if row.value is not None else 0.0, 1.0]


def _pair_counts(row: Row) -> list[float]:
    """Pairs are sets within one record, so the record's key is the conversation's key."""
    said, true = _pairs(row.value), _pairs(row.truth)
    return [float(len(said & true)), float(len(said)), float(len(true))]


def _pair_counts_by_emotion(row: Row) -> list[float]:
    said, true = _pairs(row.value), _pairs(row.truth)
    counts: list[float] = []
    for name in PAIR_EMOTIONS:
        p, t = ({pair for pair in pairs if pair.emotion == name} for pairs in (said, true))
        counts += [float(len(p & t)), float(len(p)), float(len(t))]
    return counts


def _cause_counts(row: Row) -> list[float]:
    said, true = ({str(pair.cause) for pair in _pairs(a)} for a in (row.value, row.truth))
    return _counts(said, true)


# --- finishes: sums [..., K] -> metric [...] ---


def _ratio(sums_K: Floats) -> Floats:
    """Hits / clips."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums_K[..., 0] / sums_K[..., 1])


def _weighted_f1(sums_K: Floats) -> Floats:
    """Sum over classes of F1 * (support / all support); with one class it is the micro F1.

    A class without any hit has F1 0 (scikit-learn's zero_division=0); no support at all is nan.
    """
    hit, said, true = (sums_K[..., start::3] for start in range(3))
    f1 = 2 * hit / np.maximum(said + true, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((f1 * true).sum(-1) / true.sum(-1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric's name and its two halves; `per_clip` says that it is a mean over clips."""

    name: str
    title: str
    contribution: Callable[[Row], list[float]]
    finish: Callable[[Floats], Floats] = _ratio

    @property
    def per_clip(self) -> bool:
        return self.finish is _ratio


# The one table of what is measured. The first metric of a task is its primary metric.
METRICS: dict[Task, tuple[Metric, ...]] = {
    Task.MSA: (
        Metric(name="acc2_nn", title="Acc-2 N/N", contribution=_acc2_nn),
        Metric(name="f1_nn", title="weighted F1 N/N", contribution=_f1_nn, finish=_weighted_f1),
        Metric(name="acc2_np", title="Acc-2 N/P", contribution=_acc2_np),
        Metric(name="f1_np", title="weighted F1 N/P", contribution=_f1_np, finish=_weighted_f1),
    ),
    Task.ER: (
        Metric(name="accuracy", title="accuracy", contribution=_accuracy),
        Metric(
            name="weighted_f1",
            title="weighted F1",
            contribution=_emotion_counts,
            finish=_weighted_f1,
        ),
    ),
    Task.FER: (
        Metric(name="phrase_f1", title="phrase F1, mean of clips", contribution=_phrase_f1),
        Metric(
            name="phrase_f1_micro",
            title="phrase F1, pooled",
            contribution=_phrase_counts,
            finish=_weighted_f1,
        ),
        Metric(name="exact", title="all phrases right", contribution=_phrase_exact),
    ),
    Task.ERI: (
        Metric(
            name="emotion_agreement", title="emotion agreement", contribution=_emotion_agreement
        ),
        Metric(name="rouge_l", title="ROUGE-L", contribution=_rouge_l),
    ),
    Task.ECPE: (
        Metric(name="pair_f1", title="pair F1", contribution=_pair_counts, finish=_weighted_f1),
        Metric(
            name="weighted_f1",
            title="weighted pair F1",
            contribution=_pair_counts_by_emotion,
            finish=_weighted_f1,
        ),
        Metric(
            name="cause_f1",
            title="cause F1, any emotion",
            contribution=_cause_counts,
            finish=_weighted_f1,
        ),
    ),
}


def primary(task: Task) -> Metric:
    """The metric that stands for a task in summaries."""
    return METRICS[task][0]


# --- tables ---


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """`counts[i][j]`: clips of true class `classes[i]` answered `answers[j]` (last: no class)."""

    classes: tuple[str, ...]
    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def confusion(task: Task, rows: Sequence[Row]) -> Confusion | None:
    """The confusion matrix of MSA (N/N), ER and ERI's concluded emotion; None for set answers."""
    if task not in (Task.MSA, Task.ER, Task.ERI):
        return None
    classes = POLARITIES if task is Task.MSA else EMOTIONS
    counts = [[0] * (len(classes) + 1) for _ in classes]
    for row in rows:
        said = str(row.value) if row.value is not None else None
        if task is Task.ERI:
            true, said = reason_emotion(row), concluded_emotion(said or "")
        else:
            true = _true_polarity(row) if task is Task.MSA else str(row.truth)
        if true in classes:
            column = classes.index(said) if said in classes else len(classes)
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


def item_scores(task: Task, rows: Sequence[Row]) -> tuple[ItemScore, ...]:
    """Scores per phrase or per emotion of pairs, most frequent first; () for the other tasks."""
    tables: dict[str, list[int]] = {}
    for row in rows:
        if task is Task.FER:
            said = {(phrase, phrase) for phrase in _phrases(row.value)}
            true = {(phrase, phrase) for phrase in _phrases(row.truth)}
        elif task is Task.ECPE:
            said = {(pair.emotion, str(pair)) for pair in _pairs(row.value)}
            true = {(pair.emotion, str(pair)) for pair in _pairs(row.truth)}
        else:
            return ()
        for column, items in enumerate((said & true, said, true)):
            for name, _ in items:
                tables.setdefault(name, [0, 0, 0])[column] += 1
    found = [
        ItemScore(
            name=name,
            precision=hit / said if said else 0.0,
            recall=hit / true if true else 0.0,
            f1=2 * hit / (said + true),
            support=true,
        )
        for name, (hit, said, true) in tables.items()
    ]
    return tuple(sorted(found, key=lambda item: (-item.support, item.name)))
