"""Steps of a longer way: commands of the `emoverse` front door, run as processes of their own.

A list of words in, nothing out but what the command writes; printed before it runs, so that a user
can repeat each one. Used by the demo and by `emoverse ablate`.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

DONE = 0
_TAIL_LINES = 15  # of a failed step's log


class StepError(RuntimeError):
    """A step failed with exit code `code`; its own message stands above, or in the text."""

    def __init__(self, text: str, *, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def run_step(
    arguments: Sequence[str], *, quiet_log: Path | None = None, said_to: IO[str] | None = None
) -> None:
    """Run `emoverse ARGUMENTS`.

    quiet_log: write its output there instead of showing it. said_to: where the command line is
    printed (stdout by default).
    Raises StepError if it ends with another code than 0, with the last lines of a quiet log.
    """
    print(f"$ emoverse {shlex.join(arguments)}", file=said_to, flush=True)
    command = [sys.executable, "-m", "launch.cli", *arguments]
    # Two steps run side by side on two cores: more threads would only wait for each other, and the
    # order of sums, hence the last digit of a figure, depends on their number.
    environ = {"OMP_NUM_THREADS": "1", **os.environ}
    tail = ""
    if quiet_log is None:
        code = subprocess.run(command, check=False, env=environ).returncode
    else:
        quiet_log.parent.mkdir(parents=True, exist_ok=True)
        with quiet_log.open("wb") as log:
            code = subprocess.run(
                command, check=False, env=environ, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        lines = quiet_log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "".join(f"\n{line}" for line in lines[-_TAIL_LINES:])
    if code != DONE:
        raise StepError(f"emoverse {arguments[0]} ended with exit code {code}{tail}", code=code)
