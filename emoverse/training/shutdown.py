"""The wish to stop: signals and the time limit, noticed at once, acted upon between two steps.

In: SIGINT, SIGTERM, SIGUSR2 and `train.max_minutes`. Out: a `StopFlag`, which the training loop
takes to the vote before each step, so that all ranks stop after the same one. Nothing collective
happens in a handler. A second signal ends the process at once, also inside a collective. No torch.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SECOND_SIGNAL_EXIT = 75  # EX_TEMPFAIL: the same command resumes
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
# Signals this close together are one wish: a scheduler may signal a launcher and its ranks, the
# launcher passes its own on, and submitit sends SIGTERM and SIGUSR2 in a row.
ONE_WISH_S = 1.0


class StopFlag:
    """Becomes true at the first signal to stop, or when the time is up; never false again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._limit_s: float | None = None
        self._reason: str | None = None
        # Set at the first signal by a thread, also while the main thread waits in a collective.
        self.heard = threading.Event()

    def limit(self, minutes: float | None) -> None:
        """The time is up this long after the flag was made; None is no limit."""
        self._limit_s = None if minutes is None else 60 * minutes

    def began_before(self, seconds: float) -> None:
        """The time that is limited began this much earlier, in a process before this one."""
        self._started -= seconds

    @property
    def reason(self) -> str | None:
        """Why to stop, in a few words for the user; None while there is no wish to."""
        limit_s = self._limit_s
        if self._reason is None and limit_s is not None and self._passed_s() >= limit_s:
            self._reason = f"time limit of {limit_s / 60:g} minutes"
        return self._reason

    def _passed_s(self) -> float:
        return self._clock() - self._started

    @property
    def requested(self) -> bool:
        """Is there a wish to stop?"""
        return self.reason is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: only sets the flag."""
        self._reason = self._reason or signal.Signals(number).name


@contextlib.contextmanager
def listen() -> Iterator[StopFlag]:
    """Listens to the signals while the block runs; call it in the main thread."""
    flag = StopFlag()
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, flag.handle) for number in STOP_SIGNALS}
    # Python runs handlers between two of its own instructions, so not while the main thread waits
    # in a collective. The wake-up descriptor is written by the C handler, and a thread reads it.
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(read, flag.heard), daemon=True)
    watcher.start()
    try:
        yield flag
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)  # the watcher reads the end, closes its side and leaves
        watcher.join()


def _watch(read: int, heard: threading.Event) -> None:
    """Tells of the first wish to stop, and ends this process at the second one."""
    first: float | None = None
    with open(read, "rb", buffering=0) as source:
        while received := source.read(1):
            if received[0] not in STOP_SIGNALS:
                continue
            now = time.monotonic()
            if first is None:
                first = now
                heard.set()
            elif now - first > ONE_WISH_S:
                os.write(2, b"second signal: leaving at once, the last checkpoint is good\n")
                os._exit(SECOND_SIGNAL_EXIT)
