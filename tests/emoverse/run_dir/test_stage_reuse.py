"""A stage of another run is reused if, and only if, it was trained in exactly the same way."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.build.build import build_shards
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from emoverse.config.schema import Config
from emoverse.run_dir.checkpoint import TRAINED, OtherRun, read_state
from emoverse.run_dir.lineage import handed_over
from emoverse.run_dir.stage_reuse import reuse_stage
from emoverse.training.stage_build import is_done

MakeConfig = Callable[..., Config]
Train = Callable[..., list[Any]]
ER_ALONE = [f"stages.stage2.rates.{task}={task == 'er':d}" for task in ("msa", "er", "eri", "ecpe")]


def weights(config: Config, stage: str) -> bytes:
    return (handed_over(config.run.run_dir / stage) / TRAINED).read_bytes()


def test_a_run_on_a_reused_stage_is_the_run_that_trained_it(
    train: Train, tiny_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    donor, alone, adopter = (
        tiny_config(*overrides, run=run)
        for run, overrides in (("donor", []), ("alone", ER_ALONE), ("adopter", ER_ALONE))
    )
    train(donor, "stage1", world_size=1)
    train(alone, "stage1", "stage2", world_size=1)
    assert reuse_stage(adopter, "stage1", donor.run.run_dir)
    assert is_done(adopter, "stage1")
    capfd.readouterr()
    train(adopter, "stage1", "stage2", world_size=1)
    assert "stage1 already done" in capfd.readouterr().out
    for stage in ("stage1", "stage2"):
        assert weights(adopter, stage) == weights(alone, stage)
        first, second = (read_state(handed_over(c.run.run_dir / stage)) for c in (adopter, alone))
        assert first["identity"] == second["identity"] and first["data"] == second["data"]
    marker = json.loads((adopter.run.run_dir / "stage1" / "DONE").read_text())
    assert marker["adopted_from"] == str(donor.run.run_dir)
    # The second stage is another training than the donor's, and the first one has begun here.
    assert not reuse_stage(alone, "stage1", donor.run.run_dir)
    shutil.rmtree(adopter.run.run_dir / "stage2")
    train(donor, "stage2", world_size=1)
    assert not reuse_stage(adopter, "stage2", donor.run.run_dir)
    assert reuse_stage(adopter, "stage2", alone.run.run_dir)


def test_anything_that_differs_is_trained(
    train: Train, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    donor = tiny_config(run="donor")
    home = donor.run.run_dir
    assert not reuse_stage(tiny_config(run="early"), "stage1", home)  # nothing is there yet
    train(donor, "stage1", world_size=1)
    # The same keys and tasks, other clips.
    index = ShardIndex.load(donor.data.shards)
    reader = ShardReader(index.folder, index)
    records = [
        reader.read(shard, slot)
        for shard in range(index.num_shards)
        for slot in range(len(index.keys(shard)))
    ]
    reader.close()
    swapped = [
        dataclasses.replace(one, media=other.media)
        for one, other in zip(records, records[::-1], strict=True)
    ]
    build_shards(swapped, tmp_path / "swapped", provenance={}, max_records_per_shard=12)
    for number, override in enumerate(
        (
            "run.seed=4",
            "stages.stage1.optim.lr_lora=1e-3",
            "stages.stage1.epochs=3",
            "stages.stage1.pool.take=15",
            "train.global_batch_size=4",
            "model.lora.r=2",
            "data.give_emotion=true",
            f"data.shards={tmp_path / 'swapped'}",
        )
    ):
        other = tiny_config(override, run=f"other{number}")
        assert not reuse_stage(other, "stage1", home), override
        assert not (other.run.run_dir / "stage1").exists()
    # Stage 2 begins with a stage that this run does not have.
    assert not reuse_stage(tiny_config(run="late"), "stage2", home)
    marker = home / "stage1" / "DONE"
    done = json.loads(marker.read_text())
    for change in ({"skipped": [3]}, {"audit": "0" * 16}):
        marker.write_text(json.dumps(done | change))
        assert not reuse_stage(tiny_config(run="same"), "stage1", home), change
    marker.write_text(json.dumps(done))
    last = handed_over(home / "stage1")
    last.rename(last.with_name("gone"))
    with pytest.raises(OtherRun, match="newest intact checkpoint"):
        reuse_stage(tiny_config(run="same"), "stage1", home)
