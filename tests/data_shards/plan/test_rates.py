"""The order of the tasks: bounds, period, agreement with the rule written out in fractions."""

from fractions import Fraction
from math import lcm

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.plan.rates import MAX_PERIOD, TaskOrder, check_rates, prefix_bound
from data_shards.tasks import TASKS, Task

STAGE_1 = {Task.MSA: Fraction(2, 5), Task.ER: Fraction(1, 5), Task.FER: Fraction(2, 5)}
STAGE_2 = {
    Task.MSA: Fraction(1, 20),
    Task.ER: Fraction(19, 60),
    Task.ERI: Fraction(19, 60),
    Task.ECPE: Fraction(19, 60),
}

rate_vectors = (
    st.lists(st.integers(0, 40), min_size=5, max_size=5)
    .filter(any)
    .map(
        lambda weights: {
            task: Fraction(weight, sum(weights))
            for task, weight in zip(TASKS, weights, strict=True)
        }
    )
)


def rule(rates: dict[Task, Fraction], length: int) -> list[Task]:
    """The chairman assignment as the paper states it, in fractions."""
    rates = {task: rate for task, rate in rates.items() if rate}
    if len(rates) == 1:
        return [*rates] * length
    edge = Fraction(1, 2 * len(rates) - 2)
    counts = dict.fromkeys(rates, 0)
    order = []
    for k in range(1, length + 1):
        claims = {task: k * rate - counts[task] for task, rate in rates.items()}
        waits = {t: (1 - edge - claims[t]) / rates[t] for t in rates if claims[t] >= edge}
        order.append(min(waits, key=lambda task: waits[task]))
        counts[order[-1]] += 1
    return order


@settings(max_examples=60, deadline=None)
@given(rate_vectors)
def test_every_prefix_and_window_is_within_the_bound(rates: dict[Task, Fraction]) -> None:
    order = TaskOrder(rates)
    bound = prefix_bound(len(order.tasks))
    length = 2 * order.period
    for task in order.tasks:
        errors = [order.count(task, k) - k * rates[task] for k in range(length + 1)]
        assert max(map(abs, errors)) <= bound
        # A window's error is the difference of two prefix errors.
        assert max(errors) - min(errors) <= 2 * bound


@settings(max_examples=40, deadline=None)
@given(rate_vectors)
def test_the_order_is_the_rule(rates: dict[Task, Fraction]) -> None:
    order = TaskOrder(rates)
    length = order.period + 7
    assert [order.task_at(k) for k in range(length)] == rule(rates, length)


@settings(max_examples=40, deadline=None)
@given(rate_vectors, st.integers(0, 10**15))
def test_counts_and_tasks_agree_anywhere(rates: dict[Task, Fraction], position: int) -> None:
    order = TaskOrder(rates)
    assert order.period == lcm(*(rate.denominator for rate in rates.values()))
    before, after = order.counts(position), order.counts(position + 1)
    assert sum(before.values()) == position
    grown = [task for task in order.tasks if after[task] > before[task]]
    assert grown == [order.task_at(position)]
    assert order.count(order.tasks[0], position + order.period) - before[order.tasks[0]] == (
        order.period * rates[order.tasks[0]]
    )


def test_the_orders_of_the_paper_never_change() -> None:
    first = TaskOrder(STAGE_1)
    assert [first.task_at(k).value for k in range(5)] == ["msa", "fer", "er", "msa", "fer"]
    second = TaskOrder(STAGE_2)
    letters = "".join("mefic"[TASKS.index(second.task_at(k))] for k in range(60))
    assert letters == "eic" * 4 + "m" + "eic" * 6 + "m" + "eic" * 6 + "m" + "eic" * 3
    assert first.counts(15_000) == {Task.MSA: 6_000, Task.ER: 3_000, Task.FER: 6_000}
    assert [*second.counts(17_940).values()] == [897, 5_681, 5_681, 5_681]


def test_the_order_of_the_config_does_not_matter() -> None:
    assert TaskOrder(dict(reversed(STAGE_2.items()))).rates == TaskOrder(STAGE_2).rates


def test_one_task_takes_everything_and_a_zero_rate_nothing() -> None:
    order = TaskOrder({Task.ER: Fraction(1), Task.FER: Fraction(0)})
    assert order.tasks == (Task.ER,)
    assert order.counts(7) == {Task.ER: 7}
    assert prefix_bound(1) == 0


def test_a_large_period_is_quick_and_exact() -> None:
    rates = {Task.MSA: Fraction(1, MAX_PERIOD), Task.ER: Fraction(MAX_PERIOD - 1, MAX_PERIOD)}
    order = TaskOrder(rates)
    assert order.count(Task.MSA, MAX_PERIOD) == 1
    counts = np.array([order.count(Task.MSA, k) for k in range(0, MAX_PERIOD, 97)])
    wanted = np.arange(0, MAX_PERIOD, 97) / MAX_PERIOD
    assert np.abs(counts - wanted).max() <= 0.5


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({Task.ER: Fraction(1, 2)}, r"sum to exactly 1, but 1/2 = 1/2; 1/2 is missing"),
        ({}, r"sum to exactly 1, but there are none"),
        (
            {Task.ER: Fraction(-1, 2), Task.FER: Fraction(3, 2)},
            r"rate of er must not be negative, found -1/2",
        ),
        (
            {Task.ER: Fraction(1, 99_991), Task.FER: Fraction(99_990, 99_991)},
            None,
        ),
        (
            {Task.ER: Fraction(1, 100_003), Task.FER: Fraction(100_002, 100_003)},
            r"common denominator .* is at most 100000, here it is 100003",
        ),
    ],
)
def test_wrong_rates_are_named(rates: dict[Task, Fraction], message: str | None) -> None:
    if message is None:
        assert check_rates(rates) == rates
        return
    with pytest.raises(ValueError, match=message):
        check_rates(rates)
