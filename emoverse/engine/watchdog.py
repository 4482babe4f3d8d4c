"""Heartbeats, and a time limit for a training that hangs.

In: what this rank is doing, by `beat`. Out: RUN/STAGE/heartbeat/rank_N.json. When a rank makes no
progress within the limit, it reports which ranks are silent and the Python stacks of all its
threads, and ends its process, which ends the others. Ranks that are suspended or gone cannot
report; the reports of the ranks that wait for them name them.
"""

import contextlib
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emoverse.engine.distributed import World

EXIT_FAULT = 1
BEAT_S = 5.0  # between two heartbeats
# A rank whose run directory was taken over ends with the next step consensus. If there is none for
# this long, as when the network is cut and the others do not answer, it ends alone.
LOST_S = 20.0
# A thread that cannot get the interpreter's lock cannot report. faulthandler's C thread needs no
# lock; it ends the process this much later.
BACKSTOP_S = 10.0
_STDERR = 2


class Watchdog:
    """The watchdog of one rank; `beat` records progress."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        limit_s: float,
        lost: Callable[[], Exception | None] = lambda: None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        """`lost`: the reason why this rank must not continue, None while it may."""
        self._folder, self._world, self._limit_s, self._end = folder, world, limit_s, end
        self._lost = lost
        self._closed = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self.beat("starting", 0)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def beat(self, doing: str, step: int) -> None:
        """This rank begins an activity within `step`."""
        self._activity = (time.monotonic(), doing, step)
        faulthandler.dump_traceback_later(self._limit_s + BACKSTOP_S, exit=True, file=_STDERR)

    def close(self) -> None:
        """The training has ended, with or without an error."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            since, doing, step = self._activity
            stuck_s = time.monotonic() - since
            with contextlib.suppress(OSError):  # a full disk is reported by what must be saved
                self._write({"step": step, "doing": doing, "for_s": round(stuck_s, 1)})
            reason = self._lost()
            if reason is not None and stuck_s > LOST_S:
                os.write(_STDERR, f"watchdog: {reason} ({doing}, step {step})\n".encode())
                self._end(EXIT_FAULT)
            if stuck_s > self._limit_s:
                self._report(doing, step, stuck_s)
                self._end(EXIT_FAULT)
            if self._closed.wait(min(BEAT_S, self._limit_s / 4)):
                return

    def _write(self, facts: dict[str, Any]) -> None:
        path = self._folder / f"rank_{self._world.rank}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"rank": self._world.rank, "pid": os.getpid(), **facts}))
        temporary.replace(path)

    def _report(self, doing: str, step: int, stuck_s: float) -> None:
        lines = [
            f"watchdog: rank {self._world.rank} has made no progress for {stuck_s:.0f} s "
            f"(train.hang_minutes: {self._limit_s / 60:g}): {doing}, step {step}",
            *describe_others(self._folder, self._world),
            "stacks of this rank:",
        ]
        os.write(_STDERR, ("\n".join(lines) + "\n").encode())
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)


def describe_others(folder: Path, world: World) -> list[str]:
    """A line for every other rank: its activity, and how long it has been silent."""
    clock = folder / f".clock_{world.rank}"
    clock.touch()  # ages are measured by the file system's clock, which all machines share
    lines = []
    for rank in range(world.world_size):
        if rank == world.rank:
            continue
        try:
            path = folder / f"rank_{rank}.json"
            silent_s = clock.stat().st_mtime - path.stat().st_mtime
            beat = json.loads(path.read_text())
            doing = f"{beat['doing']}, step {beat['step']}, for {beat['for_s'] + silent_s:.0f} s"
        except (OSError, ValueError, KeyError) as error:
            lines.append(f"rank {rank}: no heartbeat ({error})")
            continue
        silent = silent_s > 3 * BEAT_S
        state = f"NO HEARTBEAT for {silent_s:.0f} s, last seen" if silent else "alive,"
        lines.append(f"rank {rank}: {state} {doing}")
    return lines


@contextlib.contextmanager
def watching(
    folder: Path,
    world: World,
    *,
    limit_s: float,
    lost: Callable[[], Exception | None] = lambda: None,
) -> Iterator[Watchdog]:
    """A watchdog while the block runs."""
    watchdog = Watchdog(folder, world, limit_s=limit_s, lost=lost)
    try:
        yield watchdog
    finally:
        watchdog.close()
