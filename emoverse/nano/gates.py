"""What a finished nano base can do, measured on people and dialogues that it has not seen.

In: its folder. Out: the figures: a linear probe of the frozen tower for the face's emotion (the
only place where the base meets emotions, after it is finished), sign F1 of captions against the
best constant caption, and exact answers to who-said-what questions (beside them, without a gate,
to which turn names an event).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_shards.sources.synthetic import SyntheticOptions, make_scene
from data_shards.world import pairs
from data_shards.world.grammar import EVENTS
from data_shards.world.scene import film
from emoverse.data.encode import EncodeOptions
from emoverse.data.tokenizer import Tokenizer
from emoverse.inference.generate import generate_answers
from emoverse.models.emoverse import EmoVerse, compose
from emoverse.models.internvl.checkpoint import import_checkpoint
from emoverse.nano.pretrain_config import Gates
from emoverse.nano.pretrain_data import encode_generic, pair_options

_HELD_OUT, _PROBE_TRAIN, _PROBE_TEST = 201, 202, 203
_BATCH = 64
_NEW_TOKENS = 64  # room for the longest caption
_PROBE_EPOCHS = 300


def check_gates(figures: dict[str, float], gates: Gates) -> None:
    """Raises ValueError naming every gate that is missed."""
    wanted = {
        "probe_accuracy": gates.probe_accuracy,
        "caption_margin": gates.caption_margin,
        "dialogue_accuracy": gates.dialogue_accuracy,
    }
    missed = [
        f"gates.{name}: must be at least {least}, found {figures[name]:.3f}"
        for name, least in wanted.items()
        if figures[name] < least
    ]
    if missed:
        raise ValueError(
            "; ".join(missed) + "; train longer (align.steps, talk.steps) or lower the gate"
        )


def measure_gates(folder: Path, *, seed: int, samples: int) -> dict[str, float]:
    """The figures of a finished base; see the head of this file."""
    native, config_json = import_checkpoint(folder, torch.float32)
    model = compose(native, config_json, None, train="none")
    model.eval()
    tokenizer = Tokenizer.load(folder)
    options = pair_options(
        model.architecture,
        config_json["template"],
        max_tokens=config_json["llm_config"]["max_position_embeddings"],
    )
    rng = np.random.default_rng([seed, _HELD_OUT])
    captions = [pairs.draw_pair(rng, "face") for _ in range(samples)]
    videos = [pairs.draw_pair(rng, "video") for _ in range(samples)]
    dialogues = [pairs.draw_pair(rng, "turns") for _ in range(samples)]
    caption_f1 = sign_f1(answers(model, tokenizer, options, captions), captions)
    video_f1 = sign_f1(answers(model, tokenizer, options, videos), videos)
    constant = max(sign_f1([guess] * samples, captions) for guess in constant_captions(captions))
    said = answers(model, tokenizer, options, dialogues)
    return {
        "probe_accuracy": probe_emotion(model, seed=seed, samples=samples),
        "caption_f1": caption_f1,
        "video_f1": video_f1,
        "constant_caption_f1": constant,
        "caption_margin": caption_f1 - constant,
        "dialogue_accuracy": exact_share(said, dialogues, number=False),
        "turn_number_accuracy": exact_share(said, dialogues, number=True),
    }


def exact_share(
    written: Sequence[str], asked: Sequence[pairs.GenericPair], *, number: bool
) -> float:
    """Share of exact answers to who-said-what, or to which turn (`number`): told apart, as counting
    the line in which an event stands is another skill than reading what the line says."""
    right = [
        answer == pair.answer
        for answer, pair in zip(written, asked, strict=True)
        if (pairs.WHICH_TURN in pair.question) == number
    ]
    return sum(right) / max(1, len(right))


def answers(
    model: EmoVerse,
    tokenizer: Tokenizer,
    options: EncodeOptions,
    asked: Sequence[pairs.GenericPair],
) -> list[str]:
    """Greedy answers to generic pairs, in their order."""
    examples = [encode_generic(pair, tokenizer, options, answer=False) for pair in asked]
    written: list[str] = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        found = generate_answers(model, tokenizer, batch, max_new_tokens=_NEW_TOKENS)
        written += [answer.text for answer in found]
    return written


def _signs(caption: str) -> set[str]:
    return {part.strip() for part in caption.rstrip(".").split(",") if part.strip()}


def sign_f1(written: Sequence[str], asked: Sequence[pairs.GenericPair]) -> float:
    """Micro F1 over the sets of signs."""
    hits = given = wanted = 0
    for answer, pair in zip(written, asked, strict=True):
        said, true = _signs(answer), _signs(pair.answer)
        hits, given, wanted = hits + len(said & true), given + len(said), wanted + len(true)
    return 2 * hits / max(1, given + wanted)


def constant_captions(asked: Sequence[pairs.GenericPair]) -> list[str]:
    """The k most frequent signs, for every k: one of them is the best constant caption."""
    ranked = [
        sign for sign, _ in Counter(s for pair in asked for s in _signs(pair.answer)).most_common()
    ]
    return [", ".join(ranked[:k]) + "." for k in range(1, len(ranked) + 1)]


def probe_emotion(model: EmoVerse, *, seed: int, samples: int) -> float:
    """Accuracy of a linear probe on the frozen tower's tokens at the peak of an emotional face.

    Trained on one set of identities, tested on another; the probe sees all visual tokens of a
    frame, concatenated (their mean says nothing: the layout of the face is lost).
    """
    train_x, train_y = _peaks(model, [seed, _PROBE_TRAIN], 4 * samples)
    test_x, test_y = _peaks(model, [seed, _PROBE_TEST], samples)
    mean, scale = train_x.mean(0), train_x.std(0) + 1e-4
    train_x, test_x = (train_x - mean) / scale, (test_x - mean) / scale
    weights = torch.zeros(train_x.shape[1], len(EVENTS), requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=3e-3, weight_decay=1e-3)
    for _ in range(_PROBE_EPOCHS):
        optimizer.zero_grad()
        F.cross_entropy(train_x @ weights, train_y).backward()
        optimizer.step()
    return float(((test_x @ weights).argmax(1) == test_y).float().mean())


def _peaks(model: EmoVerse, key: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the strongest frame of `count` clips whose face shows one of the six emotions."""
    options = SyntheticOptions(
        clips=1, seed=int(np.random.default_rng(list(key)).integers(2**31)), split="test"
    )
    frames: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    number = 0
    while len(frames) < count:
        scene, rng = make_scene(options, number)
        number += 1
        if not scene.units:
            continue
        shot = film(rng, scene)
        frames.append(shot.frames[int(shot.track.sum(axis=1).argmax())])
        labels.append(list(EVENTS).index(scene.emotion))
    parts = [
        model.vision_features(torch.from_numpy(np.stack(frames[i : i + _BATCH]))).flatten(1)
        for i in range(0, count, _BATCH)
    ]
    return torch.cat(parts).float(), torch.tensor(labels)
