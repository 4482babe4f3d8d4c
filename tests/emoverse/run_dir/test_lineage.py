"""Stage to stage: adapters trained further or merged, and a lineage that is checked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emoverse.config.errors import ConfigError
from emoverse.config.schema import Config, load_config
from emoverse.engine.distributed import World
from emoverse.evaluation.evaluate import find_state, load_state
from emoverse.models.emoverse import EmoVerse, build_model
from emoverse.models.internvl.checkpoint import import_checkpoint
from emoverse.models.merge import check_adapters
from emoverse.run_dir.checkpoint import OtherRun, find_checkpoint, load_trained, read_checkpoint
from emoverse.run_dir.lineage import adapters_below, handed_over, label_of, read_stage_adapter
from emoverse.training.stage_build import is_done
from emoverse.training.stages import merged_into

MakeConfig = Callable[..., Config]
Train = Callable[..., list[Any]]
GOOD = Path(__file__).resolve().parents[1] / "good_config.yaml"
CPU = torch.device("cpu")


@pytest.fixture
def trained(train: Train, tiny_config: MakeConfig) -> MakeConfig:
    """`trained(*overrides)`: both stages, the second one on the merged first one."""

    def make(*overrides: str, run: str = "run", ranks: int = 1) -> Config:
        config = tiny_config("stages.stage2.adapter=merge", *overrides, run=run)
        codes = train(config, "stage1", "stage2", world_size=ranks)
        assert codes == ["done"] * ranks
        return config

    return make


def state_of(config: Config, which: str) -> EmoVerse:
    return load_state(config, find_state(config, which, config.run.run_dir, print), CPU)


def logits(model: EmoVerse) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found: torch.Tensor = model.native(input_ids=ids).logits
    return found


def test_which_stages_are_merged() -> None:
    plain = load_config([GOOD])
    assert merged_into(plain.stages, "stage1") == merged_into(plain.stages, "stage2") == ()
    merging = load_config([GOOD], ["stages.stage2.adapter=merge"])
    assert merged_into(merging.stages, "stage2") == ("stage1",)


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["stages.stage1.adapter=merge"], "stages.stage1.adapter", "no adapters to merge"),
        (["stages.stage1.optimizer=continue"], "stages.stage1.optimizer", "hands moments over"),
        (
            ["stages.stage2.adapter=merge", "stages.stage2.optimizer=continue"],
            "stages.stage2.optimizer",
            "merged away",
        ),
    ],
)
def test_combinations_without_meaning(overrides: list[str], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([GOOD], overrides)
    (problem,) = caught.value.problems
    assert ".".join(problem.path) == path and words in problem.rule


def test_the_merged_base_is_where_stage2_starts(trained: MakeConfig) -> None:
    """New adapters begin as nothing, so before a step the model is stage 1's, and after it not."""
    config = trained()
    first = state_of(config, "stage1")
    adapters = adapters_below(config, "stage2", config.run.run_dir)
    start = build_model(config.model.base, config.model, adapters=adapters)
    torch.testing.assert_close(logits(start), logits(first), atol=1e-5, rtol=1e-5)
    second = state_of(config, "stage2")
    assert not torch.allclose(logits(second), logits(first), atol=1e-3)
    state = read_checkpoint(handed_over(config.run.run_dir / "stage2")).state
    assert state["updates"] == state["step"]
    tensors = load_trained(config.run.run_dir / "stage2")
    # B matrices of new adapters: zero at first, moved by the few steps since.
    moved = [v.abs().max().item() for n, v in tensors.items() if ".lora_B." in n]
    before = load_trained(config.run.run_dir / "stage1")
    assert max(moved) < 0.1
    a_name = next(name for name in tensors if ".lora_A." in name)
    # A starts from the seed again and not from stage 1's.
    fresh = dict(build_model(config.model.base, config.model, seed=3).named_parameters())[a_name]
    steps_away = (tensors[a_name] - fresh.detach()).abs().max()
    assert steps_away < (tensors[a_name] - before[a_name]).abs().max()


def test_merging_is_the_same_under_every_zero_stage(trained: MakeConfig) -> None:
    one = trained(run="one")
    three = trained("train.zero_stage=3", run="three", ranks=2)
    left, right = (load_trained(config.run.run_dir / "stage2") for config in (one, three))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_the_lineage_is_recorded_and_checked(
    trained: MakeConfig, tiny_config: MakeConfig, train: Train
) -> None:
    config = trained()
    run_dir = config.run.run_dir
    folder = find_checkpoint(run_dir / "stage2" / "checkpoints", print)
    assert folder is not None
    state = json.loads((folder / "state.json").read_text())
    label = label_of(handed_over(run_dir / "stage1"))
    assert state["identity"]["merged"] == [label]
    assert state["identity"]["start"] == label and label.startswith("stage1 step_")
    # Stage 1 is trained again with another result behind stage 2's back.
    other = tiny_config("stages.stage1.optim.lr_lora=1e-3", run="other")
    assert train(other, "stage1", world_size=1) == ["done"]
    shutil.rmtree(run_dir / "stage1")
    shutil.copytree(other.run.run_dir / "stage1", run_dir / "stage1")
    with pytest.raises(OtherRun, match=r"was trained on \['stage1 step_.* now holds"):
        state_of(config, "stage2")


def test_a_finished_stage_is_not_done_when_the_one_before_it_was_trained_again(
    train: Train, tiny_config: MakeConfig
) -> None:
    config, other = tiny_config(), tiny_config("stages.stage1.optim.lr_lora=1e-3")
    assert train(config, "stage1", "stage2", world_size=1) == ["done"]
    stage1 = config.run.run_dir / "stage1"
    shutil.rmtree(stage1)
    assert train(config, "stage1", "stage2", world_size=1) == ["done"]  # the same weights again
    shutil.rmtree(stage1)
    assert train(other, "stage1", world_size=1) == ["done"]
    with pytest.raises(OtherRun, match=r"stage2 was trained from stage1 step_.* trained again"):
        is_done(other, "stage2")
    assert is_done(other, "stage2", accept_changes=True)
    shutil.rmtree(stage1 / "checkpoints")  # somebody makes room: nothing is left to compare
    assert is_done(other, "stage2")


def test_an_earlier_checkpoint_is_not_handed_over_in_silence(
    train: Train, tiny_config: MakeConfig
) -> None:
    config = tiny_config()
    assert train(config, "stage1", world_size=1) == ["done"]
    stage1 = config.run.run_dir / "stage1"
    last = handed_over(stage1)
    shutil.rmtree(last)
    with pytest.raises(OtherRun, match=rf"finished with {last.name}, but the newest intact"):
        handed_over(stage1)
    shutil.rmtree(stage1 / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has nothing to hand over; restore it or train"):
        handed_over(stage1)


def test_moments_are_handed_over_when_asked(train: Train, tiny_config: MakeConfig) -> None:
    """AdamW's count of updates goes on, and the moments with it; else both begin anew."""
    config = tiny_config("stages.stage2.optimizer=continue")
    assert train(config, "stage1", "stage2", world_size=1) == ["done"]
    first, second = (
        read_checkpoint(handed_over(config.run.run_dir / stage)).state
        for stage in ("stage1", "stage2")
    )
    assert first["updates"] == first["step"]
    assert second["updates"] == first["step"] + second["step"]


def test_the_frozen_part_is_the_file_bit_for_bit(
    run_ranks: Train, train_rank: Callable[..., str], tiny_config: MakeConfig
) -> None:
    """After real training under every ZeRO stage, in bf16: tower, base, rotary table."""

    def work(world: World, config: Config) -> dict[str, Any]:
        import emoverse.training.train as module

        kept: dict[str, Any] = {}
        original = module.start_run

        def watched(setup: Any, *others: Any) -> Any:
            kept["model"] = setup.model
            return original(setup, *others)

        module.start_run = watched
        try:
            assert train_rank(config, world) == "done"
        finally:
            module.start_run = original
        native = kept["model"].native
        rotary = native.model.language_model.rotary_emb.inv_freq
        return {
            "rotary": rotary.clone(),
            "trained": {str(v.dtype) for v in native.parameters() if v.requires_grad},
            "frozen": {
                # Under ZeRO-3 a rank holds its share, flat; of one rank that is everything.
                name.replace(".base_layer.", "."): getattr(value, "ds_tensor", value)
                .detach()
                .clone()
                for name, value in native.named_parameters()
                if not value.requires_grad
            },
        }

    for stage in (1, 2, 3):
        config = tiny_config(
            "model.precision=bf16", f"train.zero_stage={stage}", run=f"zero{stage}"
        )
        base, _ = import_checkpoint(config.model.base, torch.bfloat16)
        expected = dict(base.named_parameters())
        (found,) = run_ranks(lambda world, config=config: work(world, config), 1)
        projector = {name for name in expected if "multi_modal_projector" in name}
        assert found["frozen"].keys() == expected.keys() - projector
        for name, value in found["frozen"].items():
            assert value.numel() == expected[name].numel()
            assert torch.equal(value.view_as(expected[name]), expected[name]), name
        assert found["trained"] == {"torch.bfloat16"}
        assert found["rotary"].dtype == torch.float32
        assert torch.equal(found["rotary"], base.model.language_model.rotary_emb.inv_freq)


def test_the_adapter_of_a_stage_has_the_names_of_the_base(trained: MakeConfig) -> None:
    config = trained()
    adapter = read_stage_adapter(config.run.run_dir / "stage1", config.model.lora)
    assert adapter.scale == 2.0
    base, _ = import_checkpoint(config.model.base)
    check_adapters([adapter], {name: value.shape for name, value in base.named_parameters()})
    stored = load_file(handed_over(config.run.run_dir / "stage1") / "trained.safetensors")
    assert len(adapter.tensors) == len(stored)
