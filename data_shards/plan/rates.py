"""Exact task mixing: which task is trained at position k of a stage.

The paper gives every task of a stage a sampling rate (section III-C, Fig. 3) and draws tasks at
random. Here the rates hold exactly.

In: the rates r(t) of a stage, fractions that sum to 1. Out: an endless periodic sequence of tasks.
With c(t, k) the occurrences of task t at the first k positions and m tasks with a positive rate,

    |c(t, k) - k r(t)| <= 1 - 1/(2m - 2)        for every t and k,

the smallest bound that can be met for all rates. The rule is the chairman assignment of R. Tijdeman
(The chairman assignment problem, Discrete Mathematics 32, 1980). Only integers are compared; a
table of one period answers every query in O(1).
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Final

import numpy as np
from numpy.typing import NDArray

from data_shards.tasks import TASKS, Task

MAX_PERIOD: Final = 100_000
"""Upper limit of the rates' common denominator, which is the length of the table."""


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
    """Most samples by which a count may differ from k r(t): 1 - 1/(2m-2), and 0 for m = 1."""
    return 1 - Fraction(1, 2 * num_tasks - 2) if num_tasks > 1 else Fraction(0)


class TaskOrder:
    """The periodic sequence of tasks for given rates.

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
        self._per_period = tuple(int(rate * self.period) for rate in self.rates.values())
        self._column = {task: column for column, task in enumerate(self.tasks)}
        self._sequence = chairman_sequence(self._per_period)
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
        column = self._column[task]
        periods, rest = divmod(length, self.period)
        return periods * self._per_period[column] + int(self._before[rest, column])

    def counts(self, length: int) -> dict[Task, int]:
        """The count of every task at the first `length` positions; they sum to `length`."""
        return {task: self.count(task, length) for task in self.tasks}


def chairman_sequence(shares: Sequence[int]) -> NDArray[np.int8]:
    """One period of Tijdeman's assignment, int8 [D]: element k is the index of the task at k.

    Args:
        shares: occurrences of each of the m tasks in a period; D is their sum, a task's rate is
            r = share / D.

    At position k (from 1), with c the occurrences of a task so far:

        claim    = k r - c
        eligible : claim >= 1/(2m-2)                  at least one task always is
        slack    = (1 - 1/(2m-2) - claim) / r         positions that the task can still wait

    The eligible task with the least slack takes the position, the first one on a tie. After D
    positions every k r is whole and every deviation below 1, so all claims are 0: the sequence has
    period D. Claims are scaled by (2m-2) D, so that all comparisons are between integers.
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
        for task, share in enumerate(shares):
            claims[task] += scale * share
            if claims[task] < period:  # not eligible
                continue
            # slack < least slack so far, multiplied out: both shares are positive.
            if (
                winner < 0
                or (limit - claims[task]) * shares[winner] < (limit - claims[winner]) * share
            ):
                winner = task
        assert winner >= 0, "the claims sum to 1, so one of them is at least 1/m"
        claims[winner] -= scale * period
        sequence[position] = winner
    assert not any(claims), "the sequence is not periodic"
    return sequence
