"""The metrics of the five tasks as pure functions: rows (reference, parsed answer) in, numbers out.

Every metric is `finish(sum of contributions)`, over clips or, for the official ECPE protocol, over
conversations; `intervals.py` needs no more for values, intervals and paired differences.
An answer that cannot be parsed (`value is None`) is wrong; it is never dropped.
Torch-free; scikit-learn is only the oracle of the tests. Shares are fractions of 1, not percent.
Definitions: docs/metrics.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_shards.tasks import EMOTIONS, POLARITIES, Answer, Pair, Task, polarity

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


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F-measure (beta 1) of lower-cased alphanumeric tokens, in [0, 1].

    Longest common subsequence L of the two token lists: P = L/len(answer), R = L/len(reference),
    F = 2PR/(P+R); two empty texts agree fully, an empty one against a full one scores 0.
    """
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference))
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


def set_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two sets of phrases; two empty sets agree fully."""
    predicted, true = set(answer), set(reference)
    return 2 * len(predicted & true) / (len(predicted) + len(true)) if predicted or true else 1.0


Floats = NDArray[np.float64]

NEUTRAL = "neutral"
PAIR_EMOTIONS = tuple(name for name in EMOTIONS if name != NEUTRAL)


END_OF_SCALE = 3.0  # sentiment lies between -3 and 3
EPSILON = 1e-8  # what the official ECPE scorer adds to its denominators


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One answered (record, task) entry: its reference, its parsed answer, and what metrics need.

    sentiment: reference intensity, -3 to 3. number: predicted intensity, for numeric answers.
    conversation: identifier shared by the records of one conversation, empty without one.
    judge: verdict of the judge model on an ERI answer, 0 to 1. unread_pairs: wrong pairs of an ECPE
    answer that could not be read (`tasks.Parsed`).
    """

    key: str
    task: Task
    reference: Answer
    value: Answer | None
    response: str = ""
    status: str = "parsed"
    sentiment: float | None = None
    emotion: str | None = None
    target: int = 0
    number: float | None = None
    conversation: str = ""
    judge: float | None = None
    unread_pairs: int = 0


# --- contributions: one clip -> a short vector that may be summed over clips ---


def as_phrases(answer: Answer | None) -> tuple[str, ...]:
    """Phrases without regard to case, the parser's rule for equal phrases."""
    return tuple(str(item).casefold() for item in answer) if isinstance(answer, tuple) else ()


def as_pairs(answer: Answer | None) -> set[Pair]:
    """The pairs of an ECPE answer; none for an unreadable one."""
    items = answer if isinstance(answer, tuple) else ()
    return {item for item in items if isinstance(item, Pair)}


def _counts(predicted: set[str], true: set[str]) -> list[float]:
    return [float(len(predicted & true)), float(len(predicted)), float(len(true))]


def _one_hot_counts(predicted: str | None, true: str, classes: Sequence[str]) -> list[float]:
    """Per class (hit, predicted, true). A value outside the classes has no support."""
    return [
        float(flag)
        for name in classes
        for flag in (predicted == true == name, predicted == name, true == name)
    ]


def reference_polarity(row: Row) -> str:
    """Non-negative is positive, as MMSA's Has0 columns; without a number the label itself."""
    return str(row.reference) if row.sentiment is None else polarity(row.sentiment)


def predicted_polarity(row: Row, *, zero: str = "positive") -> str | None:
    """The answered polarity; a number of exactly 0 is `zero`: positive in N/N, negative in N/P."""
    if row.number is not None:
        return zero if row.number == 0 else polarity(row.number)
    if row.value == NEUTRAL:
        return zero
    return None if row.value is None else str(row.value)


def acc2_nn(row: Row) -> list[float]:
    """Negative against non-negative, all clips."""
    return [float(predicted_polarity(row) == reference_polarity(row)), 1.0]


def acc2_np(row: Row) -> list[float]:
    """Negative against positive: clips of sentiment 0 do not count; an answered 0 is negative."""
    predicted = predicted_polarity(row, zero="negative")
    return [0.0, 0.0] if row.sentiment == 0 else [float(predicted == reference_polarity(row)), 1.0]


def f1_nn(row: Row) -> list[float]:
    """Counts of the two classes of `acc2_nn`."""
    return _one_hot_counts(predicted_polarity(row), reference_polarity(row), POLARITIES)


def f1_np(row: Row) -> list[float]:
    """Counts of the two classes of `acc2_np`."""
    if row.sentiment == 0:
        return [0.0] * (3 * len(POLARITIES))
    return _one_hot_counts(
        predicted_polarity(row, zero="negative"), reference_polarity(row), POLARITIES
    )


def predicted_intensity(row: Row) -> float:
    """The predicted intensity; an unreadable answer counts as the farther end of the scale.

    So it is wrong in every class and as far off as can be, and no metric profits from leaving
    answers unreadable.
    """
    assert row.sentiment is not None
    if row.number is not None:
        return row.number
    return -END_OF_SCALE if row.sentiment >= 0 else END_OF_SCALE


def same_class(limit: float) -> Callable[[Row], list[float]]:
    """Both numbers clipped to +-limit and rounded half to even fall on the same integer."""

    def contribution(row: Row) -> list[float]:
        if row.sentiment is None:
            return [0.0, 0.0]
        predicted, true = (
            float(np.round(min(max(number, -limit), limit)))
            for number in (predicted_intensity(row), row.sentiment)
        )
        return [float(predicted == true), 1.0]

    return contribution


def absolute_error(row: Row) -> list[float]:
    """Distance of the two intensities, not clipped."""
    if row.sentiment is None:
        return [0.0, 0.0]
    return [abs(predicted_intensity(row) - row.sentiment), 1.0]


def moments(row: Row) -> list[float]:
    """n, x, y, xx, yy, xy of answered x and true y."""
    if row.sentiment is None:
        return [0.0] * 6
    x, y = predicted_intensity(row), row.sentiment
    return [1.0, x, y, x * x, y * y, x * y]


def accuracy(row: Row) -> list[float]:
    """The label itself."""
    return [float(row.value == row.reference), 1.0]


def emotion_counts(row: Row) -> list[float]:
    """Counts per emotion; an unreadable answer belongs to none."""
    predicted = str(row.value) if row.value is not None else None
    return _one_hot_counts(predicted, str(row.reference), EMOTIONS)


def phrase_f1(row: Row) -> list[float]:
    """Set F1 of one clip."""
    # None is not the empty set: an unparseable answer is wrong even where no phrase is true.
    predicted = row.value is not None
    return [set_f1(as_phrases(row.value), as_phrases(row.reference)) if predicted else 0.0, 1.0]


def phrase_exact(row: Row) -> list[float]:
    """The very set of phrases."""
    same = row.value is not None and set(as_phrases(row.value)) == set(as_phrases(row.reference))
    return [float(same), 1.0]


def phrase_counts(row: Row) -> list[float]:
    """Phrases of all clips pooled."""
    return _counts(set(as_phrases(row.value)), set(as_phrases(row.reference)))


def reason_emotion(row: Row) -> str | None:
    """The emotion an ERI answer should conclude: the record's label, else the true reason's."""
    return row.emotion if row.emotion is not None else concluded_emotion(str(row.reference))


def emotion_agreement(row: Row) -> list[float]:
    """The reason concludes the right emotion."""
    true = reason_emotion(row)
    if true is None:  # nothing to agree with: the clip does not count
        return [0.0, 0.0]
    return [float(row.value is not None and concluded_emotion(str(row.value)) == true), 1.0]


def rouge(row: Row) -> list[float]:
    """ROUGE-L of the reason."""
    return [rouge_l(str(row.value), str(row.reference)) if row.value is not None else 0.0, 1.0]


def judged(row: Row) -> list[float]:
    """The verdict of the judge model, where there is one."""
    return [0.0, 0.0] if row.judge is None else [row.judge, 1.0]


def pair_counts(row: Row) -> list[float]:
    """Pairs are sets within one record; a record without a true pair is left out (the paper)."""
    predicted, true = as_pairs(row.value), as_pairs(row.reference)
    if not true:
        return [0.0, 0.0, 0.0]
    count = len(predicted) + row.unread_pairs
    return [float(len(predicted & true)), float(count), float(len(true))]


def _counts_by_emotion(predicted: set[Pair], true: set[Pair], unread: int) -> list[float]:
    """Per emotion (hit, predicted, true); the last class holds unreadable pairs."""
    counts: list[float] = []
    for name in PAIR_EMOTIONS:
        p, t = ({pair for pair in pairs if pair.emotion == name} for pairs in (predicted, true))
        counts += [float(len(p & t)), float(len(p)), float(len(t))]
    return [*counts, 0.0, float(unread), 0.0]


def pair_counts_by_emotion(row: Row) -> list[float]:
    """`pair_counts` for each of the six emotions."""
    true = as_pairs(row.reference)
    if not true:
        return [0.0] * (3 * len(PAIR_EMOTIONS) + 3)
    return _counts_by_emotion(as_pairs(row.value), true, row.unread_pairs)


def conversation_counts(rows: Sequence[Row]) -> list[float]:
    """One conversation of the official protocol: sets over all its targets, without neutral."""
    predicted = {pair for row in rows for pair in as_pairs(row.value)}
    true = {pair for row in rows for pair in as_pairs(row.reference)}
    return _counts_by_emotion(predicted, true, sum(row.unread_pairs for row in rows))


def cause_counts(row: Row) -> list[float]:
    """Cause numbers alone, by the rule of `pair_counts`."""
    if not row.reference:
        return [0.0, 0.0, 0.0]
    answers = (row.value, row.reference)
    predicted, true = ({str(pair.cause) for pair in as_pairs(answer)} for answer in answers)
    hit, count, support = _counts(predicted, true)
    return [hit, count + row.unread_pairs, support]


# --- finishes: sums [..., K] -> metric [...] ---


def _ratio(sums_K: Floats) -> Floats:
    """Hits / clips."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums_K[..., 0] / sums_K[..., 1])


def weighted_f1(sums_K: Floats) -> Floats:
    """Sum over classes of F1 * (support / all support); with one class it is the micro F1.

    A class without any hit has F1 0 (scikit-learn's zero_division=0); no support at all is nan.
    """
    hit, predicted, true = (sums_K[..., start::3] for start in range(3))
    f1 = 2 * hit / np.maximum(predicted + true, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((f1 * true).sum(-1) / true.sum(-1))


def pearson(sums_K: Floats) -> Floats:
    """Pearson's r of answered and true intensity; nan when either is constant."""
    n, x, y, xx, yy, xy = (sums_K[..., place] for place in range(6))
    with np.errstate(invalid="ignore", divide="ignore"):
        spread_x, spread_y = n * xx - x * x, n * yy - y * y
        # What cancellation leaves of a constant is not a spread.
        flat = (spread_x <= 1e-9 * n * xx) | (spread_y <= 1e-9 * n * yy)
        r = (n * xy - x * y) / np.sqrt(np.where(flat, np.nan, spread_x * spread_y))
        return np.asarray(np.clip(r, -1, 1))


def _official_f1(hit: Floats, predicted: Floats, true: Floats) -> Floats:
    precision, recall = hit / (predicted + EPSILON), hit / (true + EPSILON)
    return np.asarray(2 * precision * recall / (precision + recall + EPSILON))


def official_micro(sums_K: Floats) -> Floats:
    """F1 over all pairs of the six emotions."""
    hit, predicted, true = (sums_K[..., start::3].sum(-1) for start in range(3))
    return _official_f1(hit, predicted, true)


def official_weighted(sums_K: Floats) -> Floats:
    """Per-emotion F1 weighted by the emotion's share of true pairs; nan without a true pair."""
    hit, predicted, true = (sums_K[..., start::3] for start in range(3))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((_official_f1(hit, predicted, true) * true).sum(-1) / true.sum(-1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric's name and its two halves; `per_clip` says that it is a mean over clips.

    whole: contribution of all rows of one conversation together, instead of row by row.
    needs: the field of Row without which the metric does not exist (word answers have no MAE).
    """

    name: str
    title: str
    contribution: Callable[[Row], list[float]] | None = None
    finish: Callable[[Floats], Floats] = _ratio
    whole: Callable[[Sequence[Row]], list[float]] | None = None
    needs: Literal["", "number", "judge"] = ""

    @property
    def per_clip(self) -> bool:
        return self.finish is _ratio

    def applies(self, rows: Sequence[Row]) -> bool:
        """Whether any of the rows has what the metric needs."""
        return not self.needs or any(getattr(row, self.needs) is not None for row in rows)

    def contributions(self, rows: Sequence[Row]) -> Floats:
        """One vector per clip, or per conversation in the order of first appearance: [n, K]."""
        if self.whole is None:
            assert self.contribution is not None
            parts = [self.contribution(row) for row in rows]
        else:
            together: dict[str, list[Row]] = {}
            for row in rows:
                together.setdefault(row.conversation or row.key, []).append(row)
            parts = [self.whole(one) for one in together.values()]
        return np.array(parts, dtype=np.float64)

    def value(self, rows: Sequence[Row]) -> float:
        """The metric of these rows; nan where it is not defined."""
        if not rows or not self.applies(rows):
            return math.nan
        return float(self.finish(self.contributions(rows).sum(0)))
