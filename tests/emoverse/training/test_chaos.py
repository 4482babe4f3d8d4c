"""Chaos: two ranks killed at random moments, inside saves too, end with the undisturbed weights."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from emoverse.config.schema import Config
from emoverse.engine.distributed import World
from emoverse.run_dir import storage
from emoverse.run_dir.checkpoint import find_checkpoint, read_checkpoint
from emoverse.training import shutdown
from emoverse.training.stages import DONE
from launch.exit_codes import OF_OUTCOME

MakeConfig = Callable[..., Config]
RANKS = 2
LIMIT_S = 120  # of one life; a rank that outlives it fails the test


def _live(config: Config, rank: int, meeting: Path, kill_at_operation: int | None) -> None:
    """One rank of one life."""
    torch.set_num_threads(1)
    from emoverse.engine.deepspeed_engine import start_process_group
    from emoverse.training.train import train_stages

    if rank == 0 and kill_at_operation is not None:
        _kill_at(kill_at_operation)
    world = World(
        rank=rank,
        world_size=RANKS,
        local_rank=rank,
        device=torch.device("cpu"),
        init_method=f"file://{meeting}",
    )
    start_process_group(world, timeout_s=LIMIT_S / 2)
    with shutdown.listen() as flag:
        outcome = train_stages(config, ["stage1"], world, flag=flag)
    os._exit(OF_OUTCOME[outcome])


def _kill_at(number: int) -> None:
    """This process dies at its n-th file operation of a save."""
    numbers = count(1)

    def guarded(operation: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            if next(numbers) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            operation(*arguments)

        return run

    for name in storage.OPERATIONS:
        setattr(storage, name, guarded(getattr(storage, name)))


class Chaos:
    """Lives of a run, each ended by force."""

    def __init__(self, config: Config, tmp_path: Path, seed: int) -> None:
        self.config, self._tmp, self._random = config, tmp_path, random.Random(seed)
        self._meetings = count()

    @property
    def done(self) -> bool:
        return (self.config.run.run_dir / "stage1" / DONE).exists()

    def live(self, *, kill_after_s: float | None = None, operation: int | None = None) -> list[int]:
        """Exit codes of the ranks; a rank that loses the other one ends by itself."""
        context = multiprocessing.get_context("fork")
        meeting = self._tmp / f"{self.config.run.run_dir.name}-meeting-{next(self._meetings)}"
        ranks: list[BaseProcess] = [
            context.Process(target=_live, args=(self.config, rank, meeting, operation))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        try:
            if kill_after_s is not None:
                time.sleep(kill_after_s)
                victims = self._random.choice([ranks[:1], ranks[1:], ranks])
                for process in victims:
                    process.kill()
                time.sleep(0.05)
                for process in ranks:  # the scheduler ends the others
                    process.kill()
            elif operation is not None:
                ranks[0].join(LIMIT_S)
                ranks[1].kill()
            for process in ranks:
                process.join(LIMIT_S)
            assert all(process.exitcode is not None for process in ranks), "a rank hangs"
            return [process.exitcode or 0 for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()

    def kill_many(self, kills: int, longest_s: float) -> Iterator[str]:
        """Kills that many lives, half of them inside a save; yields where each was killed.

        Ends earlier when the run has ended: a life that was quicker than its killer is no kill.
        """
        inside = True
        while kills and not self.done:
            inside = not inside
            if inside:
                operation = self._random.randint(1, 40)
                codes = self.live(operation=operation)
                assert codes[0] in (-signal.SIGKILL, 0), codes
                killed, where = codes[0] == -signal.SIGKILL, f"operation {operation} of its saves"
            else:
                after = self._random.uniform(0.05, longest_s)
                codes = self.live(kill_after_s=after)
                killed, where = -signal.SIGKILL in codes, f"after {after:.2f} s"
            if killed:
                kills -= 1
                yield where


def final(config: Config) -> dict[str, torch.Tensor]:
    root = config.run.run_dir / "stage1" / "checkpoints"
    folder = find_checkpoint(root, lambda text: pytest.fail(text))
    assert folder is not None
    found = read_checkpoint(folder)
    kinds = {"param": found.params, "avg": found.exp_avg, "sq": found.exp_avg_sq}
    state = {"step": torch.tensor(found.step), "audit": torch.tensor(_bits(found.state))}
    named = {f"{kind}/{key}": v for kind, them in kinds.items() for key, v in them.items()}
    return {**named, **state}


def _bits(state: dict[str, dict[str, str]]) -> int:
    return int(state["data"]["audit"][:15], 16)


def run_chaos(make: Callable[[str], Config], tmp_path: Path, kills: int) -> None:
    whole = Chaos(make("whole"), tmp_path, 0)
    begin = time.monotonic()
    assert whole.live() == [0, 0]
    length_s = time.monotonic() - begin
    expected = final(whole.config)
    killed: list[str] = []
    for run in count():
        chaos = Chaos(make(f"chaos{run}"), tmp_path, 7 + run)
        killed += chaos.kill_many(kills - len(killed), length_s)
        if not chaos.done:
            assert chaos.live() == [0, 0]
        found = final(chaos.config)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        if len(killed) == kills:
            break
    inside = sum("operation" in where for where in killed)
    print(f"{len(killed)} kills, {inside} of them inside saves, in {run + 1} runs: {killed}")
    assert inside >= kills // 3


@pytest.fixture
def imported() -> None:
    """Once in this process instead of once per rank."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    import emoverse.training.train  # noqa: F401


@pytest.mark.promise(2)
@pytest.mark.timeout(280)
def test_five_kills_change_nothing(tiny_config: MakeConfig, tmp_path: Path, imported: None) -> None:
    knobs = ("train.save_every=1", "train.keep_checkpoints=2", "model.lora.dropout=0.1")
    run_chaos(lambda name: tiny_config(*knobs, run=name), tmp_path, 5)


@pytest.mark.promise(2)
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_of_a_nano_run_change_nothing(
    tiny_config: MakeConfig, tmp_path: Path, imported: None
) -> None:
    knobs = (
        *("model.base=nano", "model.lora.dropout=0.1", "stages.stage1.epochs=12"),
        *("train.save_every=3", "train.keep_checkpoints=2", "train.zero_stage=2"),
    )
    run_chaos(lambda name: tiny_config(*knobs, run=name), tmp_path, 50)
