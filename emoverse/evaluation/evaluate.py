"""The verb `evaluate`: a trained state answers the held-out shards, and the answers are scored.

(1) choose    which (record, task) entries, in batches that are formed globally (`held_out.py`)
(2) answer    ranks take whole batches in turn (`generate.Answerer`); each is kept at once, so
              that a killed evaluation goes on (`predictions.PartWriter`)
(3) score     `eval/<which>/predictions.jsonl` and `metrics.json`, both written atomically
`which` is `base` (the imported base before any training) or the name of a stage.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tqdm import tqdm

from data_shards.files import write_atomically
from data_shards.shards.index import ShardIndex
from data_shards.tasks import TASKS, Task
from emoverse.config.schema import Config
from emoverse.engine.distributed import World, fail_together, from_main, read_world
from emoverse.evaluation.metrics import Row
from emoverse.evaluation.metrics_file import (
    keep_judge,
    log_line,
    protocol_of,
    tasks_json,
    with_baseline,
)
from emoverse.evaluation.parsing import Mode, read_again
from emoverse.evaluation.predictions import (
    PartWriter,
    Prediction,
    identity_hash,
    read_parts,
    read_predictions,
    remove_parts,
    write_predictions,
)
from emoverse.evaluation.target import Target, name_of, resolve, states_of, write_config
from emoverse.inference.generate import Answerer, shared_weights
from emoverse.inference.held_out import Entry, choose_entries, plan_batches, training_references
from emoverse.kernels.attention import attention_backend
from emoverse.models.architecture import base_folder
from emoverse.models.emoverse import EmoVerse, build_model
from emoverse.run_dir.checkpoint import MANIFEST, TRAINED, find_checkpoint, verify_checkpoint
from emoverse.run_dir.lineage import adapters_below_checkpoint
from emoverse.run_dir.provenance import base_fingerprint, package_versions
from emoverse.training.stages import BASE, DONE

PREDICTIONS, METRICS, PARTS = "predictions.jsonl", "metrics.json", "parts"
LOG_EVERY = 10  # batches between two lines where there is no terminal for a bar
Log = Callable[[str], None]


def log_to_stderr(text: str) -> None:
    """Progress goes to stderr: stdout belongs to `--json`."""
    print(text, file=sys.stderr, flush=True)


def find_state(config: Config, which: str, run_dir: Path, log: Log) -> Path | None:
    """The checkpoint of a trained state, verified; None for the base.

    Raises FileNotFoundError if the stage has no checkpoint, ValueError for an unknown state.
    """
    if which == BASE:
        return None
    if which not in config.stages:
        raise ValueError(
            f"--which {which}: no such state; choose among {', '.join((BASE, *config.stages))}"
        )
    folder = find_checkpoint(run_dir / which / "checkpoints", log)
    if folder is None:
        raise FileNotFoundError(
            f"{run_dir / which / 'checkpoints'} holds no checkpoint; train {which} first, or "
            "check run.run_dir"
        )
    return folder


def load_state(
    config: Config, folder: Path | None, device: torch.device, *, defer: bool = False
) -> EmoVerse:
    """The base, or the model with the trained weights of a verified checkpoint.

    defer: frozen weights are left to `generate.shared_weights`.

    Raises ValueError for a checkpoint that trains other parameters than the config.
    """
    dtype, seed = _dtype(config), config.run.seed
    if folder is None:
        return build_model(
            config.model.base,
            config.model,
            device=device,
            dtype=dtype,
            train="none",
            seed=seed,
            defer=defer,
        )
    tensors = load_file(folder / TRAINED)
    model = build_model(
        config.model.base,
        config.model,
        device=device,
        dtype=dtype,
        seed=seed,
        adapters=adapters_below_checkpoint(config, folder),
        defer=defer,
    )
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
    return model


# One state -----------------------------------------------------------------------------------


def answers_identity(config: Config, folder: Path | None, index: ShardIndex) -> dict[str, Any]:
    """What decides the answers, and so whether those of an earlier process are the same."""
    weights = None
    if folder is not None:
        weights = json.loads((folder / MANIFEST).read_text())["files"][TRAINED]["sha256"]
    return {
        "base": base_fingerprint(base_folder(config.model.base)),
        "weights": weights,
        "data": index.fingerprint,
        "batch_size": config.evaluation.batch_size,
        "protocol": protocol_of(config, index),
    }


def evaluate_checkpoint(
    config: Config,
    *,
    which: str,
    run_dir: Path,
    answerer: Answerer,
    training: Mapping[Task, Sequence[Row]],
    world: World,
    checkpoint: Path | None = None,
    out: Path | None = None,
    mode: Mode = "tolerant",
    fresh: bool = False,
    log: Log = log_to_stderr,
) -> dict[str, Any]:
    """Answer and score the held-out entries in one trained state; returns `metrics.json`.

    Collective: every rank calls it and answers whole batches; the main rank writes
    `out/eval/<which>/`. Answers of an earlier process are taken over where their identity is
    this one's, unless `fresh`. checkpoint: this one instead of the stage's newest.
    """
    started = time.monotonic()
    name = which if checkpoint is None else f"{which}@{checkpoint.name}"
    target = (out or run_dir) / "eval" / name
    # A single process raises the error as it is: the command line maps its type to an exit code.
    together = fail_together(world, f"evaluating {name}") if world.world_size > 1 else nullcontext()
    with together:
        if checkpoint is not None:
            verify_checkpoint(checkpoint)
        folder = checkpoint or find_state(config, which, run_dir, log)
        index = answerer.index
        chosen = choose_entries(index, config.evaluation.max_records)
        batches = plan_batches(index, chosen, config.evaluation.batch_size)
        identity = identity_hash(answers_identity(config, folder, index))
        known = _known(target, batches, identity) if world.is_main and not fresh else {}
    known = from_main(world, known)
    if known and world.is_main:
        log(f"{name}: {len(known)} of {len(batches)} batches are answered already")
    together = fail_together(world, f"evaluating {name}") if world.world_size > 1 else nullcontext()
    answers = dict(known)
    with together:
        left = [batch for batch in range(len(batches)) if batch not in known]
        mine = left[world.rank :: world.world_size]
        shared = _shares_weights(config, world)
        if mine or (left and shared):
            model = load_state(config, folder, world.device, defer=shared)
            with shared_weights(model, world, config.model.precision):
                answers |= _answer(
                    model, answerer, batches, mine, target / PARTS, identity, world, log
                )
    answers = _gather(answers, world)
    predictions = [prediction for batch in range(len(batches)) for prediction in answers[batch]]
    order = {
        (entry.task, entry.shard, entry.slot): position
        for position, entry in enumerate(entry for entries in chosen.values() for entry in entries)
    }
    predictions.sort(
        key=lambda prediction: order[prediction.row.task, prediction.shard, prediction.slot]
    )
    predictions = with_baseline(
        read_again(predictions, mode), training, give_emotion=config.data.give_emotion
    )
    metrics = {
        "which": name,
        "run": config.run.name,
        "checkpoint": folder and _inside(folder, run_dir),
        "stage_done": None if which == BASE else (run_dir / which / DONE).is_file(),
        "identity": identity,
        "parser": mode,
        **_conditions(config, index, world),
        **_scored(predictions, training, config.data.give_emotion),
        "seconds": round(time.monotonic() - started, 1),
    }
    if world.is_main:
        for task, line in metrics["tasks"].items():
            log(f"{name}: {task} {log_line(line)}")
        _write(target, metrics, predictions)
    return metrics


def _shares_weights(config: Config, world: World) -> bool:
    """Ranks that share the weights in training share them here, idle ones too.

    Cached features need the whole tower on every rank: each computes those of other clips.
    """
    divided = config.train.zero_stage == 3 and world.world_size > 1
    return divided and not config.model.cache_features


def _write(target: Path, metrics: dict[str, Any], predictions: Sequence[Prediction]) -> None:
    keep_judge(metrics, target / METRICS)
    write_predictions(target / PREDICTIONS, predictions)
    write_atomically(target / METRICS, json.dumps(metrics, indent=1) + "\n")
    remove_parts(target / PARTS)


def _conditions(config: Config, index: ShardIndex, world: World) -> dict[str, Any]:
    """Protocol, data and versions behind the numbers."""
    return {
        "protocol": protocol_of(config, index),
        "data": {
            "shards": str(config.evaluation.shards),
            "fingerprint": index.fingerprint,
            "training_shards": str(config.data.shards),
        },
        "versions": {
            **package_versions(),
            "attention": attention_backend(world.device.type, _dtype(config)),
            "device": str(world.device),
        },
    }


def _scored(
    predictions: Sequence[Prediction], training: Mapping[Task, Sequence[Row]], give_emotion: bool
) -> dict[str, Any]:
    return {
        "clips": len({prediction.row.key for prediction in predictions}),
        "answers": len(predictions),
        "tasks": tasks_json(predictions, training, give_emotion=give_emotion),
    }


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.model.precision == "bf16" else torch.float32


def _inside(folder: Path, run_dir: Path) -> str:
    """The checkpoint relative to its run, where it lies in it."""
    folder, run_dir = folder.resolve(), run_dir.resolve()
    return folder.relative_to(run_dir).as_posix() if folder.is_relative_to(run_dir) else str(folder)


def _known(
    target: Path, batches: Sequence[Sequence[Entry]], identity: str
) -> dict[int, list[Prediction]]:
    """Batches that an earlier process answered, from a finished evaluation or from its parts."""
    metrics = target / METRICS
    whole = metrics.is_file() and (target / PREDICTIONS).is_file()
    if not whole or json.loads(metrics.read_text()).get("identity") != identity:
        return read_parts(target / PARTS, identity)
    answered = {
        (prediction.row.task, prediction.shard, prediction.slot): prediction
        for prediction in read_predictions(target / PREDICTIONS)
    }
    return {
        batch: [answered[entry.task, entry.shard, entry.slot] for entry in entries]
        for batch, entries in enumerate(batches)
    }


def _answer(
    model: EmoVerse,
    answerer: Answerer,
    batches: Sequence[Sequence[Entry]],
    mine: Sequence[int],
    parts: Path,
    identity: str,
    world: World,
    log: Log,
) -> dict[int, list[Prediction]]:
    """This rank's batches, each written before the next one; a bar or lines on the main rank."""
    answers = {}
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=len(mine),
        unit="batch",
        desc=parts.parent.name,
        disable=not (world.is_main and terminal),
    )
    with PartWriter(parts, identity, world.rank) as writer, bar:
        answered = answerer.predict(model, [batches[batch] for batch in mine])
        for position, (batch, predictions) in enumerate(zip(mine, answered, strict=True), start=1):
            writer.write(batch, predictions)
            answers[batch] = predictions
            bar.update()
            if (
                world.is_main
                and not terminal
                and (position % LOG_EVERY == 0 or position == len(mine))
            ):
                share = f" of rank 0's share of {world.world_size}" if world.world_size > 1 else ""
                log(f"{parts.parent.name}: {position}/{len(mine)} batches{share}")
    return answers


def _gather(answers: dict[int, list[Prediction]], world: World) -> dict[int, list[Prediction]]:
    """Everyone's batches on every rank."""
    if world.world_size == 1:
        return answers
    everyone: list[dict[int, list[Prediction]] | None] = [None] * world.world_size
    dist.all_gather_object(everyone, answers)
    return {batch: predictions for part in everyone for batch, predictions in (part or {}).items()}


# All states of a target ----------------------------------------------------------------------


def run(
    run_dir: Path,
    *,
    which: Sequence[str] | None = None,
    world: World | None = None,
    config: Config | None = None,
    mode: Mode = "tolerant",
    fresh: bool = False,
    log: Log = log_to_stderr,
) -> dict[str, Any]:
    """Evaluate some states of a run directory, one after the other; {state: metrics}.

    which: base or stages by name; by default those of `evaluation.when` that exist already.
    world: the ranks, whose process group is running; by default this process alone.
    config: what the run directory says unless it is given.
    Raises FileNotFoundError and ValueError for a folder that is not a run, missing shards, an
    unknown state, or a state that is asked for by name and not trained.
    """
    target = resolve(run_dir, states=tuple(which or ()))
    if config is not None:
        target = replace(target, config=config)
    return run_target(target, world=world, mode=mode, fresh=fresh, log=log)


def run_target(
    target: Target,
    *,
    world: World | None = None,
    mode: Mode = "tolerant",
    fresh: bool = False,
    log: Log = log_to_stderr,
) -> dict[str, Any]:
    """`run` for any target with a model: a run, one checkpoint, or a base as it was downloaded."""
    config = target.config
    assert config is not None, "a predictions file needs no model"
    world = world if world is not None else read_world()
    run_dir = target.path if target.kind == "run" else config.run.run_dir
    if target.checkpoint is not None:
        run_dir = target.checkpoint.parents[2]
    if target.kind == "base" and world.is_main:
        write_config(target)
    answerer = Answerer(config, ShardIndex.load(config.evaluation.shards), target.out / "cache")
    training = training_references(config.data.shards, TASKS, config.data.cache)
    return {
        name_of(target, state): evaluate_checkpoint(
            config,
            which=state,
            run_dir=run_dir,
            answerer=answerer,
            training=training,
            world=world,
            checkpoint=target.checkpoint,
            out=target.out,
            mode=mode,
            fresh=fresh,
            log=log,
        )
        for state in states_of(target, log)
    }
