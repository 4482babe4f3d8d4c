"""Saves on a bad disk, saves by minutes, and steps with bad numbers."""

import contextlib
import dataclasses
import errno
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.files import read_complete_lines
from data_shards.shards.index import ShardIndex
from emoverse.config.schema import Config
from emoverse.data.collate import Batch
from emoverse.data.pipeline import BatchPipeline
from emoverse.run_dir import storage
from emoverse.run_dir.checkpoint import find_checkpoint, read_checkpoint

MakeConfig = Callable[..., Config]
Train = Callable[..., list[Any]]
AtStep = Callable[..., contextlib.AbstractContextManager[None]]


def records(config: Config, kind: str, stage: str = "stage1") -> list[dict[str, Any]]:
    lines = read_complete_lines(config.run.run_dir / stage / "metrics.jsonl")
    return [record for record in lines if record["kind"] == kind]


def final(config: Config) -> dict[str, torch.Tensor]:
    root = config.run.run_dir / "stage1" / "checkpoints"
    folder = find_checkpoint(root, lambda text: pytest.fail(text))
    assert folder is not None
    saved = read_checkpoint(folder)
    return {**saved.params, **{f"sq/{key}": value for key, value in saved.exp_avg_sq.items()}}


def assert_same(first: Config, second: Config) -> None:
    expected, actual = final(first), final(second)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# Disks ----------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")
DENIED = PermissionError(errno.EACCES, "Permission denied")


def fail_saves_of(monkeypatch: pytest.MonkeyPatch, step: int, error: OSError) -> None:
    original = storage.make_folder

    def make_folder(path: Path) -> None:
        if path.name.endswith(f"step_{step:06d}"):
            raise error
        original(path)

    monkeypatch.setattr(storage, "make_folder", make_folder)


@pytest.mark.promise(3)
@pytest.mark.parametrize(
    "error",
    [
        pytest.param(FULL, id="full"),
        pytest.param(READ_ONLY, id="read-only", marks=pytest.mark.slow),
        pytest.param(DENIED, id="denied", marks=pytest.mark.slow),
    ],
)
def test_a_save_that_fails_is_tried_again(
    train: Train, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    config = tiny_config()
    fail_saves_of(monkeypatch, 4, error)
    assert train(config, world_size=1) == ["done"]
    assert [record["step"] for record in records(config, "save")] == [2, 6]
    (note,) = [r["text"] for r in records(config, "note") if "could not be saved" in r["text"]]
    assert str(error) in note and "the checkpoint of step 2 is good, trying again" in note


@pytest.mark.promise(3)
def test_a_training_survives_a_full_disk(
    train: Train, at_step: AtStep, tiny_config: MakeConfig
) -> None:
    """Nothing at all can be written for two steps and a save: heartbeats, metrics, the log."""
    full, whole = tiny_config(run="full"), tiny_config(run="whole")
    assert train(whole, world_size=1) == ["done"]

    def limit_files(size: int | None) -> None:  # no file may grow beyond `size` bytes
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    with at_step(2, lambda setup: limit_files(1)), at_step(4, lambda setup: limit_files(None)):
        assert train(full, world_size=1) == ["done"]
    assert [record["step"] for record in records(full, "step")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(full, "save")] == [2, 6]
    (note,) = [r["text"] for r in records(full, "note") if "could not be saved" in r["text"]]
    assert "File too large" in note and "the checkpoint of step 2 is good" in note
    assert_same(whole, full)


@pytest.mark.promise(3)
@pytest.mark.parametrize(
    ("step", "policy"), [(4, "stop"), pytest.param(6, "retry", marks=pytest.mark.slow)]
)
def test_a_save_that_fails_ends_the_run_by_policy_or_at_the_end(
    train: Train, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, step: int, policy: str
) -> None:
    config = tiny_config(f"train.on_save_error={policy}")
    with monkeypatch.context() as patch:
        fail_saves_of(patch, step, FULL)
        answers = train(config)
    assert answers[0] == answers[1]
    assert not answers[0][1]
    assert f"saving step {step}: rank 0: OSError: [Errno 28] No space left" in answers[0][0]
    latest = (config.run.run_dir / "stage1" / "checkpoints" / "latest").read_text()
    assert latest == f"step_{step - 2:06d}\n"
    assert train(config) == ["done", "done"]  # with room again it goes on


def test_saving_by_minutes(train: Train, tiny_config: MakeConfig) -> None:
    config = tiny_config("train.save_every=1000", "train.save_minutes=1e-6")
    assert train(config) == ["done", "done"]
    assert [record["step"] for record in records(config, "save")] == [1, 2, 3, 4, 5, 6]


# Bad numbers ----------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Rank 1's weights of the samples of these 0-based steps are not finite."""
    original = BatchPipeline.batches

    def batches(self: BatchPipeline, step: int) -> list[Batch]:
        packs = original(self, step)
        if step in steps and self.stream.sampler.rank == 1:
            bad = packs[0].row_weights * float("nan")
            packs = [dataclasses.replace(packs[0], row_weights=bad), *packs[1:]]
        return packs

    monkeypatch.setattr(BatchPipeline, "batches", batches)


@pytest.mark.promise(8)
def test_a_bad_step_is_skipped_listed_and_does_not_move_the_schedule(
    train: Train, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2)
    config = tiny_config("train.log_every=1", "train.save_every=3")
    assert train(config) == ["done", "done"]
    assert [record["step"] for record in records(config, "step")] == [1, 2, 4, 5, 6]
    rates = [record["lr"]["lora"] for record in records(config, "interval")]
    good = tiny_config("train.log_every=1", run="good")
    monkeypatch.undo()
    assert train(good) == ["done", "done"]
    assert rates == [record["lr"]["lora"] for record in records(good, "interval")][:5]

    (skip,) = records(config, "skip")
    dump = json.loads(Path(skip["dump"]).read_text())
    assert dump["step"] == skip["step"] == 3 and "loss is not finite: nan" in dump["reason"]
    assert dump["loss"] == "nan" and [str(x) == "nan" for x in dump["rank_loss"]] == [False, True]
    index = ShardIndex.load(config.data.shards)
    samples = dump["samples"]
    assert [sample["position"] for sample in samples] == list(range(12, 18))
    assert {sample["rank"] for sample in samples} == {0, 1}
    for sample in samples:
        shard = [info.name for info in index.shards].index(sample["shard"])
        slot = list(index.keys(shard)).index(sample["key"])
        assert sample["offset"] == index.entries(shard)[slot]["offset"]
    assert json.loads((config.run.run_dir / "stage1" / "DONE").read_text())["skipped"] == [3]
    assert records(config, "end")[-1]["skipped"] == 1
    assert records(config, "end")[-1]["audit"] == records(good, "end")[-1]["audit"]


@pytest.mark.promise(8)
def test_a_run_with_a_skipped_step_resumes_exactly(
    train: Train, stop_at: AtStep, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2)
    whole, parts = tiny_config(run="whole"), tiny_config(run="parts")
    assert train(whole) == ["done", "done"]
    with stop_at(4):
        assert train(parts) == ["stopped", "stopped"]
    assert train(parts) == ["done", "done"]
    assert_same(whole, parts)


@pytest.mark.promise(8)
@pytest.mark.parametrize(
    ("knob", "words"),
    [
        pytest.param(
            "train.bad_numbers=stop",
            "train.bad_numbers: skip would continue without them",
            marks=pytest.mark.slow,
        ),
        ("train.max_skipped=1", "train.max_skipped allows 1 such steps in a stage, this is number"),
    ],
)
def test_bad_numbers_end_the_run_by_policy(
    train: Train, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, knob: str, words: str
) -> None:
    poison(monkeypatch, 2, 3)
    config = tiny_config(knob)
    (reason, wrong_input), other = train(config)
    assert not wrong_input and other == (reason, wrong_input)
    assert words in reason and "loss is not finite: nan; its samples are listed in" in reason
    assert (config.run.run_dir / "stage1" / "checkpoints" / "latest").read_text() == "step_000002\n"
