"""Ranks that hang or raise: all ranks end in bounded time, with the first reason."""

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emoverse.config.schema import Config
from emoverse.engine import watchdog
from emoverse.engine.deepspeed_engine import Engine, start_process_group
from emoverse.engine.distributed import World
from emoverse.engine.watchdog import Watchdog
from emoverse.training import shutdown
from launch import worker
from launch.context import RankContext
from launch.worker import Job

MakeConfig = Callable[..., Config]


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


@pytest.mark.promise(5)
def test_a_stopped_rank_ends_the_job_within_the_bound(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start_process_group  # imported here, once, and not in every rank
    monkeypatch.setattr(watchdog, "BEAT_S", 0.2)
    limit_s = 3.0
    config = tiny_config("stages.stage1.epochs=500")
    watchdogs: list[Watchdog] = []
    original = Watchdog.__init__

    def make(self: Watchdog, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        watchdogs.append(self)

    monkeypatch.setattr(Watchdog, "__init__", make)

    def halt(engine: Engine, rank: int) -> None:
        if engine._updates < 2:
            return  # starting, and steps on a busy machine, may take their time
        watchdogs[0]._limit_s = limit_s
        watchdogs[0].beat("forward, backward, update", engine._updates + 1)
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
    assert "rank 1: NO HEARTBEAT for" in said and " s, last seen " in said
    stacks = said[said.index("stacks of this rank:") :]
    assert "engine.py" in stacks and "train.py" in stacks and "Thread 0x" in stacks


@pytest.mark.promise(5)
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
    assert first < said.index("KeyError: 'a bug of rank 1'") < said.index("rank 0 lost its peer")
    assert said.count("Traceback (most recent call last)") >= 2
