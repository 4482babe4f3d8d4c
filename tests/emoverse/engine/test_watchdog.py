"""The watchdog and a lost run directory; what it does about a hang is in test_train_faults.py."""

import time
from pathlib import Path

import pytest
import torch

from emoverse.engine import watchdog
from emoverse.engine.distributed import World
from emoverse.engine.watchdog import EXIT_FAULT, Watchdog


def test_a_rank_whose_run_directory_is_lost_waits_for_a_vote_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "BEAT_S", 0.05)
    monkeypatch.setattr(watchdog, "LOST_S", 0.5)
    world = World(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"))
    losses: list[Exception] = []
    codes: list[int] = []
    dog = Watchdog(
        tmp_path,
        world,
        limit_s=600,
        lost=lambda: losses[0] if losses else None,
        end=codes.append,
    )
    try:
        time.sleep(0.8)
        assert not codes, "nothing is lost"
        losses.append(RuntimeError("RUN was taken over"))
        for step in range(16):
            dog.beat("waiting for the other ranks", step)
            time.sleep(0.05)
        assert not codes, "the ranks go on, so a consensus will follow"
        deadline = time.monotonic() + 30
        while not codes:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        dog.close()
    assert codes[0] == EXIT_FAULT
    said = capfd.readouterr().err
    assert "watchdog: RUN was taken over (waiting for the other ranks, step 15)" in said
