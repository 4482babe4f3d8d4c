"""Faults in a training: disks, bad numbers, changed settings, hanging and raising ranks."""

import dataclasses
import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.shards.index import ShardIndex
from emoverse.config.schema import Config
from emoverse.data.collate import Batch
from emoverse.data.loader import StepLoader
from emoverse.engine import watchdog
from emoverse.engine.deepspeed_engine import Engine, start_process_group
from emoverse.engine.distributed import RankError, World
from emoverse.engine.watchdog import Watchdog
from emoverse.run_dir import storage
from emoverse.run_dir.checkpoint import find_checkpoint, read_checkpoint
from emoverse.training import shutdown
from emoverse.training.stage_build import Parts
from emoverse.training.train import TrainOptions, train_stages
from launch import worker
from launch.context import RankContext
from launch.worker import Job

Ranks = Callable[..., list[Any]]
MakeConfig = Callable[..., Config]


def train(run_ranks: Ranks, config: Config, *, world_size: int = 2, **launch: Any) -> list[Any]:
    """Trains stage1 in forked ranks: exit codes, or the reasons with which they end."""

    def work(world: World) -> Any:
        try:
            with shutdown.listen() as flag:
                options = TrainOptions(**launch)
                return train_stages(config, ["stage1"], world, options=options, flag=flag)
        except RankError as error:
            return str(error), error.wrong_input

    return run_ranks(work, world_size)


def records(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = (config.run.run_dir / "stage1" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def final(config: Config) -> dict[str, torch.Tensor]:
    root = config.run.run_dir / "stage1" / "checkpoints"
    folder = find_checkpoint(root, lambda text: pytest.fail(text))
    assert folder is not None
    found = read_checkpoint(folder)
    return {**found.params, **{f"sq/{key}": value for key, value in found.exp_avg_sq.items()}}


def assert_same(first: Config, second: Config) -> None:
    expected, found = final(first), final(second)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Disks ----------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")
DENIED = PermissionError(errno.EACCES, "Permission denied")


def fail_saves_of(monkeypatch: pytest.MonkeyPatch, step: int, error: OSError) -> None:
    original = storage.make_folder

    def make_folder(path: Path) -> None:
        if path.name.endswith(f"step_{step:06d}"):
            raise error
        original(path)

    monkeypatch.setattr(storage, "make_folder", make_folder)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(FULL, id="full"),
        pytest.param(READ_ONLY, id="read-only", marks=pytest.mark.slow),
        pytest.param(DENIED, id="denied", marks=pytest.mark.slow),
    ],
)
def test_a_save_that_fails_is_tried_again(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    config = tiny_config()
    fail_saves_of(monkeypatch, 4, error)
    assert train(run_ranks, config, world_size=1) == ["done"]
    assert [record["step"] for record in records(config, "save")] == [2, 6]
    (note,) = [r["text"] for r in records(config, "note") if "could not be saved" in r["text"]]
    assert str(error) in note and "the checkpoint of step 2 is good, trying again" in note


def test_a_training_survives_a_full_disk(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing at all can be written for two steps and a save: heartbeats, metrics, the log."""
    full, disturbed = tiny_config(run="full"), Parts.lr_factor
    whole = tiny_config(run="whole")
    assert train(run_ranks, whole, world_size=1) == ["done"]

    def lr(self: Parts, step: int) -> float:
        if step in (2, 4):  # no file grows beyond one byte, or beyond what it may
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 if step == 2 else hard, hard))
        return disturbed(self, step)

    monkeypatch.setattr(Parts, "lr_factor", lr)
    assert train(run_ranks, full, world_size=1) == ["done"]
    assert [record["step"] for record in records(full, "step")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(full, "save")] == [2, 6]
    (note,) = [r["text"] for r in records(full, "note") if "could not be saved" in r["text"]]
    assert "File too large" in note and "the checkpoint of step 2 is good" in note
    assert_same(whole, full)


@pytest.mark.parametrize(
    ("step", "policy"), [(4, "stop"), pytest.param(6, "retry", marks=pytest.mark.slow)]
)
def test_a_save_that_fails_ends_the_run_by_policy_or_at_the_end(
    run_ranks: Ranks,
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    policy: str,
) -> None:
    config = tiny_config(f"train.on_save_error={policy}")
    with monkeypatch.context() as patch:
        fail_saves_of(patch, step, FULL)
        answers = train(run_ranks, config)
    assert answers[0] == answers[1]
    assert answers[0][1] == 1
    assert f"saving step {step}: rank 0: OSError: [Errno 28] No space left" in answers[0][0]
    latest = (config.run.run_dir / "stage1" / "checkpoints" / "latest").read_text()
    assert latest == f"step_{step - 2:06d}\n"
    assert train(run_ranks, config) == ["done", "done"]  # with room again it goes on


def test_saving_by_minutes(run_ranks: Ranks, tiny_config: MakeConfig) -> None:
    config = tiny_config("train.save_every=1000", "train.save_minutes=1e-6")
    assert train(run_ranks, config) == ["done", "done"]
    assert [record["step"] for record in records(config, "save")] == [1, 2, 3, 4, 5, 6]


# Bad numbers ----------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Rank 1's weights of the samples of these 0-based steps are not finite."""
    original = StepLoader.batches

    def batches(self: StepLoader, step: int) -> list[Batch]:
        packs = original(self, step)
        if step in steps and self._steps.sampler.rank == 1:
            bad = packs[0].row_weights * float("nan")
            packs = [dataclasses.replace(packs[0], row_weights=bad), *packs[1:]]
        return packs

    monkeypatch.setattr(StepLoader, "batches", batches)


def test_a_bad_step_is_skipped_listed_and_does_not_move_the_schedule(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2)
    config = tiny_config("train.log_every=1", "train.save_every=3")
    assert train(run_ranks, config) == ["done", "done"]
    assert [record["step"] for record in records(config, "step")] == [1, 2, 4, 5, 6]
    rates = [record["lr"]["lora"] for record in records(config, "interval")]
    good = tiny_config("train.log_every=1", run="good")
    monkeypatch.undo()
    assert train(run_ranks, good) == ["done", "done"]
    assert rates == [record["lr"]["lora"] for record in records(good, "interval")][:5]

    (skip,) = records(config, "skip")
    dump = json.loads(Path(skip["dump"]).read_text())
    assert dump["step"] == skip["step"] == 3 and "loss is not finite: nan" in dump["reason"]
    assert dump["loss"] == "nan" and [str(x) == "nan" for x in dump["rank_loss"]] == [False, True]
    index = ShardIndex.load(config.data.shards)
    samples = dump["samples"]
    assert [sample["position"] for sample in samples] == list(range(12, 18))
    assert {sample["rank"] for sample in samples} == {0, 1}
    for sample in samples:
        shard = [info.name for info in index.shards].index(sample["shard"])
        slot = list(index.keys(shard)).index(sample["key"])
        assert sample["offset"] == index.entries(shard)[slot]["offset"]
    assert json.loads((config.run.run_dir / "stage1" / "DONE").read_text())["skipped"] == [3]
    assert records(config, "end")[-1]["skipped"] == 1
    assert records(config, "end")[-1]["audit"] == records(good, "end")[-1]["audit"]


def test_a_run_with_a_skipped_step_resumes_exactly(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2)
    whole, parts = tiny_config(run="whole"), tiny_config(run="parts")
    assert train(run_ranks, whole) == ["done", "done"]
    original = Parts.lr_factor

    def stop_in_step_5(self: Parts, step: int) -> float:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "lr_factor", stop_in_step_5)
        assert train(run_ranks, parts) == ["stopped", "stopped"]
    assert train(run_ranks, parts) == ["done", "done"]
    assert_same(whole, parts)


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        pytest.param(
            "train.bad_numbers=stop",
            "train.bad_numbers: skip would go on without them",
            marks=pytest.mark.slow,
        ),
        ("train.max_skipped=1", "train.max_skipped allows 1 such steps in a stage, this is number"),
    ],
)
def test_bad_numbers_end_the_run_by_policy(
    run_ranks: Ranks,
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    knob: str,
    words: str,
) -> None:
    poison(monkeypatch, 2, 3)
    config = tiny_config(knob)
    (reason, wrong_input), other = train(run_ranks, config)
    assert not wrong_input and other == (reason, wrong_input)
    assert words in reason and "loss is not finite: nan; its samples are listed in" in reason
    assert (config.run.run_dir / "stage1" / "checkpoints" / "latest").read_text() == "step_000002\n"


# Changes --------------------------------------------------------------------------------------


def test_changes_are_accepted_on_demand_and_remembered(
    run_ranks: Ranks, tiny_config: MakeConfig
) -> None:
    other = tiny_config("run.seed=4", "stages.stage1.optim.lr_lora=1e-3")
    assert train(run_ranks, other, world_size=1) == ["done"]
    folder = other.run.run_dir / "stage1"
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_000006")
    (reason, wrong_input) = train(run_ranks, tiny_config(), world_size=1)[0]
    assert wrong_input and "or give --accept-changes" in reason
    assert train(run_ranks, tiny_config(), world_size=1, accept_changes=True) == ["done"]
    (change,) = records(tiny_config(), "start")[-1]["accepted"]
    assert change["step"] == 4
    found = "; ".join(change["changes"])
    assert "stages.stage1.optim.lr_lora: saved 0.001, now 0.005" in found
    assert "run.seed: saved 4, now 3" in found and "plan: saved " in found
    state = json.loads((folder / "checkpoints" / "step_000006" / "state.json").read_text())
    assert state["accepted"] == [change]
    assert train(run_ranks, tiny_config(), world_size=1) == ["done"]  # now it is this run


@pytest.mark.parametrize("batch", [4, 16])
def test_another_batch_size_is_never_accepted_within_a_stage(
    run_ranks: Ranks, tiny_config: MakeConfig, batch: int
) -> None:
    """Step 4 of twice the samples is not where the checkpoint stands: some would be left out."""
    config = tiny_config("train.global_batch_size=8", "stages.stage1.epochs=4")
    assert train(run_ranks, config, world_size=1) == ["done"]
    folder = config.run.run_dir / "stage1"
    (folder / "DONE").unlink()
    shutil.rmtree(find_checkpoint(folder / "checkpoints", print) or folder)
    other = tiny_config(f"train.global_batch_size={batch}", "stages.stage1.epochs=4")
    (reason, wrong_input) = train(run_ranks, other, world_size=1, accept_changes=True)[0]
    assert wrong_input and "train.global_batch_size: the checkpoint" in reason


# Ranks ----------------------------------------------------------------------------------------


def start_ranks(config: Config, tmp_path: Path, act: Callable[[Engine, int], None]) -> list[Any]:
    """Two ranks of the worker program; `act` runs in each of their steps."""

    def rank_main(rank: int) -> None:
        torch.set_num_threads(1)
        world = World(
            rank=rank,
            world_size=2,
            local_rank=rank,
            device=torch.device("cpu"),
            init_method=f"file://{tmp_path / 'meeting'}",
        )
        log = open(tmp_path / f"rank_{rank}.log", "w", buffering=1)  # noqa: SIM115  (till the end)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        original = Engine.step

        def step(self: Engine, *arguments: Any, **options: Any) -> Any:
            act(self, rank)
            return original(self, *arguments, **options)

        patch = pytest.MonkeyPatch()
        patch.setattr(Engine, "step", step)
        patch.setattr("emoverse.engine.distributed.read_world", lambda: world)
        job = Job(
            config=config,
            parts=["stage1"],
            context=RankContext(launcher="none"),
            max_requeues=0,
            logs=None,
        )
        with shutdown.listen() as flag:
            os._exit(worker.run_rank(job, worker.parse(["config.yaml"]), flag))

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(rank,)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def end_ranks(ranks: list[Any]) -> None:
    for process in ranks:
        process.kill()
        process.join()


def test_a_stopped_rank_ends_the_job_within_the_bound(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start_process_group  # imported here, once, and not in every rank
    monkeypatch.setattr(watchdog, "BEAT_S", 0.2)
    limit_s = 3.0
    config = tiny_config("stages.stage1.epochs=500")
    dogs: list[Watchdog] = []
    original = Watchdog.__init__

    def make(self: Watchdog, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        dogs.append(self)

    monkeypatch.setattr(Watchdog, "__init__", make)

    def halt(engine: Engine, rank: int) -> None:
        if engine._updates < 2:
            return  # starting, and steps on a busy machine, may take their time
        dogs[0]._limit_s = limit_s
        dogs[0].beat("forward, backward, update", engine._updates + 1)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    ranks = start_ranks(config, tmp_path, halt)
    try:
        ranks[0].join(200)
        assert ranks[0].exitcode == 1
    finally:
        end_ranks(ranks)
    said = (tmp_path / "rank_0.log").read_text()
    (stuck_s,) = re.findall(r"watchdog: rank 0 has made no progress for (\d+) s", said)
    assert limit_s <= int(stuck_s) < limit_s + watchdog.BACKSTOP_S
    assert "Timeout (" not in said  # the watchdog found it, not the backstop behind it
    assert "forward, backward, update, step 3" in said
    assert "rank 1: NO SIGN OF LIFE for" in said and " s, last seen " in said
    stacks = said[said.index("stacks of this rank:") :]
    assert "engine.py" in stacks and "train.py" in stacks and "Thread 0x" in stacks


def test_a_raising_rank_ends_all_and_its_traceback_comes_first(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    def fail(engine: Engine, rank: int) -> None:
        if rank == 1 and engine._updates == 2:
            raise KeyError("a bug of rank 1")

    ranks = start_ranks(tiny_config(), tmp_path, fail)
    try:
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [1, 1]
    finally:
        end_ranks(ranks)
    said = (tmp_path / "rank_0.log").read_text()
    first = said.index("rank 1 failed first:\nTraceback")
    assert first < said.index("KeyError: 'a bug of rank 1'") < said.index("and so rank 0, which")
    assert said.count("Traceback (most recent call last)") >= 2
