"""Training whole stages on tiny inputs: resume, ranks and ZeRO do not change what is learned."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_shards.shards.index import ShardIndex
from emoverse.config.schema import Config
from emoverse.engine.distributed import RankError, World
from emoverse.training import shutdown
from emoverse.training.outcome import Outcome
from emoverse.training.sample_audit import Ledger
from emoverse.training.stage_build import Parts
from emoverse.training.train import TrainOptions, train_stages
from launch.local import run_local

Ranks = Callable[..., list[Any]]
MakeConfig = Callable[..., Config]


def train_stage(config: Config, stage: str, world: World, *others: str, **launch: Any) -> Outcome:
    with shutdown.listen() as flag:
        stages = (stage, *others)
        return train_stages(config, stages, world, options=TrainOptions(**launch), flag=flag)


def train(run_ranks: Ranks, config: Config, stage: str, *others: str, world_size: int) -> list[Any]:
    """Trains stages in forked ranks; the outcome on each rank."""
    return run_ranks(lambda world: train_stage(config, stage, world, *others), world_size)


def failure(run_ranks: Ranks, config: Config, stage: str, world_size: int = 1) -> str:
    """The reason with which all ranks refuse to train."""

    def work(world: World) -> tuple[str, bool]:
        with pytest.raises(RankError) as raised:
            train_stage(config, stage, world)
        return str(raised.value), raised.value.wrong_input

    answers = run_ranks(work, world_size)
    assert len(set(answers)) == 1
    reason, wrong_input = answers[0]
    assert wrong_input
    return reason


def records(config: Config, stage: str, kind: str) -> list[dict[str, Any]]:
    path = config.run.run_dir / stage / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(config: Config, stage: str) -> list[float]:
    found = records(config, stage, "step")
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return [record["loss"] for record in found]


def audit(config: Config, stage: str) -> str:
    return str(records(config, stage, "end")[-1]["audit"])


def last_file(config: Config, name: str, stage: str = "stage1") -> Path:
    done = json.loads((config.run.run_dir / stage / "DONE").read_text())
    return Path(config.run.run_dir / stage / "checkpoints" / done["checkpoint"] / name)


def trained(config: Config, stage: str) -> dict[str, torch.Tensor]:
    return load_file(last_file(config, "trained.safetensors", stage))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, *, on_rank: int = 0) -> None:
    """Sends this process a signal when the loop asks for the learning rate of a step."""
    original = Parts.lr_factor

    def lr(self: Parts, number: int) -> float:
        if number == step and self.sampler.rank == on_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, number)

    monkeypatch.setattr(Parts, "lr_factor", lr)


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Parts.lr_factor

    def lr(self: Parts, number: int) -> float:
        if number == step:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(Parts, "lr_factor", lr)


def test_two_ranks_train_both_stages(run_ranks: Ranks, tiny_config: MakeConfig) -> None:
    config = tiny_config()
    assert train(run_ranks, config, "stage1", "stage2", world_size=2) == ["done", "done"]
    run = config.run.run_dir
    for stage, num_steps in (("stage1", 6), ("stage2", 4)):
        found = losses(config, stage)
        assert len(found) == num_steps
        assert all(0 < loss < 20 for loss in found)
        intervals = records(config, stage, "interval")
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
    assert records(config, "stage2", "start")[0]["lineage"].startswith("stage1 step_000006 ")
    assert (run / "config.yaml").exists()
    launches = json.loads((run / "provenance.json").read_text())
    assert [launch["stage"] for launch in launches] == ["stage1", "stage2"]


def test_a_finished_stage_says_so(
    run_ranks: Ranks, tiny_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    train(run_ranks, config, "stage1", world_size=1)
    before = (config.run.run_dir / "stage1" / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert train(run_ranks, config, "stage1", world_size=1) == ["done"]
    assert "stage1 already done" in capfd.readouterr().out
    assert (config.run.run_dir / "stage1" / "metrics.jsonl").read_bytes() == before
    other = tiny_config("stages.stage1.optim.lr_lora=1e-3")
    reason = failure(run_ranks, other, "stage1")
    assert "stages.stage1.optim.lr_lora: saved 0.005, now 0.001" in reason


@pytest.mark.parametrize("zero_stage", [0, 2, 3, pytest.param(1, marks=pytest.mark.slow)])
def test_stop_and_resume_is_bit_identical(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    """Also with dropout: its randomness belongs to the step, not to the history."""
    knobs = (f"train.zero_stage={zero_stage}", "model.lora.dropout=0.2")
    whole, parts = tiny_config(*knobs, run="whole"), tiny_config(*knobs, run="parts")
    assert train(run_ranks, whole, "stage1", world_size=2) == ["done", "done"]
    with monkeypatch.context() as patch:
        stop_at(patch, 2, on_rank=1)  # one rank is told; all stop after the step
        assert train(run_ranks, parts, "stage1", world_size=2) == ["stopped", "stopped"]
    assert records(parts, "stage1", "end")[-1]["reason"] == "stopped"
    assert len(losses(parts, "stage1")) == 3
    assert train(run_ranks, parts, "stage1", world_size=2) == ["done", "done"]
    assert losses(parts, "stage1") == losses(whole, "stage1")
    assert audit(parts, "stage1") == audit(whole, "stage1")
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert last_file(parts, file).read_bytes() == last_file(whole, file).read_bytes(), file
    written = sum(path.stat().st_size for path in last_file(whole, "state.json").parent.iterdir())
    assert written <= 1.2 * 12 * records(whole, "stage1", "start")[0]["trainable"]


def test_stops_in_both_stages_change_nothing(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across the boundary: stage 2 starts from a stage 1 that was stopped, and is stopped itself.

    Stage 1 is stopped after 12 of its 16 samples per epoch.
    """
    whole, parts = tiny_config(run="whole"), tiny_config(run="parts")
    assert train(run_ranks, whole, "stage1", "stage2", world_size=2) == ["done", "done"]
    for step in (1, 2):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert train(run_ranks, parts, "stage1", "stage2", world_size=2) == [
                "stopped",
                "stopped",
            ]
    assert len(losses(parts, "stage1")) == 3
    assert train(run_ranks, parts, "stage1", world_size=2) == ["done", "done"]
    with monkeypatch.context() as patch:
        stop_at(patch, 2, on_rank=1)
        assert set(train(run_ranks, parts, "stage1", "stage2", world_size=2)) == {"stopped"}
    assert train(run_ranks, parts, "stage1", "stage2", world_size=2) == ["done", "done"]
    for stage in ("stage1", "stage2"):
        assert losses(parts, stage) == losses(whole, stage)
        assert audit(parts, stage) == audit(whole, stage)
        for name, value in trained(whole, stage).items():
            assert torch.equal(trained(parts, stage)[name], value), name


def test_a_crash_resumes_from_the_newest_checkpoint(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tiny_config(run="whole"), tiny_config(run="parts")
    train(run_ranks, whole, "stage1", world_size=1)
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(pytest.fail.Exception, match="KeyboardInterrupt"):
            train(run_ranks, parts, "stage1", world_size=1)
    folder = parts.run.run_dir / "stage1" / "checkpoints"
    assert (folder / "latest").read_text() == "step_000004\n"
    (folder / "step_000004" / "trained.safetensors").write_bytes(b"damaged")
    assert train(run_ranks, parts, "stage1", world_size=1) == ["done"]
    assert any("passed over" in note["text"] for note in records(parts, "stage1", "note"))
    assert records(parts, "stage1", "start")[-1]["step"] == 2
    assert losses(parts, "stage1") == losses(whole, "stage1")
    for name, value in trained(whole, "stage1").items():
        assert torch.equal(trained(parts, "stage1")[name], value), name


def test_ranks_and_zero_stages_learn_the_same(run_ranks: Ranks, tiny_config: MakeConfig) -> None:
    runs = {}
    for zero_stage, world_size in ((0, 1), (1, 4), (2, 2), (3, 2)):
        config = tiny_config(
            f"train.zero_stage={zero_stage}",
            "train.save_every=1",
            run=f"zero{zero_stage}-ranks{world_size}",
        )
        codes = train(run_ranks, config, "stage1", world_size=world_size)
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


def test_a_rank_that_trains_other_samples_is_found_out(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    original = Ledger.add

    def add(self: Ledger, packs: list[Any], *, num_damaged: int) -> Any:
        return original(self, packs[:-1] if self._world.rank else packs, num_damaged=num_damaged)

    monkeypatch.setattr(Ledger, "add", add)

    def work(world: World) -> str:
        with pytest.raises(RuntimeError) as raised:
            train_stage(config, "stage1", world)
        return str(raised.value)

    reasons = run_ranks(work, 2)
    assert reasons[0] == reasons[1]
    assert reasons[0].startswith(
        "audit: the ranks did not train what the plan says in steps 0 to 1"
    )
    assert not (config.run.run_dir / "stage1" / "checkpoints").exists()


def test_packing_does_not_change_what_is_learned(run_ranks: Ranks, tiny_config: MakeConfig) -> None:
    wide = tiny_config("data.pack_tokens=2000", run="wide")
    narrow = tiny_config(run="narrow")
    for config in (wide, narrow):
        train(run_ranks, config, "stage1", world_size=1)
    assert losses(wide, "stage1") == pytest.approx(losses(narrow, "stage1"), rel=1e-5)


def test_resume_with_other_ranks_and_zero_stage(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, two, four and one again, each on another ZeRO stage."""
    whole = tiny_config(run="whole")
    train(run_ranks, whole, "stage1", world_size=1)
    for step, (world_size, zero_stage) in enumerate(((1, 0), (2, 2), (4, 1))):
        begun = tiny_config(f"train.zero_stage={zero_stage}", run="parts")
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert set(train(run_ranks, begun, "stage1", world_size=world_size)) == {"stopped"}
        assert len(losses(begun, "stage1")) == step + 1
    parts = tiny_config("train.zero_stage=3", "data.pack_tokens=500", run="parts")
    assert train(run_ranks, parts, "stage1", world_size=1) == ["done"]
    assert losses(parts, "stage1") == pytest.approx(losses(whole, "stage1"), rel=1e-5)
    assert audit(parts, "stage1") == audit(whole, "stage1")


def test_cached_features_and_data_workers_change_nothing(
    run_ranks: Ranks, tiny_config: MakeConfig
) -> None:
    plain = tiny_config(run="plain")
    cached = tiny_config("model.cache_features=true", run="cached")
    worked = tiny_config("data.workers=1", run="worked")
    divided = tiny_config("model.cache_features=true", "train.zero_stage=3", run="divided")
    for config in (plain, cached, worked, divided):
        assert train(run_ranks, config, "stage1", world_size=2) == ["done", "done"]
    assert losses(worked, "stage1") == losses(plain, "stage1")
    assert losses(cached, "stage1") == pytest.approx(losses(plain, "stage1"), rel=1e-5)
    assert losses(divided, "stage1") == pytest.approx(losses(plain, "stage1"), rel=1e-5)
    assert list((cached.run.run_dir / "cache").glob("features-*.bin"))


def test_blank_frames_train_on_text_alone(run_ranks: Ranks, tiny_config: MakeConfig) -> None:
    blank = tiny_config("model.blank_frames=true", run="blank")
    cached = tiny_config("model.blank_frames=true", "model.cache_features=true", run="cached")
    for config in (blank, cached):
        train(run_ranks, config, "stage1", world_size=1)
    assert losses(cached, "stage1") == pytest.approx(losses(blank, "stage1"), rel=1e-5)
    assert audit(cached, "stage1") == audit(blank, "stage1")


def test_bf16_trains(run_ranks: Ranks, tiny_config: MakeConfig) -> None:
    exact, rough = tiny_config(run="exact"), tiny_config("model.precision=bf16", run="rough")
    for config in (exact, rough):
        assert train(run_ranks, config, "stage1", world_size=2) == ["done", "done"]
    assert losses(rough, "stage1") == pytest.approx(losses(exact, "stage1"), rel=0.05)


def test_another_config_or_base_does_not_resume(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        train(run_ranks, tiny_config(), "stage1", world_size=1)
    other = tiny_config("stages.stage1.epochs=3", "train.loss=token")
    reason = failure(run_ranks, other, "stage1", world_size=2)
    assert "stages.stage1.epochs: saved 2, now 3; train.loss: saved 'sample', now 'token'" in reason
    assert "plan: saved" in reason
    base = Path(shutil.copytree(tiny_config().model.base, tmp_path / "base"))
    with (base / "config.json").open("a") as file:
        file.write(" ")
    reason = failure(run_ranks, tiny_config(f"model.base={base}"), "stage1")
    assert "Different: base: saved " in reason and "or give --accept-changes" in reason


def test_stage2_needs_a_finished_stage1_of_the_same_plan(
    run_ranks: Ranks, tiny_config: MakeConfig
) -> None:
    assert "stage1 is not finished" in failure(run_ranks, tiny_config(), "stage2")
    train(run_ranks, tiny_config(), "stage1", world_size=1)
    other = tiny_config("stages.stage2.epochs=2")
    assert "stage1 was trained with another plan" in failure(run_ranks, other, "stage2")


def damaged_copy(source: Path, target: Path) -> Path:
    """The shards with one byte flipped in each of the first four records."""
    shutil.copytree(source, target)
    entries = ShardIndex.load(target).entries(0)[:4]
    tar = target / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    for entry in entries:
        content[int(entry["offset"]) + int(entry["size"]) // 2] ^= 0xFF
    tar.write_bytes(content)
    return target


def test_damage_stops_all_ranks_or_is_replaced(
    run_ranks: Ranks, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    shards = damaged_copy(tiny_config().data.shards, tmp_path / "bad")
    knobs = (f"data.shards={shards}", "stages.stage1.pool.take=30")
    reason = failure(run_ranks, tiny_config(*knobs, run="stop"), "stage1", world_size=2)
    assert "record clip-00" in reason and "set data.on_damage to 'replace'" in reason
    replacing = tiny_config(*knobs, "data.on_damage=replace", run="replace")
    assert train(run_ranks, replacing, "stage1", world_size=2) == ["done", "done"]
    notes = [note["text"] for note in records(replacing, "stage1", "note")]
    assert any(note.startswith("replaced damaged record clip-00") for note in notes)
    limited = tiny_config(*knobs, "data.on_damage=replace", "data.max_damaged=1", run="limited")
    assert "data.max_damaged allows 1 damaged records per stage, this is number 2" in failure(
        run_ranks, limited, "stage1", world_size=2
    )


def test_more_ranks_than_samples_are_refused(run_ranks: Ranks, tiny_config: MakeConfig) -> None:
    config = tiny_config("train.global_batch_size=2")
    reason = failure(run_ranks, config, "stage1", world_size=3)
    assert "world size: must be 1..train.global_batch_size = 2" in reason


def test_local_processes_stop_together(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after the first log line: saved where they stand, exit code 75, no second stage."""
    config = tiny_config("stages.stage1.epochs=2000", "train.save_every=10000")
    metrics = config.run.run_dir / "stage1" / "metrics.jsonl"

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if metrics.exists() and '"interval"' in metrics.read_text():
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert run_local(config, stages=["stage1", "stage2"]) == 75
    out = capfd.readouterr().out
    step = int(out.split("stopped after step ")[1].split(";")[0])
    assert records(config, "stage1", "end")[-1]["step"] == step == len(losses(config, "stage1"))
