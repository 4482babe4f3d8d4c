"""The sample audit: ranks that train other samples, and damaged records that are replaced."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.files import read_complete_lines
from data_shards.shards.index import ShardIndex
from emoverse.config.schema import Config
from emoverse.engine.distributed import World
from emoverse.training.sample_audit import SampleAudit

MakeConfig = Callable[..., Config]
Train = Callable[..., list[Any]]
AtStep = Callable[..., contextlib.AbstractContextManager[None]]


def records(config: Config, kind: str, stage: str = "stage1") -> list[dict[str, Any]]:
    lines = read_complete_lines(config.run.run_dir / stage / "metrics.jsonl")
    return [record for record in lines if record["kind"] == kind]


def failure(train: Train, config: Config, stage: str, world_size: int = 1) -> str:
    """The reason with which all ranks refuse to train."""
    answers = train(config, stage, world_size=world_size)
    assert len(set(answers)) == 1
    reason, wrong_input = answers[0]
    assert wrong_input
    return str(reason)


@pytest.mark.promise(2)
def test_a_rank_that_trains_other_samples_is_found_out(
    run_ranks: Train,
    train_rank: Callable[..., str],
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config()
    original = SampleAudit.add

    def add(self: SampleAudit, packs: list[Any], *, num_damaged: int) -> Any:
        return original(self, packs[:-1] if self._world.rank else packs, num_damaged=num_damaged)

    monkeypatch.setattr(SampleAudit, "add", add)

    def work(world: World) -> str:
        with pytest.raises(RuntimeError) as raised:
            train_rank(config, world)
        return str(raised.value)

    reasons = run_ranks(work, 2)
    assert reasons[0] == reasons[1]
    assert reasons[0].startswith("audit: ranks did not train the planned samples in steps 0 to 1")
    assert not (config.run.run_dir / "stage1" / "checkpoints").exists()


def damaged_copy(source: Path, target: Path) -> Path:
    """The shards with one byte flipped in each of the first four records."""
    shutil.copytree(source, target)
    entries = ShardIndex.load(target).entries(0)[:4]
    tar = target / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    for entry in entries:
        content[int(entry["offset"]) + int(entry["size"]) // 2] ^= 0xFF
    tar.write_bytes(content)
    return target


@pytest.mark.promise(5)
def test_damage_stops_all_ranks_or_is_replaced(
    train: Train, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    shards = damaged_copy(tiny_config().data.shards, tmp_path / "bad")
    knobs = (f"data.shards={shards}", "stages.stage1.pool.take=30")
    reason = failure(train, tiny_config(*knobs, run="stop"), "stage1", world_size=2)
    assert "record clip-00" in reason and "set data.on_damage to 'replace'" in reason
    replacing = tiny_config(*knobs, "data.on_damage=replace", run="replace")
    assert train(replacing, "stage1", world_size=2) == ["done", "done"]
    notes = [note["text"] for note in records(replacing, "note")]
    assert any(note.startswith("replaced damaged record clip-00") for note in notes)
    limited = tiny_config(*knobs, "data.on_damage=replace", "data.max_damaged=1", run="limited")
    assert "data.max_damaged allows 1 damaged records per stage, this is number 2" in failure(
        train, limited, "stage1", world_size=2
    )
