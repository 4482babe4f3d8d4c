"""Peak frames in tiles: through training, with and without data workers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.build.build import build_shards
from data_shards.media.video import encode_mp4
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Video
from emoverse.config.schema import Config
from emoverse.engine.distributed import World
from emoverse.training.shutdown import StopFlag
from emoverse.training.train import train_stages

MakeConfig = Callable[..., Config]
Ranks = Callable[[Callable[[World], Any], int], list[Any]]


@pytest.fixture
def wide_config(tiny_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """`tiny_config` with clips twice as wide as high, whose peak is two tiles and a thumbnail."""
    frames = np.random.default_rng(0).integers(0, 256, (8, 64, 128, 3)).astype(np.uint8)
    media = Video(mp4=encode_mp4(frames, 8))
    square = ShardIndex.load(tiny_config().data.shards)
    reader = ShardReader(square.folder, square)
    records = [reader.read(*square.address(number)) for number in range(square.num_records)]
    wide = (replace(record, media=media) for record in records)
    build_shards(wide, tmp_path / "wide", provenance={}, max_records_per_shard=12)

    def make(*overrides: str, run: str = "run") -> Config:
        return tiny_config(f"data.shards={tmp_path / 'wide'}", *overrides, run=run)

    return make


def notes(run_ranks: Ranks, config: Config, kind: str) -> list[dict[str, Any]]:
    """Trains stage 1 on two ranks; the notes of one kind."""

    def train(world: World) -> str:
        return train_stages(config, ("stage1",), world, flag=StopFlag())

    assert run_ranks(train, 2) == ["done", "done"]
    lines = (config.run.run_dir / "stage1" / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.mark.timeout(180)
def test_tiles_train_and_data_workers_change_nothing(
    run_ranks: Ranks, wide_config: MakeConfig
) -> None:
    def losses(name: str, *changes: str) -> list[float]:
        config = wide_config(*changes, run=name)
        return [step["loss"] for step in notes(run_ranks, config, "step")]

    plain = losses("plain")
    tiled = losses("tiled", "data.peak_tiles=6")
    assert losses("worked", "data.peak_tiles=6", "data.workers=1") == tiled
    assert tiled != plain and len(tiled) == len(plain)


@pytest.mark.timeout(180)
def test_the_text_only_twin_has_as_many_grey_tiles(
    run_ranks: Ranks, wide_config: MakeConfig
) -> None:
    """Prompts of the same length, though only the pictures tell how many tiles they have."""

    def lengths(name: str, *changes: str) -> list[float]:
        config = wide_config(*changes, run=name)
        return [some["tokens_per_pack"] for some in notes(run_ranks, config, "interval")]

    seeing = lengths("seeing", "data.peak_tiles=6")
    blind = lengths("blind", "data.peak_tiles=6", "model.blank_frames=true")
    assert blind == seeing != lengths("plain")


def test_the_largest_sample_is_known(tiny_config: MakeConfig) -> None:
    one, six, twelve = (tiny_config(f"data.peak_tiles={tiles}").data for tiles in (1, 6, 12))
    assert [data.frames_per_peak for data in (one, six, twelve)] == [1, 7, 13]
    assert [data.most_frames for data in (one, twelve)] == [one.frames_per_clip, 13]
