"""Processes that make things ahead of time, in order, and are never waited for in vain.

In: a function step -> result and a range of steps. Out: the results in order. Worker w of W makes
every W-th step, at most `prefetch` ahead of what was taken: that is the backpressure. Large arrays
lie in shared memory (ring.py), the rest goes through a pipe. A worker that dies is started again at
the step it owed, since a result is a pure function of its step; if it dies there again, or takes
too long, the run ends with an error that says what the worker was doing.
"""

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch

from emoverse.data.shared_memory import Desk, SharedRing

T = TypeVar("T")

_LOOK_S: Final = 5.0  # how often a waiting worker looks whether the trainer still lives


class WorkerDied(RuntimeError):
    """A data worker was killed, or hangs, and starting it again did not help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolOptions:
    """workers: processes. prefetch: steps that each prepares ahead. step_bytes: room in shared
    memory for the arrays of one step; larger ones go through the pipe. pin: page-lock that memory.
    timeout_s: longest wait for one step.
    """

    workers: int
    prefetch: int = 2
    step_bytes: int = 0
    pin: bool = False
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    """An error on its way out of a worker."""

    error: Exception
    where: str


@dataclass(kw_only=True)
class _Worker:
    """The trainer's side of one worker."""

    number: int
    ring: SharedRing
    process: BaseProcess | None = None
    pipe: Connection | None = None
    released: list[int] = field(default_factory=list)  # slots the worker does not know to be free
    lent: set[int] = field(default_factory=set)
    died_at: int | None = None

    def release(self, slot: int) -> None:
        """Called by the garbage collection of tensors, at any time: only notes the number."""
        self.released.append(slot)


class WorkerPool(Generic[T]):
    """Makes `make(step, desk)` for a range of steps in forked processes; use it once.

    Args:
        make: a pure function of the step; `desk` gives it shared memory and takes a line about
            what it is doing. It runs in forked copies of this process.
        say: told when a worker is started again.
    """

    def __init__(
        self,
        make: Callable[[int, Desk], T],
        steps: range,
        options: PoolOptions,
        *,
        say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        assert options.workers >= 1 and options.prefetch >= 1
        self._make, self._steps, self._options, self._say = make, steps, options, say
        # One step is in use while the next is taken; with one worker both are its own.
        slots = options.prefetch + 1 + (options.workers == 1)
        self._workers = [
            _Worker(number=number, ring=SharedRing(slots, options.step_bytes))
            for number in range(min(options.workers, len(steps)))
        ]

    def __iter__(self) -> Iterator[T]:
        """The results in order.

        Raises what `make` raises, with the worker's traceback as a note, and WorkerDied.
        """
        try:
            for worker in self._workers:
                if self._options.pin:
                    worker.ring.pin()
                self._start(worker, self._steps[worker.number])
            for number, step in enumerate(self._steps):
                result = self._take(self._workers[number % len(self._workers)], step)
                if isinstance(result, _Failure):
                    result.error.add_note(result.where)
                    raise result.error
                yield result
                del result  # or the slot of this step would be in use during the next
        finally:
            self._end()

    def _start(self, worker: _Worker, step: int) -> None:
        context = get_context("fork")  # workers share index, tokenizer and features with us
        worker.pipe, theirs = context.Pipe()
        others = [other.pipe for other in self._workers if other.pipe is not None]
        worker.lent -= set(worker.released)
        worker.released.clear()
        free = [slot for slot in range(worker.ring.slots) if slot not in worker.lent]
        steps = range(step, self._steps.stop, len(self._workers) * self._steps.step)
        worker.process = context.Process(
            target=_work,
            args=(self._make, steps, theirs, others, worker.ring, free, self._options.prefetch),
            name=f"data-worker-{worker.number}",
            daemon=True,
        )
        worker.process.start()
        theirs.close()

    def _take(self, worker: _Worker, step: int) -> T | _Failure:
        """The result of a step, which this worker owes next."""
        while True:
            assert worker.pipe is not None and worker.process is not None
            ready = connection.wait(
                [worker.pipe, worker.process.sentinel], timeout=self._options.timeout_s
            )
            if not ready:
                raise WorkerDied(
                    f"data worker {worker.number} has not finished step {step} in "
                    f"{self._options.timeout_s:g} s, it is at: {worker.ring.said()}; look at that "
                    "record and at the storage, or raise data.batch_timeout_s"
                )
            try:
                if worker.pipe in ready or worker.pipe.poll():
                    return self._unpack(worker, *worker.pipe.recv())
            except (EOFError, OSError, pickle.UnpicklingError):
                worker.process.join()  # it died, perhaps in the middle of a message
            self._revive(worker, step)

    def _unpack(
        self, worker: _Worker, content: bytes, slot: int | None, spans: list[tuple[int, int]]
    ) -> Any:
        worker.lent -= set(worker.released)
        freed, worker.released = worker.released, []
        assert worker.pipe is not None
        try:
            worker.pipe.send(freed)  # and one more step may be begun
        except OSError:
            worker.released = freed  # it has made its last step and left
        if slot is None:
            return pickle.loads(content)
        worker.lent.add(slot)
        return pickle.loads(content, buffers=worker.ring.lend(slot, spans, worker.release))

    def _revive(self, worker: _Worker, step: int) -> None:
        assert worker.process is not None and worker.pipe is not None
        worker.process.join()
        cause, doing = _ending(worker.process.exitcode), worker.ring.said()
        worker.pipe.close()
        worker.pipe = None
        if worker.died_at == step:
            raise WorkerDied(
                f"data worker {worker.number} {cause} twice at step {step}, at: {doing}; if memory "
                "ran out, lower data.workers or give the job more memory"
            )
        worker.died_at = step
        self._say(
            f"data worker {worker.number} {cause} at step {step}, at: {doing}; it is started again "
            "at this step, nothing is lost"
        )
        self._start(worker, step)

    def _end(self) -> None:
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()  # it ignores the signals that are meant for the trainer
                worker.process.join()
            if worker.pipe is not None:
                worker.pipe.close()


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with code {exitcode}"


# ------------------------------------------------------------------------------- in the worker


def _work(
    make: Callable[[int, Desk], Any],
    steps: range,
    pipe: Connection,
    others: list[Connection],
    ring: SharedRing,
    free: list[int],
    credit: int,
) -> None:
    """The life of a worker: one step after the other, as far ahead as it may."""
    trainer = os.getppid()
    for other in others:  # the trainer's ends: a copy here would hide that the trainer died
        other.close()
    # The trainer decides about stopping; schedulers signal its children as well.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    desk = Desk(ring, free)
    try:
        for step in steps:
            while not credit or pipe.poll():
                if pipe.poll(_LOOK_S):
                    desk.free.extend(pipe.recv())
                    credit += 1
                elif os.getppid() != trainer:
                    return
            credit -= 1
            desk.begin()
            desk.ring.say(f"step {step}")
            pipe.send(_pack(_result(make, step, desk), desk))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the trainer is gone


def _result(make: Callable[[int, Desk], Any], step: int, desk: Desk) -> Any:
    try:
        return make(step, desk)
    except Exception as error:
        where = f"In the data worker, at step {step}:\n{traceback.format_exc()}"
        return _Failure(error=_portable(error), where=where)


def _pack(result: Any, desk: Desk) -> tuple[bytes, int | None, list[tuple[int, int]]]:
    """(pickle, slot, places in the slot); arrays that lie in the slot stay out of the pickle."""
    spans: list[tuple[int, int]] = []
    slot = desk.slot

    def stays(buffer: pickle.PickleBuffer) -> bool:
        """False: pickle leaves it out."""
        array = np.frombuffer(buffer.raw(), dtype=np.uint8)
        place = None if slot is None or not array.nbytes else desk.ring.place(array, slot)
        if place is None:
            return True
        spans.append((place, array.nbytes))
        return False

    content = pickle.dumps(result, protocol=5, buffer_callback=stays)
    if slot is not None and not spans:
        desk.free.append(slot)
        slot = None
    return content, slot, spans


def _portable(error: Exception) -> Exception:
    """The error if it survives pickling, else one with the same message."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception as reason:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        return kind(f"{error} ({type(error).__name__} could not be pickled: {reason})")
    assert isinstance(copy, Exception)
    return copy
