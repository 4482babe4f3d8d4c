"""Putting a stopped job back into the scheduler's queue, from inside the job.

In: the door of rank 0, after everything is saved. Out: None, or the reason why the job is not
requeued. A job that somebody cancels also receives a signal to stop and must stay cancelled, hence
the question to the scheduler first.
"""

import re
import subprocess

from launch.context import Door

# What submitit's local controller takes for "start the tasks again".
REQUEUE_CODE = 144
SCONTROL_TIMEOUT_S = 60
# A job may be suspended while it is told to stop; any other state means that it is ending.
LIVING_STATES = ("RUNNING", "SUSPENDED", "PREEMPTED")


def requeue(door: Door) -> str | None:
    """Requeues the job of this door.

    Returns:
        None once the job is in the queue again, whoever put it there, else why it stays stopped.
    """
    if door.launcher == "submitit":
        return None  # the exit code tells its controller
    if door.launcher != "slurm" or door.job is None:
        return "it was not started by srun; the same command resumes"
    try:
        said = _scontrol("show", "job", "--oneliner", door.job)
        if num_restarts(said) > door.start:
            return None  # counted already: it is the scheduler or an operator who has requeued it
        state = job_state(said)
        if state not in LIVING_STATES:
            return f"the scheduler says that it is {state}"
        _scontrol("requeue", door.job)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or "").strip()
        return f"scontrol failed ({said or error}); submit again to resume"
    return None


def job_state(text: str) -> str:
    """The state in the output of `scontrol show job`."""
    found = re.search(r"\bJobState=(\w+)", text)
    return found.group(1) if found else "UNKNOWN"


def num_restarts(text: str) -> int:
    """How often the job has been put back, in the output of `scontrol show job`."""
    found = re.search(r"\bRestarts=(\d+)", text)
    return int(found.group(1)) if found else 0


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(
        ["scontrol", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=SCONTROL_TIMEOUT_S,
    )
    return done.stdout
