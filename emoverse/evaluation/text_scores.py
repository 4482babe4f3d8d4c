"""Scores of two texts, and the emotion that a free text concludes: the word rules of the metrics.

Strings in, numbers out. Under `scoring.py`; torch-free and free of any record.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from data_shards.tasks import EMOTIONS

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
