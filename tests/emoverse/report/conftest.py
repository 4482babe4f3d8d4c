"""A run directory as training and evaluation leave it, with real shards and made-up answers."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_shards.build.build import build_shards
from data_shards.media.video import encode_mp4
from data_shards.shards.record import Record, Turn, Video
from data_shards.tasks import EMOTIONS, TASKS, Answer, Pair, Task, build_query, format_answer
from emoverse.config.schema import Config, load_config, to_yaml
from emoverse.evaluation.baselines import majority_rows
from emoverse.evaluation.metrics import Row
from emoverse.evaluation.predictions import Prediction, write_predictions

NUM_CLIPS, NUM_FRAMES = 36, 20
PHRASES = ("Brow lower", "Cheek raise", "Lip corner pull", "Lips part", "Inner brow raise")
SKILL = {"base": 0.15, "stage1": 0.6, "stage2": 0.9}

CONFIG = """
run: {{name: tiny-run, seed: 3, run_dir: {run_dir}}}
model: {{base: nano, precision: fp32}}
data: {{shards: {shards}, max_tokens: 512, frames_per_clip: 4}}
stages:
  stage1:
    pool: {{take: 100}}
    rates: {{msa: 2/5, er: 0.2, fer: 0.4}}
  stage2:
    pool: {{rest_of: stage1}}
    rates: {{msa: 1/20, er: 19/60, eri: 19/60, ecpe: 19/60}}
    start_from: stage1
train: {{global_batch_size: 8}}
evaluation: {{shards: {shards}, batch_size: 4}}
"""


def _mp4(index: int) -> bytes:
    """A disc that moves over a grey field."""
    rows, columns = np.mgrid[0:96, 0:96]
    frames = []
    for t in range(NUM_FRAMES):
        disc = (rows - 48) ** 2 + (columns - 20 - 3 * t) ** 2 < 300
        color = np.array([60 + 5 * (index % 30), 120, 200], dtype=np.uint8)
        frames.append(np.where(disc[..., None], color, np.uint8(90)).astype(np.uint8))
    return encode_mp4(np.stack(frames), fps=10)


def make_record(index: int) -> Record:
    """A clip with the labels of all five tasks."""
    rng = random.Random(index)
    emotion = rng.choice(EMOTIONS)
    pair_emotion = emotion if emotion != "neutral" else "joy"
    target = rng.randint(1, 3)
    turns = tuple(
        Turn(speaker=name, text=f"{name} speaks of day {index} & more.")
        for name in ("Anna", "Ben", "Anna")
    )
    return Record(
        key=f"clip-{index:03d}",
        source="synthetic",
        split="test",
        utterance=turns[target - 1].text,
        speaker=turns[target - 1].speaker,
        conversation=turns,
        target=target,
        sentiment=rng.choice([-2.0, -1.0, 0.0, 1.5]),
        emotion=emotion,
        expressions=tuple(sorted(rng.sample(PHRASES, 2))),
        reason=f"The face is clear. The person feels {emotion}.",
        pairs=(Pair(target, pair_emotion, rng.randint(1, target)),),
        tasks=TASKS,
        num_frames=NUM_FRAMES,
        peak_frame=index % NUM_FRAMES,
        media=Video(mp4=_mp4(index)),
    )


def _guess(task: Task, record: Record, skill: float, rng: random.Random) -> Answer:
    if rng.random() < skill:
        return record.answer(task)
    other = rng.choice(EMOTIONS[1:])
    return {
        Task.MSA: rng.choice(["positive", "negative"]),
        Task.ER: rng.choice(EMOTIONS),
        Task.FER: tuple(sorted(rng.sample(PHRASES, 2))),
        Task.ERI: f"The face is clear. The person feels {other}.",
        Task.ECPE: (Pair(record.target, other, 1),),
    }[task]


def _predictions(records: Sequence[Record], skill: float, seed: int) -> list[Prediction]:
    rng = random.Random(seed)
    predictions = []
    for task in TASKS:
        for slot, record in enumerate(records):
            value = _guess(task, record, skill, rng)
            broken = rng.random() < 0.03
            row = Row(
                key=record.key,
                task=task,
                reference=record.answer(task),
                value=None if broken else value,
                response="<b>?</b>" if broken else format_answer(task, value),
                status="unparseable" if broken else "parsed",
                sentiment=record.sentiment,
                emotion=record.emotion,
                target=record.target,
            )
            predictions.append(
                Prediction(
                    row=row,
                    label=format_answer(task, row.reference),
                    rule="no-label" if broken else "exact",
                    finished=True,
                    baseline=None,
                    question=build_query(record, task, give_emotion=False),
                    shard=0,
                    slot=slot,
                    source="synthetic",
                    confidence=round(rng.uniform(0.3, 1.0), 3),
                )
            )
    ruled = {}
    for task in TASKS:
        rows = [p.row for p in predictions if p.row.task is task]
        for row in majority_rows(task, [], rows, give_emotion=False):
            ruled[row.key, task] = row.value
    return [dataclasses.replace(p, baseline=ruled[p.row.key, p.row.task]) for p in predictions]


def _write_log(path: Path, rates: dict[str, float]) -> None:
    rng = random.Random(1)
    lines = [
        {
            "kind": "start",
            "step": 0,
            "rates": rates,
            "world_size": 2,
            "zero_stage": 2,
            "num_steps": 300,
        }
    ]
    for step in range(10, 301, 10):
        task = {
            name: {
                "loss": 2.5 * 0.985**step + 0.2 + 0.05 * rng.random() + 0.1 * position,
                "samples": round(80 * rate),
                "mix": rate,
                "rate": rate,
            }
            for position, (name, rate) in enumerate(rates.items())
        }
        lines.append({"kind": "step", "step": step, "loss": 1.0})
        lines.append(
            {
                "kind": "interval",
                "step": step,
                "loss": 1.0,
                "task": task,
                "samples_per_s": 55.0 + rng.random(),
                "tokens_per_s": 5500.0 + rng.random(),
                "data_wait": 0.02,
                "memory_bytes": 3 * 2**30,
            }
        )
    lines.append({"kind": "end", "step": 300, "seconds": 92.0, "reason": "done", "audit": "x"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "ste')


MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def records() -> list[Record]:
    return [make_record(index) for index in range(NUM_CLIPS)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "test"
    build_shards(records, folder, provenance={"source": "test"})
    return folder


@pytest.fixture(scope="session")
def make_run(records: list[Record], shards: Path) -> MakeRun:
    """`make_run(folder, states=..., skill=..., logs=True, shards=None)` -> a run directory."""

    def make(
        folder: Path,
        *,
        states: Sequence[str] = ("base", "stage1", "stage2"),
        skill: dict[str, float] = SKILL,
        logs: bool = True,
        shards: Path = shards,
    ) -> Path:
        folder.mkdir(parents=True)
        draft = folder / "draft.yaml"
        draft.write_text(CONFIG.format(run_dir=folder, shards=shards))
        config: Config = load_config([draft])
        draft.unlink()
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "provenance.json").write_text(json.dumps([{"git": None, "note": "</script>"}]))
        for seed, state in enumerate(states):
            path = folder / "eval" / state
            write_predictions(path / "predictions.jsonl", _predictions(records, skill[state], seed))
            metrics = {"protocol": {"give_emotion": False, "leakage": "no_meld_test"}}
            (path / "metrics.json").write_text(json.dumps(metrics))
        if logs:
            for name, stage in config.stages.items():
                rates = {str(task): float(rate) for task, rate in stage.rates.items()}
                _write_log(folder / name / "metrics.jsonl", rates)
        return folder

    return make
