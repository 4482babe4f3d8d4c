"""A function over many items, in several processes, results in the order of the items.

In: any iterable, read a few items ahead and no further. Out: the results, one by one. The number of
processes changes nothing but the time. The processes end with the one that started them, even when
that one is killed; and if one of them is killed, its pipe ends, so that nobody waits for it (a
concurrent.futures pool may wait for ever, for the rest of a result: its workers share one pipe).
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_AHEAD: Final = 3  # chunks in flight per process: enough to hide one slow item, little memory
_PR_SET_PDEATHSIG: Final = 1


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, chunk: int = 4
) -> Generator[R, None, None]:
    """`map(function, items)` by `workers` processes; 1 = in this process, item by item.

    Close the generator (contextlib.closing) to end the processes when not all results are wanted.

    Items and results must be picklable; `function` need not be.

    Raises:
        RuntimeError: a process was killed, as the system does when memory runs out.
        Exception: whatever the function raises, at the place of its item.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    pool = _Pool(function, workers)
    source = iter(items)
    running: deque[Future[list[Any]]] = deque()
    try:
        while True:
            while len(running) < _AHEAD * workers and (batch := list(islice(source, chunk))):
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
        # For results that nobody fetches, and for a Ctrl-C in the middle of the loop below:
        # multiprocessing's own end sends SIGTERM, to which the processes are deaf, and waits.
        atexit.register(self.close)
        # All are forked before the first thread starts. By fork, a large table bound to the
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
            theirs.close()  # the process alone holds it: its death ends the pipe
            self._processes.append(process)
            self._pipes.append(ours)
            self._free.put(ours)

    def submit(self, batch: list[Any]) -> Future[list[Any]]:
        """The results of the batch, as soon as a process has made them."""
        return self._threads.submit(self._ask, batch)

    def _ask(self, batch: list[Any]) -> list[Any]:
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
        if isinstance(result, BaseException):
            raise result
        return list(result)

    def close(self) -> None:
        """Ends all processes; what they are just at is finished and thrown away."""
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
    of_others: "list[Connection[Any, Any]]",
    parent: int,
) -> None:
    """One process: a list of items in, a list of results or an exception out; None ends it."""
    # Signals to the whole group (Ctrl-C, a scheduler's SIGTERM) reach the parent, which ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before this process could ask to be told
        os._exit(1)
    for other in of_others:
        other.close()
    while (batch := pipe.recv()) is not None:
        try:
            answer = pickle.dumps([function(item) for item in batch])
        except Exception as error:
            answer = _pickled(error)
        pipe.send_bytes(answer)


def _pickled(error: Exception) -> bytes:
    """The exception with its traceback as a note; a RuntimeError of its text if it must be."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"In a worker process:\n{text}")
    try:
        answer = pickle.dumps(error)
        pickle.loads(answer)  # an exception with a constructor of its own may fail only here
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}\n{text}"))
    return answer
