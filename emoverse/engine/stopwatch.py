"""Seconds that a device works, summed over several blocks, without making anybody wait.

In: blocks of code as a context. Out: their sum. A GPU works behind our back, so its own events are
the clock there; they are read after the step, when the device has finished anyway.
"""

import time

import torch


class Stopwatch:
    """Use `with watch:` around each block, then `watch.seconds()` once all of them are over."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._passed_s = 0.0
        self._begin_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._cuda:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._events.append(pair)
        else:
            self._begin_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._passed_s += time.perf_counter() - self._begin_s

    def seconds(self) -> float:
        """Sum of all blocks; waits for the last one."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._passed_s + sum(a.elapsed_time(b) for a, b in self._events) / 1000
