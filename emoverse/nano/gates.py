"""Quality gates of a finished nano base, measured on held-out identities and dialogues.

In: the folder of the base. Out: accuracy of a linear probe of the frozen tower for the emotion of a
face (the base itself is never trained on emotions), sign F1 of captions above the best constant
caption, and the share of exact answers to who-said-what questions. The share of exact answers to
which turn names an event is measured without a gate.
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

_HELD_OUT, _PROBE_TRAIN, _PROBE_TEST = 201, 202, 203  # streams of random numbers of a seed
_BATCH = 64
_MAX_NEW_TOKENS = 64  # of the longest caption
_PROBE_EPOCHS = 300


def check_gates(figures: dict[str, float], gates: Gates) -> None:
    """Raise ValueError if a gate is missed; the message names every one."""
    minimum = {
        "probe_accuracy": gates.probe_accuracy,
        "caption_margin": gates.caption_margin,
        "dialogue_accuracy": gates.dialogue_accuracy,
    }
    missed = [
        f"gates.{name}: must be at least {least}, found {figures[name]:.3f}"
        for name, least in minimum.items()
        if figures[name] < least
    ]
    if missed:
        raise ValueError(
            "; ".join(missed) + "; train longer (align.steps, talk.steps) or lower the gate"
        )


def measure_gates(folder: Path, *, seed: int, samples: int) -> dict[str, float]:
    """Name -> figure of a finished base, from `samples` held-out pictures, clips and dialogues."""
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
    dialogue_answers = answers(model, tokenizer, options, dialogues)
    return {
        "probe_accuracy": probe_emotion(model, seed=seed, samples=samples),
        "caption_f1": caption_f1,
        "video_f1": video_f1,
        "constant_caption_f1": constant,
        "caption_margin": caption_f1 - constant,
        "dialogue_accuracy": exact_share(dialogue_answers, dialogues, number=False),
        "turn_number_accuracy": exact_share(dialogue_answers, dialogues, number=True),
    }


def exact_share(
    written: Sequence[str], asked: Sequence[pairs.GenericPair], *, number: bool
) -> float:
    """Share of exact answers to who-said-what questions, or to which-turn questions (`number`).

    They are separate figures because finding the number of a line is another skill than reading it.
    """
    correct = [
        answer == pair.answer
        for answer, pair in zip(written, asked, strict=True)
        if (pairs.WHICH_TURN in pair.question) == number
    ]
    return sum(correct) / max(1, len(correct))


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
        generated = generate_answers(model, tokenizer, batch, max_new_tokens=_MAX_NEW_TOKENS)
        written += [answer.text for answer in generated]
    return written


def _signs(caption: str) -> set[str]:
    return {sign.strip() for sign in caption.rstrip(".").split(",") if sign.strip()}


def sign_f1(written: Sequence[str], asked: Sequence[pairs.GenericPair]) -> float:
    """Micro F1 of the sets of signs that the captions name, against the reference captions."""
    hits = num_predicted = num_reference = 0
    for answer, pair in zip(written, asked, strict=True):
        predicted, reference = _signs(answer), _signs(pair.answer)
        hits += len(predicted & reference)
        num_predicted += len(predicted)
        num_reference += len(reference)
    return 2 * hits / max(1, num_predicted + num_reference)


def constant_captions(asked: Sequence[pairs.GenericPair]) -> list[str]:
    """Captions of the k most frequent signs, for every k: the best constant one is among them."""
    ranked = [
        sign for sign, _ in Counter(s for pair in asked for s in _signs(pair.answer)).most_common()
    ]
    return [", ".join(ranked[:k]) + "." for k in range(1, len(ranked) + 1)]


def probe_emotion(model: EmoVerse, *, seed: int, samples: int) -> float:
    """Accuracy of a linear probe on the frozen tower's tokens of the peak frame of a face.

    Trained on one set of identities, tested on another. The probe gets all visual tokens of a
    frame, concatenated; their mean is uninformative because it loses the layout of the face.
    """
    train_x, train_y = _peaks(model, [seed, _PROBE_TRAIN], 4 * samples)
    test_x, test_y = _peaks(model, [seed, _PROBE_TEST], samples)
    mean, scale = train_x.mean(0), train_x.std(0) + 1e-4
    train_x, test_x = (train_x - mean) / scale, (test_x - mean) / scale
    weights = torch.zeros(train_x.shape[1], len(EVENTS), requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=3e-3, weight_decay=1e-3)
    for _ in range(_PROBE_EPOCHS):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(train_x @ weights, train_y))
        optimizer.step()
    return float(((test_x @ weights).argmax(1) == test_y).float().mean())


def _peaks(model: EmoVerse, key: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [count, D] and emotion labels [count] of the peak frames of clips that show one."""
    options = SyntheticOptions(
        clips=1, seed=int(np.random.default_rng(list(key)).integers(2**31)), split="test"
    )
    frames: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    index = 0
    while len(frames) < count:
        scene, rng = make_scene(options, index)
        index += 1
        if not scene.units:
            continue
        shot = film(rng, scene)
        frames.append(shot.frames[int(shot.track.sum(axis=1).argmax())])
        labels.append(list(EVENTS).index(scene.emotion))
    features = [
        model.vision_features(torch.from_numpy(np.stack(frames[i : i + _BATCH]))).flatten(1)
        for i in range(0, count, _BATCH)
    ]
    return torch.cat(features).float(), torch.tensor(labels)
