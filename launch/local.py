"""Several ranks on this machine, without a scheduler: what `emoverse train` starts.

In: the config and the stages. `run_local` starts `train.processes` workers for each stage, shows
the output of rank 0, keeps every rank's output under RUN/STAGE/logs/, and ends all of them when one
fails. Out: one exit code for all. Importing this file does not import torch.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from emoverse.config.schema import Config, freeze_config
from emoverse.training.shutdown import STOP_SIGNALS
from emoverse.training.stages import stage_dir
from launch.exit_codes import DONE, FAULT, STOPPED, WRONG_INPUT
from launch.progress import Screen, stage_screen
from launch.worker import rank_defaults

POLL_S = 0.1
# The other ranks learn of a failure at the next consensus; after this they are ended.
GRACE_AFTER_FAILURE_S = 10.0
# A stopped rank finishes its step and saves.
GRACE_AFTER_STOP_S = 300.0


def run_local(config: Config, *, stages: Sequence[str], flags: Sequence[str] = ()) -> int:
    """Trains `stages` in turn on this machine, resuming what an earlier call left unfinished.

    A stop signal (Ctrl-C, SIGTERM, SIGUSR2) reaches all ranks, which save and leave; no stage
    begins after it. The time limit is that of all stages together.
    `flags`: of `worker.FLAGS`, for every rank.

    Returns:
        0 all done, 75 stopped and resumable, 2 wrong input, 1 a fault.
    """
    begin, limit_s = time.monotonic(), 60 * (config.train.max_minutes or math.inf)
    with _stop_signals() as signals:
        for stage in stages:
            spent_s = time.monotonic() - begin
            if signals.received or spent_s >= limit_s:
                reason = f"time limit of {limit_s / 60:g} minutes"
                if signals.received:
                    reason = signal.Signals(signals.received[0]).name
                print(f"{stage} is not begun; the same command resumes ({reason})", flush=True)
                return STOPPED
            code = _run_stage(config, stage, [*flags, f"--spent-s={spent_s:.1f}"], signals)
            if code != DONE:
                return code
    return DONE


def _run_stage(config: Config, stage: str, flags: Sequence[str], signals: "StopSignals") -> int:
    folder = stage_dir(config, stage) / "logs"
    try:
        # Absolute: a relative path with an equals sign would be taken for an override.
        frozen = freeze_config(config, folder.absolute())
    except OSError as error:
        raise ValueError(
            f"run.run_dir: {config.run.run_dir} must be a folder that can be written: {error}; "
            "make room, change its permissions, or choose another run.run_dir"
        ) from error
    command = [sys.executable, "-m", "launch.worker", str(frozen), "--stage", stage]
    command += ["--end-with-input", *flags]
    metrics = stage_dir(config, stage) / "metrics.jsonl"
    with stage_screen(metrics) as screen:
        code = run_ranks(
            command, num_ranks=config.train.processes, logs=folder, screen=screen, signals=signals
        )
    if code in (FAULT, WRONG_INPUT) and config.train.processes > 1:
        print(f"{stage} failed; logs of all ranks: {folder}/rank_*.log", file=sys.stderr)
    return code


def run_ranks(
    command: Sequence[str],
    *,
    num_ranks: int,
    logs: Path,
    screen: Screen | None = None,
    signals: "StopSignals | None" = None,
) -> int:
    """Runs `command` once per rank on this machine and waits; returns one exit code for all.

    The output of rank 0 goes to our stdout, through `screen` if given; every rank's output is
    appended to `logs`/rank_N.log. If a rank fails or the launcher dies, all others end as well.
    `signals`: of a caller that handles stop signals already.
    """
    port = free_port()
    screen = screen or Screen(sys.stdout)
    with contextlib.ExitStack() as stack:
        signals = signals or stack.enter_context(_stop_signals())
        signals.ranks.clear()
        for rank in range(num_ranks):
            log = stack.enter_context((logs / f"rank_{rank}.log").open("ab", buffering=0))
            environ = rank_environment(os.environ, rank=rank, world_size=num_ranks, port=port)
            shown_on = screen if rank == 0 else None
            signals.ranks.append(_start_rank(command, environ, log, screen=shown_on, stack=stack))
        if signals.received:  # while the ranks were started one after the other
            signals.forward()
        codes = _wait(signals.ranks)
    if signals.received:
        # A rank that is starting or leaving has no handler and dies; the others wait for it until
        # we end them. Nothing is lost: the same command resumes.
        ended = (-signal.SIGTERM, -signal.SIGKILL)
        codes = [STOPPED if code in ended else code for code in codes]
        if set(codes) == {DONE, STOPPED}:
            return STOPPED
    return exit_code(codes)


def free_port() -> int:
    """A TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rank_environment(
    environ: Mapping[str, str], *, rank: int, world_size: int, port: int
) -> dict[str, str]:
    """The environment of one local rank: the five variables, its share of the cores, no noise."""
    threads = max(1, (os.cpu_count() or 1) // world_size)
    defaults = rank_defaults(threads)
    five = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }
    return defaults | dict(environ) | five


def _start_rank(
    command: Sequence[str],
    environ: Mapping[str, str],
    log: IO[bytes],
    *,
    screen: Screen | None,
    stack: contextlib.ExitStack,
) -> subprocess.Popen[bytes]:
    """Starts a rank in a session of its own, so that Ctrl-C reaches it once, through us."""
    process = subprocess.Popen(
        command,
        # The write end stays here: when this process dies, however it dies, the rank reads the end
        # of its input and leaves.
        stdin=subprocess.PIPE,
        stdout=log if screen is None else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environ),
        start_new_session=True,
    )
    if process.stdout is not None and screen is not None:
        arguments = (process.stdout, log, screen)
        copier = threading.Thread(target=_copy, args=arguments, daemon=True)
        copier.start()
        stack.callback(copier.join, 5.0)
    stack.callback(_end, process)  # runs before the join above: the copier ends with the rank
    return process


def _copy(source: IO[bytes], log: IO[bytes], screen: Screen) -> None:
    """Copies rank 0's lines to the user and to its log.

    A full disk may lose lines, but reading goes on; otherwise rank 0 would block in a print.
    """
    with source:
        for line in source:
            with contextlib.suppress(OSError):
                log.write(line)
            with contextlib.suppress(OSError):
                screen.line(line.decode(errors="replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a rank with the data workers of its session, and closes the pipe to it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


class StopSignals:
    """The stop signals received so far; each is forwarded to the ranks, which stop together."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.ranks: list[subprocess.Popen[bytes]] = []

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.received.append(number)
        self.forward()

    def forward(self) -> None:
        """Sends SIGTERM to the ranks that are running."""
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def _stop_signals() -> Iterator[StopSignals]:
    """Handles the stop signals while the block runs."""
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, signals.handle) for number in STOP_SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of all ranks; after the first failure the others have some seconds to leave."""
    deadline: float | None = None
    while True:
        codes = [process.poll() for process in ranks]
        left = [code for code in codes if code is not None]
        if len(left) == len(codes):
            return left
        if left and deadline is None:
            grace = GRACE_AFTER_FAILURE_S if set(left) - {DONE, STOPPED} else GRACE_AFTER_STOP_S
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            return [-signal.SIGKILL if code is None else code for code in codes]
        time.sleep(POLL_S)


def exit_code(codes: Sequence[int]) -> int:
    """One exit code for all ranks: a fault wins over wrong input, that over stopped and done."""
    for code in (WRONG_INPUT, STOPPED, DONE):
        if all(of_rank == code for of_rank in codes):
            return code
    return FAULT
