"""Several ranks on this machine, without a scheduler: the door of `emoverse train`.

In: the config and the stages. `run_local` starts `train.processes` workers for each stage, shows
what rank 0 says, keeps every rank's output under RUN/STAGE/logs/, and ends all of them when one
fails. Out: one exit code for all. Importing this file does not import torch.
"""

import contextlib
import hashlib
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

from emoverse.config.schema import Config, to_yaml
from emoverse.training.shutdown import EXIT_STOPPED as STOPPED
from emoverse.training.shutdown import STOP_SIGNALS
from emoverse.training.stages import stage_dir
from launch.progress import Screen, shown
from launch.worker import DONE, FAULT, WRONG_INPUT, rank_defaults

POLL_S = 0.1
# A rank that fails tells the others why at the next agreement; after this they are ended.
GRACE_AFTER_FAILURE_S = 10.0
# A stopped rank finishes its step and saves.
GRACE_AFTER_STOP_S = 300.0


def run_local(config: Config, *, stages: Sequence[str], flags: Sequence[str] = ()) -> int:
    """Trains `stages` in turn on this machine, continuing what an earlier call left.

    A signal to stop (Ctrl-C, SIGTERM, SIGUSR2) reaches all ranks, which save and leave; no stage
    begins after it. The time limit is that of all stages together.
    `flags`: of `worker.FLAGS`, for every rank.

    Returns:
        0 all done, 75 stopped and resumable, 2 wrong input, 1 a fault.
    """
    begin, limit_s = time.monotonic(), 60 * (config.train.max_minutes or math.inf)
    with _hearing() as heard:
        for stage in stages:
            spent_s = time.monotonic() - begin
            if heard.numbers or spent_s >= limit_s:
                minutes = f"time limit of {limit_s / 60:g} minutes"
                why = signal.Signals(heard.numbers[0]).name if heard.numbers else minutes
                print(f"{stage} is not begun; the same command goes on ({why})", flush=True)
                return STOPPED
            code = _run_stage(config, stage, [*flags, f"--spent-s={spent_s:.1f}"], heard)
            if code != DONE:
                return code
    return DONE


def _run_stage(config: Config, stage: str, flags: Sequence[str], heard: "Heard") -> int:
    folder = stage_dir(config, stage) / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        launched = _hand_config(config, folder)
    except OSError as error:
        raise ValueError(
            f"run.run_dir: {config.run.run_dir} must be a folder that can be written: {error}; "
            "make room, change its permissions, or choose another run.run_dir"
        ) from error
    command = [sys.executable, "-m", "launch.worker", str(launched), "--stage", stage]
    command += ["--end-with-input", *flags]
    metrics = stage_dir(config, stage) / "metrics.jsonl"
    with shown(metrics) as screen:
        code = run_ranks(
            command, num_ranks=config.train.processes, logs=folder, screen=screen, heard=heard
        )
    if code in (FAULT, WRONG_INPUT) and config.train.processes > 1:
        print(f"{stage} failed; what every rank said: {folder}/rank_*.log", file=sys.stderr)
    return code


def _hand_config(config: Config, folder: Path) -> Path:
    """A file for the ranks to read, which no other launcher of this run directory writes over.

    The name follows from the content: who else writes it writes the same.
    """
    text = to_yaml(config)
    name = f"config-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    path = folder.absolute() / name  # absolute: a folder may have an equals sign in its name
    temporary = folder / f".{name}-{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def run_ranks(
    command: Sequence[str],
    *,
    num_ranks: int,
    logs: Path,
    screen: Screen | None = None,
    heard: "Heard | None" = None,
) -> int:
    """Runs `command` once per rank on this machine and waits; returns one exit code for all.

    Rank 0 speaks on our stdout, by way of `screen` if given; every rank's output is appended to
    `logs`/rank_N.log. A rank that fails, or a launcher that dies, takes all the others with it.
    `heard`: of a caller that listens to signals already.
    """
    port = free_port()
    screen = screen or Screen(sys.stdout)
    with contextlib.ExitStack() as stack:
        heard = heard or stack.enter_context(_hearing())
        heard.ranks.clear()
        for rank in range(num_ranks):
            log = stack.enter_context((logs / f"rank_{rank}.log").open("ab", buffering=0))
            environ = rank_environment(os.environ, rank=rank, world_size=num_ranks, port=port)
            shown_on = screen if rank == 0 else None
            heard.ranks.append(_start_rank(command, environ, log, screen=shown_on, stack=stack))
        if heard.numbers:  # while they were started one after the other
            heard.pass_on()
        codes = _wait(heard.ranks)
    if heard.numbers:
        # A rank that was starting, or already leaving, has no handler and simply dies; the others
        # wait for it until we end them. Nothing is lost: the same command resumes.
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
    """Rank 0's lines to the user and to its log.

    A disk that is full may lose lines here, but nobody stops reading: rank 0 would wait for ever.
    """
    with source:
        for line in source:
            with contextlib.suppress(OSError):
                log.write(line)
            with contextlib.suppress(OSError):
                screen.line(line.decode(errors="replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a rank with the data workers of its session, and closes what leads to it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


class Heard:
    """The signals to stop that have come; each is passed on to the ranks, which decide together."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.ranks: list[subprocess.Popen[bytes]] = []

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.numbers.append(number)
        self.pass_on()

    def pass_on(self) -> None:
        """Tells the ranks that live."""
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def _hearing() -> Iterator[Heard]:
    """Hears the signals to stop while the block runs."""
    heard = Heard()
    if threading.current_thread() is not threading.main_thread():
        yield heard  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, heard.handle) for number in STOP_SIGNALS}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of all ranks; when one has left with an error the others have some seconds."""
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
        if all(found == code for found in codes):
            return code
    return FAULT
