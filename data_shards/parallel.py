"""A function over many items, in several processes, results in the order of the items.

In: any iterable, read a few items ahead and no further. Out: the results, one by one. The number of
processes changes nothing but the time. The processes end with the one that started them, even when
that one is killed.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_AHEAD: Final = 3  # chunks in flight per process: enough to hide one slow item, little memory
_PR_SET_PDEATHSIG: Final = 1

# The function of this pool's processes. They inherit it by fork, so that a large table bound to it
# is not pickled once per chunk.
_function: Callable[[Any], Any] | None = None


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
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(function, os.getpid()),
    )
    source = iter(items)
    running: deque[Future[list[Any]]] = deque()
    try:
        while True:
            while len(running) < _AHEAD * workers and (batch := list(islice(source, chunk))):
                running.append(pool.submit(_apply, batch))
            if not running:
                return
            yield from running.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed, perhaps because memory ran out; run again with fewer "
            "workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before this process could ask to be told
        os._exit(1)


def _apply(batch: list[Any]) -> list[Any]:
    assert _function is not None, "the pool's processes begin with _begin"
    return [_function(item) for item in batch]
