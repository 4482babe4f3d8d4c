"""Fixtures of the training tests: several ranks by fork, and tiny runs from inputs to weights.

`run_ranks(work, world_size)` forks ranks that meet through a file, so a two-rank test takes a
fraction of a second; a rank that hangs is killed at the time limit and fails the test.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.build.build import build_shards
from data_shards.media.video import encode_mp4
from data_shards.shards.record import Record, Turn, Video
from data_shards.tasks import EMOTIONS, TASKS, Pair, build_query, format_answer
from emoverse.config.schema import Config, load_config
from emoverse.engine.distributed import RankError, World, shutdown
from emoverse.models.emoverse import build_model
from emoverse.models.internvl.checkpoint import build_native, export_checkpoint
from emoverse.models.internvl.released_config import new_config
from emoverse.nano.train_tokenizer import train_tokenizer
from emoverse.training.stage_build import StageSetup

CPU = torch.device("cpu")


def _rank_main(
    work: Callable[[World], Any], world: World, timeout_s: float, result: Connection
) -> None:
    # A forked child that uses the parent's thread pool hangs; one thread never touches it.
    torch.set_num_threads(1)
    from emoverse.engine.deepspeed_engine import start_process_group

    try:
        start_process_group(world, timeout_s=timeout_s)
        answer = (True, work(world))
    except BaseException as error:
        answer = (False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    try:
        # Bytes, not send(): torch would hand tensors over as descriptors that die with this rank.
        result.send_bytes(pickle.dumps(answer))
    finally:
        shutdown()
        result.close()


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`run_ranks(work, world_size, limit_s=150)` -> what `work(world)` returned on each rank."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (imported once, not per rank)

    import emoverse.engine.deepspeed_engine  # noqa: F401

    meetings = iter(range(1000))

    def run(work: Callable[[World], Any], world_size: int, *, limit_s: float = 150) -> list[Any]:
        context = multiprocessing.get_context("fork")
        meeting = tmp_path / f"meeting-{next(meetings)}"
        ranks = []
        for rank in range(world_size):
            world = World(
                rank=rank,
                world_size=world_size,
                local_rank=rank,
                device=CPU,
                init_method=f"file://{meeting}",
            )
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(work, world, limit_s / 2, send))
            process.start()
            send.close()
            ranks.append((process, receive))
        try:
            return _collect(ranks, time.monotonic() + limit_s)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()

    return run


def _collect(ranks: list[tuple[Any, Connection]], deadline: float) -> list[Any]:
    results = []
    for rank, (_, receive) in enumerate(ranks):
        if not receive.poll(max(0.0, deadline - time.monotonic())):
            pytest.fail(f"rank {rank} did not answer in time")
        try:
            done, value = pickle.loads(receive.recv_bytes())
        except EOFError:
            pytest.fail(f"rank {rank} died without an answer")
        if not done:
            pytest.fail(f"rank {rank}: {value}")
        results.append(value)
    return results


# A tiny run -----------------------------------------------------------------------------------

NAMES = ("Anna", "Ben", "Cleo")
EVENTS = ("the train left", "the cake is ready", "my keys are gone", "we won the game")
NUM_RECORDS = 36
RUN = """
run: {name: tiny, seed: 3, run_dir: RUN_DIR}
model:
  base: BASE
  lora: {r: 4, alpha: 8}
  precision: fp32
data: {shards: SHARDS, frames_per_clip: 2, max_tokens: 400, pack_tokens: 400, workers: 0}
stages:
  stage1:
    pool: {take: 16}
    rates: {msa: 2/5, er: 1/5, fer: 2/5}
    epochs: 2
    shortage: repeat
    optim: {lr_lora: 5e-3, lr_projector: 1e-3, warmup: 0.2}
  stage2:
    pool: {rest_of: stage1}
    rates: {msa: 1/20, er: 19/60, eri: 19/60, ecpe: 19/60}
    epochs: 1
    shortage: repeat
    start_from: stage1
    optim: {lr_lora: 5e-3, lr_projector: 1e-3, warmup: 0.2}
train:
  global_batch_size: 6
  zero_stage: 2
  processes: 2
  log_every: 2
  save_every: 2
  keep_checkpoints: 9
  tensorboard: false
evaluation: {shards: SHARDS}
"""


def tiny_record(number: int) -> Record:
    """A clip of eight 64-pixel frames with all five tasks; sizes and words differ by number."""
    rng = np.random.default_rng(number)
    emotion = EMOTIONS[1 + number % 6]
    turns = tuple(
        Turn(speaker=NAMES[turn % 3], text=f"Listen, {EVENTS[(number + turn) % 4]}.")
        for turn in range(2 + number % 3)
    )
    target = len(turns)
    frames = rng.integers(0, 256, (8, 1, 1, 3), dtype=np.uint8).repeat(64, 1).repeat(64, 2)
    return Record(
        key=f"clip-{number:03d}",
        source="test",
        split="train",
        utterance=turns[-1].text,
        speaker=turns[-1].speaker,
        conversation=turns,
        target=target,
        sentiment=float(number % 7 - 3),
        emotion=emotion,
        expressions=("inner brow raised", "lips part")[: 1 + number % 2],
        reason=f"{turns[-1].speaker} feels {emotion} because {EVENTS[number % 4]}.",
        pairs=(Pair(target, emotion, 1 + number % target),),
        tasks=TASKS,
        num_frames=8,
        peak_frame=number % 8,
        media=Video(mp4=encode_mp4(frames, 8)),
    )


@dataclass(frozen=True)
class TinyInputs:
    """A shard folder and a random base model in the released layout."""

    shards: Path
    base: Path


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    """Built once: 36 clips in three shards, and a base of 60 thousand parameters."""
    folder = tmp_path_factory.mktemp("tiny")
    records = [tiny_record(number) for number in range(NUM_RECORDS)]
    build_shards(records, folder / "shards", provenance={}, max_records_per_shard=12)
    texts = [
        text
        for record in records
        for task in TASKS
        for text in (
            build_query(record, task, give_emotion=False),
            format_answer(task, record.answer(task)),
        )
    ]
    tokenizer = train_tokenizer(texts, folder / "base", vocab_size=420)
    config_json = new_config(
        family="phi3",
        vision_hidden=32,
        vision_layers=1,
        vision_heads=2,
        vision_mlp=48,
        image_size=56,
        hidden=32,
        layers=2,
        heads=2,
        mlp=48,
        vocab=tokenizer.vocab_size,
        bos_id=1,
        eos_id=tokenizer.stop_ids[-1],
        pad_id=tokenizer.stop_ids[-1],
        img_context_id=tokenizer.image_context_id,
    )
    export_checkpoint(build_native(config_json, seed=11), config_json, folder / "base")
    # Once here, inherited by all ranks: PEFT's first model costs half a second.
    lora = SimpleNamespace(preset="paper", r=1, alpha=1, dropout=0.0, targets=())
    build_model(
        folder / "base", SimpleNamespace(lora=lora, projector="full", attention="auto", lean="auto")
    )
    return TinyInputs(shards=folder / "shards", base=folder / "base")


@pytest.fixture
def tiny_config(tiny_inputs: TinyInputs, tmp_path: Path) -> Callable[..., Config]:
    """`tiny_config("train.zero_stage=3", run="other")`: the tiny run with overrides."""

    def make(*overrides: str, run: str = "run") -> Config:
        text = RUN.replace("RUN_DIR", json.dumps(str(tmp_path / run)))
        text = text.replace("BASE", json.dumps(str(tiny_inputs.base)))
        text = text.replace("SHARDS", json.dumps(str(tiny_inputs.shards)))
        path = tmp_path / f"{run}.yaml"
        path.write_text(text)
        return load_config([path], overrides)

    return make


# Training it ----------------------------------------------------------------------------------

AtStep = Callable[..., contextlib.AbstractContextManager[None]]


@pytest.fixture
def train_rank() -> Callable[..., str]:
    """`train_rank(config, world, "stage1", resume=False)`: one rank, in a group; its outcome."""
    from emoverse.training import shutdown
    from emoverse.training.train import TrainOptions, train_stages

    def train(config: Config, world: World, *stages: str, **options: Any) -> str:
        with shutdown.listen() as flag:
            given = TrainOptions(**options)
            return train_stages(config, stages or ("stage1",), world, options=given, flag=flag)

    return train


@pytest.fixture
def train(
    run_ranks: Callable[..., list[Any]], train_rank: Callable[..., str]
) -> Callable[..., list[Any]]:
    """`train(config, "stage1", "stage2", world_size=2, resume=False)`: trains in forked ranks.

    Returns per rank "done", "stopped", or (reason, whether the input is wrong) of a `RankError`.
    """

    def train(config: Config, *stages: str, world_size: int = 2, **options: Any) -> list[Any]:
        def work(world: World) -> Any:
            try:
                return train_rank(config, world, *stages, **options)
            except RankError as error:
                return str(error), error.wrong_input

        return run_ranks(work, world_size)

    return train


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> AtStep:
    """`with at_step(3, act)`: inside, every rank calls `act(setup)` during 0-based step 3."""

    @contextlib.contextmanager
    def patched(step: int, act: Callable[[StageSetup], None]) -> Iterator[None]:
        original = StageSetup.lr_factor

        def lr_factor(self: StageSetup, current: int) -> float:
            if current == step:
                act(self)
            return original(self, current)

        with monkeypatch.context() as patch:
            patch.setattr(StageSetup, "lr_factor", lr_factor)
            yield

    return patched


@pytest.fixture
def stop_at(at_step: AtStep) -> AtStep:
    """`with stop_at(3, on_rank=1)`: inside, one rank gets a stop signal during 0-based step 3."""

    def stop(step: int, *, on_rank: int = 0) -> contextlib.AbstractContextManager[None]:
        def act(setup: StageSetup) -> None:
            if setup.sampler.rank == on_rank:
                os.kill(os.getpid(), signal.SIGTERM)

        return at_step(step, act)

    return stop
