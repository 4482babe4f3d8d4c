"""Peak frames in tiles: through training, with and without data workers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.build.build import build_shards
from data_shards.files import read_complete_lines
from data_shards.media.video import encode_mp4
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Video
from emoverse.config.schema import Config

MakeConfig = Callable[..., Config]
Train = Callable[..., list[Any]]


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


def records(train: Train, config: Config, kind: str) -> list[dict[str, Any]]:
    """Trains stage 1 on two ranks; the records of one kind."""
    assert train(config) == ["done", "done"]
    lines = read_complete_lines(config.run.run_dir / "stage1" / "metrics.jsonl")
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.timeout(180)
def test_tiles_train_and_data_workers_change_nothing(train: Train, wide_config: MakeConfig) -> None:
    def losses(name: str, *changes: str) -> list[float]:
        config = wide_config(*changes, run=name)
        return [step["loss"] for step in records(train, config, "step")]

    plain = losses("plain")
    tiled = losses("tiled", "data.peak_tiles=6")
    assert losses("worked", "data.peak_tiles=6", "data.workers=1") == tiled
    assert tiled != plain and len(tiled) == len(plain)


@pytest.mark.timeout(180)
def test_the_text_only_baseline_has_as_many_grey_tiles(
    train: Train, wide_config: MakeConfig
) -> None:
    """Prompts of the same length, though only the pictures tell how many tiles they have."""

    def lengths(name: str, *changes: str) -> list[float]:
        config = wide_config(*changes, run=name)
        return [some["tokens_per_pack"] for some in records(train, config, "interval")]

    seeing = lengths("seeing", "data.peak_tiles=6")
    blind = lengths("blind", "data.peak_tiles=6", "model.blank_frames=true")
    assert blind == seeing != lengths("plain")


def test_the_largest_sample_is_known(tiny_config: MakeConfig) -> None:
    one, six, twelve = (tiny_config(f"data.peak_tiles={tiles}").data for tiles in (1, 6, 12))
    assert [data.frames_per_peak for data in (one, six, twelve)] == [1, 7, 13]
    assert [data.most_frames for data in (one, twelve)] == [one.frames_per_clip, 13]
