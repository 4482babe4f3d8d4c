"""`ordered_map`: a function over many items in several processes, results in the items' order.

In: any iterable, read only a few items ahead. Out: the results, one by one; the number of processes
changes nothing but the time. The workers end with their parent, even when it is killed. Each worker
has its own pipe, so the parent notices when a worker is killed. The workers of a concurrent.futures
pool share one pipe, and the parent may wait forever for the rest of a result.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from data_shards.process_errors import WorkerError

T = TypeVar("T")
R = TypeVar("R")

_CHUNKS_AHEAD: Final = 3  # per process: enough to hide one slow item, little memory
_PR_SET_PDEATHSIG: Final = 1


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, chunk: int = 4
) -> Generator[R, None, None]:
    """`map(function, items)` in `workers` processes; 1 = in this process, item by item.

    Close the generator (contextlib.closing) to end the processes when not all results are wanted.

    Items and results must be picklable; `function` need not be.

    Raises:
        RuntimeError: a process was killed, as the system does when memory runs out.
        Exception: whatever the function raises, in place of the item's result.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    pool = _Pool(function, workers)
    source = iter(items)
    running: deque[Future[list[Any]]] = deque()
    try:
        while True:
            while len(running) < _CHUNKS_AHEAD * workers and (batch := list(islice(source, chunk))):
                running.append(pool.submit(batch))
            if not running:
                return
            yield from running.popleft().result()
    finally:
        pool.close()


class _Pool:
    """Processes with a pipe each, and as many threads, each of which waits for one of them."""

    def __init__(self, function: Callable[[Any], Any], workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection[Any, Any]] = []
        self._free: SimpleQueue[Connection[Any, Any]] = SimpleQueue()
        # For a generator that is never closed, and for a Ctrl-C in the middle of the loop below:
        # multiprocessing's own cleanup sends SIGTERM, which the workers ignore, and waits.
        atexit.register(self.close)
        # All are forked before the first thread starts. With fork, a large table bound to the
        # function is not pickled.
        context = multiprocessing.get_context("fork")
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(function, theirs, [*self._pipes, ours], os.getpid()),
                daemon=True,
            )
            process.start()
            theirs.close()  # only the worker holds it: its death closes the pipe
            self._processes.append(process)
            self._pipes.append(ours)
            self._free.put(ours)

    def submit(self, batch: list[Any]) -> Future[list[Any]]:
        """The results of the batch, as soon as a process has made them."""
        return self._threads.submit(self._compute, batch)

    def _compute(self, batch: list[Any]) -> list[Any]:
        pipe = self._free.get()
        try:
            pipe.send(batch)
            result = pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                "a worker process was killed, perhaps because memory ran out; run again with fewer "
                "workers"
            ) from error
        finally:
            self._free.put(pipe)
        if isinstance(result, WorkerError):
            result.reraise()
        return list(result)

    def close(self) -> None:
        """End all processes; items in progress are finished and their results discarded."""
        atexit.unregister(self.close)
        self._threads.shutdown(wait=True, cancel_futures=True)
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # its process is dead
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join()


def _work(
    function: Callable[[Any], Any],
    pipe: "Connection[Any, Any]",
    pipes_of_parent: "list[Connection[Any, Any]]",
    parent: int,
) -> None:
    """One process: a list of items in, a list of results or a WorkerError out; None ends it."""
    # Signals to the whole group (Ctrl-C, a scheduler's SIGTERM) reach the parent, which ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent was killed before the call above took effect
        os._exit(1)
    for other in pipes_of_parent:  # a copy here would hide the death of the parent or of a worker
        other.close()
    while (batch := pipe.recv()) is not None:
        try:
            message = pickle.dumps([function(item) for item in batch])
        except Exception as error:
            message = pickle.dumps(WorkerError.capture(error, "In a worker process"))
        pipe.send_bytes(message)
