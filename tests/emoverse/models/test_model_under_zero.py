"""EmoVerse under DeepSpeed with two ranks: every ZeRO stage trains the same model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from emoverse.distributed import World
from emoverse.models.emoverse import compose
from emoverse.models.internvl2 import build_native

Make = Callable[..., Any]


@dataclass
class Pack:
    """A namespace batch with the engine's `to`."""

    values: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def to(self, device: torch.device) -> "Pack":
        return Pack(
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.values.items()}
        )


def test_stages_agree(
    make_tiny: Make,
    make_settings: Make,
    make_batch: Make,
    samples: list[Any],
    run_ranks: Callable[..., list[Any]],
) -> None:
    """One rank sees text only, so a graph that depended on the batch would hang or differ."""
    from emoverse.engine import Engine, deepspeed_config

    config = make_tiny("phi3")
    shares = [[samples[2], samples[2]], [samples[0], samples[1]]]

    def work(world: World, stage: int) -> tuple[list[float], list[float]]:
        model = compose(build_native(config, seed=3), config, make_settings()).train()
        groups = [
            {"name": part, "params": [p for _, p in named], "lr": 1e-2, "initial_lr": 1e-2}
            for part, named in model.trainable_groups().items()
        ]
        count = sum(p.numel() for group in groups for p in group["params"])
        settings = deepspeed_config(
            zero_stage=stage,
            precision="fp32",
            clip=1.0,
            world_size=world.world_size,
            num_trainable=count,
        )
        engine = Engine(model, torch.optim.AdamW(groups), world, settings)
        packs = [Pack(vars(make_batch([sample]))) for sample in shares[world.rank]]
        results = [
            engine.step(
                packs, num_packs=2, normaliser=4.0, lr_factor=1.0, make_empty=lambda: packs[0]
            )
            for _ in range(3)
        ]
        engine.close()
        return [one.loss for one in results], [one.grad_norm for one in results]

    found = {
        stage: run_ranks(lambda world, stage=stage: work(world, stage), 2) for stage in (0, 2, 3)
    }
    losses, norms = found[0][0]
    assert losses[2] < losses[0]
    for stage, answers in found.items():
        for own_losses, own_norms in answers:
            assert own_losses == pytest.approx(losses, rel=1e-5), stage
            assert own_norms == pytest.approx(norms, rel=1e-3), stage
