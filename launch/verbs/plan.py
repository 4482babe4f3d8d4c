"""The verb `plan`: what a run will train, before anything heavy is imported.

In: the config and the index of its shards. Out: pools, samples per task, steps and trainable
parameters, as JSON values or as text; optionally every planned sample in order. No torch.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.plan.plan import Plan, StagePlan
from data_shards.shards.index import ShardIndex
from data_shards.shards.open import open_index
from emoverse.config.schema import Config, StageSection, load_config
from emoverse.estimate.flops import flops_report, flops_text
from emoverse.estimate.memory import memory_report, memory_text
from emoverse.models.architecture import load_architecture, parameter_counts
from emoverse.training.stages import run_plan
from launch.verb_tools import add_config, add_json, config_words, print_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, and where to write the sampling order."""
    add_config(parser)
    parser.add_argument(
        "--order", type=Path, metavar="FILE", help="also write one JSON line per planned sample"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    index, plan, report = make_plan(load_config(*config_words(args.config)))
    if args.order is not None:
        write_order(args.order, index, plan)
    return print_result(report, args, plan_text)


def make_plan(config: Config) -> tuple[ShardIndex, Plan, dict[str, Any]]:
    """The index, the plan of all stages, and the report as JSON values.

    Raises FileNotFoundError or ValueError when shards or model sizes are missing, or when there are
    too few records for the rates.
    """
    architecture = load_architecture(config.model.base)
    parameters = parameter_counts(architecture, config.model.lora, config.model.projector)
    index = open_index(config.data.shards, config.data.cache)
    plan = run_plan(config, index)
    report = {
        "run": config.run.name,
        "run_dir": str(config.run.run_dir),
        "shards": str(config.data.shards),
        "records": index.num_records,
        "index_fingerprint": index.fingerprint,
        "plan_fingerprint": plan.fingerprint,
        "global_batch_size": config.train.global_batch_size,
        "processes": config.train.processes,
        "zero_stage": config.train.zero_stage,
        "parameters": parameters,
        "memory": memory_report(config, architecture),
        "work": flops_report(
            config, architecture, sum(stage.num_samples for stage in plan.stages.values())
        ),
        "visual_tokens_per_clip": config.data.frames_per_clip
        * architecture.visual_tokens_per_frame,
        "stages": {
            name: _stage_report(config, stage, plan.stages[name])
            for name, stage in config.stages.items()
        },
    }
    return index, plan, report


def _stage_report(config: Config, stage: StageSection, plan: StagePlan) -> dict[str, Any]:
    tasks = {
        count.task.value: {
            "rate": str(count.rate),
            "asked": count.asked,
            "available": count.available,
            "given": count.given,
            "records": count.records,
            "total": count.total,
        }
        for count in plan.counts
    }
    pool = stage.pool
    return {
        "pool": {"take": pool.take} if pool.take else {"rest_of": list(pool.rest_of or ())},
        "start_from": stage.start_from,
        "tasks": tasks,
        "shortage": stage.shortage,
        "epochs": stage.epochs,
        "samples_per_epoch": plan.samples_per_epoch,
        "samples": plan.num_samples,
        "steps": plan.num_steps(config.train.global_batch_size),
    }


def plan_text(report: Mapping[str, Any]) -> str:
    """The report as text."""
    parameters = report["parameters"]
    lines = [
        f"run {report['run']} -> {report['run_dir']}",
        f"shards {report['shards']}: {report['records']:,} records",
        f"batch {report['global_batch_size']} samples per step on {report['processes']} local "
        f"process(es), ZeRO-{report['zero_stage']}; "
        f"{report['visual_tokens_per_clip']:,} visual tokens per clip",
        "",
        f"parameters {parameters['total']:,} (vit {parameters['vit']:,}, "
        f"projector {parameters['projector']:,}, llm {parameters['llm']:,})",
        f"trainable  {parameters['trainable']:,} ({_trainable_shares(parameters)})",
    ]
    lines += ["", *memory_text(report["memory"]), flops_text(report["work"])]
    for name, stage in report["stages"].items():
        lines += ["", *_stage_text(name, stage)]
    lines += ["", f"plan {report['plan_fingerprint']}"]
    return "\n".join(lines)


def _trainable_shares(parameters: Mapping[str, int]) -> str:
    adapters = parameters["lora_llm"] + parameters["lora_projector"]
    shares = {
        "adapters of the llm": parameters["lora_llm"],
        "adapters of the projector": parameters["lora_projector"],
        "projector": parameters["trainable"] - adapters,
    }
    return ", ".join(f"{name} {count:,}" for name, count in shares.items() if count) or "nothing"


def _stage_text(name: str, stage: Mapping[str, Any]) -> list[str]:
    pool = stage["pool"]
    pool_text = f"{pool['take']:,} records" if "take" in pool else _rest_text(pool["rest_of"])
    lines = [
        f"{name}: from {stage['start_from']}, pool {pool_text}, {stage['epochs']} epoch(s) of "
        f"{stage['samples_per_epoch']:,} samples = {stage['samples']:,} samples in "
        f"{stage['steps']:,} steps",
        "  per epoch:",
        f"  {'task':<6}{'rate':>8}{'asked':>12}{'available':>12}{'given':>12}{'records':>12}"
        f"{'share':>9}{'all epochs':>13}",
    ]
    short = []
    for task, row in stage["tasks"].items():
        lines.append(
            f"  {task:<6}{row['rate']:>8}{row['asked']:>12,}{row['available']:>12,}"
            f"{row['given']:>12,}{row['records']:>12,}"
            f"{row['total'] / max(stage['samples'], 1):>9.2%}{row['total']:>13,}"
        )
        if row["records"] < row["given"]:
            short.append(f"  {task}: {row['records']:,} records give {row['given']:,} samples")
        elif row["given"] < row["asked"]:
            short.append(f"  {task}: {row['asked'] - row['given']:,} samples fewer than asked")
    return lines + [f"{line} (shortage: {stage['shortage']})" for line in short]


def _rest_text(earlier: list[str]) -> str:
    return f"the rest of {', '.join(earlier)}" if earlier else "all records"


def write_order(path: Path, index: ShardIndex, plan: Plan) -> None:
    """Write every planned sample as one JSON line, in the order of training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for name, stage in plan.stages.items():
            for position in range(stage.num_samples):
                placement = stage.at(position)
                line = {
                    "position": position,
                    "stage": name,
                    "epoch": placement.epoch,
                    "record": index.key(placement.shard, placement.slot),
                    "task": placement.task.value,
                }
                file.write(json.dumps(line) + "\n")
