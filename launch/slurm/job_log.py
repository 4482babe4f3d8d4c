"""The history of a run's jobs in RUN/jobs/, readable without the scheduler.

`JOB.json` is written once, at submission; `JOB.jsonl` gets one line per start and end from rank 0
of the job itself. So every file has one writer, and `emoverse status` needs no other source. The
history of starts also bounds how often a job may be requeued.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.files import read_complete_lines, write_atomically
from emoverse.config.schema import load_config
from emoverse.config.yaml_source import split_words
from emoverse.run_dir import storage
from emoverse.training.stages import stages_to_train
from launch.context import RankContext, scheduler_job
from launch.exit_codes import DONE, WRONG_INPUT

JOBS = "jobs"
EVAL = "eval"  # the part of a job that is not a stage
MAX_REQUEUES = 20
# After this many starts in a row without a newer checkpoint, another one would not help.
MAX_STARTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """One job of a run: its submission, and its starts and ends so far."""

    job: str
    submitted: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the job, oldest first."""
        return [event for event in self.events if event["event"] == "start"]

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest event; None for a job that has not started."""
        return self.events[-1] if self.events else None


def log_folder(run_dir: Path, part: str, job: str) -> Path:
    """The folder of the ranks' logs, RUN/PART/logs/JOB; `part` is a stage or eval."""
    return run_dir / part / "logs" / job


def read_jobs(run_dir: Path) -> list[JobRecord]:
    """All jobs of a run, in the order of their submission or first start."""
    folder = run_dir / JOBS
    # The frozen configs of the jobs are in the same folder; the name of a job starts with a digit.
    names = {path.stem for path in folder.glob("[0-9]*.json*")} if folder.is_dir() else set()
    records = [read_job(run_dir, name) for name in names]

    def when(record: JobRecord) -> tuple[str, str]:
        first = record.submitted.get("time") or (record.last or {}).get("time", "")
        return str(first), record.job

    return sorted(records, key=when)


def read_job(run_dir: Path, job: str) -> JobRecord:
    """One job; empty if nothing was recorded for it."""
    folder = run_dir / JOBS
    submission = folder / f"{job}.json"
    submitted = json.loads(submission.read_text(encoding="utf-8")) if submission.is_file() else {}
    events = list(read_complete_lines(folder / f"{job}.jsonl"))
    return JobRecord(job=job, submitted=submitted, events=events)


def write_submission(run_dir: Path, job: str, **facts: Any) -> None:
    """Records a job that was submitted to the scheduler."""
    content = json.dumps({"time": _now(), **facts}, indent=1) + "\n"
    write_atomically(run_dir / JOBS / f"{job}.json", content)


def add_event(run_dir: Path, job: str, event: str, **facts: Any) -> None:
    """Appends a line to the job's history; only rank 0 of the job calls it."""
    folder = run_dir / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time": _now(), **facts}) + "\n"
    with (folder / f"{job}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def record_start(
    run_dir: Path, parts: Sequence[str], context: RankContext, max_requeues: int, logs: str
) -> None:
    """Rank 0 records a start of the job, unless there were too many already.

    SLURM itself restarts a job after a lost node, without a limit. The limit is applied here, where
    both kinds of restart pass.

    Raises:
        RuntimeError: the limit is reached; a new submission has a new count.
    """
    if context.job is None or context.rank:
        return
    progress = saved_steps(run_dir, parts)
    reason = restart_refusal(read_job(run_dir, context.job), progress, max_requeues)
    if reason:
        raise RuntimeError(f"job {context.job} does not start again: {reason}")
    add_event(
        run_dir,
        context.job,
        "start",
        parts=list(parts),
        start=context.num_restarts,
        progress=progress,
        ranks=context.world_size,
        nodes=os.environ.get("SLURM_JOB_NODELIST") or os.uname().nodename,
        logs=logs,
    )


def restart_refusal(record: JobRecord, progress: int, max_requeues: int) -> str | None:
    """The reason not to start this job once more; None if it may. progress: steps saved so far."""
    starts = record.starts
    if len(starts) > max_requeues:
        return (
            f"it has started {len(starts)} times and max_requeues is {max_requeues}; the last "
            "checkpoint is good, submit again to continue"
        )
    recent = starts[-MAX_STARTS_WITHOUT_PROGRESS:]
    if len(recent) == MAX_STARTS_WITHOUT_PROGRESS and all(
        start["progress"] == progress for start in recent
    ):
        return (
            f"its last {len(recent)} starts saved nothing new (step {progress}), so another one "
            "would not either; read its log, then submit again"
        )
    return None


def saved_steps(run_dir: Path, parts: Sequence[str]) -> int:
    """Steps in the newest checkpoints of these stages together: the progress of a job.

    An evaluation saves lines: batches while it runs, then answers. Both count as steps.
    """
    total = 0
    for part in parts:
        if part == EVAL:
            total += sum(map(_num_lines, (run_dir / part).glob("*/**/*.jsonl")))
        for newest in storage.published(run_dir / part / "checkpoints")[:1]:
            total += storage.step_of(newest)
    return total


def _num_lines(path: Path) -> int:
    with contextlib.suppress(OSError), path.open("rb") as file:  # a file may be removed meanwhile
        return sum(1 for _ in file)
    return 0


def log(text: str) -> None:
    """Writes one line about the job to its log."""
    print(f"emoverse: {text}", file=sys.stderr, flush=True)


def main(words: Sequence[str]) -> int:
    """`python -m launch.slurm.job_log PART CONFIG...`: makes the log folder and prints it."""
    try:
        # Flags among the words are for the worker.
        config = load_config(*split_words(word for word in words[1:] if word[:1] != "-"))
        if words[0] != EVAL:
            stages_to_train(config, [words[0]])
        folder = log_folder(config.run.run_dir, words[0], scheduler_job(os.environ) or "")
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return WRONG_INPUT
    print(folder.resolve())
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
