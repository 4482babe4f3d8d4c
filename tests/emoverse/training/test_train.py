"""Training whole stages on tiny inputs: resume, ranks and ZeRO do not change what is learned."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_shards.files import read_complete_lines
from emoverse.config.schema import Config
from emoverse.training.stage_build import StageSetup
from emoverse.training.train import step_seed

MakeConfig = Callable[..., Config]
Train = Callable[..., list[Any]]
AtStep = Callable[..., contextlib.AbstractContextManager[None]]


def records(config: Config, kind: str, stage: str = "stage1") -> list[dict[str, Any]]:
    lines = read_complete_lines(config.run.run_dir / stage / "metrics.jsonl")
    return [record for record in lines if record["kind"] == kind]


def losses(config: Config, stage: str) -> list[float]:
    found = records(config, "step", stage)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return [record["loss"] for record in found]


def audit(config: Config, stage: str) -> str:
    return str(records(config, "end", stage)[-1]["audit"])


def last_file(config: Config, name: str, stage: str = "stage1") -> Path:
    done = json.loads((config.run.run_dir / stage / "DONE").read_text())
    return Path(config.run.run_dir / stage / "checkpoints" / done["checkpoint"] / name)


def trained(config: Config, stage: str) -> dict[str, torch.Tensor]:
    return load_file(last_file(config, "trained.safetensors", stage))


def test_two_ranks_train_both_stages(train: Train, tiny_config: MakeConfig) -> None:
    config = tiny_config()
    assert train(config, "stage1", "stage2", world_size=2) == ["done", "done"]
    run = config.run.run_dir
    for stage, num_steps in (("stage1", 6), ("stage2", 4)):
        found = losses(config, stage)
        assert len(found) == num_steps
        assert all(0 < loss < 20 for loss in found)
        intervals = records(config, "interval", stage)
        given = {
            task: sum(record["task"][task]["samples"] for record in intervals)
            for task in intervals[0]["task"]
        }
        plan = json.loads((run / "plan" / "plan.json").read_text())["stages"][stage]
        assert given == {task: row["total"] for task, row in plan["tasks"].items()}
        assert sum(given.values()) == plan["samples"] and plan["steps"] == num_steps
        assert (run / stage / "checkpoints" / "latest").read_text() == f"step_{num_steps:06d}\n"
        settings = json.loads((run / stage / "deepspeed.json").read_text())
        assert settings["zero_optimization"]["stage"] == 2
    assert losses(config, "stage1")[-1] < losses(config, "stage1")[0]
    assert records(config, "start", "stage2")[0]["lineage"].startswith("stage1 step_000006 ")
    assert (run / "config.yaml").exists()
    launches = json.loads((run / "provenance.json").read_text())
    assert [launch["stage"] for launch in launches] == ["stage1", "stage2"]


@pytest.mark.promise(2)
@pytest.mark.parametrize("zero_stage", [0, 2, 3, pytest.param(1, marks=pytest.mark.slow)])
def test_stop_and_resume_is_bit_identical(
    train: Train, stop_at: AtStep, tiny_config: MakeConfig, zero_stage: int
) -> None:
    """Also with dropout: its randomness belongs to the step, not to the history."""
    knobs = (f"train.zero_stage={zero_stage}", "model.lora.dropout=0.2")
    whole, parts = tiny_config(*knobs, run="whole"), tiny_config(*knobs, run="parts")
    assert train(whole, "stage1", world_size=2) == ["done", "done"]
    with stop_at(2, on_rank=1):  # one rank is told; all stop after the step
        assert train(parts, "stage1", world_size=2) == ["stopped", "stopped"]
    assert records(parts, "end")[-1]["reason"] == "stopped"
    assert len(losses(parts, "stage1")) == 3
    assert train(parts, "stage1", world_size=2) == ["done", "done"]
    assert losses(parts, "stage1") == losses(whole, "stage1")
    assert audit(parts, "stage1") == audit(whole, "stage1")
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert last_file(parts, file).read_bytes() == last_file(whole, file).read_bytes(), file
    written = sum(path.stat().st_size for path in last_file(whole, "state.json").parent.iterdir())
    assert written <= 1.2 * 12 * records(whole, "start")[0]["trainable"]


@pytest.mark.promise(2)
def test_stops_in_both_stages_change_nothing(
    train: Train, stop_at: AtStep, tiny_config: MakeConfig
) -> None:
    """Across the boundary: stage 2 starts from a stage 1 that was stopped, and is stopped itself.

    Stage 1 is stopped after 12 of its 16 samples per epoch.
    """
    whole, parts = tiny_config(run="whole"), tiny_config(run="parts")
    assert train(whole, "stage1", "stage2", world_size=2) == ["done", "done"]
    for step in (1, 2):
        with stop_at(step):
            assert train(parts, "stage1", "stage2", world_size=2) == ["stopped", "stopped"]
    assert len(losses(parts, "stage1")) == 3
    assert train(parts, "stage1", world_size=2) == ["done", "done"]
    with stop_at(2, on_rank=1):
        assert train(parts, "stage1", "stage2", world_size=2) == ["stopped", "stopped"]
    assert train(parts, "stage1", "stage2", world_size=2) == ["done", "done"]
    for stage in ("stage1", "stage2"):
        assert losses(parts, stage) == losses(whole, stage)
        assert audit(parts, stage) == audit(whole, stage)
        for name, value in trained(whole, stage).items():
            assert torch.equal(trained(parts, stage)[name], value), name


@pytest.mark.promise(3)
def test_a_crash_resumes_from_the_newest_checkpoint(
    train: Train, at_step: AtStep, tiny_config: MakeConfig
) -> None:
    def crash(setup: StageSetup) -> None:
        raise KeyboardInterrupt

    whole, parts = tiny_config(run="whole"), tiny_config(run="parts")
    train(whole, "stage1", world_size=1)
    with at_step(5, crash), pytest.raises(pytest.fail.Exception, match="KeyboardInterrupt"):
        train(parts, "stage1", world_size=1)
    folder = parts.run.run_dir / "stage1" / "checkpoints"
    assert (folder / "latest").read_text() == "step_000004\n"
    (folder / "step_000004" / "trained.safetensors").write_bytes(b"damaged")
    assert train(parts, "stage1", world_size=1) == ["done"]
    assert any("damaged checkpoint skipped" in note["text"] for note in records(parts, "note"))
    assert records(parts, "start")[-1]["step"] == 2
    assert losses(parts, "stage1") == losses(whole, "stage1")
    for name, value in trained(whole, "stage1").items():
        assert torch.equal(trained(parts, "stage1")[name], value), name


@pytest.mark.promise(2)
def test_ranks_and_zero_stages_learn_the_same(train: Train, tiny_config: MakeConfig) -> None:
    runs = {}
    for zero_stage, world_size in ((0, 1), (1, 4), (2, 2), (3, 2)):
        config = tiny_config(
            f"train.zero_stage={zero_stage}",
            "train.save_every=1",
            run=f"zero{zero_stage}-ranks{world_size}",
        )
        codes = train(config, "stage1", world_size=world_size)
        assert codes == ["done"] * world_size
        runs[zero_stage, world_size] = config
    first = runs[0, 1]
    for config in runs.values():
        assert losses(config, "stage1") == pytest.approx(losses(first, "stage1"), rel=1e-5)
        assert audit_of_steps(config) == audit_of_steps(first)
    assert len(set(audit_of_steps(first))) == 6


def audit_of_steps(config: Config) -> list[str]:
    """The hash of all (position, record, task) trained up to each step."""
    folders = sorted((config.run.run_dir / "stage1" / "checkpoints").glob("step_*"))
    return [json.loads((path / "state.json").read_text())["data"]["audit"] for path in folders]


@pytest.mark.promise(2)
def test_packing_does_not_change_what_is_learned(train: Train, tiny_config: MakeConfig) -> None:
    wide = tiny_config("data.pack_tokens=2000", run="wide")
    narrow = tiny_config(run="narrow")
    for config in (wide, narrow):
        train(config, "stage1", world_size=1)
    assert losses(wide, "stage1") == pytest.approx(losses(narrow, "stage1"), rel=1e-5)


@pytest.mark.promise(2)
def test_resume_with_other_ranks_and_zero_stage(
    train: Train, stop_at: AtStep, tiny_config: MakeConfig
) -> None:
    """One process, two, four and one again, each on another ZeRO stage."""
    whole = tiny_config(run="whole")
    train(whole, "stage1", world_size=1)
    for step, (world_size, zero_stage) in enumerate(((1, 0), (2, 2), (4, 1))):
        begun = tiny_config(f"train.zero_stage={zero_stage}", run="parts")
        with stop_at(step):
            assert train(begun, "stage1", world_size=world_size) == ["stopped"] * world_size
        assert len(losses(begun, "stage1")) == step + 1
    parts = tiny_config("train.zero_stage=3", "data.pack_tokens=500", run="parts")
    assert train(parts, "stage1", world_size=1) == ["done"]
    assert losses(parts, "stage1") == pytest.approx(losses(whole, "stage1"), rel=1e-5)
    assert audit(parts, "stage1") == audit(whole, "stage1")


@pytest.mark.promise(2)
def test_cached_features_and_data_workers_change_nothing(
    train: Train, tiny_config: MakeConfig
) -> None:
    plain = tiny_config(run="plain")
    cached = tiny_config("model.cache_features=true", run="cached")
    worked = tiny_config("data.workers=1", run="worked")
    divided = tiny_config("model.cache_features=true", "train.zero_stage=3", run="divided")
    for config in (plain, cached, worked, divided):
        assert train(config, "stage1", world_size=2) == ["done", "done"]
    assert losses(worked, "stage1") == losses(plain, "stage1")
    assert losses(cached, "stage1") == pytest.approx(losses(plain, "stage1"), rel=1e-5)
    assert losses(divided, "stage1") == pytest.approx(losses(plain, "stage1"), rel=1e-5)
    assert list((cached.run.run_dir / "cache").glob("features-*.bin"))


def test_blank_frames_train_on_text_alone(train: Train, tiny_config: MakeConfig) -> None:
    blank = tiny_config("model.blank_frames=true", run="blank")
    cached = tiny_config("model.blank_frames=true", "model.cache_features=true", run="cached")
    for config in (blank, cached):
        train(config, "stage1", world_size=1)
    assert losses(cached, "stage1") == pytest.approx(losses(blank, "stage1"), rel=1e-5)
    assert audit(cached, "stage1") == audit(blank, "stage1")


def test_bf16_trains(train: Train, tiny_config: MakeConfig) -> None:
    exact, rough = tiny_config(run="exact"), tiny_config("model.precision=bf16", run="rough")
    for config in (exact, rough):
        assert train(config, "stage1", world_size=2) == ["done", "done"]
    assert losses(rough, "stage1") == pytest.approx(losses(exact, "stage1"), rel=0.05)


def test_step_seeds_differ() -> None:
    seeds = {
        step_seed(seed, stage, step, rank)
        for seed in (0, 1)
        for stage in ("stage1", "stage2")
        for step in range(50)
        for rank in (0, 1)
    }
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
