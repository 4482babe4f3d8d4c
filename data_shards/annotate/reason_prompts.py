"""What the two models are asked for an ERI label: to describe the clip, then to infer the cause.

The paper names the two models and the order, its prompts are not published; these are ours. Every
row of the result carries PROMPT_VERSION.
"""

import base64
from collections.abc import Sequence
from typing import Any, Final

PROMPT_VERSION: Final = "1"  # raise it with every change of the texts below

DESCRIBE_TASK: Final = (
    "These are {count} frames of one short video clip in order of time. Describe only what can be "
    "seen. First the person who speaks or is most in view: face, gaze, mouth, brows, gestures and "
    "posture, and how they change. Then the scene: place, other people, and what happens. Four to "
    "six plain sentences. Do not guess at words that are spoken and do not name an emotion."
)
INFER_SYSTEM: Final = "You explain why a person in a video feels what they feel."
INFER_TASK: Final = (
    "What can be seen:\n{description}\n\n{words}\n\nThe person's emotion is known: {emotion}. "
    "Explain in two to four sentences, as one paragraph: begin with the clues of the face, go on "
    "with what the words convey, and conclude with the emotion {emotion} and its most likely "
    "cause. Use only what is given above."
)
_WORDS: Final = "The person says: {utterance}"
_NO_WORDS: Final = "The person says nothing."


def describe_messages(jpegs: Sequence[bytes]) -> list[dict[str, Any]]:
    """The first call: frames as JPEG data URLs, then the task."""
    images = [
        {
            "type": "image_url",
            "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()},
        }
        for jpeg in jpegs
    ]
    text = {"type": "text", "text": DESCRIBE_TASK.format(count=len(jpegs))}
    return [{"role": "user", "content": [*images, text]}]


def infer_messages(description: str, utterance: str, emotion: str) -> list[dict[str, Any]]:
    """The second call: description, words and label; the cause comes back."""
    words = _WORDS.format(utterance=utterance) if utterance.strip() else _NO_WORDS
    task = INFER_TASK.format(description=description, words=words, emotion=emotion)
    return [{"role": "system", "content": INFER_SYSTEM}, {"role": "user", "content": task}]
