"""The rank that failed first is named first, before the ranks that only lost their peer.

In: the error that ends a rank. Out: RUN/faults/rank_N.txt, written before the rank exits and so
before the others can notice, and on stderr the tracebacks in the order in which they happened.
"""

import contextlib
import shutil
import sys
import time
import traceback
from pathlib import Path

from data_shards.files import write_atomically

FOLDER = "faults"


def clear(run_dir: Path) -> None:
    """Deletes the faults of earlier launches; called by the owner of the run directory."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def report(run_dir: Path, rank: int, error: Exception) -> None:
    """Stores the error of `rank`, and prints it after those of the ranks that failed before."""
    trace = "".join(traceback.format_exception(error))
    earlier = sorted(_others(run_dir, rank))
    # A full disk may be the cause; the traceback is printed all the same.
    with contextlib.suppress(OSError):
        write_atomically(run_dir / FOLDER / f"rank_{rank}.txt", f"{time.time()}\n{trace}")
    for index, (_, other, text) in enumerate(earlier):
        order = "first" if index == 0 else "then"
        print(f"rank {other} failed {order}:\n{text}", file=sys.stderr)
    if earlier:
        print(f"rank {rank} lost its peer and ends as well:", file=sys.stderr)
    print(trace, file=sys.stderr, end="", flush=True)


def _others(run_dir: Path, rank: int) -> list[tuple[float, str, str]]:
    """(time, rank, traceback) of every other rank that has failed."""
    faults = []
    for path in (run_dir / FOLDER).glob("rank_*.txt"):
        other = path.stem.removeprefix("rank_")
        time_s, _, text = path.read_text().partition("\n")
        if other != str(rank):
            faults.append((float(time_s), other, text))
    return faults
