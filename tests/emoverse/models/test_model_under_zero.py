"""EmoVerse under DeepSpeed with three ranks: every ZeRO stage trains the same model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emoverse import loss
from emoverse.engine.distributed import World
from emoverse.models.emoverse import compose
from emoverse.models.internvl.checkpoint import build_native

Make = Callable[..., Any]


@pytest.mark.promise(2)
@pytest.mark.parametrize(
    ("precision", "dropout"), [("fp32", 0.0), ("fp32", 0.1), ("bf16", 0.1)], ids=str
)
def test_stages_agree(
    make_tiny: Make,
    make_settings: Make,
    make_batch: Make,
    make_pack: Make,
    samples: list[Any],
    run_ranks: Callable[..., list[Any]],
    precision: str,
    dropout: float,
) -> None:
    """Text alone, images, clips: a graph that depended on the batch would hang or differ.

    Two packs a step: gradients add up before the update.
    """
    from emoverse.engine.deepspeed_engine import Engine, deepspeed_config

    config = make_tiny("phi3")
    shares = [[samples[2], samples[2]], [samples[1], samples[4]], [samples[0], samples[3]]]

    def work(world: World, stage: int, lean: str) -> tuple[list[float], list[float]]:
        model_settings = make_settings(dropout=dropout)
        model_settings.lean = lean
        native = build_native(config, seed=3)
        if precision == "bf16":
            for value in native.parameters():  # the rotary tables stay fp32, as in a loaded model
                value.data = value.data.bfloat16()
        model = compose(native, config, model_settings).train()
        groups = [
            {"name": part, "params": [p for _, p in named], "lr": 1e-2, "initial_lr": 1e-2}
            for part, named in model.trainable_groups().items()
        ]
        count = sum(p.numel() for group in groups for p in group["params"])
        settings = deepspeed_config(
            zero_stage=stage,
            precision=precision,
            clip=1.0,
            world_size=world.world_size,
            num_trainable=count,
        )
        # A tiny model would stay gathered; lean layers must find their weights all the same.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        torch.manual_seed(7)
        engine = Engine(model, torch.optim.AdamW(groups), world, settings)
        packs = [make_pack(make_batch([sample])) for sample in shares[world.rank]]
        results = [
            engine.step(
                packs, num_packs=2, normaliser=6.0, lr_factor=1.0, make_empty=lambda: packs[0]
            )
            for _ in range(3)
        ]
        engine.close()
        return [one.loss for one in results], [one.grad_norm for one in results]

    # With dropout the plain layers draw other masks; ZeRO-0 does not take bf16.
    ways = [(1, "on"), (3, "on")] + ([] if dropout else [(0, "on"), (2, "on"), (2, "off")])
    if precision == "bf16":
        ways.append((2, "on"))
    found = {way: run_ranks(lambda world, way=way: work(world, *way), 3) for way in ways}
    losses, norms = found[1, "on"][0]
    assert losses[2] < losses[0]
    # bf16: DeepSpeed sums gradients in bf16 under ZeRO-1 and in fp32 above.
    bounds = (1e-5, 1e-3) if precision == "fp32" else (2e-3, 5e-2)
    for way, answers in found.items():
        for own_losses, own_norms in answers:
            assert own_losses == pytest.approx(losses, rel=bounds[0]), way
            assert own_norms == pytest.approx(norms, rel=bounds[1]), way


def test_chunks_of_logits_under_zero_3(
    make_tiny: Make,
    make_settings: Make,
    make_batch: Make,
    make_pack: Make,
    samples: list[Any],
    run_ranks: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each chunk gathers the head: ranks with fewer supervised rows must not leave the others."""
    from emoverse.engine.deepspeed_engine import Engine, deepspeed_config

    config = make_tiny("phi3")

    def work(world: World) -> list[float]:
        model = compose(build_native(config, seed=3), config, make_settings()).train()
        trained = [p for part in model.trainable_groups().values() for _, p in part]
        settings = deepspeed_config(
            zero_stage=3,
            precision="fp32",
            clip=1.0,
            world_size=world.world_size,
            num_trainable=sum(p.numel() for p in trained),
        )
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        groups = [{"name": "all", "params": trained, "lr": 1e-2, "initial_lr": 1e-2}]
        engine = Engine(model, torch.optim.AdamW(groups), world, settings)
        pack = make_pack(make_batch([samples[3 if world.rank else 1]]))  # 1 and 5 rows
        results = [
            engine.step([pack], num_packs=1, normaliser=2.0, lr_factor=1.0, make_empty=lambda: pack)
            for _ in range(3)
        ]
        engine.close()
        return [one.loss for one in results]

    whole = run_ranks(work, 2)
    two_rows = 2 * config["llm_config"]["vocab_size"]
    monkeypatch.setitem(loss.supervised_cross_entropy.__kwdefaults__, "max_logits", two_rows)
    assert run_ranks(work, 2, limit_s=60) == [pytest.approx(losses, rel=1e-5) for losses in whole]
