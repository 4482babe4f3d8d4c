"""A function over many items in several processes: order, errors, kills, an early end."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from data_shards.build.worker_pool import ordered_map


def slow_square(number: int) -> int:
    time.sleep(0.02 * (number % 3 == 0))
    return number * number


def test_results_come_in_order_and_nothing_is_read_far_ahead() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(200):
            taken.append(number)
            yield number

    results = ordered_map(slow_square, source(), workers=2, chunk=4)
    assert next(results) == 0
    assert len(taken) <= 2 * 3 * 4 + 4
    assert list(results) == [n * n for n in range(1, 200)]


def test_errors_and_killed_workers_are_told() -> None:
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(lambda n: 1 // (n - 5), range(20), workers=2))
    with pytest.raises(RuntimeError, match="worker process was killed, perhaps because memory ran"):
        list(ordered_map(lambda n: os.kill(os.getpid(), signal.SIGKILL), range(8), workers=2))


def killed_while_sending(number: int) -> bytes:
    threading.Timer(0.01 * (number % 8), os.kill, (os.getpid(), signal.SIGKILL)).start()
    return bytes(30_000_000)


def test_a_worker_killed_in_the_middle_of_a_result_is_told() -> None:
    for _ in range(3):
        with pytest.raises(RuntimeError, match="worker process was killed"):
            list(ordered_map(killed_while_sending, range(32), workers=2, chunk=1))


def test_an_error_comes_with_the_traceback_of_the_worker() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        list(ordered_map(lambda n: n // 0, range(4), workers=2))
    assert "in <lambda>" in caught.value.__notes__[0]


def test_results_that_nobody_wants_do_not_keep_the_program(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = (
        "from data_shards.build.worker_pool import ordered_map; from itertools import count\n"
        "results = ordered_map(str, count(), workers=2); print(next(results), next(results))"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n", "")
