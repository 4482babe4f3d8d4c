"""What a stage starts from: finished, resumed, refused, or continued with accepted changes."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.files import read_complete_lines
from emoverse.config.schema import Config
from emoverse.run_dir.checkpoint import find_checkpoint

MakeConfig = Callable[..., Config]
Train = Callable[..., list[Any]]
AtStep = Callable[..., contextlib.AbstractContextManager[None]]


def records(config: Config, kind: str, stage: str = "stage1") -> list[dict[str, Any]]:
    lines = read_complete_lines(config.run.run_dir / stage / "metrics.jsonl")
    return [record for record in lines if record["kind"] == kind]


def failure(train: Train, config: Config, stage: str, world_size: int = 1) -> str:
    """The reason with which all ranks refuse to train."""
    answers = train(config, stage, world_size=world_size)
    assert len(set(answers)) == 1
    reason, wrong_input = answers[0]
    assert wrong_input
    return str(reason)


@pytest.mark.promise(1)
def test_a_finished_stage_says_so(
    train: Train, tiny_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    train(config, "stage1", world_size=1)
    before = (config.run.run_dir / "stage1" / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert train(config, "stage1", world_size=1) == ["done"]
    assert "stage1 already done" in capfd.readouterr().out
    assert (config.run.run_dir / "stage1" / "metrics.jsonl").read_bytes() == before
    other = tiny_config("stages.stage1.optim.lr_lora=1e-3")
    reason = failure(train, other, "stage1")
    assert "stages.stage1.optim.lr_lora: saved 0.005, now 0.001" in reason


@pytest.mark.promise(4)
def test_another_config_or_base_does_not_resume(
    train: Train, stop_at: AtStep, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with stop_at(1):
        train(tiny_config(), "stage1", world_size=1)
    other = tiny_config("stages.stage1.epochs=3", "train.loss=token")
    reason = failure(train, other, "stage1", world_size=2)
    assert "stages.stage1.epochs: saved 2, now 3; train.loss: saved 'sample', now 'token'" in reason
    assert "plan: saved" in reason
    base = Path(shutil.copytree(tiny_config().model.base, tmp_path / "base"))
    with (base / "config.json").open("a") as file:
        file.write(" ")
    reason = failure(train, tiny_config(f"model.base={base}"), "stage1")
    assert "Different: base: saved " in reason and "or give --accept-changes" in reason


@pytest.mark.promise(4)
def test_stage2_needs_a_finished_stage1_of_the_same_plan(
    train: Train, tiny_config: MakeConfig
) -> None:
    assert "stage1 is not finished" in failure(train, tiny_config(), "stage2")
    train(tiny_config(), "stage1", world_size=1)
    other = tiny_config("stages.stage2.epochs=2")
    assert "stage1 was trained with another plan" in failure(train, other, "stage2")


def test_more_ranks_than_samples_are_refused(train: Train, tiny_config: MakeConfig) -> None:
    config = tiny_config("train.global_batch_size=2")
    reason = failure(train, config, "stage1", world_size=3)
    assert "world size: must be 1..train.global_batch_size = 2" in reason


@pytest.mark.promise(1)
def test_fresh_refuses_a_stage_that_has_begun(
    train: Train, stop_at: AtStep, tiny_config: MakeConfig
) -> None:
    with stop_at(1):
        assert train(tiny_config(), world_size=1) == ["stopped"]
    ((reason, wrong_input),) = train(tiny_config(), world_size=1, resume=False)
    assert (
        wrong_input and "the stage was to start from scratch; choose another run.run_dir" in reason
    )


@pytest.mark.promise(4)
def test_changes_are_accepted_on_demand_and_remembered(
    train: Train, tiny_config: MakeConfig
) -> None:
    other = tiny_config("run.seed=4", "stages.stage1.optim.lr_lora=1e-3")
    assert train(other, world_size=1) == ["done"]
    folder = other.run.run_dir / "stage1"
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_000006")
    (reason, wrong_input) = train(tiny_config(), world_size=1)[0]
    assert wrong_input and "or give --accept-changes" in reason
    assert train(tiny_config(), world_size=1, accept_changes=True) == ["done"]
    (change,) = records(tiny_config(), "start")[-1]["accepted"]
    assert change["step"] == 4
    found = "; ".join(change["changes"])
    assert "stages.stage1.optim.lr_lora: saved 0.001, now 0.005" in found
    assert "run.seed: saved 4, now 3" in found and "plan: saved " in found
    state = json.loads((folder / "checkpoints" / "step_000006" / "state.json").read_text())
    assert state["accepted"] == [change]
    assert train(tiny_config(), world_size=1) == ["done"]  # now it is this run


@pytest.mark.parametrize("batch", [4, 16])
def test_another_batch_size_is_never_accepted_within_a_stage(
    train: Train, tiny_config: MakeConfig, batch: int
) -> None:
    """Step 4 of twice the samples is not where the checkpoint stands: some would be left out."""
    config = tiny_config("train.global_batch_size=8", "stages.stage1.epochs=4")
    assert train(config, world_size=1) == ["done"]
    folder = config.run.run_dir / "stage1"
    (folder / "DONE").unlink()
    shutil.rmtree(find_checkpoint(folder / "checkpoints", print) or folder)
    other = tiny_config(f"train.global_batch_size={batch}", "stages.stage1.epochs=4")
    (reason, wrong_input) = train(other, world_size=1, accept_changes=True)[0]
    assert wrong_input and "train.global_batch_size: the checkpoint" in reason
