"""ZeRO-3 from a folder: no rank holds the whole model, and it trains as the plain one does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emoverse.engine.distributed import World
from emoverse.models.emoverse import EmoVerse, build_model
from emoverse.models.internvl.checkpoint import build_native, export_checkpoint, import_deferred

Make = Callable[..., Any]


@pytest.fixture
def base(tmp_path: Path, config_json: dict[str, Any]) -> Path:
    native = build_native(config_json, seed=1)
    export_checkpoint(native, config_json, tmp_path / "base", None, shard_bytes=60_000)
    return tmp_path / "base"


def test_placeholders_take_no_memory(base: Path) -> None:
    native, _, deferred = import_deferred(base, torch.bfloat16)
    for name, value in native.named_parameters():
        frozen = not name.startswith("model.multi_modal_projector.")
        assert (name in deferred.parameters) == frozen
        assert value.untyped_storage().nbytes() == (2 if frozen else 2 * value.numel()), name
    values = {id(param): value for param, value in deferred.values()}
    assert values.keys() == {id(param) for param in deferred.parameters.values()}
    for param in deferred.parameters.values():
        assert values[id(param)].shape == param.shape
        assert values[id(param)].dtype == torch.bfloat16
    assert native.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_adapters_start_as_without_deferring(base: Path, make_settings: Make) -> None:
    plain = build_model(base, make_settings(), seed=4)
    deferred = build_model(base, make_settings(), seed=4, defer=True)
    trained = dict(deferred.named_parameters())
    for name, value in plain.named_parameters():
        assert trained[name].requires_grad == value.requires_grad
        if value.requires_grad:
            assert torch.equal(trained[name], value), name


def train(model: EmoVerse, world: World, packs: list[Any], stage: int, dtype: str) -> Any:
    from emoverse.engine.deepspeed_engine import Engine, deepspeed_config

    groups = [
        {"name": part, "params": [p for _, p in named], "lr": 1e-2, "initial_lr": 1e-2}
        for part, named in model.trainable_groups().items()
    ]
    count = sum(p.numel() for group in groups for p in group["params"])
    settings = deepspeed_config(
        zero_stage=stage,
        precision=dtype,
        clip=1.0,
        world_size=world.world_size,
        num_trainable=count,
    )
    engine = Engine(model, torch.optim.AdamW(groups), world, settings, model.deferred)
    losses = [
        engine.step(
            packs, num_packs=1, normaliser=2.0, lr_factor=1.0, make_empty=lambda: packs[0]
        ).loss
        for _ in range(3)
    ]
    state = engine.export_state()
    engine.close()
    return losses, {name: value.sum().item() for name, value in state.params.items()}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("phi3", "fp32"), ("internlm2", "bf16")],
    indirect=["family"],
)
def test_training_is_that_of_whole_weights(
    base: Path,
    make_settings: Make,
    make_batch: Make,
    make_pack: Make,
    samples: list[Any],
    run_ranks: Callable[..., list[Any]],
    dtype: str,
) -> None:
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    shares = [[samples[2]], [samples[0]]]

    def work(world: World, stage: int) -> Any:
        model = build_model(base, make_settings(), dtype=torch_dtype, seed=4, defer=stage == 3)
        packs = [make_pack(make_batch([sample])) for sample in shares[world.rank]]
        if stage < 3:
            return train(model.train(), world, packs, stage, dtype)
        frozen = [value for value in model.parameters() if not value.requires_grad]
        whole = sum(value.numel() for value in frozen)
        found = train(model.train(), world, packs, stage, dtype)
        # What this rank keeps once partitioned: its half, and padding.
        kept = sum(value.ds_tensor.untyped_storage().nbytes() for value in frozen)
        assert kept / torch_dtype.itemsize == pytest.approx(whole / 2, rel=0.02)
        return found

    whole = run_ranks(lambda world: work(world, 2), 2)
    split = run_ranks(lambda world: work(world, 3), 2)
    for (losses, _), (others, _) in zip(whole, split, strict=True):
        assert others == pytest.approx(losses, rel=1e-6 if dtype == "fp32" else 2e-3)
    sums, other_sums = whole[0][1], split[0][1]
    assert sums.keys() == other_sums.keys()
    if dtype == "fp32":
        for name, value in sums.items():
            assert other_sums[name] == pytest.approx(value, abs=2e-4), name
