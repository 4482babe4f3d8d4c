"""The two chat templates, with placeholders for the frames.

In: the query of a sample and the number of its frames. Out: the prompt as segments, each text or a
run of image context tokens, which `encode.py` tokenises one by one.
The segment boundaries are part of the format: a word at the start of a segment has other tokens
than the same word inside one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from emoverse.data.tokenizer import IMG_END, IMG_START

# The frames of a sample: those of a clip, one image, none, or grey frames instead.
View = Literal["clip", "peak", "none", "blank"]
# Text, or the number of image context tokens of a run.
Segment = str | int

# As the authors spell it.
SYSTEM_TEXT = "You are an sentiment and emotion analysis expert."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """The fixed text around system text, query and answer; no newline follows an end token."""

    before_system: str
    before_query: str
    before_answer: str
    end: str


TEMPLATES: Mapping[str, ChatTemplate] = {
    "phi3-chat": ChatTemplate(
        before_system="<|system|>\n",
        before_query="<|end|><|user|>\n",
        before_answer="<|end|><|assistant|>\n",
        end="<|end|>",
    ),
    "internlm2-chat": ChatTemplate(
        before_system="<|im_start|>system\n",
        before_query="<|im_end|><|im_start|>user\n",
        before_answer="<|im_end|><|im_start|>assistant\n",
        end="<|im_end|>",
    ),
}


def chat_template(name: str) -> ChatTemplate:
    """The template that config.json of a base model names. Raises ValueError for another name."""
    if name not in TEMPLATES:
        raise ValueError(
            f"template in the model's config.json must be one of {sorted(TEMPLATES)}, found "
            f"{name!r}; only InternVL2-4B and InternVL2-8B folders are supported"
        )
    return TEMPLATES[name]


def build_prompt(
    query: str,
    *,
    num_frames: int,
    tokens_per_frame: int,
    view: Literal["clip", "peak", "none"],
    template: str,
    system: str = SYSTEM_TEXT,
) -> list[Segment]:
    """Everything before the answer, frames in front of the query.

    view: `clip` tags every frame with its number from 1; `peak` is one image, whose tiles share one
        pair of tags (`num_frames` tiles); `none` is text only.
    """
    chat = chat_template(template)
    if (view == "none") != (num_frames == 0):
        raise ValueError(f"view {view!r} cannot have {num_frames} frames")
    for tag in ("<image>", "<video>"):
        if tag in query:
            raise ValueError(
                f"the query contains the tag {tag}, but frames always precede it; "
                "remove the tag from the text"
            )
    segments: list[Segment] = []
    text = chat.before_system + system + chat.before_query
    if view == "clip":
        for frame in range(1, num_frames + 1):
            segments += [f"{text}Frame{frame}: {IMG_START}", tokens_per_frame]
            text = f"{IMG_END}\n"
    elif view == "peak":
        segments += [f"{text}{IMG_START}", num_frames * tokens_per_frame]
        text = f"{IMG_END}\n"
    segments.append(text + query + chat.before_answer)
    return segments


def build_answer(response: str, *, template: str) -> str:
    """The supervised segment: the response and the token that ends it."""
    return response + chat_template(template).end
