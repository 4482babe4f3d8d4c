"""Runs `emoverse` commands as processes of their own, for verbs that are made of several.

In: the words of a command. It is printed before it runs, so that a user can repeat it. Used by the
verbs demo and ablate.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from launch.exit_codes import DONE, FAULT

_TAIL_LINES: Final = 15  # of a failed command's log


class SubcommandError(RuntimeError):
    """A command failed with exit code `code`; its message is on the screen or in the text."""

    def __init__(self, text: str, *, code: int = FAULT) -> None:
        super().__init__(text)
        self.code = code


def run_subcommand(
    words: Sequence[str], *, log_file: Path | None = None, echo_to: IO[str] | None = None
) -> None:
    """Run `emoverse WORDS`.

    Args:
        log_file: receives the command's output, which is then not shown.
        echo_to: where the command line is printed; stdout by default.

    Raises:
        SubcommandError: the exit code is not 0; with the last lines of the log file.
    """
    print(f"$ emoverse {shlex.join(words)}", file=echo_to, flush=True)
    command = [sys.executable, "-m", "launch.cli", *words]
    # Two commands run side by side on two cores, so more threads would only wait for each other.
    # The number of threads also decides the order of sums, hence the last digit of a figure.
    environ = {"OMP_NUM_THREADS": "1", **os.environ}
    tail = ""
    if log_file is None:
        code = subprocess.run(command, check=False, env=environ).returncode
    else:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("wb") as log:
            code = subprocess.run(
                command, check=False, env=environ, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "".join(f"\n{line}" for line in lines[-_TAIL_LINES:])
    if code != DONE:
        raise SubcommandError(f"emoverse {words[0]} ended with exit code {code}{tail}", code=code)
