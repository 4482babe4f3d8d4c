"""The loader: the same packs for any number of workers and any start, and clear errors."""

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.build.build import build_shards
from data_shards.media.video import encode_mp4
from data_shards.plan.plan import StageSpec, plan_stages
from data_shards.plan.sampler import WeightedTaskSampler
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Record, Video
from data_shards.stream import Damage, DamagedSample, Sample, StepStream, ViewOptions
from data_shards.tasks import Task
from emoverse.data.collate import Batch
from emoverse.data.loader import StepLoader
from emoverse.data.pipeline import BatchPipeline, SampleStream
from emoverse.data.workers import PoolOptions, WorkerDied

SIZE, NUM_STEPS = 4, 5
Plain = Callable[[list[Batch]], list[dict[str, Any]]]


class Stream:
    """Step n has n samples of a pure function; `trouble` runs before a step is made."""

    def __init__(self, trouble: Callable[[int], None] = lambda step: None) -> None:
        self.trouble = trouble
        self.report: Callable[[str], object] = lambda record: None

    def __len__(self) -> int:
        return NUM_STEPS

    def read(self, step: int) -> list[Sample]:
        self.trouble(step)
        return [sample(10 * step + n) for n in range(step)]

    def decode(self, sample: Sample, out: np.ndarray | None = None) -> np.ndarray:
        assert sample.undecoded and out is not None
        out[:] = sample.position
        return out

    def substitute(self, sample: Sample, damage: Damage) -> Sample:
        raise AssertionError("nothing is damaged")

    def complete(self, sample: Sample) -> Sample:
        raise AssertionError("nothing is damaged, and no features are stored")


def sample(position: int) -> Sample:
    """At odd positions the frames are not decoded yet."""
    record = Record(
        key=f"r{position}",
        source="test",
        split="train",
        utterance="I won! " * (1 + position % 3),
        speaker="Anna",
        sentiment=1.0,
        tasks=(Task.MSA,),
        num_frames=2,
        media=Video(mp4=b"-"),
    )
    frames = np.full((2, SIZE, SIZE, 3), position, dtype=np.uint8)
    return Sample(
        position=position,
        task=Task.MSA,
        record=record,
        view="clip",
        frames=None if position % 2 else frames,
        undecoded=2 * (position % 2),
    )


@pytest.fixture
def build(pipeline_of: Callable[..., BatchPipeline]) -> Callable[..., StepLoader]:
    def build_loader(stream: SampleStream, workers: int, pack_tokens: int = 600) -> StepLoader:
        pool = PoolOptions(workers=workers, step_bytes=4 * 2 * SIZE * SIZE * 3)
        return StepLoader(pipeline=pipeline_of(stream, pack_tokens), pool=pool)

    return build_loader


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(
    build: Callable[..., StepLoader], plain: Plain, workers: int
) -> None:
    alone = build(Stream(), 0)
    assert len(alone) == NUM_STEPS
    steps = [plain(packs) for packs in alone.iterate(0)]
    assert steps == [plain(packs) for packs in build(Stream(), workers).iterate(0)]
    assert steps == [plain(alone.pipeline.batches(step)) for step in range(NUM_STEPS)]
    assert [sum(len(pack["keys"]) for pack in packs) for packs in steps] == [0, 1, 2, 3, 4]
    assert steps[0] == []
    assert len(steps[4]) > 1
    for pack in (pack for packs in steps for pack in packs):
        frames = np.reshape(pack["pixels"], (len(pack["positions"]), -1))
        for position, values in zip(pack["positions"], frames, strict=True):
            assert (values == position).all(), "each sample has its own frames"


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_a_start_step(
    build: Callable[..., StepLoader], plain: Plain, workers: int
) -> None:
    loader = build(Stream(), workers)
    whole = [plain(packs) for packs in loader.iterate(0)]
    assert [plain(packs) for packs in loader.iterate(3)] == whole[3:]
    assert [plain(packs) for packs in loader.iterate(1, 3)] == whole[1:3]
    assert list(loader.iterate(NUM_STEPS)) == []


def test_generators_of_the_training_stay_untouched(build: Callable[..., StepLoader]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(build(Stream(), 1).iterate(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_zero_batch(build: Callable[..., StepLoader]) -> None:
    batch = build(Stream(), 0).zero_batch()
    assert batch.normaliser == 0 and batch.num_images == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_keep_kind_and_message(build: Callable[..., StepLoader], workers: int) -> None:
    damage = Damage(position=30, task=Task.MSA, shard="s.tar", key="k", offset=5, cause="crc")

    def fail_with(error: Exception) -> Callable[[int], None]:
        def trouble(step: int) -> None:
            if step == 3:
                raise error

        return trouble

    for error in (
        DamagedSample(damage, "build the shards again"),
        FileNotFoundError("shard s.tar is gone"),
        ZeroDivisionError("a fault"),
    ):
        packs = build(Stream(fail_with(error)), workers).iterate(2)
        assert len(next(packs)) > 0
        with pytest.raises(type(error)) as caught:
            next(packs)
        assert str(caught.value) == str(error)
        if workers:
            assert "In the data worker, at step 3:\nTraceback" in caught.value.__notes__[0]
        if isinstance(error, DamagedSample):
            assert caught.value.damage == damage  # type: ignore[attr-defined]


class Unpicklable(ValueError):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def test_an_error_that_does_not_pickle_keeps_its_message(build: Callable[..., StepLoader]) -> None:
    def trouble(step: int) -> None:
        raise Unpicklable("this", "that")

    with pytest.raises(ValueError, match=r"this and that \(Unpicklable could not be pickled"):
        list(build(Stream(trouble), 1).iterate(0))


def test_too_small_packs_are_an_error(build: Callable[..., StepLoader]) -> None:
    with pytest.raises(ValueError, match=r"data\.pack_tokens must be at least as long"):
        list(build(Stream(), 0, pack_tokens=20).iterate(0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_workers_outlive_the_signals_of_a_scheduler(
    build: Callable[..., StepLoader], plain: Plain, tmp_path: Path, number: signal.Signals
) -> None:
    def trouble(step: int) -> None:
        (tmp_path / f"{os.getpid()}").touch()

    packs = build(Stream(trouble), 1).iterate(0)
    seen = [plain(next(packs))]
    children = {child.pid for child in multiprocessing.active_children()}
    (worker,) = (int(path.name) for path in tmp_path.iterdir())
    assert worker in children
    os.kill(worker, number)
    seen += [plain(rest) for rest in packs]
    assert seen == [plain(rest) for rest in build(Stream(), 0).iterate(0)]


def test_stopping_early_ends_the_workers(build: Callable[..., StepLoader]) -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    packs = build(Stream(), 2).iterate(0)
    next(packs)
    assert len(multiprocessing.active_children()) >= len(before) + 2
    packs.close()  # type: ignore[attr-defined]
    del packs
    assert {child.pid for child in multiprocessing.active_children()} <= before


def test_ranks_and_workers_share_the_plan_from_real_shards(
    build: Callable[..., StepLoader], tmp_path: Path
) -> None:
    """Clips on disk to packs: whatever the ranks and workers, a step is the plan's step."""
    clip = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3)).astype(np.uint8)
    media = Video(mp4=encode_mp4(clip, 25))
    records = [
        dataclasses.replace(
            sample(n).record, tasks=(Task.MSA, Task.ER), emotion="joy", num_frames=4, media=media
        )
        for n in range(12)
    ]
    index = build_shards(records, tmp_path / "shards", provenance={}, max_records_per_shard=5)
    half = Fraction(1, 2)
    spec = StageSpec(name="stage1", rates=((Task.MSA, half), (Task.ER, half)), take=10)
    stage = plan_stages(index, [spec], seed=1).stages["stage1"]

    def open_rank(rank: int, world_size: int, workers: int) -> StepLoader:
        sampler = WeightedTaskSampler(
            stage, index, global_batch_size=4, rank=rank, world_size=world_size
        )
        view = ViewOptions(num_frames=2, image_size=SIZE)
        reader = ShardReader(tmp_path / "shards", index)
        return build(StepStream(sampler, reader, view), workers)

    def step_samples(packs: list[Batch]) -> set[tuple[int, str, Task]]:
        return {row for b in packs for row in zip(b.positions, b.keys, b.tasks, strict=True)}

    alone = list(open_rank(0, 1, workers=0).iterate(0))
    ranks = [list(open_rank(rank, 2, workers=1).iterate(0)) for rank in range(2)]
    assert [sum(b.normaliser for b in packs) for packs in alone] == pytest.approx([4, 4, 2])
    for step, packs in enumerate(alone):
        places = range(4 * step, min(4 * step + 4, 10))
        planned = {(place, stage.at(place)) for place in places}
        expected = {(place, index.key(at.shard, at.slot), at.task) for place, at in planned}
        assert step_samples(packs) == expected
        assert step_samples(ranks[0][step]) | step_samples(ranks[1][step]) == expected
        assert not step_samples(ranks[0][step]) & step_samples(ranks[1][step])
    assert all(b.pixels is not None and b.pixels.shape[1:] == (SIZE, SIZE, 3) for b in alone[0])


@pytest.mark.promise(2)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_killed_at_any_step_changes_nothing(
    build: Callable[..., StepLoader],
    plain: Plain,
    tmp_path: Path,
    workers: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """kill -9 in the middle of a step, once: the same batches, and a line that says so."""
    expected = [plain(packs) for packs in build(Stream(), 0).iterate(0)]
    for victim in range(NUM_STEPS):

        def die_once(step: int, victim: int = victim) -> None:
            marker = tmp_path / f"{workers}-{victim}"
            if step == victim and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        found = [plain(packs) for packs in build(Stream(die_once), workers).iterate(0)]
        assert found == expected
        assert f"was killed by SIGKILL at step {victim}, at: step {victim}; it is restarted" in (
            capfd.readouterr().err
        )


def test_a_worker_that_always_dies_ends_the_run(build: Callable[..., StepLoader]) -> None:
    def die(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    packs = build(Stream(die), 2).iterate(0)
    assert [len(next(packs)) > 0 for _ in range(3)] == [False, True, True]
    with pytest.raises(
        WorkerDied, match="was killed by SIGKILL twice at step 3, at: step 3; if mem"
    ):
        next(packs)
    assert not [c for c in multiprocessing.active_children() if c.name.startswith("data-worker")]
