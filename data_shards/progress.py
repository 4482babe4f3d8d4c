"""Progress of a long job: a bar that is redrawn on a terminal, else a line every few seconds.

In: the number of finished items. Out: text on stderr with the rate and the remaining time.
"""

import sys
import time
from typing import Final

_LINE_EVERY_S: Final = 2.0
_REDRAW_EVERY_S: Final = 0.1
_BAR_WIDTH: Final = 30


class Progress:
    """Call it with the number of finished items. `total` is None if it is not known.

    A first call with more than 1 states the items of an earlier start, which the rate leaves out.
    """

    def __init__(self, total: int | None, unit: str) -> None:
        self._total = total
        self._unit = unit
        self._start: int | None = None
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = done if done > 1 else 0
        on_terminal = sys.stderr.isatty()
        at_end = self._total is not None and done >= self._total
        if not at_end and now - self._last < (_REDRAW_EVERY_S if on_terminal else _LINE_EVERY_S):
            return
        self._last = now
        text = self._text(done, now - self._began) + (f", {note}" if note else "")
        if on_terminal:
            print(f"\r{text}\x1b[K", end="\n" if at_end else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _text(self, done: int, spent_s: float) -> str:
        rate = (done - (self._start or 0)) / max(spent_s, 1e-9)
        if self._total is None:
            return f"{done} {self._unit}, {_rate(rate)}"
        bar = "#" * min(_BAR_WIDTH, _BAR_WIDTH * done // max(self._total, 1))
        left = "?" if rate == 0 else f"{(self._total - done) / rate:.0f}"
        return (
            f"[{bar:<{_BAR_WIDTH}}] {done}/{self._total} {self._unit}, {_rate(rate)}, {left} s left"
        )


def _rate(per_s: float) -> str:
    return f"{per_s:.0f}/s" if per_s >= 10 else f"{per_s:.2f}/s"


def format_duration(seconds: float) -> str:
    """3h12m, 4m05s or 12s."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
