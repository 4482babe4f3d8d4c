"""Which rank failed first: its traceback comes before those of the ranks that only lost it.

In: the error that ends a rank. Out: RUN/faults/rank_N.txt, written before the rank leaves and so
before the others can notice, and on stderr the tracebacks in the order in which they happened.
"""

import contextlib
import shutil
import sys
import time
import traceback
from pathlib import Path

FOLDER = "faults"


def clear(run_dir: Path) -> None:
    """Forgets the faults of earlier launches; by the owner of the run directory."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def report(run_dir: Path, rank: int, error: Exception) -> None:
    """Writes down that `rank` fails with `error`, and prints it after what failed before it."""
    mine = "".join(traceback.format_exception(error))
    before = sorted(_others(run_dir, rank))
    # A full disk may be the very reason; the traceback is printed all the same.
    with contextlib.suppress(OSError):
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".rank_{rank}"
        temporary.write_text(f"{time.time()}\n{mine}")
        temporary.replace(folder / f"rank_{rank}.txt")
    for number, (_, other, text) in enumerate(before):
        order = "first" if number == 0 else "then"
        print(f"rank {other} failed {order}:\n{text}", file=sys.stderr)
    if before:
        print(f"and so rank {rank}, which lost it, ends as well:", file=sys.stderr)
    print(mine, file=sys.stderr, end="", flush=True)


def _others(run_dir: Path, rank: int) -> list[tuple[float, str, str]]:
    """(time, rank, traceback) of every other rank that has failed."""
    found = []
    for path in (run_dir / FOLDER).glob("rank_*.txt"):
        other = path.stem.removeprefix("rank_")
        when, _, text = path.read_text().partition("\n")
        if other != str(rank):
            found.append((float(when), other, text))
    return found
