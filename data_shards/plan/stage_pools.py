"""What each stage gets of the corpus: its number of samples, and the records of each task.

In: the stages, and how many records each class of the corpus holds. Out: per stage the samples of
an epoch, the records that each task owns, and who serves the few samples by which epochs differ;
or one ValueError that names every shortage of every stage. Earlier stages are served first, but
only in numbers: which records they take is decided for all stages together (allocate.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil, gcd
from typing import Literal

from data_shards.plan.allocation import (
    allocate,
    available,
    fair_shares,
    find_cuts,
    is_feasible,
    offering,
    reassign,
)
from data_shards.plan.rates import TaskOrder, prefix_bound
from data_shards.tasks import TASKS, Task, bit

Shortage = Literal["error", "repeat", "shrink"]
EpochTasks = Literal["keep", "redraw"]
Shares = Mapping[Task, Mapping[int, int]]
"""Task -> class -> number of records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """One stage as the config states it; its pool is either `take` or `rest_of`."""

    name: str
    rates: tuple[tuple[Task, Fraction], ...]  # share of the samples per task; sum exactly 1
    take: int | None = None  # samples per epoch, one record each
    rest_of: tuple[str, ...] = ()  # without take: all the records that these stages leave
    epochs: int = 1
    shortage: Shortage = "error"
    epoch_tasks: EpochTasks = "keep"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """What one stage gets."""

    asked: int  # samples per epoch before the shortage policy
    samples: int  # samples per epoch
    own: Mapping[Task, int]  # records that serve the task in every epoch
    spare: Mapping[Task, int] = field(default_factory=dict)  # ... only where an epoch needs more
    shifts: tuple[Shares, ...] = ()  # per epoch who serves what, where records must change task
    repeats: bool = False  # records come again within an epoch

    @property
    def demands(self) -> list[tuple[Task, int]]:
        """What it asks of the corpus, in records: own, then spare."""
        return [*self.own.items(), *self.spare.items()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Supply:
    """The corpus as a stage finds it."""

    counts: Mapping[int, int]  # class -> records
    earlier: tuple[tuple[Task, int], ...] = ()  # demands of the stages settled before

    @property
    def held(self) -> dict[Task, int]:
        """Records that the earlier stages hold, per task."""
        held = dict.fromkeys(TASKS, 0)
        for task, amount in self.earlier:
            held[task] += amount
        return held

    @property
    def left(self) -> int:
        """Records that the earlier stages do not hold."""
        return sum(self.counts.values()) - sum(amount for _, amount in self.earlier)

    def available(self, task: Task) -> int:
        """Most records that a task can have beside the earlier stages."""
        return available(self.counts, self.held, bit(task))


def settle_pools(
    counts: Mapping[int, int], specs: Sequence[StageSpec], orders: Mapping[str, TaskOrder]
) -> dict[str, tuple[Supply, Pool]]:
    """What every stage found and got, one after the other.

    Args:
        specs: in `settling_order`.

    Raises:
        ValueError: all shortages of all stages, one after the other.
    """
    settled: dict[str, tuple[Supply, Pool]] = {}
    problems: list[str] = []
    supply = Supply(counts=counts)
    for spec in specs:
        pool, problem = _settle(supply, spec, orders[spec.name])
        settled[spec.name] = supply, pool
        supply = Supply(counts=counts, earlier=(*supply.earlier, *pool.demands))
        if problem:
            problems.append(f"stages.{spec.name}: {problem}")
    if problems:
        raise ValueError("\n".join(problems))
    return settled


def _settle(supply: Supply, spec: StageSpec, order: TaskOrder) -> tuple[Pool, str]:
    """The pool of a stage; with a problem it is only there to find the next stages' problems."""
    asked = supply.left if spec.take is None else spec.take
    empty = Pool(asked=asked, samples=0, own={})
    if not supply.left:
        return empty, "its pool is empty: the other stages take every record; let them take fewer"
    missing = [task for task in order.tasks if not supply.available(task)]
    if missing:
        found = ", ".join(f"{task} {offering(supply.counts, bit(task)):,}" for task in TASKS)
        return empty, (
            f"no record is left that offers {', '.join(missing)} (records in the shards: {found}); "
            "set such a rate to 0, add records, or let the other stages take fewer"
        )
    if pool := exact_pool(supply, spec, order, asked):
        return pool, ""
    if spec.shortage == "shrink":
        if pool := largest_exact_pool(supply, spec, order, asked):
            return pool, ""
        return empty, "at these rates not one sample can be drawn; change the rates"
    pool = repeating_pool(supply, spec, order, asked)
    bare = [task for task in order.tasks if not pool.own[task]]
    if spec.shortage == "repeat" and bare:
        return empty, f"too few records are left to give {', '.join(bare)} even one; take fewer"
    return pool, "" if spec.shortage == "repeat" else _shortage(supply, spec, order, asked)


def epoch_counts(order: TaskOrder, samples: int, epochs: int) -> list[dict[Task, int]]:
    """Samples per task of each epoch, up to the epoch from which they repeat.

    The order of the tasks runs on over the whole stage, so the count of a task moves by one, seldom
    more, from epoch to epoch, unless an epoch is a whole number of periods.
    """
    cycle = order.period // gcd(samples, order.period)
    before = [order.counts(epoch * samples) for epoch in range(min(epochs, cycle) + 1)]
    return [
        {task: before[epoch + 1][task] - before[epoch][task] for task in order.tasks}
        for epoch in range(len(before) - 1)
    ]


def exact_pool(supply: Supply, spec: StageSpec, order: TaskOrder, samples: int) -> Pool | None:
    """A pool in which no record is used twice in an epoch, or None.

    A task owns as many records as its smallest epoch needs, and has spare ones for the larger
    epochs, which sit out the others. A stage that takes every record left has none to spare: there
    some records change their task from epoch to epoch, as few as can be.
    """
    epochs = epoch_counts(order, samples, spec.epochs)
    own = {task: min(epoch[task] for epoch in epochs) for task in order.tasks}
    most = {task: max(epoch[task] for epoch in epochs) for task in order.tasks}
    if is_feasible(supply.counts, supply.held, most):
        spare = {task: most[task] - own[task] for task in order.tasks}
        return Pool(asked=samples, samples=samples, own=own, spare=spare)
    if samples == supply.left and is_feasible(supply.counts, supply.held, epochs[0]):
        shares = allocate(supply.counts, [*supply.earlier, *epochs[0].items()])
        first = dict(zip(epochs[0], shares[len(supply.earlier) :], strict=True))
        shifts = [shift for epoch in epochs if (shift := reassign(first, epoch))]
        if len(shifts) == len(epochs):
            return Pool(asked=samples, samples=samples, own=epochs[0], shifts=tuple(shifts))
    return None


def largest_exact_pool(
    supply: Supply, spec: StageSpec, order: TaskOrder, asked: int
) -> Pool | None:
    """The exact pool with the most samples below `asked`, None if not one sample can be drawn."""
    bound = prefix_bound(len(order.tasks))

    def may_be_exact(samples: int) -> bool:
        """Necessary, and true for every smaller number too: the least that an epoch can need."""
        least = {t: max(0, ceil(samples * rate - bound)) for t, rate in order.rates.items()}
        return is_feasible(supply.counts, supply.held, least)

    low, high = 0, asked
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if may_be_exact(middle) else (low, middle)
    for samples in range(low, 0, -1):
        if pool := exact_pool(supply, spec, order, samples):
            return replace(pool, asked=asked)
    return None


def repeating_pool(supply: Supply, spec: StageSpec, order: TaskOrder, samples: int) -> Pool:
    """A pool in which scarce records come again, as evenly as can be over tasks and records.

    No task owns more records than its smallest epoch has samples, so every epoch uses them all.
    """
    epochs = epoch_counts(order, samples, spec.epochs)
    least = {task: max(1, min(epoch[task] for epoch in epochs)) for task in order.tasks}
    own = fair_shares(supply.counts, supply.held, least)
    return Pool(asked=samples, samples=samples, own=own, repeats=True)


def _shortage(supply: Supply, spec: StageSpec, order: TaskOrder, samples: int) -> str:
    """Every short task and set of tasks, and what can be done."""
    epochs = epoch_counts(order, samples, spec.epochs)
    most = {task: max(epoch[task] for epoch in epochs) for task in order.tasks}
    cuts = find_cuts(supply.counts, supply.held, epochs[0])
    where = "an epoch asks"
    if not cuts:
        cuts = find_cuts(supply.counts, supply.held, most)
        where = "the largest epochs together ask"
    smaller = largest_exact_pool(supply, spec, order, samples)
    shrink = f" or to 'shrink' (then {smaller.samples:,} samples per epoch)" if smaller else ""
    return (
        f"{where} for more records than there are at these rates and {samples:,} samples: "
        f"{'; '.join(str(cut) for cut in cuts)}; change the rates or the pool, or set "
        f"stages.{spec.name}.shortage to 'repeat' (scarce records come again){shrink}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolCells:
    """A pool in terms of classes: who owns how many records of each, and which ones vary."""

    quotas: Mapping[int, Mapping[Task | None, int]]  # class -> task, or None: it varies -> records
    # Per epoch (they repeat): task -> the varying records that serve it, as (class, number).
    varying: tuple[Mapping[Task, Sequence[tuple[int, int]]], ...]


def pool_cells(
    pool: Pool, shares: Sequence[Mapping[int, int]], epochs: Sequence[Mapping[Task, int]]
) -> PoolCells:
    """Turn what the corpus gave to a pool's demands into cells.

    Args:
        shares: element i: class -> records given to `pool.demands[i]`.
        epochs: samples per task of each epoch, as `epoch_counts` has them.
    """
    own: Shares = dict(zip(pool.own, shares, strict=False))
    spare: Shares = dict(zip(pool.spare, shares[len(pool.own) :], strict=True))
    fixed, free = own, spare
    if pool.shifts:
        masks = {mask for share in own.values() for mask in share}
        fixed = {t: {m: min(s[t].get(m, 0) for s in pool.shifts) for m in masks} for t in own}
        extra = [
            {t: {m: s[t].get(m, 0) - fixed[t][m] for m in masks} for t in own} for s in pool.shifts
        ]
        free = extra[0]  # another one has the same number of records in each class
        varying = [_numbered(shift) for shift in extra]
    else:
        numbers = _numbered(spare)
        varying = [
            {task: numbers[task][: epoch[task] - pool.own[task]] for task in numbers}
            for epoch in epochs
        ]
    quotas: dict[int, dict[Task | None, int]] = {}
    for task, share in fixed.items():
        for mask, number in share.items():
            quotas.setdefault(mask, {})[task] = number
    for share in free.values():
        for mask, number in share.items():
            cells = quotas.setdefault(mask, {})
            cells[None] = cells.get(None, 0) + number
    return PoolCells(quotas=quotas, varying=tuple(varying))


def _numbered(shares: Shares) -> dict[Task, list[tuple[int, int]]]:
    """Task -> (class, number) of its records, numbered from 0 in each class."""
    following: dict[int, int] = {}
    numbers: dict[Task, list[tuple[int, int]]] = {}
    for task, share in shares.items():
        numbers[task] = []
        for mask in sorted(share):
            start = following.get(mask, 0)
            following[mask] = start + share[mask]
            numbers[task] += [(mask, number) for number in range(start, following[mask])]
    return numbers


def settling_order(specs: Sequence[StageSpec]) -> list[StageSpec]:
    """Takes in the order of training, then rests; checks the specs.

    Raises:
        ValueError: a stage that is not well defined: its knob, the rule, the value found.
    """
    names = [spec.name for spec in specs]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"stages: must be at least one, each with its own name, found {names}")
    for spec in specs:
        _check(spec)
    takes = [spec for spec in specs if spec.take is not None]
    settled = {spec.name for spec in takes}
    order = takes
    for spec in specs:
        if spec.take is None:
            if set(spec.rest_of) != settled:
                raise ValueError(
                    f"stages.{spec.name}.pool.rest_of: stages never share a record, so it must "
                    "name every stage with a take and every rest stage before it "
                    f"({', '.join(sorted(settled)) or 'none'}), found "
                    f"{', '.join(spec.rest_of) or 'none'}"
                )
            settled.add(spec.name)
            order = [*order, spec]
    return order


def _check(spec: StageSpec) -> None:
    """What the config cannot get wrong, its rates being a mapping; it checks everything else."""
    tasks = [task for task, _ in spec.rates]
    if len(set(tasks)) < len(tasks):
        raise ValueError(
            f"stages.{spec.name}.rates: must name a task only once, found {', '.join(tasks)}"
        )
