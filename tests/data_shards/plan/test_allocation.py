"""The transport of records to stages and tasks, against brute force on small corpora."""

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.plan.allocation import (
    TASK_SETS,
    Amounts,
    Counts,
    allocate,
    available,
    fair_shares,
    find_cuts,
    is_feasible,
    reassign,
)
from data_shards.tasks import TASKS, Task, bit, mask_of

PAPER = {
    mask_of([Task.MSA, Task.ER, Task.FER]): 15_870 - 4_839,
    mask_of([Task.MSA, Task.ER, Task.FER, Task.ERI]): 4_839,
    mask_of([Task.MSA, Task.ER]): 9_989,
    mask_of([Task.ECPE]): 7_081,
}
STAGE_1 = {Task.MSA: 6_000, Task.ER: 3_000, Task.FER: 6_000}
STAGE_2 = {Task.MSA: 897, Task.ER: 5_681, Task.ERI: 5_681, Task.ECPE: 5_681}

corpora = st.dictionaries(st.integers(1, 31), st.integers(0, 9), min_size=1, max_size=7)
amounts = st.fixed_dictionaries({task: st.integers(0, 7) for task in TASKS})


def can_serve(counts: Counts, asked: Amounts) -> bool:
    """Matching of single records to single requests by augmenting paths."""
    requests = [task for task, amount in asked.items() for _ in range(amount)]
    records = [mask for mask, number in counts.items() for _ in range(number)]
    holder: dict[int, int] = {}

    def serve(request: int, seen: set[int]) -> bool:
        for record, mask in enumerate(records):
            if mask & bit(requests[request]) and record not in seen:
                seen.add(record)
                if record not in holder or serve(holder[record], seen):
                    holder[record] = request
                    return True
        return False

    return all(serve(request, set()) for request in range(len(requests)))


@settings(max_examples=120, deadline=None)
@given(corpora, amounts, amounts)
def test_feasible_means_that_a_matching_exists(
    counts: Counts, held: Amounts, asked: Amounts
) -> None:
    both = {task: held[task] + asked[task] for task in TASKS}
    assert is_feasible(counts, held, asked) == can_serve(counts, both)
    if is_feasible(counts, {}, held):
        assert (not find_cuts(counts, held, asked)) == is_feasible(counts, held, asked)
        for task in TASKS:
            most = available(counts, held, bit(task))
            assert is_feasible(counts, held, {task: most})
            assert not is_feasible(counts, held, {task: most + 1})


@settings(max_examples=120, deadline=None)
@given(corpora, st.lists(st.tuples(st.sampled_from(TASKS), st.integers(0, 6)), max_size=9))
def test_allocation_serves_every_demand_exactly(
    counts: Counts, wishes: list[tuple[Task, int]]
) -> None:
    demands: list[tuple[Task, int]] = []
    for wish in wishes:
        total: dict[Task, int] = {}
        for task, amount in [*demands, wish]:
            total[task] = total.get(task, 0) + amount
        if is_feasible(counts, {}, total):
            demands.append(wish)
    shares = allocate(counts, demands)
    for (task, amount), share in zip(demands, shares, strict=True):
        assert sum(share.values()) == amount
        assert all(mask & bit(task) and number > 0 for mask, number in share.items())
    for mask, number in counts.items():
        assert sum(share.get(mask, 0) for share in shares) <= number


def test_a_choice_spares_the_scarce_records_and_is_even_otherwise() -> None:
    plain, scarce = mask_of([Task.MSA]), mask_of([Task.MSA, Task.ERI])
    counts = {plain: 100, scarce: 50}
    assert allocate(counts, [(Task.MSA, 90), (Task.ERI, 50)]) == [{plain: 90}, {scarce: 50}]
    assert allocate(counts, [(Task.MSA, 90), (Task.ERI, 10)])[0] == {plain: 60, scarce: 30}
    # 110 of 150 in proportion would leave 14 for ERI, which asks 20.
    assert allocate(counts, [(Task.MSA, 110), (Task.ERI, 20)])[0] == {plain: 80, scarce: 30}


def test_the_paper_is_short_of_two_sets_of_tasks() -> None:
    assert is_feasible(PAPER, {}, STAGE_1)
    cuts = find_cuts(PAPER, STAGE_1, STAGE_2)
    assert [str(cut) for cut in cuts] == [
        "eri: 5,681 records asked, 4,839 available",
        "msa + er + eri together: 12,259 records asked, 10,859 available",
    ]


def test_the_shares_of_the_paper_are_even() -> None:
    shares = fair_shares(PAPER, STAGE_1, STAGE_2)
    assert shares == {Task.MSA: 821, Task.ER: 5_199, Task.ERI: 4_839, Task.ECPE: 5_681}
    assert sum(shares.values()) == 4_839 + 6_020 + 5_681


@settings(max_examples=80, deadline=None)
@given(corpora, amounts, amounts)
def test_fair_shares_cannot_be_improved(counts: Counts, held: Amounts, asked: Amounts) -> None:
    if not is_feasible(counts, {}, held):
        return
    shares = fair_shares(counts, held, asked)
    assert is_feasible(counts, held, shares)
    for task in TASKS:
        assert 0 <= shares[task] <= asked[task]
        more = {**shares, task: shares[task] + 1}
        assert shares[task] == asked[task] or not is_feasible(counts, held, more)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.integers(1, 7), st.integers(0, 6), min_size=1, max_size=4),
    st.fixed_dictionaries({task: st.integers(1, 6) for task in TASKS[:3]}),
)
def test_the_scarcest_task_gets_as_much_as_it_can(counts: Counts, asked: Amounts) -> None:
    """No feasible amounts have a larger least share, up to rounding by one record."""
    shares = fair_shares(counts, {}, asked)
    least = min(Fraction(shares[task] + 1, asked[task]) for task in asked)
    for chosen in product(*(range(amount + 1) for amount in asked.values())):
        other = dict(zip(asked, chosen, strict=True))
        if is_feasible(counts, {}, other):
            assert min(Fraction(other[task], asked[task]) for task in asked) <= least


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.integers(1, 15), st.integers(1, 5), min_size=1, max_size=5),
    st.lists(st.integers(0, 10**6), min_size=25, max_size=25),
    st.lists(st.integers(0, 3), min_size=25, max_size=25),
)
def test_reassigning_keeps_the_records_and_hits_the_amounts(
    counts: Counts, first: list[int], second: list[int]
) -> None:
    tasks = TASKS[:4]
    shares: dict[Task, dict[int, int]] = {task: {} for task in tasks}
    draws = iter(first)
    for mask, number in counts.items():
        for _ in range(number):
            offered = [task for task in tasks if mask & bit(task)]
            task = offered[next(draws) % len(offered)]
            shares[task][mask] = shares[task].get(mask, 0) + 1
    records = sum(counts.values())
    wanted = dict.fromkeys(tasks, 0)
    for _, draw in zip(range(records), second, strict=False):
        wanted[tasks[draw]] += 1
    new = reassign(shares, wanted)
    assert (new is not None) == is_feasible(counts, {}, wanted)
    if new is None:
        return
    assert {task: sum(new[task].values()) for task in tasks} == wanted
    for mask, number in counts.items():
        assert sum(new[task].get(mask, 0) for task in tasks) == number
        assert all(mask & bit(task) for task in tasks if new[task].get(mask, 0))
    if wanted == {task: sum(shares[task].values()) for task in tasks}:
        assert new == shares


def test_task_sets_are_all_sets() -> None:
    assert sorted(TASK_SETS) == list(range(1, 32))
    sizes = [tasks.bit_count() for tasks in TASK_SETS]
    assert sizes == sorted(sizes)


def test_allocation_of_the_impossible_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="find_cuts"):
        allocate({bit(Task.ER): 1}, [(Task.ER, 2)])
