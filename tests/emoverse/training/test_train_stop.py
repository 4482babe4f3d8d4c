"""Stopping a training, and who may train: the time limit, start-up, owners of a run directory."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from emoverse.config.schema import Config
from emoverse.engine.distributed import RankError, World
from emoverse.run_dir import run_lock
from emoverse.training import shutdown
from emoverse.training.stage_build import Parts
from emoverse.training.train import TrainOptions, train_stages

Ranks = Callable[..., list[Any]]
MakeConfig = Callable[..., Config]


def train(run_ranks: Ranks, config: Config, *, world_size: int = 2, **launch: Any) -> list[Any]:
    """Trains stage1 in forked ranks: outcomes, or the reasons with which they end."""

    def work(world: World) -> Any:
        try:
            with shutdown.listen() as flag:
                options = TrainOptions(**launch)
                return train_stages(config, ["stage1"], world, options=options, flag=flag)
        except RankError as error:
            return str(error), error.wrong_input

    return run_ranks(work, world_size)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Parts], None]) -> None:
    """Calls `act` on every rank inside a step, once."""
    original = Parts.lr_factor

    def lr(self: Parts, number: int) -> float:
        if number == step:
            act(self)
        return original(self, number)

    monkeypatch.setattr(Parts, "lr_factor", lr)


def checkpoints(config: Config) -> list[str]:
    folder = config.run.run_dir / "stage1" / "checkpoints"
    return sorted(path.name for path in folder.glob("step_*"))


def test_the_time_limit_saves_and_stops_all(
    run_ranks: Ranks, tiny_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """The limit is over before the first step: nothing is built, nothing is lost."""
    config = tiny_config("train.max_minutes=1e-9")
    assert train(run_ranks, config) == ["stopped", "stopped"]
    assert checkpoints(config) == []
    assert train(run_ranks, tiny_config()) == ["done", "done"]


def test_a_signal_during_start_up_stops_before_the_first_step(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Parts.__init__

    def build(self: Parts, **parts: Any) -> None:
        original(self, **parts)
        if self.sampler.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(Parts, "__init__", build)
    assert train(run_ranks, tiny_config()) == ["stopped", "stopped"]
    assert checkpoints(tiny_config()) == []


def test_fresh_refuses_a_stage_that_has_begun(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda parts: os.kill(os.getpid(), signal.SIGTERM))
        assert train(run_ranks, tiny_config(), world_size=1) == ["stopped"]
    ((reason, wrong_input),) = train(run_ranks, tiny_config(), world_size=1, resume=False)
    assert wrong_input and "the stage was to start afresh; choose another run.run_dir" in reason


def test_a_second_owner_is_refused_while_the_first_one_trains(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.0)
    config = tiny_config()
    held = run_lock.acquire(config.run.run_dir)
    try:
        answers = train(run_ranks, config)
    finally:
        held.release()
    assert answers[0] == answers[1]
    reason, wrong_input = answers[0]
    assert wrong_input and reason.startswith("run directory: rank 0: RunInUse: run.run_dir: ")
    assert "is in use by process" in reason and "or give --take-over" in reason


@pytest.mark.parametrize("step", [2, 5])
def test_a_cut_off_owner_saves_nothing_and_ends(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A successor takes over in the middle of a step; the last save of the stage is refused too."""

    def take_over(parts: Parts) -> None:
        if parts.sampler.rank == 0:
            run_lock.acquire(parts.config.run.run_dir, take_over=True)

    config = tiny_config()
    with monkeypatch.context() as patch:
        at_step(patch, step, take_over)
        answers = train(run_ranks, config)
    assert answers[0] == answers[1]
    reason, wrong_input = answers[0]
    assert not wrong_input and "LostLease" in reason and "was taken over by process" in reason
    assert checkpoints(config) == [f"step_{number:06d}" for number in range(2, step + 1, 2)]
    assert not (config.run.run_dir / "stage1" / "DONE").exists()
    assert train(run_ranks, config) == ["done", "done"]
    assert not (config.run.run_dir / run_lock.FOLDER).exists()


def test_an_owner_cut_off_while_it_starts_touches_nothing(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would drop the lines of its successor, which is some steps ahead by then."""
    config, original = tiny_config(), Parts.__init__
    files = [config.run.run_dir / name for name in ("config.yaml", "stage1/metrics.jsonl")]

    def build(self: Parts, **parts: Any) -> None:
        original(self, **parts)
        if self.sampler.rank == 0:
            run_lock.acquire(config.run.run_dir, take_over=True)
            files[1].parent.mkdir(exist_ok=True)
            for file in files:
                file.write_text("the successor's")

    monkeypatch.setattr(Parts, "__init__", build)
    (reason, wrong_input), other = train(run_ranks, config)
    assert not wrong_input and "LostLease" in reason and other == (reason, wrong_input)
    assert [file.read_text() for file in files] == ["the successor's"] * 2


def test_a_cut_off_owner_learns_it_at_the_next_step(
    run_ranks: Ranks, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for a save: the renewer looks every few seconds."""
    monkeypatch.setattr(run_lock, "RENEW_S", 0.01)

    def take_over(parts: Parts) -> None:
        if parts.sampler.rank == 0:
            run_lock.acquire(parts.config.run.run_dir, take_over=True)

    at_step(monkeypatch, 1, take_over)
    config = tiny_config("train.save_every=100000", "stages.stage1.epochs=2000")
    (reason, wrong_input), other = train(run_ranks, config)
    assert not wrong_input and "LostLease" in reason and "stage1 step " in reason
    assert other == (reason, wrong_input)


def test_the_run_directory_is_released_before_a_stop_is_returned(
    run_ranks: Ranks, tiny_config: MakeConfig
) -> None:
    """The launcher requeues the job then, and the next start may come at once."""
    config = tiny_config("train.max_minutes=1e-9")

    def work(world: World) -> tuple[str, bool]:
        with shutdown.listen() as flag:
            outcome = train_stages(config, ["stage1"], world, flag=flag)
            return outcome, (config.run.run_dir / run_lock.FOLDER).exists()

    assert run_ranks(work, 2) == [("stopped", False)] * 2
