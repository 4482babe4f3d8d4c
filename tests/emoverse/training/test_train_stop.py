"""Stopping a training, and who may train: the time limit, start-up, owners of a run directory."""

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from emoverse.config.schema import Config
from emoverse.engine.distributed import World
from emoverse.run_dir import run_lock
from emoverse.training.stage_build import StageSetup

MakeConfig = Callable[..., Config]
Train = Callable[..., list[Any]]
AtStep = Callable[..., contextlib.AbstractContextManager[None]]


def checkpoints(config: Config) -> list[str]:
    folder = config.run.run_dir / "stage1" / "checkpoints"
    return sorted(path.name for path in folder.glob("step_*"))


@pytest.mark.promise(6)
def test_the_time_limit_saves_and_stops_all(train: Train, tiny_config: MakeConfig) -> None:
    """The limit is over before the first step: nothing is built, nothing is lost."""
    config = tiny_config("train.max_minutes=1e-9")
    assert train(config) == ["stopped", "stopped"]
    assert checkpoints(config) == []
    assert train(tiny_config()) == ["done", "done"]


@pytest.mark.promise(6)
def test_a_signal_during_start_up_stops_before_the_first_step(
    train: Train, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StageSetup.__init__

    def build(self: StageSetup, **parts: Any) -> None:
        original(self, **parts)
        if self.sampler.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(StageSetup, "__init__", build)
    assert train(tiny_config()) == ["stopped", "stopped"]
    assert checkpoints(tiny_config()) == []


def test_a_second_owner_is_refused_while_the_first_one_trains(
    train: Train, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.0)
    config = tiny_config()
    held = run_lock.acquire(config.run.run_dir)
    try:
        answers = train(config)
    finally:
        held.release()
    assert answers[0] == answers[1]
    reason, wrong_input = answers[0]
    assert wrong_input and reason.startswith("run directory: rank 0: RunInUse: run.run_dir: ")
    assert "is in use by process" in reason and "or give --take-over" in reason


@pytest.mark.promise(7)
@pytest.mark.parametrize("step", [2, 5])
def test_a_cut_off_owner_saves_nothing_and_ends(
    train: Train, at_step: AtStep, tiny_config: MakeConfig, step: int
) -> None:
    """A successor takes over in the middle of a step; the last save of the stage is refused too."""

    def take_over(setup: StageSetup) -> None:
        if setup.sampler.rank == 0:
            run_lock.acquire(setup.config.run.run_dir, take_over=True)

    config = tiny_config()
    with at_step(step, take_over):
        answers = train(config)
    assert answers[0] == answers[1]
    reason, wrong_input = answers[0]
    assert not wrong_input and "RunLockLost" in reason and "was taken over by process" in reason
    assert checkpoints(config) == [f"step_{number:06d}" for number in range(2, step + 1, 2)]
    assert not (config.run.run_dir / "stage1" / "DONE").exists()
    assert train(config) == ["done", "done"]
    assert not (config.run.run_dir / run_lock.FOLDER).exists()


def test_an_owner_cut_off_while_it_starts_touches_nothing(
    train: Train, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would drop the lines of its successor, which is some steps ahead by then."""
    config, original = tiny_config(), StageSetup.__init__
    files = [config.run.run_dir / name for name in ("config.yaml", "stage1/metrics.jsonl")]

    def build(self: StageSetup, **parts: Any) -> None:
        original(self, **parts)
        if self.sampler.rank == 0:
            run_lock.acquire(config.run.run_dir, take_over=True)
            files[1].parent.mkdir(exist_ok=True)
            for file in files:
                file.write_text("the successor's")

    monkeypatch.setattr(StageSetup, "__init__", build)
    (reason, wrong_input), other = train(config)
    assert not wrong_input and "RunLockLost" in reason and other == (reason, wrong_input)
    assert [file.read_text() for file in files] == ["the successor's"] * 2


def test_a_cut_off_owner_learns_it_at_the_next_step(
    train: Train, at_step: AtStep, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for a save: the renewer looks every few seconds."""
    monkeypatch.setattr(run_lock, "RENEW_S", 0.01)

    def take_over(setup: StageSetup) -> None:
        if setup.sampler.rank == 0:
            run_lock.acquire(setup.config.run.run_dir, take_over=True)

    config = tiny_config("train.save_every=100000", "stages.stage1.epochs=2000")
    with at_step(1, take_over):
        (reason, wrong_input), other = train(config)
    assert not wrong_input and "RunLockLost" in reason and "stage1 step " in reason
    assert other == (reason, wrong_input)


def test_the_run_directory_is_released_before_a_stop_is_returned(
    run_ranks: Train, train_rank: Callable[..., str], tiny_config: MakeConfig
) -> None:
    """The launcher requeues the job then, and the next start may come at once."""
    config = tiny_config("train.max_minutes=1e-9")

    def work(world: World) -> tuple[str, bool]:
        outcome = train_rank(config, world)
        return outcome, (config.run.run_dir / run_lock.FOLDER).exists()

    assert run_ranks(work, 2) == [("stopped", False)] * 2
