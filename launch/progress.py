"""The progress bar of a running stage: a redrawn line on a terminal, only plain lines in a log.

In: the lines of rank 0, and RUN/STAGE/metrics.jsonl, which grows by a line per step. Out: the lines
as they come, and on a terminal the bar below them. No torch.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from data_shards.progress import format_duration

WIDTH: Final = 30  # of the bar, in characters
PERIOD_S = 0.5
_CLEAR: Final = "\r\x1b[K"


class Screen:
    """A text stream that several threads write to: permanent lines, and a status line below."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock, self._status = stream, threading.Lock(), ""

    def line(self, text: str) -> None:
        """Write a permanent line; `text` ends with a newline."""
        with self._lock:
            clear = _CLEAR if self._status else ""
            self._stream.write(f"{clear}{text}{self._status}")
            self._stream.flush()

    def status(self, text: str) -> None:
        """Replace the status line; empty removes it."""
        with self._lock:
            if text != self._status:
                self._stream.write(_CLEAR + text)
                self._stream.flush()
                self._status = text


class StageProgress:
    """Follows metrics.jsonl of a stage, reading only what was appended since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = 0, 0  # the file that was read, and up to where
        self._cut_line = ""  # the start of a line whose end is not written yet
        self._latest: dict[str, Any] = {}

    def text(self, columns: int) -> str:
        """The bar; empty before the stage has begun and after it has ended."""
        for record in self._new_records():
            if record["kind"] == "start":
                self._latest = {"num_steps": record["num_steps"], "name": self._path.parent.name}
            elif record["kind"] == "end":
                self._latest = {}
            elif self._latest and record["kind"] in ("step", "interval"):
                self._latest |= {k: record[k] for k in ("step", "loss", "eta_s") if k in record}
        if "step" not in self._latest:
            return ""
        return bar_text(self._latest)[: columns - 1]

    def _new_records(self) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open(encoding="utf-8") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # a launch that resumes replaces the file
                    self._inode, self._offset, self._cut_line = inode, 0, ""
                file.seek(self._offset)
                text = self._cut_line + file.read()
                self._offset = file.tell()
        except OSError:
            return
        *lines, self._cut_line = text.split("\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # a line that a crash cut off
                yield json.loads(line)


def bar_text(latest: Mapping[str, Any]) -> str:
    """`stage1 [######----] 120/938 12.8% loss 1.43 eta 3h12m`."""
    done = latest["step"] / latest["num_steps"]
    bar = "#" * int(WIDTH * done)
    text = (
        f"{latest['name']} [{bar:-<{WIDTH}}] {latest['step']}/{latest['num_steps']} {done:.1%} "
        f"loss {latest['loss']:.2f}"
    )
    return f"{text} eta {format_duration(latest['eta_s'])}" if "eta_s" in latest else text


@contextlib.contextmanager
def stage_screen(metrics: Path | None, stream: TextIO | None = None) -> Iterator[Screen]:
    """The screen for a stage; with a bar if `stream` (stdout) is a terminal that can draw it."""
    stream = stream or sys.stdout
    screen = Screen(stream)
    if metrics is None or not stream.isatty() or os.environ.get("TERM") in (None, "dumb"):
        yield screen
        return
    ended = threading.Event()
    progress = StageProgress(metrics)
    thread = threading.Thread(target=_redraw, args=(screen, progress, ended), daemon=True)
    thread.start()
    try:
        yield screen
    finally:
        ended.set()
        thread.join()
        screen.status("")


def _redraw(screen: Screen, progress: StageProgress, ended: threading.Event) -> None:
    while not ended.wait(PERIOD_S):
        columns = 80
        with contextlib.suppress(OSError):
            columns = os.get_terminal_size().columns
        screen.status(progress.text(columns))
