"""The verb `status`: the progress of a run, from its own files and from the scheduler.

In: a run directory, or a folder of runs that were launched together. Out: per run its stages
(progress, rate, ETA, last checkpoint) and its jobs (state, log), as JSON or text. No torch.
"""

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_shards.progress import format_duration
from emoverse.config.schema import Config, load_config
from emoverse.run_dir import storage
from emoverse.training.stages import DONE as DONE_FILE
from launch.exit_codes import DONE, STOPPED
from launch.slurm.job_log import EVAL, JOBS, JobRecord, read_jobs
from launch.verb_tools import add_json, print_result

SQUEUE_TIMEOUT_S = 10
SQUEUE_FORMAT = "%i|%T|%M|%L|%N|%r"
TAIL_BYTES = 200_000  # of metrics.jsonl: enough for the last interval of any run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run directory."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run directory, or a folder of variants"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the status."""
    return print_result(status_of(args.run), args, report_text)


def status_of(folder: Path) -> dict[str, Any]:
    """The status of a run, or of all runs in a folder.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    # A run directory may also hold the variants of a later launch.
    run_dirs = [path for path in (folder, *sorted(folder.glob("*"))) if _is_run(path)]
    if not run_dirs:
        raise FileNotFoundError(
            f"{folder}: no run here; a run directory has a config.yaml or a {JOBS} folder, give "
            "the one that run.run_dir names"
        )
    live = ask_squeue()
    return {
        "scheduler": "answers" if live is not None else "does not answer; from files alone",
        "runs": [run_status(run_dir, live) for run_dir in run_dirs],
    }


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or any((folder / JOBS).glob("*.json*"))


def run_status(run_dir: Path, live: Mapping[str, Mapping[str, str]] | None) -> dict[str, Any]:
    """One run; `live`: the scheduler's row per job id, None if it does not answer."""
    config = _config(run_dir)
    stages = list(config.stages) if config else []
    stages += [
        path.parent.name
        for path in sorted(run_dir.glob("*/metrics.jsonl"))
        if path.parent.name not in stages
    ]
    progress = {stage: stage_status(run_dir / stage) for stage in stages}
    jobs = [job_status(record, live) for record in read_jobs(run_dir)]
    return {
        "run_dir": str(run_dir),
        "stages": progress,
        "evaluated": sorted(path.parent.name for path in run_dir.glob(f"{EVAL}/*/metrics.json")),
        "jobs": jobs,
        "next": _next(run_dir, progress, jobs),
    }


def _config(run_dir: Path) -> Config | None:
    """The run's config: of its first start, or as it was frozen for the queue."""
    paths = [run_dir / "config.yaml", *sorted((run_dir / JOBS).glob("config-*"))]
    return next((load_config([path]) for path in paths if path.is_file()), None)


def stage_status(folder: Path) -> dict[str, Any]:
    """Progress of a stage from metrics.jsonl, its checkpoints and DONE."""
    lines = _last_lines(folder / "metrics.jsonl")
    interval, start = lines.get("interval", {}), lines.get("start", {})
    steps = [storage.step_of(path) for path in storage.published(folder / "checkpoints")]
    done = (folder / DONE_FILE).is_file()
    return {
        "state": "done" if done else "begun" if lines else "not begun",
        "step": lines.get("step", start).get("step", 0),
        "num_steps": start.get("num_steps"),
        "loss": interval.get("loss"),
        "samples_per_s": interval.get("samples_per_s"),
        "eta_s": None if done else interval.get("eta_s"),
        "checkpoint_step": max(steps, default=None),
        "last_line_s_ago": _age(folder / "metrics.jsonl"),
    }


def _last_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The last record of each kind; `start` may lie before the tail, so line 1 is read as well."""
    last: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return last
    with path.open("rb") as file:
        head = file.readline()
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        tail = file.read().splitlines()
    for line in [head, *tail]:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut by the start of the tail, or being written
        last[record["kind"]] = record
    return last


def _age(path: Path) -> float | None:
    return round(time.time() - path.stat().st_mtime, 1) if path.is_file() else None


def job_status(record: JobRecord, live: Mapping[str, Mapping[str, str]] | None) -> dict[str, Any]:
    """One job: as the scheduler reports it, else as its files do."""
    last, starts = record.last or {}, record.starts
    row = (live or {}).get(record.job, {})
    if record.submitted.get("executor") == "local":
        gone = not Path(f"/proc/{record.job}").exists()
    else:
        gone = live is not None and not row
    ended = last.get("event") == "end" and not last.get("requeued")
    if row:
        state = row["state"].lower()
    elif ended:
        state = {DONE: "done", STOPPED: "stopped"}.get(last["code"], f"failed with {last['code']}")
    elif gone:
        state = "killed or cancelled: no end recorded, and it no longer exists"
    elif not last:
        state = "submitted, not begun"
    else:
        running = last["event"] == "start"
        state = "begun, no end recorded" if running else "stopped and requeued"
    return {
        "job": record.job,
        "parts": record.submitted.get("parts") or (starts[-1]["parts"] if starts else []),
        "state": state,
        "active": bool(row) or not (ended or gone),
        "starts": len(starts),
        "nodes": row.get("nodes") or (starts[-1]["nodes"] if starts else None),
        "time_left": row.get("left"),
        "waits_for": record.submitted.get("waits_for"),
        "reason": row.get("reason") or last.get("reason"),
        "logs": (starts[-1] if starts else record.submitted).get("logs"),
        "since": last.get("time") or record.submitted.get("time"),
    }


def ask_squeue() -> dict[str, dict[str, str]] | None:
    """All jobs of the scheduler by id, None if it does not answer."""
    if shutil.which("squeue") is None:
        return None
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--array", "--format", SQUEUE_FORMAT],
            capture_output=True,
            text=True,
            check=True,
            timeout=SQUEUE_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split("|") for line in done.stdout.splitlines()]
    names = ("state", "ran", "left", "nodes", "reason")
    return {
        row[0]: {
            name: value
            for name, value in zip(names, row[1:], strict=True)
            if value not in ("", "None")
        }
        for row in rows
        if len(row) == len(names) + 1
    }


def _next(run_dir: Path, stages: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]]) -> str:
    """What the user does next."""
    active = [job["job"] for job in jobs if job["active"]]
    if active:
        return f"wait for {', '.join(active)}"
    if stages and all(stage["state"] == "done" for stage in stages.values()):
        report = run_dir / "report.html"
        return f"open {report}" if report.is_file() else f"emoverse evaluate {run_dir}"
    return "submit again; the same command resumes"


# As text ---------------------------------------------------------------------------------------


def report_text(report: Mapping[str, Any]) -> str:
    """A few lines per run."""
    lines = [f"scheduler: {report['scheduler']}"]
    for status in report["runs"]:
        lines += ["", f"{status['run_dir']}"]
        lines += [f"  {_stage_line(name, stage)}" for name, stage in status["stages"].items()]
        if status["evaluated"]:
            lines.append(f"  evaluated: {', '.join(status['evaluated'])}")
        for job in status["jobs"]:
            lines += [f"  {line}" for line in _job_lines(job)]
        lines.append(f"  next: {status['next']}")
    return "\n".join(lines)


def _stage_line(name: str, stage: Mapping[str, Any]) -> str:
    if stage["state"] == "not begun":
        return f"{name}: not begun"
    of = f"/{stage['num_steps']}" if stage["num_steps"] else ""
    parts = [f"{name}: {stage['state']}, step {stage['step']}{of}"]
    if stage["loss"] is not None:
        parts.append(f"loss {stage['loss']:.3f}")
    if stage["samples_per_s"]:
        parts.append(f"{stage['samples_per_s']:.1f} samples/s")
    if stage["eta_s"] is not None:
        parts.append(f"{format_duration(stage['eta_s'])} left")
    saved = stage["checkpoint_step"]
    parts.append("no checkpoint yet" if saved is None else f"checkpoint at step {saved}")
    if stage["last_line_s_ago"] is not None and stage["state"] != "done":
        parts.append(f"last line {format_duration(stage['last_line_s_ago'])} ago")
    return ", ".join(parts)


def _job_lines(job: Mapping[str, Any]) -> list[str]:
    text = f"job {job['job']} ({' '.join(job['parts'])}): {job['state']}"
    text += f", start {job['starts']}" if job["starts"] > 1 else ""
    text += f" on {job['nodes']}" if job["nodes"] else ""
    text += f", {job['time_left']} left" if job["time_left"] else ""
    text += f", waits for {job['waits_for']}" if job["waits_for"] and not job["starts"] else ""
    text += f", because: {job['reason']}" if job["reason"] else ""
    text += f", {_since(job['since'])}" if job["since"] else ""
    return [text, f"  log {job['logs']}"] if job["logs"] else [text]


def _since(stamp: str) -> str:
    then = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return f"{format_duration((datetime.now(UTC) - then).total_seconds())} ago"
