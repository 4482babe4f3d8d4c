"""Answers on several ranks, with weights that no rank holds alone: those of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.tasks import Task
from emoverse.data.encode import EncodeOptions, Example, encode_pair
from emoverse.data.tokenizer import Tokenizer
from emoverse.engine.distributed import World
from emoverse.inference.generate import Answered, generate_answers
from emoverse.models.adapters import merge_adapters
from emoverse.models.emoverse import EmoVerse, build_model
from emoverse.models.internvl.checkpoint import export_checkpoint, import_checkpoint

NEW_TOKENS = 9
LORA = {"preset": "paper", "r": 4, "alpha": 8, "dropout": 0.0, "targets": ()}


@pytest.fixture
def base(tiny_inputs: Any, tmp_path: Path) -> Path:
    """The tiny base with larger weights, so that answers differ and end at different lengths."""
    native, config_json = import_checkpoint(tiny_inputs.base, torch.float32)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for value in native.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.25)
    export_checkpoint(native, config_json, tmp_path / "big", None, copy_from=tiny_inputs.base)
    return tmp_path / "big"


def settings() -> Any:
    from types import SimpleNamespace

    adapters = SimpleNamespace(**LORA)
    return SimpleNamespace(lora=adapters, projector="full", attention="sdpa", lean="auto")


def adapted(base: Path, *, defer: bool = False) -> EmoVerse:
    """With adapters that say something."""
    model = build_model(base, settings(), defer=defer, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def examples(base: Path) -> list[Example]:
    """Seven queries: clips of two frames, one frame, and text alone."""
    tokenizer = Tokenizer.load(base)
    options = EncodeOptions(template="phi3-chat", tokens_per_frame=4, image_size=56)
    rng = np.random.default_rng(0)
    found = []
    for number, frames in enumerate((2, 0, 1, 2, 2, 0, 1)):
        view = ("none", "peak", "clip")[frames]
        words = " ".join(["the train left", "we won", "my keys are gone"][: 1 + number % 3])
        ids, labels = encode_pair(
            words, None, tokenizer, options, num_frames=frames, view=view, what="test"
        )
        pixels = rng.integers(0, 256, (frames, 56, 56, 3), dtype=np.uint8)
        found.append(
            Example(
                position=number,
                task=Task.ER,
                key=f"k{number}",
                ids_T=ids,
                labels_T=labels,
                pixels_F=pixels if frames else None,
                view=view,
                num_frames=frames,
            )
        )
    return found


def one_by_one(model: EmoVerse, base: Path, examples: list[Example]) -> list[Answered]:
    tokenizer = Tokenizer.load(base)
    return [
        generate_answers(model, tokenizer, [one], max_new_tokens=NEW_TOKENS)[0] for one in examples
    ]


def test_zero3_on_two_ranks_answers_as_one_process(
    base: Path, examples: list[Example], run_ranks: Callable[..., list[Any]]
) -> None:
    """Uneven: rank 0 has two batches of three and one, rank 1 one batch of three, then nothing."""
    expected = one_by_one(adapted(base), base, examples)
    assert len({answer.text for answer in expected}) > 3

    def work(world: World) -> list[Answered]:
        from emoverse.engine.deepspeed_engine import SharedWeights

        model = adapted(base, defer=True)
        shared = SharedWeights(model, world, precision="fp32", deferred=model.deferred)
        assert model.partitioned
        tokenizer = Tokenizer.load(base)
        batches = [[examples[:3], examples[6:]], [examples[3:6], []]][world.rank]
        answers: list[Answered] = []
        for batch in batches:
            answers += generate_answers(model, tokenizer, batch, max_new_tokens=NEW_TOKENS)
        shared.close()
        return answers

    first, second = run_ranks(work, 2)
    assert [*first[:3], *second, *first[3:]] == expected


def test_a_training_engine_can_answer_in_between(
    base: Path, examples: list[Example], run_ranks: Callable[..., list[Any]]
) -> None:
    expected = one_by_one(adapted(base), base, examples[:3])

    def work(world: World, stage: int) -> list[Answered]:
        from emoverse.engine.deepspeed_engine import Engine, deepspeed_config

        model = adapted(base, defer=stage == 3).train()
        groups = [
            {"name": part, "params": [p for _, p in named], "lr": 0.0, "initial_lr": 0.0}
            for part, named in model.trainable_groups().items()
        ]
        config = deepspeed_config(
            zero_stage=stage, precision="fp32", clip=1.0, world_size=2, num_trainable=9000
        )
        engine = Engine(model, torch.optim.AdamW(groups), world, config, model.deferred)
        mine = examples[:3][world.rank :: 2]
        answers = generate_answers(model, Tokenizer.load(base), mine, max_new_tokens=NEW_TOKENS)
        engine.close()
        return answers

    first, second = run_ranks(lambda world: work(world, 3), 2)
    assert [first[0], second[0], first[1]] == expected


def test_merged_and_unmerged_answer_alike(base: Path, examples: list[Example]) -> None:
    model = adapted(base)
    apart = one_by_one(model, base, examples)
    together = generate_answers(model, Tokenizer.load(base), examples, max_new_tokens=NEW_TOKENS)
    assert together == apart
    merge_adapters(model.native)
    assert one_by_one(model, base, examples) == apart
    plain = build_model(base, settings(), train="none")
    assert one_by_one(plain, base, examples) != apart
