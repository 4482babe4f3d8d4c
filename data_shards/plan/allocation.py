"""How many records of each kind serve which task of which stage: an exact integer transport.

A *class* is the set of records that offer exactly the same tasks (a bit mask, at most 31 of them).
In: how many records each class holds and how many each (stage, task) asks. Out: whether it can be
done, by how much it falls short, and how many records each class gives to whom. Stages share no
record, so for the question "can it be done" only the sum over the stages counts, and the answer is
P. Hall's condition: for every set of tasks, what is asked of them together must not exceed the
records that offer at least one of them. With five tasks these are 31 inequalities, for any corpus.
Integers and fractions only; a pure function of the counts.
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
    return sum(number for mask, number in counts.items() if mask & tasks)


def total(amounts: Amounts, tasks: int) -> int:
    """What is asked of a set of tasks together."""
    return sum(amount for task, amount in amounts.items() if bit(task) & tasks)


def available(counts: Counts, held: Amounts, tasks: int) -> int:
    """Most records that a set of tasks can have while the `held` amounts are still served."""
    return min(
        offering(counts, others) - total(held, others)
        for others in TASK_SETS
        if others & tasks == tasks
    )


def is_feasible(counts: Counts, held: Amounts, asked: Amounts) -> bool:
    """Can `asked` be served beside `held`, no record twice?"""
    return all(
        total(held, tasks) + total(asked, tasks) <= offering(counts, tasks) for tasks in TASK_SETS
    )


def find_cuts(counts: Counts, held: Amounts, asked: Amounts) -> list[Cut]:
    """Every shortage: each set of tasks that lacks more than the sets inside it; empty if none."""
    cuts: list[Cut] = []
    lacking: dict[int, int] = {}  # set -> most that it or a set inside it lacks
    relevant = mask_of(task for task, amount in asked.items() if amount)
    for tasks in TASK_SETS:
        if tasks & ~relevant:
            continue
        smaller = (tasks & ~bit(task) for task in tasks_in(tasks))
        inside = max(lacking.get(part, 0) for part in smaller)
        there = available(counts, held, tasks)
        missing = total(asked, tasks) - there
        lacking[tasks] = max(inside, missing)
        if missing > inside:
            cuts.append(Cut(tasks=tasks_in(tasks), asked=total(asked, tasks), available=there))
    return cuts


def fair_shares(counts: Counts, held: Amounts, asked: Amounts) -> dict[Task, int]:
    """The most even way to serve less than asked, beside `held`.

    All tasks are filled in proportion to what they ask until a set of tasks runs out of records;
    its tasks stop there and the others fill on, up to what they ask. So the scarcest task is served
    as well as it can be, then the next one (lexicographic max-min of given / asked). Whole numbers:
    rounded down, then the left-over records one by one to the task that lost most by rounding.
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
    """Serve every demand (task, amount); element i maps class -> records given to demand i.

    One demand after the other takes its task's classes in proportion to what is left of them, as a
    random choice would, except where a later demand needs them: no set of tasks is left with fewer
    records than the demands to come ask of it. So the early stages leave the scarce records alone
    as far as they have a choice, and every demand is served exactly.
    """
    left = dict(counts)
    to_come: dict[Task, int] = {}
    for task, amount in demands:
        to_come[task] = to_come.get(task, 0) + amount
    assert is_feasible(counts, {}, to_come), "ask find_cuts first"
    taken = []
    for task, amount in demands:
        to_come[task] -= amount
        share = _take(left, to_come, task, amount)
        left = {mask: number - share.get(mask, 0) for mask, number in left.items()}
        taken.append(share)
    return taken


def _take(left: Counts, to_come: Amounts, task: Task, amount: int) -> dict[int, int]:
    """Class -> records for one demand, as evenly over the classes as the demands to come allow."""
    goal = {mask: number for mask, number in left.items() if mask & bit(task) and number}
    if not amount:
        return {}
    limits = [(tasks, offering(left, tasks) - total(to_come, tasks)) for tasks in TASK_SETS]
    limits.append((bit(task), amount))  # every class here offers the task: the sum is the amount
    levels = _fill({mask: Fraction(number) for mask, number in goal.items()}, limits)
    share = {mask: int(level) for mask, level in levels.items()}
    by_loss = sorted(share, key=lambda mask: (share[mask] - levels[mask], mask))
    # The sets that can be taken form a polymatroid: any filling that is not full can grow by one.
    while sum(share.values()) < amount:
        share[next(m for m in by_loss if _may_grow(share, m, goal, limits))] += 1
    return {mask: number for mask, number in share.items() if number}


def _may_grow(share: Counts, mask: int, goal: Counts, limits: Sequence[tuple[int, int]]) -> bool:
    return share[mask] < goal[mask] and all(
        offering(share, tasks) < limit for tasks, limit in limits if tasks & mask
    )


def _fill(goal: Mapping[int, Fraction], limits: Sequence[tuple[int, int]]) -> dict[int, Fraction]:
    """Raise all levels together, as one fraction of their goals, until a limit stops some of them.

    A limit (tasks, most) holds for the sum of the levels whose mask meets `tasks`; what is stopped
    stays, the others rise on, up to their goals.
    """
    levels = dict.fromkeys(goal, Fraction(0))
    rising = {mask for mask in goal if goal[mask] > 0}
    while rising:
        height = Fraction(1)
        for tasks, most in limits:
            speed = _meeting({mask: goal[mask] for mask in rising}, tasks)
            if speed:
                stopped = {mask: levels[mask] for mask in goal if mask not in rising}
                height = min(height, (most - _meeting(stopped, tasks)) / speed)
        for mask in rising:
            levels[mask] = height * goal[mask]
        if height == 1:
            break
        full = [tasks for tasks, most in limits if _meeting(levels, tasks) == most]
        rising = {mask for mask in rising if not any(mask & tasks for tasks in full)}
    return levels


def _meeting(levels: Mapping[int, Fraction], tasks: int) -> Fraction:
    return sum((level for mask, level in levels.items() if mask & tasks), Fraction(0))


def reassign(shares: Mapping[Task, Counts], wanted: Amounts) -> dict[Task, dict[int, int]] | None:
    """Other amounts per task from the same records, with as few changes of task as can be.

    Args:
        shares: task -> class -> records.
        wanted: task -> records, with the same sum as the shares.

    Returns:
        The new shares; None if the records do not offer the tasks for it.
    """
    new = {task: dict(share) for task, share in shares.items()}
    while True:
        over = {task: sum(share.values()) - wanted[task] for task, share in new.items()}
        if not any(over.values()):
            return new
        path = _shortest_path(new, [task for task, more in over.items() if more > 0], over)
        if path is None:
            return None
        for giver, mask, taker in path:
            new[giver][mask] -= 1
            new[taker][mask] = new[taker].get(mask, 0) + 1


def _shortest_path(
    shares: Mapping[Task, Counts], starts: Sequence[Task], over: Amounts
) -> list[tuple[Task, int, Task]] | None:
    """Steps (giver, class, taker) from a task with too many records to one with too few."""
    paths: dict[Task, list[tuple[Task, int, Task]]] = {task: [] for task in starts}
    queue = list(starts)
    for giver in queue:  # grows while it is walked: breadth first
        if over[giver] < 0:
            return paths[giver]
        for mask in sorted(shares[giver]):
            for taker in shares:
                if shares[giver][mask] and mask & bit(taker) and taker not in paths:
                    paths[taker] = [*paths[giver], (giver, mask, taker)]
                    queue.append(taker)
    return None
