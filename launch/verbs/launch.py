"""The verb `launch`: submits stages and evaluation to a cluster (`launch.slurm.submit`)."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emoverse.config.yaml_source import split_words
from emoverse.training.stages import stages_to_train
from launch.slurm.cluster import Cluster, load_cluster, split_overrides
from launch.slurm.variants import make_runs
from launch.verb_tools import add_json, print_result
from launch.worker import FLAGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The cluster, the config, and which stages, variants and seeds of it."""
    parser.add_argument(
        "cluster", type=Path, metavar="CLUSTER", help="where to run: a file of configs/cluster/"
    )
    parser.add_argument(
        "config",
        nargs="+",
        metavar="CONFIG|KEY=VALUE",
        help="what to run, as for train; overrides that begin with cluster. are for CLUSTER",
    )
    parser.add_argument(
        "--stage", action="append", metavar="NAME", help="submit only this stage (repeatable)"
    )
    parser.add_argument("--no-evaluate", action="store_true", help="train only")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="FILE|'KEY=VALUE ...'",
        help="one run of a job array: an overlay file or overrides (repeatable)",
    )
    parser.add_argument(
        "--seeds", default="", metavar="N,N,...", help="every run once per seed, as a job array"
    )
    parser.add_argument(
        "--exclude", default="", metavar="NODES", help="nodes not to use, such as a failing one"
    )
    accept = "--accept-changes"
    parser.add_argument(accept, action="store_true", help=FLAGS[accept])
    parser.add_argument(
        "--dry-run", action="store_true", help="print every script exactly, submit nothing"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Submit, or with --dry-run show what would be submitted."""
    return print_result(submit_jobs(args), args, report_text)


def submit_jobs(args: argparse.Namespace) -> dict[str, Any]:
    """Submit the jobs and return them, or with --dry-run their scripts.

    Raises:
        ValueError, FileNotFoundError: wrong input, before anything is queued.
    """
    paths, words = split_words(args.config)
    if not paths:
        raise ValueError(
            f"a config file is needed after the cluster file {args.cluster}, for example "
            "configs/emoverse_4b.yaml"
        )
    of_cluster, overrides = split_overrides(words)
    cluster = _without_nodes(load_cluster(args.cluster, of_cluster), args.exclude)
    runs = make_runs(paths, overrides, variants=args.variant, seeds=_seeds(args.seeds))
    stages = stages_to_train(runs[0].config, args.stage)

    from launch.slurm import submit  # submitit is not needed to report a wrong config

    evaluate = not args.no_evaluate and args.stage is None
    chain = submit.Chain(
        cluster=cluster,
        cluster_file=args.cluster,
        runs=runs,
        steps=submit.steps_of(cluster, stages, evaluate=evaluate),
        accept_changes=args.accept_changes,
    )
    report: dict[str, Any] = {
        "run_dir": str(chain.home),
        "cluster": str(args.cluster),
        "runs": [str(run.config.run.run_dir) for run in runs],
        "notes": [],
    }
    if args.dry_run:
        return {**report, "scripts": submit.dry_run(chain)}
    report["notes"] = submit.preflight(chain)
    return {**report, "jobs": submit.submit(submit.unfinished(chain))}


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word]
    except ValueError:
        raise ValueError(f"--seeds: found {text!r}: give integers such as 1,2,3") from None


def _without_nodes(cluster: Cluster, nodes: str) -> Cluster:
    excluded = ",".join(names for names in (cluster.exclude, nodes) if names)
    return cluster.model_copy(update={"exclude": excluded or None})


def report_text(report: Mapping[str, Any]) -> str:
    """The jobs, their logs, and the next command."""
    lines = list(report["notes"])
    for script in report.get("scripts", ()):
        array = f", an array of {script['runs']}" if script["runs"] > 1 else ""
        lines += [f"#### {script['step']}{array}", script["script"]]
    for job in report.get("jobs", ()):
        waits = f", waits for {job['waits_for']}" if job["waits_for"] else ""
        lines.append(f"{job['job']}: {' '.join(job['parts'])} of {job['run']}{waits}")
        lines.append(f"  log {job['logs']}")
    if "scripts" in report:
        lines.append("nothing was submitted; the same command without --dry-run submits")
    elif not report["jobs"]:
        lines.append("everything is done already, nothing to submit")
    else:
        lines.append(f"next: emoverse status {report['run_dir']}")
    return "\n".join(lines)
