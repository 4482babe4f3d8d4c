"""What a run directory says about its jobs: RUN/jobs/, readable without the scheduler.

`JOB.json` is written once by whoever submits the job; `JOB.jsonl` gets one line per start and end
from rank 0 of the job itself. So every file has one writer, and `emoverse status` needs no other
source. The history of starts also bounds how often a job may be requeued.
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

from emoverse.config.schema import Config, load_config
from emoverse.config.yaml_source import split_words
from emoverse.run_dir import storage
from emoverse.training.stages import stage_dir, stages_to_train
from launch.context import RankContext, scheduler_job

JOBS = "jobs"
EVAL = "eval"  # the part of a run that is not a stage
MAX_REQUEUES = 20
# So many starts in a row that leave no newer checkpoint are not bad luck any more.
MAX_STARTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """One job of a run: what was submitted, and how often it began and ended."""

    job: str
    submitted: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the job, in order of time."""
        return [event for event in self.events if event["event"] == "start"]

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest event, None for a job that has not begun."""
        return self.events[-1] if self.events else None


def log_folder(config: Config, part: str, job: str) -> Path:
    """Where the ranks of a job write, `part` being a stage or eval: RUN/PART/logs/JOB."""
    return stage_dir(config, part) / "logs" / job


def read_jobs(run_dir: Path) -> list[JobRecord]:
    """All jobs of a run, by the time they were submitted or first began."""
    folder = run_dir / JOBS
    names = {path.stem for path in folder.glob("*.json*")} if folder.is_dir() else set()
    records = [read_job(run_dir, name) for name in names]

    def when(record: JobRecord) -> tuple[str, str]:
        first = record.submitted.get("time") or (record.last or {}).get("time", "")
        return str(first), record.job

    return sorted(records, key=when)


def read_job(run_dir: Path, job: str) -> JobRecord:
    """One job; a job that nobody has written about is empty. A torn last line is left out."""
    folder = run_dir / JOBS
    submitted = folder / f"{job}.json"
    events = folder / f"{job}.jsonl"
    found = []
    if events.is_file():
        for line in events.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    facts = json.loads(submitted.read_text(encoding="utf-8")) if submitted.is_file() else {}
    return JobRecord(job=job, submitted=facts, events=found)


def write_submission(run_dir: Path, job: str, **facts: Any) -> None:
    """Notes a job that was handed to the scheduler."""
    folder = run_dir / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{job}.json"
    temporary.write_text(json.dumps({"time": _now(), **facts}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / f"{job}.json")


def add_event(run_dir: Path, job: str, event: str, **facts: Any) -> None:
    """Adds a line to the job's history; only rank 0 of the job does."""
    folder = run_dir / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time": _now(), **facts}) + "\n"
    with (folder / f"{job}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def begin_start(
    config: Config, parts: Sequence[str], context: RankContext, max_requeues: int, logs: str
) -> None:
    """Rank 0 notes that the job begins, unless it has begun too often already.

    SLURM itself starts a job again after a lost node, as often as it happens; the bound is kept
    here, where both kinds of restart pass.

    Raises:
        RuntimeError: the bound is reached; a new submission counts anew.
    """
    if context.job is None or context.rank:
        return
    run_dir, progress = config.run.run_dir, saved_steps(config, parts)
    reason = why_not_again(read_job(run_dir, context.job), progress, max_requeues, begins=True)
    if reason:
        raise RuntimeError(f"job {context.job} does not begin again: {reason}")
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


def why_not_again(
    record: JobRecord, progress: int, max_requeues: int, *, begins: bool = False
) -> str | None:
    """The reason not to start this job once more, None if it may.

    progress: steps saved by now. begins: the start to come is happening now, so the last one has
    ended without leaving a line.
    """
    starts = record.starts
    if len(starts) > max_requeues:
        return (
            f"it has begun {len(starts)} times and max_requeues is {max_requeues}; the last "
            "checkpoint is good, submit again to go on"
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


def saved_steps(config: Config, parts: Sequence[str]) -> int:
    """Steps in the newest checkpoints of these stages together; what a start may add to.

    An evaluation keeps lines: batches while it is under way, then answers. They count alike.
    """
    total = 0
    for part in parts:
        if part == EVAL:
            total += sum(map(_num_lines, stage_dir(config, part).glob("*/**/*.jsonl")))
        for newest in storage.published(stage_dir(config, part) / "checkpoints")[:1]:
            total += storage.step_of(newest)
    return total


def _num_lines(path: Path) -> int:
    with contextlib.suppress(OSError), path.open("rb") as file:  # a part may go at any moment
        return sum(1 for _ in file)
    return 0


def say(text: str) -> None:
    """One line about the job for the person who reads its log."""
    print(f"emoverse: {text}", file=sys.stderr, flush=True)


def main(words: Sequence[str]) -> int:
    """`python -m launch.slurm.job_log PART CONFIG...`: makes and prints a part's log folder."""
    try:
        # The flags among them are for the worker.
        config = load_config(*split_words(word for word in words[1:] if word[:1] != "-"))
        if words[0] != EVAL:
            stages_to_train(config, [words[0]])
        folder = log_folder(config, words[0], scheduler_job(os.environ) or "")
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(folder.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
