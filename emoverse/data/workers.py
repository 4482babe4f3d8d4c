"""Processes that compute results ahead of time, in order; no wait for them is unbounded.

In: a function step -> result and a range of steps. Out: the results in order. Worker w of W makes
every W-th step, at most `prefetch` ahead of what was taken: that is the backpressure. Large arrays
lie in shared memory (`shared_memory.py`), the rest goes through a pipe. A worker that dies is
restarted at the step it owed, since a result is a pure function of its step. If it dies there
again, or takes too long, the run ends with an error that names what the worker was doing.
"""

import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Final, Generic, TypeVar

import numpy as np
import torch

from data_shards.process_errors import WorkerError
from emoverse.data.shared_memory import Bytes, SharedBuffer, SlotAllocator

T = TypeVar("T")

_PARENT_CHECK_S: Final = 5.0  # how often an idle worker checks that the trainer is alive


class WorkerDied(RuntimeError):
    """A data worker hangs, or was killed twice at the same step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolOptions:
    """workers: processes. prefetch: steps that each prepares ahead. step_bytes: shared memory for
    the arrays of one step; what does not fit goes through the pipe. pin: page-lock that memory.
    timeout_s: longest wait for one step.
    """

    workers: int
    prefetch: int = 2
    step_bytes: int = 0
    pin: bool = False
    timeout_s: float = 600.0


@dataclass(kw_only=True)
class _Worker:
    """The trainer's side of one worker."""

    index: int
    buffer: SharedBuffer
    process: BaseProcess | None = None
    pipe: Connection | None = None
    released: list[int] = field(default_factory=list)  # free slots not reported to the worker yet
    in_use: set[int] = field(default_factory=set)  # slots
    died_at: int | None = None

    def release(self, slot: int) -> None:
        """Called when tensors are garbage collected, at any time: only appends the slot."""
        self.released.append(slot)


class WorkerPool(Generic[T]):
    """Computes `make(step, slots)` for a range of steps in forked processes; use it once.

    Args:
        make: a pure function of the step, which runs in forked copies of this process. `slots`
            allocates shared memory, and `slots.buffer.report` stores what the worker is doing.
        log: receives a line when a worker is restarted.
    """

    def __init__(
        self,
        make: Callable[[int, SlotAllocator], T],
        steps: range,
        options: PoolOptions,
        *,
        log: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        assert options.workers >= 1 and options.prefetch >= 1
        self._make, self._steps, self._options, self._log = make, steps, options, log
        # One step is in use while the next is taken; with one worker both are its own.
        num_slots = options.prefetch + 1 + (options.workers == 1)
        self._workers = [
            _Worker(index=index, buffer=SharedBuffer(num_slots, options.step_bytes))
            for index in range(min(options.workers, len(steps)))
        ]

    def __iter__(self) -> Iterator[T]:
        """The results in order.

        Raises what `make` raises, with the worker's traceback as a note, and WorkerDied.
        """
        try:
            for worker in self._workers:
                if self._options.pin:
                    worker.buffer.pin()
                self._start(worker, self._steps[worker.index])
            for index, step in enumerate(self._steps):
                result = self._take(self._workers[index % len(self._workers)], step)
                if isinstance(result, WorkerError):
                    result.reraise()
                yield result
                del result  # or the slot of this step would be in use during the next
        finally:
            self._stop()

    def _start(self, worker: _Worker, step: int) -> None:
        context = get_context("fork")  # workers share index, tokenizer and features with us
        worker.pipe, child_pipe = context.Pipe()
        trainer_pipes = [other.pipe for other in self._workers if other.pipe is not None]
        worker.in_use -= set(worker.released)
        worker.released.clear()
        free = [slot for slot in range(worker.buffer.num_slots) if slot not in worker.in_use]
        steps = range(step, self._steps.stop, len(self._workers) * self._steps.step)
        worker.process = context.Process(
            target=_worker_main,
            args=(
                self._make,
                steps,
                child_pipe,
                trainer_pipes,
                SlotAllocator(worker.buffer, free),
                self._options.prefetch,
            ),
            name=f"data-worker-{worker.index}",
            daemon=True,
        )
        worker.process.start()
        child_pipe.close()

    def _take(self, worker: _Worker, step: int) -> T | WorkerError:
        """The result of the step that this worker owes next."""
        while True:
            assert worker.pipe is not None and worker.process is not None
            ready = connection.wait(
                [worker.pipe, worker.process.sentinel], timeout=self._options.timeout_s
            )
            if not ready:
                raise WorkerDied(
                    f"data worker {worker.index} has not finished step {step} in "
                    f"{self._options.timeout_s:g} s, it is at: {worker.buffer.last_report()}; "
                    "check that record and the storage, or raise data.batch_timeout_s"
                )
            try:
                if worker.pipe in ready or worker.pipe.poll():
                    return self._unpack(worker, *worker.pipe.recv())
            except (EOFError, OSError, pickle.UnpicklingError):
                worker.process.join()  # it died, perhaps in the middle of a message
            self._restart(worker, step)

    def _unpack(
        self, worker: _Worker, content: bytes, slot: int | None, spans: list[tuple[int, int]]
    ) -> T | WorkerError:
        worker.in_use -= set(worker.released)
        freed, worker.released = worker.released, []
        assert worker.pipe is not None
        try:
            worker.pipe.send(freed)  # this also allows the worker one more step
        except OSError:
            worker.released = freed  # it has made its last step and exited
        buffers: list[Bytes] = []
        if slot is not None:
            worker.in_use.add(slot)
            buffers = worker.buffer.views(slot, spans, worker.release)
        result: T | WorkerError = pickle.loads(content, buffers=buffers)
        return result

    def _restart(self, worker: _Worker, step: int) -> None:
        assert worker.process is not None and worker.pipe is not None
        worker.process.join()
        cause, activity = _describe_exit(worker.process.exitcode), worker.buffer.last_report()
        worker.pipe.close()
        worker.pipe = None
        if worker.died_at == step:
            raise WorkerDied(
                f"data worker {worker.index} {cause} twice at step {step}, at: {activity}; if "
                "memory ran out, lower data.workers or give the job more memory"
            )
        worker.died_at = step
        self._log(
            f"data worker {worker.index} {cause} at step {step}, at: {activity}; it is restarted "
            "at this step, nothing is lost"
        )
        self._start(worker, step)

    def _stop(self) -> None:
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()  # it ignores the signals that stop a trainer
                worker.process.join()
            if worker.pipe is not None:
                worker.pipe.close()


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with code {exitcode}"


# ------------------------------------------------------------------------------- in the worker


def _worker_main(
    make: Callable[[int, SlotAllocator], T],
    steps: range,
    pipe: Connection,
    trainer_pipes: list[Connection],
    slots: SlotAllocator,
    credit: int,
) -> None:
    """Runs in the worker: one step after the other; `credit` is how many more it may begin."""
    trainer = os.getppid()
    for trainer_pipe in trainer_pipes:  # an open copy here would hide the trainer's death
        trainer_pipe.close()
    # The trainer decides about stopping; schedulers signal its children as well.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        for step in steps:
            while not credit or pipe.poll():
                if pipe.poll(_PARENT_CHECK_S):
                    slots.free.extend(pipe.recv())
                    credit += 1
                elif os.getppid() != trainer:
                    return
            credit -= 1
            slots.begin_step()
            slots.buffer.report(f"step {step}")
            pipe.send(_pack(_run(make, step, slots), slots))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the trainer is gone


def _run(
    make: Callable[[int, SlotAllocator], T], step: int, slots: SlotAllocator
) -> T | WorkerError:
    try:
        return make(step, slots)
    except Exception as error:
        return WorkerError.capture(error, f"In the data worker, at step {step}")


def _pack(result: object, slots: SlotAllocator) -> tuple[bytes, int | None, list[tuple[int, int]]]:
    """(pickle, slot, spans of arrays in the slot); these arrays are left out of the pickle."""
    spans: list[tuple[int, int]] = []
    slot = slots.slot

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        """False: pickle leaves the buffer out."""
        array = np.frombuffer(buffer.raw(), dtype=np.uint8)
        offset = None if slot is None or not array.nbytes else slots.buffer.offset_in(slot, array)
        if offset is None:
            return True
        spans.append((offset, array.nbytes))
        return False

    content = pickle.dumps(result, protocol=5, buffer_callback=in_band)
    if slot is not None and not spans:
        slots.free.append(slot)
        slot = None
    return content, slot, spans
