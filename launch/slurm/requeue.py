"""Putting a stopped job back into the scheduler's queue, from inside the job.

In: the context of rank 0, after everything is saved. Out: None, or the reason why the job is not
requeued. A cancelled job receives a stop signal too and must stay cancelled, so the scheduler is
asked for the job's state first.
"""

import re
import subprocess

from launch.context import RankContext

# The exit code that makes submitit's local controller start the tasks again.
REQUEUE_CODE = 144
SCONTROL_TIMEOUT_S = 60
# A job may be suspended while it receives the stop signal; in any other state it is ending.
LIVING_STATES = ("RUNNING", "SUSPENDED", "PREEMPTED")


def requeue(context: RankContext) -> str | None:
    """Requeues the job of this rank.

    Returns:
        None if the job is in the queue again, by whomever, else the reason why it stays stopped.
    """
    if context.launcher == "submitit":
        return None  # its controller acts on the exit code
    if context.launcher != "slurm" or context.job is None:
        return "it was not started by srun; the same command resumes"
    try:
        description = _scontrol("show", "job", "--oneliner", context.job)
        if num_restarts(description) > context.num_restarts:
            return None  # counted already: the scheduler or an operator has requeued it
        state = job_state(description)
        if state not in LIVING_STATES:
            return f"its state is {state}"
        _scontrol("requeue", context.job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", "") or "").strip()
        return f"scontrol failed ({reason or error}); submit again to resume"
    return None


def job_state(text: str) -> str:
    """The state in the output of `scontrol show job`."""
    match = re.search(r"\bJobState=(\w+)", text)
    return match.group(1) if match else "UNKNOWN"


def num_restarts(text: str) -> int:
    """How often the job has been put back, in the output of `scontrol show job`."""
    match = re.search(r"\bRestarts=(\d+)", text)
    return int(match.group(1)) if match else 0


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(
        ["scontrol", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=SCONTROL_TIMEOUT_S,
    )
    return done.stdout
