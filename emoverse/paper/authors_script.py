"""The `paper` mode: what the authors' scoring script would print for the same answers.

Texts in (response, label), numbers out, so that published numbers can be compared with ours. Only
the defined behaviour is reproduced; where their script would stop with an error the result says so.
`DIFFERENCES` lists what to know before comparing. Written from a description of the behaviour.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_shards.tasks import EMOTIONS, Task
from emoverse.evaluation.metrics import PAIR_EMOTIONS

SENTIMENT_TEXTS = ("Positive.", "Negative.")
EMOTION_TEXTS = tuple("Happy." if name == "joy" else f"{name.capitalize()}." for name in EMOTIONS)
# The order in which the substring search looks is not published; this is the instruction's.
EMOTION_SEARCH = ("anger", "sad", "surprise", "disgust", "happy", "neutral", "fear")
INFLATED_START = 83.87  # `compute_other_pos` counts right answers from here, not from 0

DIFFERENCES: dict[Task, tuple[str, ...]] = {
    Task.MSA: (
        "matches 'Positive.' and 'Negative.' exactly: 'positive' or ' Positive.' is wrong; ours "
        "reads them",
        "'Neutral.' is always wrong; records whose label is neither text are left out",
        "N/P is a filter on records with a non-zero sentiment, as ours",
        "baseline models: lower-case substring search in list order, nothing found counts as "
        "Negative",
        "baseline models, N/P: the count of right answers starts at 83.87 instead of 0, which "
        "inflates the accuracy",
    ),
    Task.ER: (
        "stops at any answer outside the seven texts ('Joy.', 'happy', empty); ours reads synonyms "
        "and counts what it cannot read as wrong",
        "baseline models: lower-case substring search in list order ('unhappy' is happy), nothing "
        "found counts as Neutral, the largest class",
    ),
    Task.ECPE: (
        "records with an empty gold label are skipped: false pairs there are free (our "
        "target_given protocol does the same, official does not)",
        "pairs are compared as texts: '; ' between pairs or 'U3_joy,1' makes them wrong; ours "
        "reads both",
        "a repeated pair counts every time, so F1 can exceed 1; ours are sets",
        "stops at an empty answer, a trailing ';', an answer without '_', or when an emotion is "
        "never predicted, never true, or never right",
        "baseline models: every integer in the answer is a cause and the emotion is copied from "
        "the gold label",
    ),
}


class Text(NamedTuple):
    """One answer as written, its label as written, and the true sentiment where there is one."""

    key: str
    response: str
    label: str
    sentiment: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptResult:
    """What one function of the script gives: `values`, or why it stops (`undefined`)."""

    function: str
    values: dict[str, float]
    undefined: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"function": self.function, "values": self.values, "undefined": self.undefined}


def script_results(task: Task, texts: Sequence[Text]) -> list[ScriptResult]:
    """Every function of the script that scores this task; [] for FER and ERI, which it lacks."""
    if task is Task.MSA:
        signed = [item for item in texts if item.sentiment != 0]
        return [
            emoverse_sentiment(texts),
            emoverse_sentiment(signed, function="compute_pos"),
            other_sentiment(texts),
            other_sentiment(signed, function="compute_other_pos", start=INFLATED_START),
        ]
    if task is Task.ER:
        return [emoverse_emotion(texts), other_emotion(texts)]
    if task is Task.ECPE:
        return [emoverse_ecf2(texts), other_ecf2(texts)]
    return []


def _undefined(function: str, reason: str) -> ScriptResult:
    return ScriptResult(function=function, values={}, undefined=reason)


# --- MSA ---


def emoverse_sentiment(
    texts: Sequence[Text], *, function: str = "emoverse_sentiment"
) -> ScriptResult:
    """Recall of both texts and the accuracy over records whose label is one of them."""
    labels = Counter(item.label for item in texts if item.label in SENTIMENT_TEXTS)
    for label in SENTIMENT_TEXTS:
        if not labels[label]:
            return _undefined(function, f"divides by zero: no record is labelled {label}")
    hits = Counter(item.label for item in texts if item.response == item.label)
    positive, negative = (hits[label] / labels[label] for label in SENTIMENT_TEXTS)
    right = sum(hits[label] for label in SENTIMENT_TEXTS)
    return ScriptResult(
        function=function,
        values={
            "recall_positive": positive,
            "recall_negative": negative,
            "accuracy": right / labels.total(),
        },
    )


def other_sentiment(
    texts: Sequence[Text], *, function: str = "other_sentiment", start: float = 0.0
) -> ScriptResult:
    """Accuracy of baseline models: 'positive', then 'negative' as a substring, else Negative."""
    kept = [item for item in texts if item.label in SENTIMENT_TEXTS]
    if not kept:
        return _undefined(function, "divides by zero: no record")
    right = sum(
        _found(item.response, ("positive", "negative"), "negative") == item.label for item in kept
    )
    return ScriptResult(function=function, values={"accuracy": (start + right) / len(kept)})


def _found(response: str, words: Sequence[str], default: str) -> str:
    """The first word of the list that is a substring, as a label text."""
    word = next((word for word in words if word in response), default)
    return "Sadness." if word == "sad" else f"{word.capitalize()}."


# --- ER ---


def _label_scores(function: str, pairs: Sequence[tuple[str, str]]) -> ScriptResult:
    """Accuracy and weighted F1 of (answered, true) texts."""
    if not pairs:
        return _undefined(function, "no record")
    predicted, true = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    hits = Counter(a for a, b in pairs if a == b)
    weighted = sum(2 * hits[name] / (predicted[name] + n) * n for name, n in true.items()) / len(
        pairs
    )
    return ScriptResult(
        function=function,
        values={"accuracy": hits.total() / len(pairs), "weighted_f1": weighted},
    )


def emoverse_emotion(texts: Sequence[Text]) -> ScriptResult:
    """Exact texts only; anything else stops the script."""
    for item in texts:
        for what, text in (("answer", item.response), ("label", item.label)):
            if text not in EMOTION_TEXTS:
                return _undefined("emoverse_emotion", f"stops at the {what} {text!r} of {item.key}")
    return _label_scores("emoverse_emotion", [(item.response, item.label) for item in texts])


def other_emotion(texts: Sequence[Text]) -> ScriptResult:
    """Baseline models: substring search, else Neutral."""
    return _label_scores(
        "other_emotion",
        [(_found(item.response, EMOTION_SEARCH, "neutral"), item.label) for item in texts],
    )


# --- ECPE ---


def _pair_scores(
    function: str,
    hits: Counter[str],
    predicted: Counter[str],
    true: Counter[str],
) -> ScriptResult:
    """Micro F1 and support-weighted F1 from counts per emotion, with the script's divisions."""
    if not hits.total():
        return _undefined(function, "divides by zero: nothing is right")
    f1 = {}
    for name in PAIR_EMOTIONS:
        for what, counts in (("predicted", predicted), ("true", true)):
            if not counts[name]:
                return _undefined(function, f"divides by zero: {name} is never {what}")
        precision, recall = hits[name] / predicted[name], hits[name] / true[name]
        f1[name] = 2 * precision * recall / (precision + recall) if hits[name] else 0.0
    precision, recall = hits.total() / predicted.total(), hits.total() / true.total()
    return ScriptResult(
        function=function,
        values={
            "f1": 2 * precision * recall / (precision + recall),
            "weighted_f1": sum(f1[name] * true[name] for name in f1) / true.total(),
        },
    )


def emoverse_ecf2(texts: Sequence[Text]) -> ScriptResult:
    """Pairs as texts, repeated ones counted every time; records with an empty label skipped."""
    function = "emoverse_ecf2"
    hits, predicted, true = Counter[str](), Counter[str](), Counter[str]()
    for item in texts:
        if not item.label:
            continue
        gold = item.label.split(";")
        true.update(_emotion_of(pair) or "" for pair in gold)
        for pair in item.response.split(";"):
            emotion = _emotion_of(pair)
            if emotion is None:
                return _undefined(function, f"stops at the pair {pair!r} of {item.key}: no '_'")
            predicted[emotion] += 1
            hits[emotion] += pair in gold
    return _pair_scores(function, hits, predicted, true)


def _emotion_of(pair: str) -> str | None:
    parts = pair.split(",")[0].split("_")
    return parts[1] if len(parts) > 1 else None


def other_ecf2(texts: Sequence[Text]) -> ScriptResult:
    """Baseline models: every integer of the answer is a cause of the gold label's emotion."""
    hits, predicted, true = Counter[str](), Counter[str](), Counter[str]()
    for item in texts:
        if not item.label:
            continue
        gold = item.label.split(";")
        true.update(_emotion_of(pair) or "" for pair in gold)
        emotion = _emotion_of(gold[0]) or ""
        causes = {pair.partition(",")[2] for pair in gold}
        for number in re.findall(r"\d+", item.response):
            predicted[emotion] += 1
            hits[emotion] += number in causes
    return _pair_scores("other_ecf2", hits, predicted, true)
