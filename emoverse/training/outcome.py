"""How a training or evaluation ended on this rank, for the launcher that decides what follows.

In: what the work raised, if anything. Out: an `Outcome`; the reasons of a failure are on stderr.
What an outcome leads to, a requeue or an exit code, is decided in `launch/worker.py`.
"""

import sys
import traceback
from enum import StrEnum
from pathlib import Path

from emoverse.engine import rank_faults
from emoverse.engine.distributed import RankError, World, is_lost_peer


class Outcome(StrEnum):
    """What became of the work; `DONE` and `STOPPED` are the same on every rank."""

    DONE = "done"
    STOPPED = "stopped"  # everything is saved; the same command resumes
    LOST_PEER = "lost_peer"  # a collective failed because another rank is gone
    FAULT = "fault"
    WRONG_INPUT = "wrong_input"


def report_failure(
    error: Exception, world: World, *, command: str, run_dir: Path | None
) -> Outcome:
    """Prints why this rank failed, with tracebacks unless the input is wrong.

    command: the prefix of the message, such as `emoverse train`. run_dir: where the ranks of a
        training leave their tracebacks for each other; None for other work.
    """
    outcome = Outcome.FAULT
    if isinstance(error, RankError):  # raised on every rank, so one traceback is enough
        if error.wrong_input:
            outcome = Outcome.WRONG_INPUT
        elif world.is_main:
            print(error.traceback, file=sys.stderr, end="")
    else:
        if run_dir is not None:
            rank_faults.report(run_dir, world.rank, error)
        else:
            traceback.print_exception(error)
        if is_lost_peer(error):
            outcome = Outcome.LOST_PEER
    print(f"{command}: {error}", file=sys.stderr)
    return outcome
