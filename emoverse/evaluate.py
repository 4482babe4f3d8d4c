"""The verb `evaluate`: a trained state answers the held-out shards, and the answers are scored.

(1) choose    which (record, task) entries: a pure function of the shards' keys and the limit
(2) batch     one task per batch, equal lengths together; ranks take whole batches in turn
(3) answer    `generate.Answerer`: read, decode, encode, generate, parse
(4) score     `eval/<which>/predictions.jsonl` and `metrics.json`, both written atomically
`which` is `base` (the imported base before any training) or the name of a stage.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_shards.index import ShardIndex
from data_shards.reader import ShardReader
from data_shards.tasks import TASKS, Task, bit
from emoverse.baselines import majority_rows
from emoverse.checkpoint import find_checkpoint, load_trained
from emoverse.config import Config
from emoverse.distributed import World, agree, read_world
from emoverse.generate import Answerer, Entry, truth_row
from emoverse.kernels.attention import attention_backend
from emoverse.metric_table import primary
from emoverse.models.emoverse import EmoVerse, build_model
from emoverse.predictions import Prediction, rows_of_task, write_predictions, write_text_atomically
from emoverse.provenance import package_versions
from emoverse.score_tables import confusion, item_scores
from emoverse.scoring import Row
from emoverse.significance import Score, scores
from emoverse.stages import BASE, DONE
from emoverse.summary import load_run_config

TRAINING_TRUTHS = 2000  # records per task of the training shards on which the rules are fitted
PREDICTIONS, METRICS = "predictions.jsonl", "metrics.json"
Log = Callable[[str], None]


def say(text: str) -> None:
    """Progress goes to stderr: stdout belongs to `--json`."""
    print(text, file=sys.stderr, flush=True)


# --- (1) choose and (2) batch ---


def choose_entries(index: ShardIndex, max_records: int | None) -> dict[Task, list[Entry]]:
    """At most `max_records` entries per task, in the order of the shards.

    Which ones is decided by a hash of the record's key: the same clips for every state and every
    run, spread over the whole split, and a larger limit adds clips to those of a smaller one.
    """
    chosen: dict[Task, list[Entry]] = {}
    for task in TASKS:
        entries = [
            Entry(task=task, shard=shard, slot=int(slot))
            for shard in range(index.num_shards)
            for slot in np.flatnonzero(index.entries(shard)["tasks"] & bit(task))
        ]
        if max_records is not None and len(entries) > max_records:
            entries.sort(key=lambda one: hashlib.sha256(_key(index, one).encode()).digest())
            entries = sorted(entries[:max_records], key=lambda one: (one.shard, one.slot))
        if entries:
            chosen[task] = entries
    return chosen


def _key(index: ShardIndex, entry: Entry) -> str:
    return index.key(entry.shard, entry.slot)


def plan_batches(
    index: ShardIndex, chosen: Mapping[Task, Sequence[Entry]], batch_size: int
) -> list[list[Entry]]:
    """Batches of one task each, neighbours in length together, the longest first.

    The longest first: a batch that does not fit into memory is found at once.
    """

    def length(entry: Entry) -> int:
        return int(index.entries(entry.shard)[entry.slot]["text_chars"])

    batches = []
    for entries in chosen.values():
        ordered = sorted(entries, key=lambda one: (-length(one), one.shard, one.slot))
        batches += [
            ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)
        ]
    return batches


def training_truths(shards: Path, tasks: Iterable[Task]) -> dict[Task, list[Row]]:
    """Truths of the training shards, at most TRAINING_TRUTHS per task; {} without the folder."""
    if not shards.is_dir():
        return {}
    index = ShardIndex.load(shards)
    reader = ShardReader(shards, index)
    chosen = choose_entries(index, TRAINING_TRUTHS)
    rows = {
        task: [truth_row(reader.read(one.shard, one.slot), task) for one in chosen.get(task, ())]
        for task in tasks
    }
    reader.close()
    return rows


def with_baseline(
    predictions: Sequence[Prediction],
    training: Mapping[Task, Sequence[Row]],
    *,
    give_emotion: bool,
) -> list[Prediction]:
    """The predictions, each with the answer of its task's rule beside the model's."""
    answered: dict[tuple[Task, str], Any] = {}
    for task in TASKS:
        rows = rows_of_task(predictions, task)
        ruled = majority_rows(task, training.get(task, ()), rows, give_emotion=give_emotion)
        answered |= {(task, row.key): row.value for row in ruled}
    return [replace(one, baseline=answered[one.row.task, one.row.key]) for one in predictions]


# --- (4) score ---


def metrics_of(task: Task, predictions: Sequence[Prediction], fitted_on: int) -> dict[str, Any]:
    """All that `metrics.json` says about one task."""
    mine = [one for one in predictions if one.row.task is task]
    rows = [one.row for one in mine]
    ruled = [replace(one.row, value=one.baseline) for one in mine]
    table = confusion(task, rows)
    return {
        "n": len(rows),
        "primary": primary(task).name,
        "metrics": {name: _score_json(found) for name, found in scores(task, rows).items()},
        "majority": {name: _score_json(found) for name, found in scores(task, ruled).items()},
        "majority_fitted_on": f"{fitted_on} training records" if fitted_on else "evaluated records",
        "answers": dict(sorted(Counter(row.status for row in rows).items())),
        "unparseable": sum(row.status == "unparseable" for row in rows),
        "unfinished": sum(not one.finished for one in mine),
        "rules": dict(sorted(Counter(one.rule for one in mine).items())),
        "confusion": asdict(table) if table else None,
        "items": [asdict(item) for item in item_scores(rows)],
    }


def _score_json(found: Score) -> dict[str, Any]:
    """nan becomes null: JSON has no nan."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(found).items()
    }


def protocol_of(config: Config, index: ShardIndex) -> dict[str, Any]:
    """What a number depends on besides the weights; two metrics compare only where it is equal."""
    return {
        "leakage": index.provenance.get("leakage", index.options.get("leakage")),
        "give_emotion": config.data.give_emotion,
        "blank_frames": config.model.blank_frames,
        "frames_per_clip": config.data.frames_per_clip,
        "visual": config.data.visual,
        "resize": config.data.resize,
        "history_frames": config.data.history_frames,
        "decoding": "greedy",
        "max_new_tokens": {str(k): v for k, v in config.evaluation.max_new_tokens.items()},
        "max_records_per_task": config.evaluation.max_records,
        "precision": config.model.precision,
    }


# --- the whole way ---


def load_state(
    config: Config, which: str, run_dir: Path, *, device: torch.device, log: Log
) -> tuple[EmoVerse, str | None]:
    """The model in one trained state, and the checkpoint it comes from (None for the base).

    Raises FileNotFoundError if the stage has no checkpoint, ValueError for an unknown state or a
    checkpoint that trains other parameters than the config.
    """
    if which != BASE and which not in config.stages:
        raise ValueError(
            f"--which {which}: no such state; choose among {', '.join((BASE, *config.stages))}"
        )
    dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
    seed = config.run.seed
    if which == BASE:
        model = build_model(
            config.model.base, config.model, device=device, dtype=dtype, train="none", seed=seed
        )
        return model, None
    tensors = load_trained(run_dir / which, log)
    folder = find_checkpoint(run_dir / which / "checkpoints", log)
    assert folder is not None, "load_trained has just read it"
    model = build_model(config.model.base, config.model, device=device, dtype=dtype, seed=seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if tensors.keys() != trained.keys():
        raise ValueError(
            f"{folder}: holds {len(tensors)} trained tensors, the config's model section trains "
            f"{len(trained)} (first difference: {min(tensors.keys() ^ trained.keys())}); evaluate "
            "with the config.yaml of the same run"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    return model, folder.relative_to(run_dir).as_posix()


def evaluate_checkpoint(
    config: Config,
    *,
    which: str,
    run_dir: Path,
    answerer: Answerer,
    training: Mapping[Task, Sequence[Row]],
    world: World,
    log: Log = say,
) -> dict[str, Any]:
    """Answer and score the held-out entries in one trained state; returns `metrics.json`.

    Collective: every rank calls it and answers whole batches; the main rank writes
    `run_dir/eval/<which>/`. `answerer` may serve several states one after the other.
    """
    started = time.monotonic()
    # One process alone lets its error through as it is: the front door knows what it means.
    together = agree(world, f"evaluating {which}") if world.world_size > 1 else nullcontext()
    with together:
        model, checkpoint = load_state(config, which, run_dir, device=world.device, log=log)
        index = answerer.index
        chosen = choose_entries(index, config.evaluation.max_records)
        batches = plan_batches(index, chosen, config.evaluation.batch_size)
        mine = batches[world.rank :: world.world_size]
        predictions = answerer.predict(
            model, mine, log=lambda text: log(f"{which}: {text}") if world.is_main else None
        )
    predictions = _gather(predictions, world)
    order = {
        (one.task, one.shard, one.slot): place
        for place, one in enumerate(entry for entries in chosen.values() for entry in entries)
    }
    predictions.sort(key=lambda one: order[one.row.task, one.shard, one.slot])
    predictions = with_baseline(predictions, training, give_emotion=config.data.give_emotion)
    dtype = next(model.parameters()).dtype
    metrics = {
        "which": which,
        "run": config.run.name,
        "checkpoint": checkpoint,
        "stage_done": None if which == BASE else (run_dir / which / DONE).is_file(),
        "clips": len({one.row.key for one in predictions}),
        "answers": len(predictions),
        "protocol": protocol_of(config, index),
        "tasks": {
            str(task): metrics_of(task, predictions, len(training.get(task, ()))) for task in chosen
        },
        "data": {
            "shards": str(config.evaluation.shards),
            "fingerprint": index.fingerprint,
            "training_shards": str(config.data.shards),
        },
        "versions": {
            **package_versions(),
            "attention": attention_backend(world.device, dtype),
            "device": str(world.device),
        },
        "seconds": round(time.monotonic() - started, 1),
    }
    if world.is_main:
        for task, line in metrics["tasks"].items():
            log(f"{which}: {task} {_one_line(line)}")
        folder = run_dir / "eval" / which
        write_predictions(folder / PREDICTIONS, predictions)
        write_text_atomically(folder / METRICS, json.dumps(metrics, indent=1) + "\n")
    return metrics


def _one_line(line: Mapping[str, Any]) -> str:
    """A task's primary metric beside the rule's, for the log."""
    found, rule = (line[name][line["primary"]]["value"] for name in ("metrics", "majority"))
    values = " ".join("-" if value is None else f"{value:.3f}" for value in (found, rule))
    return f"{line['primary']} and majority: {values} ({line['n']} clips)"


def _gather(predictions: list[Prediction], world: World) -> list[Prediction]:
    """Everyone's predictions on every rank."""
    if world.world_size == 1:
        return predictions
    everyone: list[list[Prediction] | None] = [None] * world.world_size
    dist.all_gather_object(everyone, predictions)
    return [one for part in everyone for one in part or ()]


def run(
    run_dir: Path,
    *,
    which: Sequence[str] | None = None,
    world: World | None = None,
    log: Log = say,
) -> dict[str, Any]:
    """Evaluate some states of a run directory, one after the other; {state: metrics}.

    which: base or stages by name; by default those of `evaluation.when` that exist already.
    world: the ranks, whose process group is running; by default this process alone.
    Raises FileNotFoundError and ValueError for a folder that is not a run, missing shards, an
    unknown state, or a state that is asked for by name and not trained.
    """
    config = load_run_config(run_dir)
    world = world if world is not None else read_world()
    states = list(which or config.evaluation.when)
    if not which:
        for state in [one for one in states if one != BASE]:
            if not (run_dir / state / "checkpoints").is_dir():
                log(f"{state}: not trained yet, left out")
                states.remove(state)
    answerer = Answerer(config, ShardIndex.load(config.evaluation.shards), run_dir / "cache")
    training = training_truths(config.data.shards, TASKS)
    return {
        state: evaluate_checkpoint(
            config,
            which=state,
            run_dir=run_dir,
            answerer=answerer,
            training=training,
            world=world,
            log=log,
        )
        for state in states
    }
