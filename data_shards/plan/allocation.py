"""Allocation: how many records of each class serve which task of which stage.

A class is the set of records that offer exactly the same tasks (a bit mask; at most 31 classes).
In: the records of each class, and how many each (stage, task) requests. Out: whether the requests
can be met, by how much they fall short, and how many records each class gives to each request.
Stages share no record, so feasibility depends only on the sum over the stages. It is P. Hall's
condition (On representatives of subsets, 1935): for every set of tasks, the records requested for
them must not exceed the records that offer at least one of them. With five tasks these are 31
inequalities, whatever the size of the corpus. Integers and fractions only; a pure function of the
counts. docs/rates.md, section 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from data_shards.tasks import TASKS, Task, bit, mask_of, tasks_in

Counts = Mapping[int, int]
"""Class mask -> number of records."""
Amounts = Mapping[Task, int]
"""Task -> number of records; a missing task means 0."""

TASK_SETS: Final = tuple(sorted(range(1, 1 << len(TASKS)), key=lambda s: (s.bit_count(), s)))
"""All non-empty sets of tasks as masks, small sets first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A set of tasks that are together short of records."""

    tasks: tuple[Task, ...]
    asked: int
    available: int

    def __str__(self) -> str:
        name = self.tasks[0] if len(self.tasks) == 1 else " + ".join(self.tasks) + " together"
        return f"{name}: {self.asked:,} records asked, {self.available:,} available"


def offering(counts: Counts, tasks: int) -> int:
    """Number of records that offer at least one task of the set."""
    return sum(records for mask, records in counts.items() if mask & tasks)


def total(amounts: Amounts, tasks: int) -> int:
    """Records requested for a set of tasks together."""
    return sum(amount for task, amount in amounts.items() if bit(task) & tasks)


def available(counts: Counts, held: Amounts, tasks: int) -> int:
    """Most records that a set of tasks can get while the `held` amounts are still served."""
    return min(
        offering(counts, others) - total(held, others)
        for others in TASK_SETS
        if others & tasks == tasks
    )


def is_feasible(counts: Counts, held: Amounts, asked: Amounts) -> bool:
    """Whether `asked` can be served in addition to `held` without using a record twice."""
    return all(
        total(held, tasks) + total(asked, tasks) <= offering(counts, tasks) for tasks in TASK_SETS
    )


def find_cuts(counts: Counts, held: Amounts, asked: Amounts) -> list[Cut]:
    """Every shortage: each set of tasks that lacks more records than all of its subsets do."""
    cuts: list[Cut] = []
    lacking: dict[int, int] = {}  # set -> most records that it or a subset lacks
    relevant = mask_of(task for task, amount in asked.items() if amount)
    for tasks in TASK_SETS:
        if tasks & ~relevant:
            continue
        subsets = (tasks & ~bit(task) for task in tasks_in(tasks))
        subsets_lack = max(lacking.get(subset, 0) for subset in subsets)
        records = available(counts, held, tasks)
        missing = total(asked, tasks) - records
        lacking[tasks] = max(subsets_lack, missing)
        if missing > subsets_lack:
            cuts.append(Cut(tasks=tasks_in(tasks), asked=total(asked, tasks), available=records))
    return cuts


def fair_shares(counts: Counts, held: Amounts, asked: Amounts) -> dict[Task, int]:
    """The most even way to serve less than `asked` in addition to `held`: task -> records.

    All tasks are filled in proportion to their requests until a set of tasks runs out of records;
    its tasks stop there, the others are filled further, up to their requests. So the scarcest task
    is served as well as possible, then the next one (lexicographic max-min of given / asked). The
    shares are rounded down; the records left over go one by one to the task that lost most.
    """
    limits = [(tasks, available(counts, held, tasks)) for tasks in TASK_SETS]
    goal = {task: Fraction(amount) for task, amount in asked.items() if amount}
    levels = _fill({bit(task): amount for task, amount in goal.items()}, limits)
    given = {task: int(levels[bit(task)]) for task in goal}
    by_loss = sorted(goal, key=lambda task: given[task] - levels[bit(task)])
    grown = True
    while grown:
        grown = False
        for task in by_loss:
            more = {**given, task: given[task] + 1}
            if more[task] <= asked[task] and is_feasible(counts, held, more):
                given, grown = more, True
    return {task: given.get(task, 0) for task in asked}


def allocate(counts: Counts, demands: Sequence[tuple[Task, int]]) -> list[dict[int, int]]:
    """Serve every demand (task, amount) exactly; element i maps class -> records of demand i.

    One demand after the other takes from its task's classes in proportion to what is left of them,
    as a random choice would, but never so many that a set of tasks is left with fewer records than
    the later demands request. So early stages spare scarce records wherever they have a choice.
    The demands must be feasible (`is_feasible`).
    """
    left = dict(counts)
    later: dict[Task, int] = {}
    for task, amount in demands:
        later[task] = later.get(task, 0) + amount
    assert is_feasible(counts, {}, later), "call find_cuts first"
    allocated = []
    for task, amount in demands:
        later[task] -= amount
        share = _take(left, later, task, amount)
        left = {mask: records - share.get(mask, 0) for mask, records in left.items()}
        allocated.append(share)
    return allocated


def _take(left: Counts, later: Amounts, task: Task, amount: int) -> dict[int, int]:
    """Class -> records for one demand, as evenly over the classes as the later demands allow."""
    goal = {mask: records for mask, records in left.items() if mask & bit(task) and records}
    if not amount:
        return {}
    limits = [(tasks, offering(left, tasks) - total(later, tasks)) for tasks in TASK_SETS]
    limits.append((bit(task), amount))  # every class here offers the task: the sum is the amount
    levels = _fill({mask: Fraction(records) for mask, records in goal.items()}, limits)
    share = {mask: int(level) for mask, level in levels.items()}
    by_loss = sorted(share, key=lambda mask: (share[mask] - levels[mask], mask))
    # The feasible shares form a polymatroid: any share below the amount can grow by one record.
    while sum(share.values()) < amount:
        share[next(m for m in by_loss if _may_grow(share, m, goal, limits))] += 1
    return {mask: records for mask, records in share.items() if records}


def _may_grow(share: Counts, mask: int, goal: Counts, limits: Sequence[tuple[int, int]]) -> bool:
    return share[mask] < goal[mask] and all(
        offering(share, tasks) < limit for tasks, limit in limits if tasks & mask
    )


def _fill(goal: Mapping[int, Fraction], limits: Sequence[tuple[int, int]]) -> dict[int, Fraction]:
    """Water filling: raise all levels as one fraction of their goals until limits stop them.

    A limit (tasks, most) bounds the sum of the levels whose mask intersects `tasks`. Levels that
    are stopped stay, the others rise further, up to their goals.
    """
    levels = dict.fromkeys(goal, Fraction(0))
    rising = {mask for mask in goal if goal[mask] > 0}
    while rising:
        height = Fraction(1)
        for tasks, most in limits:
            speed = _sum_of({mask: goal[mask] for mask in rising}, tasks)
            if speed:
                stopped = {mask: levels[mask] for mask in goal if mask not in rising}
                height = min(height, (most - _sum_of(stopped, tasks)) / speed)
        for mask in rising:
            levels[mask] = height * goal[mask]
        if height == 1:
            break
        full = [tasks for tasks, most in limits if _sum_of(levels, tasks) == most]
        rising = {mask for mask in rising if not any(mask & tasks for tasks in full)}
    return levels


def _sum_of(levels: Mapping[int, Fraction], tasks: int) -> Fraction:
    """Sum of the levels of the classes that offer a task of the set."""
    return sum((level for mask, level in levels.items() if mask & tasks), Fraction(0))


def reassign(shares: Mapping[Task, Counts], wanted: Amounts) -> dict[Task, dict[int, int]] | None:
    """Other amounts per task from the same records, with as few changes of task as possible.

    Args:
        shares: task -> class -> records.
        wanted: task -> records, with the same sum as the shares.

    Returns:
        The new shares, task -> class -> records; None if the records do not offer these tasks.
    """
    new = {task: dict(share) for task, share in shares.items()}
    while True:
        surplus = {task: sum(share.values()) - wanted[task] for task, share in new.items()}
        if not any(surplus.values()):
            return new
        path = _shortest_path(new, surplus)
        if path is None:
            return None
        for giver, mask, taker in path:
            new[giver][mask] -= 1
            new[taker][mask] = new[taker].get(mask, 0) + 1


def _shortest_path(
    shares: Mapping[Task, Counts], surplus: Amounts
) -> list[tuple[Task, int, Task]] | None:
    """Steps (giver, class, taker) from a task with a surplus to one that lacks records."""
    queue = [task for task, records in surplus.items() if records > 0]
    paths: dict[Task, list[tuple[Task, int, Task]]] = {task: [] for task in queue}
    for giver in queue:  # breadth first: the queue grows during the loop
        if surplus[giver] < 0:
            return paths[giver]
        for mask in sorted(shares[giver]):
            for taker in shares:
                if shares[giver][mask] and mask & bit(taker) and taker not in paths:
                    paths[taker] = [*paths[giver], (giver, mask, taker)]
                    queue.append(taker)
    return None
