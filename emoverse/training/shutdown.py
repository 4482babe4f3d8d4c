"""Graceful shutdown: signals and the time limit become a stop request.

In: SIGINT, SIGTERM, SIGUSR2 and `train.max_minutes`. Out: a `StopFlag`. The training loop shares
it with the other ranks before each step, so that all ranks stop after the same step. Nothing
collective happens in a signal handler. A second signal ends the process at once, also inside a
collective. No torch.
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
# Signals within this time are one stop request: a scheduler may signal a launcher and its ranks,
# the launcher forwards its own, and submitit sends SIGTERM and SIGUSR2 in a row.
ONE_REQUEST_S = 1.0


class StopFlag:
    """Set by the first stop signal or by the time limit, and never cleared."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._limit_s: float | None = None
        self._reason: str | None = None
        # Set at the first signal by a thread, even while the main thread waits in a collective.
        self.signalled = threading.Event()

    def limit(self, minutes: float | None) -> None:
        """Set the time limit, counted from the creation of this flag; None for no limit."""
        self._limit_s = None if minutes is None else 60 * minutes

    def add_elapsed(self, seconds: float) -> None:
        """Count time that an earlier process spent towards the limit."""
        self._started -= seconds

    @property
    def reason(self) -> str | None:
        """Why to stop, in a few words for the user; None while there is no stop request."""
        limit_s = self._limit_s
        if self._reason is None and limit_s is not None and self._elapsed_s() >= limit_s:
            self._reason = f"time limit of {limit_s / 60:g} minutes"
        return self._reason

    def _elapsed_s(self) -> float:
        return self._clock() - self._started

    @property
    def requested(self) -> bool:
        """Whether there is a stop request."""
        return self.reason is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: it only sets the flag."""
        self._reason = self._reason or signal.Signals(number).name


@contextlib.contextmanager
def listen() -> Iterator[StopFlag]:
    """Receive stop signals while the block runs; call it in the main thread."""
    flag = StopFlag()
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, flag.handle) for number in STOP_SIGNALS}
    # Python runs handlers between its own instructions, so never while the main thread waits in a
    # collective. The wake-up descriptor is written by the C handler, and a thread reads it.
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(read, flag.signalled), daemon=True)
    watcher.start()
    try:
        yield flag
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)  # the watcher reads end of file, closes its side and returns
        watcher.join()


def _watch(read: int, signalled: threading.Event) -> None:
    """Set the event at the first stop request, and end this process at the second one."""
    first: float | None = None
    with open(read, "rb", buffering=0) as source:
        while received := source.read(1):
            if received[0] not in STOP_SIGNALS:
                continue
            now = time.monotonic()
            if first is None:
                first = now
                signalled.set()
            elif now - first > ONE_REQUEST_S:
                os.write(2, b"second signal: exiting at once, the last checkpoint is good\n")
                os._exit(SECOND_SIGNAL_EXIT)
