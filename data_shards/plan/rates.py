"""The order of the tasks: which task stands at position k, exactly by the rates.

In: the rates of a stage (fractions that sum to 1). Out: an endless periodic sequence of tasks in
which, after any k positions, each of m tasks has occurred k * rate times to within 1 - 1/(2m-2),
the smallest bound that holds for all rates. The rule is the chairman assignment of R. Tijdeman
(Discrete Mathematics 32, 1980). Integers only; one table of a period makes every question O(1).
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Final

import numpy as np
from numpy.typing import NDArray

from data_shards.tasks import TASKS, Task

MAX_PERIOD: Final = 100_000
"""Upper limit of the rates' common denominator: entries of the table."""


def check_rates(rates: Mapping[Task, Fraction]) -> dict[Task, Fraction]:
    """The positive rates in canonical order; a rate of 0 leaves the task out.

    The only check of a stage's rates together; the config calls it as well.

    Raises:
        ValueError: a negative rate, a sum that is not exactly 1, or a common denominator above
            MAX_PERIOD.
    """
    for task, rate in rates.items():
        if rate < 0:
            raise ValueError(f"the rate of {task} must not be negative, found {rate}")
    total = sum(rates.values(), Fraction(0))
    if total != 1:
        terms = " + ".join(str(rate) for rate in rates.values())
        found = f"but {terms} = {total}" if rates else "but there are none"
        gap = f"{1 - total} is missing" if total < 1 else f"{total - 1} is too much"
        raise ValueError(f"the rates of a stage sum to exactly 1, {found}; {gap}")
    positive = {task: rates[task] for task in TASKS if rates.get(task)}
    period = lcm(*(rate.denominator for rate in positive.values()))
    if period > MAX_PERIOD:
        raise ValueError(
            f"the common denominator of a stage's rates is at most {MAX_PERIOD}, here it is "
            f"{period}; write them over one simpler denominator"
        )
    return positive


def prefix_bound(num_tasks: int) -> Fraction:
    """How far any prefix may be from its rates, in samples: 1 - 1/(2m-2), 0 for one task."""
    return 1 - Fraction(1, 2 * num_tasks - 2) if num_tasks > 1 else Fraction(0)


class TaskOrder:
    """The periodic order of the tasks for given rates.

    Args:
        rates: task -> rate, summing to exactly 1; tasks with rate 0 never occur.

    Raises:
        ValueError: see `check_rates`.
    """

    def __init__(self, rates: Mapping[Task, Fraction]) -> None:
        self.rates = check_rates(rates)
        self.tasks: tuple[Task, ...] = tuple(self.rates)
        self.period = lcm(*(rate.denominator for rate in self.rates.values()))
        # Occurrences per period: rate * period, a whole number.
        self._share = tuple(int(rate * self.period) for rate in self.rates.values())
        self._place = {task: place for place, task in enumerate(self.tasks)}
        self._sequence = chairman_sequence(self._share)
        # _before[k, i]: occurrences of task i at the positions 0..k-1 of a period.
        self._before = np.zeros((self.period + 1, len(self.tasks)), dtype=np.int64)
        np.cumsum(
            self._sequence[:, None] == np.arange(len(self.tasks)), axis=0, out=self._before[1:]
        )

    def task_at(self, position: int) -> Task:
        """The task of a position, counted from 0."""
        return self.tasks[int(self._sequence[position % self.period])]

    def count(self, task: Task, length: int) -> int:
        """How often a task occurs at the first `length` positions."""
        place = self._place[task]
        periods, rest = divmod(length, self.period)
        return periods * self._share[place] + int(self._before[rest, place])

    def counts(self, length: int) -> dict[Task, int]:
        """The count of every task at the first `length` positions; they sum to `length`."""
        return {task: self.count(task, length) for task in self.tasks}


def chairman_sequence(shares: Sequence[int]) -> NDArray[np.int8]:
    """One period of the order: element k is the place of the task that takes position k.

    With D = sum(shares) a task's rate is share / D. At the k-th position (from 1) its claim is
    k * rate - count so far. Eligible is who claims at least 1/(2m-2); one always does. Its slack
    (1 - 1/(2m-2) - claim) / rate tells how many positions it can still wait before it breaks the
    bound. The eligible task with the least slack takes the position, the first one if several do.
    After D positions every bound is below 1 and every k * rate whole, so all claims are 0: the
    order has period D. Everything is scaled by (2m-2) * D, so that only integers are compared.
    """
    period = sum(shares)
    if len(shares) == 1:
        return np.zeros(period, dtype=np.int8)
    scale = 2 * len(shares) - 2
    limit = (scale - 1) * period
    claims = [0] * len(shares)
    sequence = np.empty(period, dtype=np.int8)
    for position in range(period):
        winner = -1
        for place, share in enumerate(shares):
            claims[place] += scale * share
            if claims[place] < period:
                continue
            # slack < best slack, multiplied out: both shares are positive.
            if (
                winner < 0
                or (limit - claims[place]) * shares[winner] < (limit - claims[winner]) * share
            ):
                winner = place
        assert winner >= 0, "the claims sum to 1, so one of them is at least 1/m"
        claims[winner] -= scale * period
        sequence[position] = winner
    assert not any(claims), "the order is not periodic"
    return sequence
