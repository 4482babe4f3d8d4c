"""Checks before GPUs are requested: does this run have everything that it requires?

In: the config, the parts to run, and on a login node the cluster. Out: notes for the reader, or one
ValueError that lists every problem and how to solve it. Runs before anything is queued and again in
rank 0 of the job, whose node may see other disks; `engine/health.py` checks all nodes together. No
torch, unless an earlier run has to be compared.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from data_shards.shards.open import open_index
from emoverse.config.schema import Config, TrainSection
from emoverse.estimate.memory import GIB, estimate_memory
from emoverse.models.architecture import base_folder, load_architecture, parameter_counts
from emoverse.run_dir import storage
from emoverse.training.stages import DONE, run_plan, stage_dir
from launch.slurm.cluster import Cluster
from launch.slurm.job_log import EVAL

# A checkpoint holds weight and two moments of each trained parameter in fp32.
BYTES_PER_TRAINED = 12
# Next to checkpoints: logs, metrics, event files, predictions, report.
OTHER_BYTES = 200 * 2**20

Check = Callable[[], list[str]]


def check_run(
    config: Config, parts: Sequence[str], *, accept_changes: bool = False, checksums: bool = False
) -> list[str]:
    """Checks what one host can see of a run; returns notes.

    parts: stages to train, or eval. checksums: also read every shard's index files and compare.
    accept_changes: settings may differ from those in the run directory.

    Raises:
        ValueError: all problems, one per line.
    """
    checks = run_checks(config, parts, accept_changes=accept_changes, checksums=checksums)
    return collect(checks)


def run_checks(
    config: Config, parts: Sequence[str], *, accept_changes: bool = False, checksums: bool
) -> list[Check]:
    """The checks behind `check_run`, to be collected together with others."""
    stages = [part for part in parts if part != EVAL]
    checks: list[Check] = [lambda: check_base(config)]
    if stages:
        checks.append(lambda: check_shards(config, "data.shards", checksums=checksums))
        checks.append(lambda: check_plan(config))
    if EVAL in parts:
        checks.append(lambda: check_shards(config, "evaluation.shards", checksums=checksums))
    if not accept_changes:
        checks.append(lambda: check_owner(config, stages or list(config.stages)))
    checks.append(lambda: check_disk(config, stages))
    return checks


def collect(checks: Sequence[Check]) -> list[str]:
    """Runs all checks; their notes, or a ValueError with everything that is wrong."""
    notes, problems = [], []
    for check in checks:
        try:
            notes += check()
        except (ValueError, FileNotFoundError) as error:
            problems += [line for line in str(error).splitlines() if line not in problems]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ValueError("\n".join([f"preflight found {count}:", *(f"  {p}" for p in problems)]))
    return notes


def check_base(config: Config) -> list[str]:
    """The base model's folder is there, with weights and the tokenizer that belongs to them."""
    from emoverse.data.encode import open_tokenizer  # sentencepiece, which only runs need

    folder = base_folder(config.model.base)
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"model.base: {folder} holds no *.safetensors; copy the whole checkpoint there, and "
            "to a disk that the compute nodes see"
        )
    open_tokenizer(folder, max_tokens=config.data.max_tokens)
    return []


def check_shards(config: Config, knob: str, *, checksums: bool) -> list[str]:
    """The shard folder is complete; with `checksums` its index files are what was written."""
    section = config.data if knob.startswith("data") else config.evaluation
    try:
        index = open_index(section.shards, config.data.cache)
        if checksums:
            for shard in range(index.num_shards):
                index.entries(shard)  # compared with index.json when they are read
                index.key(shard, 0)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{knob}: {error}") from error
    return [f"{section.shards}: {index.num_records:,} records in {index.num_shards} shards"]


def check_plan(config: Config) -> list[str]:
    """The records suffice for the rates. Silent without shards; `check_shards` reports it."""
    with contextlib.suppress(FileNotFoundError):
        run_plan(config, open_index(config.data.shards, config.data.cache))
    return []


def check_owner(config: Config, stages: Sequence[str]) -> list[str]:
    """What the run directory already holds was trained with these settings."""
    notes = []
    for stage in stages:
        folder = stage_dir(config, stage)
        trained = _trained_with(folder)
        if trained is None:
            continue
        # Heavy imports, for the rare case that there is something to compare.
        from emoverse.run_dir.checkpoint import check_identity
        from emoverse.run_dir.run_files import decisive_knobs

        where, knobs = trained
        expected = decisive_knobs(config, stage)
        check_identity({name: knobs.get(name) for name in expected}, expected, where)
        notes.append(f"{stage}: {'done' if where.name == DONE else f'resumes from {where.name}'}")
    return notes


def _trained_with(folder: Path) -> tuple[Path, dict[str, object]] | None:
    """The knobs behind a stage's result or newest checkpoint, and where they are noted."""
    marker = folder / DONE
    if marker.is_file():
        return marker, json.loads(marker.read_text())["knobs"]
    for checkpoint in storage.published(folder / "checkpoints"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # resuming reports the damage
            return checkpoint, json.loads((checkpoint / "state.json").read_text())["identity"]
    return None


def check_disk(config: Config, stages: Sequence[str]) -> list[str]:
    """The run directory, or the folder where it will be made, can be written and has room."""
    run_dir, host = config.run.run_dir.absolute(), os.uname().nodename
    folder = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    probe = folder / f".preflight-{host}-{os.getpid()}"
    try:
        with probe.open("w") as file:
            file.write("a test whether the folder can be written\n")
            os.fsync(file.fileno())
        probe.rename(probe.with_suffix(".moved")).unlink()
    except OSError as error:
        raise ValueError(
            f"run.run_dir: cannot write to {folder} on {host}: {error.strerror}; choose a folder "
            "on a disk that all nodes share and may write"
        ) from error
    free = shutil.disk_usage(folder).free
    required = sum(_bytes_to_come(config, stage) for stage in stages) + OTHER_BYTES
    if free < required:
        raise ValueError(
            f"run.run_dir: {folder} has {free / 2**30:.1f} GiB free, the checkpoints of "
            f"{', '.join(stages) or 'the run'} need {required / 2**30:.1f} GiB; make room, lower "
            "train.keep_checkpoints, or choose another disk"
        )
    return []


def checkpoint_bytes(config: Config) -> int:
    """All checkpoints of a stage: those kept, and the one being written."""
    counts = parameter_counts(
        load_architecture(config.model.base), config.model.lora, config.model.projector
    )
    return BYTES_PER_TRAINED * counts["trainable"] * (config.train.keep_checkpoints + 1)


def _bytes_to_come(config: Config, stage: str) -> int:
    """What a stage will add to the disk; a job that resumes has most of its checkpoints already."""
    folder = stage_dir(config, stage)
    if (folder / DONE).is_file():
        return 0
    existing = 0
    for path in folder.glob("checkpoints/step_*/*"):
        with contextlib.suppress(OSError):
            existing += path.stat().st_size
    return max(0, checkpoint_bytes(config) - existing)


def check_ranks(train: TrainSection, cluster: Cluster) -> list[str]:
    """Every rank has at least one sample of each step."""
    ranks, batch = cluster.num_ranks, train.global_batch_size
    if ranks > batch:
        raise ValueError(
            f"train.global_batch_size: found {batch}, but the job has {ranks} ranks "
            f"({cluster.nodes} nodes x {cluster.tasks_per_node}) and each needs a sample per step; "
            "raise it, or ask for fewer nodes"
        )
    return []


def check_memory(config: Config, cluster: Cluster) -> list[str]:
    """Weights and optimiser states fit into a GPU.

    Activations come on top; their estimate is not exact, so it only gives a note.
    """
    if cluster.gpu_memory_gib is None or not cluster.gpus_per_node:
        return []
    estimate = estimate_memory(config, cluster.num_ranks)
    states, total = estimate.states / GIB, estimate.total / GIB
    if states > cluster.gpu_memory_gib:
        raise ValueError(
            f"cluster.gpu_memory_gib: found {cluster.gpu_memory_gib:g}, but weights and optimiser "
            f"states alone take {states:.1f} GiB per rank; use larger GPUs, train.zero_stage=3 "
            "with more ranks, or train.offload=all"
        )
    fits = total <= cluster.gpu_memory_gib
    return [
        f"memory per GPU, estimated: {total:.1f} of {cluster.gpu_memory_gib:g} GiB, {states:.1f} "
        "of which are weights and optimiser states"
        + ("" if fits else "; it may run out, emoverse plan shows what would fit")
    ]
