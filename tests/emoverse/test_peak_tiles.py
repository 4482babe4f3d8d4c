"""Peak frames in tiles: through training, with and without data workers."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from emoverse.config import Config
from emoverse.distributed import World
from emoverse.stop import StopFlag
from emoverse.train import Launch, train_in_group

MakeConfig = Callable[..., Config]
Ranks = Callable[[Callable[[World], Any], int], list[Any]]


def losses(run_ranks: Ranks, config: Config) -> list[float]:
    """Trains stage 1 on two ranks; the loss of every step."""

    def train(world: World) -> int:
        return train_in_group(config, ("stage1",), world, launch=Launch(), flag=StopFlag())

    assert run_ranks(train, 2) == [0, 0]
    lines = (config.run.run_dir / "stage1" / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "step"]


@pytest.mark.timeout(180)
def test_tiles_train_and_data_workers_change_nothing(
    run_ranks: Ranks, tiny_config: MakeConfig
) -> None:
    plain = losses(run_ranks, tiny_config(run="plain"))
    tiled = losses(run_ranks, tiny_config("data.peak_tiles=6", run="tiled"))
    worked = tiny_config("data.peak_tiles=6", "data.workers=1", run="worked")
    assert losses(run_ranks, worked) == tiled
    assert tiled != plain and len(tiled) == len(plain)


def test_the_largest_sample_is_known(tiny_config: MakeConfig) -> None:
    one, six, twelve = (tiny_config(f"data.peak_tiles={tiles}").data for tiles in (1, 6, 12))
    assert [data.frames_per_peak for data in (one, six, twelve)] == [1, 7, 13]
    assert [data.most_frames for data in (one, twelve)] == [one.frames_per_clip, 13]
