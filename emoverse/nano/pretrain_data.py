"""Training data of the nano base: generic pairs as tokenizer texts and as examples.

In: a seed, or one pair. Out: texts, or an Example. Flow: `data_shards.world.pairs` -> here ->
`pretrain.py`.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from data_shards.tasks import TASKS, Task, format_answer
from data_shards.world import pairs
from data_shards.world.describe import SIGNS
from emoverse.data.encode import EncodeOptions, Example, encode_pair
from emoverse.data.tokenizer import Tokenizer
from emoverse.models.architecture import Architecture

SYSTEM_TEXT = "You are a helpful assistant."
_TEXTS = 101  # stream of random numbers, different from those of the corpus and of the phases
# A packed batch counts losses in five slots, one per task; pretraining counts kinds of pairs there.
_SLOT: Mapping[str, Task] = {
    "face": TASKS[0], "sign": TASKS[0], "person": TASKS[0], "video": TASKS[1], "speaker": TASKS[1],
    "dialogue": TASKS[2], "repeat": TASKS[3], "words": TASKS[3], "turns": TASKS[4],
    "many": TASKS[4],
}  # fmt: skip


def pair_options(architecture: Architecture, template: str, *, max_tokens: int) -> EncodeOptions:
    """Encode options of generic pairs: the prompt of the tasks with another system text."""
    return EncodeOptions(
        template=template,
        tokens_per_frame=architecture.visual_tokens_per_frame,
        image_size=architecture.vision.image_size,
        max_tokens=max_tokens,
        frames_per_clip=pairs.VIDEO_FRAMES,
        system=SYSTEM_TEXT,
    )


def encode_generic(
    pair: pairs.GenericPair,
    tokenizer: Tokenizer,
    options: EncodeOptions,
    *,
    answer: bool,
    position: int = 0,
) -> Example:
    """A generic pair as an example; without `answer` it ends where the answer begins."""
    num_frames = 0 if pair.frames is None else len(pair.frames)
    view: Literal["clip", "peak", "none"] = "clip" if pair.video else "peak"
    if pair.frames is None:
        view = "none"
    ids_T, labels_T = encode_pair(
        pair.question,
        pair.answer if answer else None,
        tokenizer,
        options,
        num_frames=num_frames,
        view=view,
        what=f"generic pair ({pair.kind})",
    )
    assert len(ids_T) <= options.max_tokens, f"a {pair.kind} pair of {len(ids_T)} tokens"
    return Example(
        position=position,
        task=_SLOT[pair.kind],
        key=pair.kind,
        ids_T=ids_T,
        labels_T=labels_T,
        pixels_F=pair.frames,
        view=view,
        num_frames=num_frames,
    )


def world_texts(seed: int, count: int) -> Iterator[str]:
    """Texts for the tokenizer, with every word of the world: generic pairs and one task answer."""
    rng = np.random.default_rng([seed, _TEXTS])
    kinds = ("dialogue", "repeat", "words")
    for index in range(count):
        pair = pairs.draw_pair(rng, kinds[index % len(kinds)])
        yield pair.question
        yield pair.answer
    for _ in range(count // 10):
        for sign in SIGNS.values():
            yield f"Describe the face in the video. Do you see {sign}? nothing special, {sign}."
        yield pairs.draw_pair(rng, "person").answer
        yield format_answer(Task.MSA, "positive")
