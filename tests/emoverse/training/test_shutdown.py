"""Graceful shutdown: the flag, the time limit, and the second signal, also in a blocking call."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from emoverse.training import shutdown
from emoverse.training.shutdown import STOP_SIGNALS, StopFlag, listen

ROOT = Path(shutdown.__file__).parents[2]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with listen() as flag:
        assert not flag.requested and flag.reason is None
        os.kill(os.getpid(), number)
        assert flag.requested and flag.reason == number.name
    assert signal.getsignal(number) is before


def test_the_time_limit_is_a_stop_request() -> None:
    now = 100.0
    flag = StopFlag(clock=lambda: now)
    flag.limit(None)
    now += 1e9
    assert not flag.requested
    now = 100.0
    flag.limit(1.5)
    now += 89.9
    assert not flag.requested
    now += 0.1
    assert flag.reason == "time limit of 1.5 minutes"
    now = 0.0
    assert flag.requested  # never false again
    later = StopFlag(clock=lambda: now)
    later.add_elapsed(60.0)  # an earlier process took a minute
    later.limit(1.5)
    now += 29.9
    assert not later.requested
    now += 0.1
    assert later.requested


def listener(body: str, before: str = "") -> subprocess.Popen[str]:
    """A process that listens, in a main thread that never runs Python code again."""
    code = f"""
    import ctypes, os, signal, sys, time
    {before}
    from emoverse.training.shutdown import listen
    with listen() as flag:
        print("up", flush=True)
        {body}
        print("end", flag.reason, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


# PyDLL keeps the interpreter lock, CDLL gives it away: as a collective does.
BLOCKED = "ctypes.CDLL(None).pause(); ctypes.CDLL(None).sleep(60); ctypes.CDLL(None).sleep(60)"


@pytest.mark.promise(6)
def test_a_second_signal_ends_a_process_that_is_blocked() -> None:
    process = listener(BLOCKED)
    process.send_signal(signal.SIGUSR2)
    time.sleep(shutdown.ONE_REQUEST_S + 0.2)
    assert process.poll() is None
    deadline = time.monotonic() + 60
    while process.poll() is None:  # a busy machine may have delivered the first one late
        assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    out, err = process.communicate()
    assert process.returncode == 75
    assert out == "" and "second signal: exiting at once" in err


@pytest.mark.promise(6)
def test_signals_close_together_are_one_request() -> None:
    process = listener("time.sleep(0.6); time.sleep(0.6)")
    # Halted meanwhile, or a busy machine might let a second pass between two of them.
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out in ("end SIGTERM\n", "end SIGUSR2\n")


def test_other_signals_are_no_request() -> None:
    process = listener("time.sleep(1.8)", "signal.signal(signal.SIGUSR1, lambda *_: None)")
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "end None\n")
