"""A progress bar on a terminal, plain lines in a log.

In: the lines of rank 0, and RUN/STAGE/metrics.jsonl, which grows by a line per step. Out: the lines
as they come, and below them, on a terminal only, one line that is drawn again and again. No torch.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

WIDTH = 30  # of the bar, in characters
PERIOD_S = 0.5
_CLEAR = "\r\x1b[K"


class Screen:
    """What several threads write to: lines for good, and one line that changes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock, self._status = stream, threading.Lock(), ""

    def line(self, text: str) -> None:
        """A line that stays; `text` ends with a newline."""
        with self._lock:
            clear = _CLEAR if self._status else ""
            self._stream.write(f"{clear}{text}{self._status}")
            self._stream.flush()

    def status(self, text: str) -> None:
        """Replaces the line that changes; empty removes it."""
        with self._lock:
            if text != self._status:
                self._stream.write(_CLEAR + text)
                self._stream.flush()
                self._status = text


class Progress:
    """Reads how far a stage is, a few new bytes at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place, self._file = 0, 0  # read so far, of the file with this number
        self._rest = ""
        self._facts: dict[str, Any] = {}

    def text(self, columns: int) -> str:
        """The bar; empty before the stage has begun and after it has ended."""
        for record in self._new_records():
            if record["kind"] == "start":
                self._facts = {"num_steps": record["num_steps"], "name": self._path.parent.name}
            elif record["kind"] == "end":
                self._facts = {}
            elif self._facts and record["kind"] in ("step", "interval"):
                self._facts |= {k: record[k] for k in ("step", "loss", "eta_s") if k in record}
        if "step" not in self._facts:
            return ""
        return draw(self._facts)[: columns - 1]

    def _new_records(self) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open(encoding="utf-8") as file:
                number = os.fstat(file.fileno()).st_ino
                if number != self._file:  # a launch that resumes writes the file anew
                    self._place, self._file, self._rest = 0, number, ""
                file.seek(self._place)
                text = self._rest + file.read()
                self._place = file.tell()
        except OSError:
            return
        *lines, self._rest = text.split("\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # a line that a crash cut off
                yield json.loads(line)


def draw(facts: dict[str, Any]) -> str:
    """`stage1 [######----] 120/938 12.8% loss 1.43 eta 3h12m`."""
    done = facts["step"] / facts["num_steps"]
    bar = "#" * int(WIDTH * done)
    text = (
        f"{facts['name']} [{bar:-<{WIDTH}}] {facts['step']}/{facts['num_steps']} {done:.1%} "
        f"loss {facts['loss']:.2f}"
    )
    if "eta_s" in facts:
        minutes, seconds = divmod(round(facts["eta_s"]), 60)
        hours, minutes = divmod(minutes, 60)
        text += f" eta {hours}:{minutes:02d}:{seconds:02d}"
    return text


@contextlib.contextmanager
def shown(metrics: Path | None, stream: TextIO | None = None) -> Iterator[Screen]:
    """The screen for a stage; with a bar if `stream` (stdout) is a terminal that can draw it."""
    stream = stream or sys.stdout
    screen = Screen(stream)
    if metrics is None or not stream.isatty() or os.environ.get("TERM") in (None, "dumb"):
        yield screen
        return
    ended = threading.Event()
    thread = threading.Thread(target=_redraw, args=(screen, Progress(metrics), ended), daemon=True)
    thread.start()
    try:
        yield screen
    finally:
        ended.set()
        thread.join()
        screen.status("")


def _redraw(screen: Screen, progress: Progress, ended: threading.Event) -> None:
    while not ended.wait(PERIOD_S):
        columns = 80
        with contextlib.suppress(OSError):
            columns = os.get_terminal_size().columns
        screen.status(progress.text(columns))
