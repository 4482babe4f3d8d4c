"""Data workers and their shared memory: order, backpressure, reuse, and every way to die."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from emoverse.data.shared_memory import SharedBuffer, SlotAllocator
from emoverse.data.workers import PoolOptions, WorkerDied, WorkerPool

SHAPE = (2, 8, 8, 3)
BYTES = int(np.prod(SHAPE))


def frames(step: int, slots: SlotAllocator) -> dict[str, object]:
    """A step's number and two arrays that are full of it."""
    arrays = [slots.allocate(SHAPE) for _ in range(2)]
    for number, array in enumerate(arrays):
        array[:] = (step + number) % 256
    return {"step": step, "frames": arrays, "small": np.arange(step)}


def pool_of(
    steps: int,
    workers: int,
    make: Callable[[int, SlotAllocator], object] = frames,
    *,
    step_bytes: int = 2 * BYTES,
    **options: float,
) -> WorkerPool[dict[str, object]]:
    logged: list[str] = options.pop("logged", [])  # type: ignore[arg-type]
    chosen = PoolOptions(workers=workers, step_bytes=step_bytes, **options)  # type: ignore[arg-type]
    return WorkerPool(make, range(3, 3 + steps), chosen, log=logged.append)  # type: ignore[arg-type]


def check(result: dict[str, object], step: int) -> None:
    assert result["step"] == step
    first, second = result["frames"]  # type: ignore[misc]
    assert (first == step % 256).all() and (second == (step + 1) % 256).all()
    assert len(result["small"]) == step  # type: ignore[arg-type]


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("step_bytes", [2 * BYTES + 64, BYTES + 64, 0])
def test_results_come_in_order_whatever_the_room(workers: int, step_bytes: int) -> None:
    """Both arrays in shared memory, one of them, or none."""
    for steps in (1, 2, 40):
        results = iter(pool_of(steps, workers, step_bytes=step_bytes))
        for step in range(3, 3 + steps):
            check(next(results), step)
        assert list(results) == []
    assert list(pool_of(0, workers)) == []


def test_memory_is_used_again_and_never_while_in_use() -> None:
    """Few places for many steps; whoever keeps arrays keeps them unchanged, all of them even."""
    places: dict[int, int] = {}
    kept = []
    for step, result in enumerate(pool_of(60, 2, step_bytes=4096), 3):
        check(result, step)
        first = result["frames"][0]  # type: ignore[index]
        places[address(first)] = places.get(address(first), 0) + 1
        if step % 10 == 0:
            kept.append((step, torch.from_numpy(first)))
    for step, tensor in kept:
        assert (tensor == step % 256).all()
    assert len(places) < 40 and max(places.values()) > 3
    everything = list(pool_of(40, 2, step_bytes=4096))
    for step, result in enumerate(everything, 3):
        check(result, step)


def test_a_result_is_a_view_of_the_buffer() -> None:
    buffer = SharedBuffer(2, 10_000)
    slots = SlotAllocator(buffer, [1])
    slots.begin_step()
    array = slots.allocate((100,))
    array[:] = 7
    assert buffer.offset_in(1, array) == 0 and buffer.offset_in(0, array) is None
    assert buffer.offset_in(1, np.zeros(3, np.uint8)) is None
    released: list[int] = []
    (view,) = buffer.views(1, [(0, 100)], released.append)
    tensor = torch.from_numpy(np.frombuffer(view, np.uint8))
    array[5] = 9
    assert tensor[5] == 9
    del view
    gc.collect()
    assert released == []
    del tensor
    gc.collect()
    assert released == [1]
    # No room left, no slot left, an empty array: ordinary memory.
    assert buffer.offset_in(1, slots.allocate((buffer.slot_bytes,))) is None
    slots.begin_step()
    assert slots.slot is None and buffer.offset_in(0, slots.allocate((5,))) is None
    buffer.report("x" * 10_000)
    assert set(buffer.last_report()) == {"x"} and len(buffer.last_report()) < 4096
    buffer.report("short")
    assert buffer.last_report() == "short"


def test_workers_stay_a_bounded_way_ahead(tmp_path: Path) -> None:
    def make(step: int, slots: SlotAllocator) -> dict[str, object]:
        (tmp_path / str(step)).touch()
        return frames(step, slots)

    results = iter(pool_of(50, 2, make, prefetch=3))
    for taken in range(1, 6):
        next(results)
        time.sleep(0.15)
        assert len(list(tmp_path.iterdir())) <= taken + 2 * 3
    results.close()  # type: ignore[attr-defined]


def kill_at(
    steps: set[int], marker: Path | None = None
) -> Callable[[int, SlotAllocator], dict[str, object]]:
    def make(step: int, slots: SlotAllocator) -> dict[str, object]:
        if step in steps and (marker is None or not (marker / str(step)).exists()):
            if marker is not None:
                (marker / str(step)).touch()
            slots.buffer.report(f"record {step}")
            os.kill(os.getpid(), signal.SIGKILL)
        return frames(step, slots)

    return make


@pytest.mark.promise(2)
def test_killed_workers_begin_again_where_they_were(tmp_path: Path) -> None:
    logged: list[str] = []
    make = kill_at({3, 4, 9, 10, 22}, tmp_path)
    kept = list(pool_of(20, 2, make, logged=logged))  # type: ignore[arg-type]
    for step, result in enumerate(kept, 3):  # what was in use survived the new workers
        check(result, step)
    assert [text.split(";")[0] for text in logged] == [
        "data worker 0 was killed by SIGKILL at step 3, at: record 3",
        "data worker 1 was killed by SIGKILL at step 4, at: record 4",
        "data worker 0 was killed by SIGKILL at step 9, at: record 9",
        "data worker 1 was killed by SIGKILL at step 10, at: record 10",
        "data worker 1 was killed by SIGKILL at step 22, at: record 22",
    ]


def test_a_step_that_kills_twice_is_an_error() -> None:
    results = iter(pool_of(20, 2, kill_at({6})))
    for step in (3, 4, 5):
        check(next(results), step)
    with pytest.raises(WorkerDied, match="1 was killed by SIGKILL twice at step 6, at: record 6;"):
        next(results)
    assert not multiprocessing.active_children()


@pytest.mark.promise(2)
def test_a_worker_killed_from_outside_at_any_time() -> None:
    """At whatever it is doing: between steps, in the middle of a message, waiting."""
    for delay in (0.0, 0.002, 0.01, 0.05):
        results = iter(pool_of(30, 1, step_bytes=0))  # everything through the pipe
        check(next(results), 3)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        time.sleep(delay)
        os.kill(worker.pid, signal.SIGKILL)
        for step in range(4, 33):
            check(next(results), step)
        assert list(results) == []


@pytest.mark.promise(2)
def test_a_worker_that_hangs_is_an_error_that_names_the_record() -> None:
    def make(step: int, slots: SlotAllocator) -> dict[str, object]:
        if step == 4:
            slots.buffer.report("record clip_7 in shard-000001.tar, position 12")
            time.sleep(60)
        return frames(step, slots)

    results = iter(pool_of(9, 2, make, timeout_s=2))
    check(next(results), 3)
    began = time.monotonic()
    with pytest.raises(
        WorkerDied,
        match=r"1 has not finished step 4 in 2 s, it is at: record clip_7 in shard-000001.tar",
    ):
        next(results)
    assert time.monotonic() - began < 50  # not the sixty seconds that it sleeps
    assert not multiprocessing.active_children()


def test_a_worker_that_leaves_is_noticed() -> None:
    def make(step: int, slots: SlotAllocator) -> dict[str, object]:
        if step == 5:
            os._exit(3)
        return frames(step, slots)

    with pytest.raises(WorkerDied, match="ended with code 3 twice at step 5"):
        list(pool_of(9, 1, make))


PROGRAM = """
import os, sys, time
from emoverse.data.workers import PoolOptions, WorkerPool
results = iter(WorkerPool(lambda step, slots: bytes(10**6), range(99), PoolOptions(workers=2)))
next(results)
import multiprocessing
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


def test_workers_do_not_outlive_a_killed_trainer() -> None:
    """Blocked in the middle of a large message, or waiting: the pipe tells them."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        trainer.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(alive(pid) for pid in workers):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "State:\tZ" not in status
