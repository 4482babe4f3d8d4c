"""Pools: how many samples and records every stage gets of the corpus.

The paper's stage 1 takes 15,000 samples at random, its stage 2 the remaining ones (section III-C);
a spec states this as `take` and `rest_of`. In: the stages, and the records of each class. Out: per
stage the samples of an epoch, the records that each task owns, and the records of the few samples
by which epochs differ; or one ValueError that names every shortage of every stage. Earlier stages
are served first, but only in counts: which records they take is decided for all stages together
(allocation.py). docs/rates.md, sections 1 to 3.
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
"""Task -> class (bit mask of tasks) -> number of records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """One stage as the config states it; its pool is given by either `take` or `rest_of`."""

    name: str
    rates: tuple[tuple[Task, Fraction], ...]  # share of the samples per task; sum exactly 1
    take: int | None = None  # samples per epoch, one record each
    rest_of: tuple[str, ...] = ()  # without take: all the records that these stages leave
    epochs: int = 1
    shortage: Shortage = "error"
    epoch_tasks: EpochTasks = "keep"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """The samples and records of one stage."""

    asked: int  # samples per epoch before the shortage policy
    samples: int  # samples per epoch
    own: Mapping[Task, int]  # records that serve the task in every epoch
    spare: Mapping[Task, int] = field(default_factory=dict)  # ... only in epochs with more samples
    shifts: tuple[Shares, ...] = ()  # per epoch who serves what, where records must change task
    repeats: bool = False  # records come again within an epoch

    @property
    def demands(self) -> list[tuple[Task, int]]:
        """(task, records) that it requests of the corpus: own, then spare."""
        return [*self.own.items(), *self.spare.items()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Supply:
    """The corpus from which a stage is served."""

    counts: Mapping[int, int]  # class -> records
    earlier: tuple[tuple[Task, int], ...] = ()  # demands of the stages served before

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
        """Most records that a task can have in addition to those of the earlier stages."""
        return available(self.counts, self.held, bit(task))


def settle_pools(
    counts: Mapping[int, int], specs: Sequence[StageSpec], orders: Mapping[str, TaskOrder]
) -> dict[str, tuple[Supply, Pool]]:
    """Stage name -> what was available to the stage, and its pool.

    Args:
        counts: class -> records of the corpus.
        specs: in `settling_order`.
        orders: stage name -> task sequence.

    Raises:
        ValueError: all shortages of all stages, one line per stage.
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
    """The pool of a stage and its problem, if any. A pool with a problem only serves to find the
    problems of the stages after it."""
    asked = supply.left if spec.take is None else spec.take
    empty = Pool(asked=asked, samples=0, own={})
    if not supply.left:
        return empty, "its pool is empty: the other stages take every record; let them take fewer"
    missing = [task for task in order.tasks if not supply.available(task)]
    if missing:
        offers = ", ".join(f"{task} {offering(supply.counts, bit(task)):,}" for task in TASKS)
        return empty, (
            f"no record is left that offers {', '.join(missing)} (records in the shards: {offers})"
            "; set such a rate to 0, add records, or let the other stages take fewer"
        )
    if pool := exact_pool(supply, spec, order, asked):
        return pool, ""
    if spec.shortage == "shrink":
        if pool := largest_exact_pool(supply, spec, order, asked):
            return pool, ""
        return empty, "at these rates not one sample can be drawn; change the rates"
    pool = repeating_pool(supply, spec, order, asked)
    unserved = [task for task in order.tasks if not pool.own[task]]
    if spec.shortage == "repeat" and unserved:
        return empty, f"too few records are left to give {', '.join(unserved)} even one; take fewer"
    return pool, "" if spec.shortage == "repeat" else _shortage(supply, spec, order, asked)


def epoch_counts(order: TaskOrder, samples: int, epochs: int) -> list[dict[Task, int]]:
    """Samples per task of each epoch, up to the epoch from which the counts recur.

    The task sequence continues from epoch to epoch, so the count of a task changes by one, seldom
    more, between epochs, unless an epoch is a whole number of periods.
    """
    cycle = order.period // gcd(samples, order.period)
    before = [order.counts(epoch * samples) for epoch in range(min(epochs, cycle) + 1)]
    return [
        {task: before[epoch + 1][task] - before[epoch][task] for task in order.tasks}
        for epoch in range(len(before) - 1)
    ]


def exact_pool(supply: Supply, spec: StageSpec, order: TaskOrder, samples: int) -> Pool | None:
    """A pool in which no record is used twice in an epoch, or None.

    A task owns as many records as its smallest epoch has samples, and spare ones that are used only
    in larger epochs. A stage that takes every remaining record has no spare ones: there some
    records change their task from epoch to epoch, as few as possible.
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
        """Necessary, and monotone in `samples`: serves the fewest samples an epoch may have."""
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
    """A pool in which scarce records repeat, as evenly as possible over tasks and records.

    No task owns more records than its smallest epoch has samples, so every epoch uses them all.
    """
    epochs = epoch_counts(order, samples, spec.epochs)
    least = {task: max(1, min(epoch[task] for epoch in epochs)) for task in order.tasks}
    own = fair_shares(supply.counts, supply.held, least)
    return Pool(asked=samples, samples=samples, own=own, repeats=True)


def _shortage(supply: Supply, spec: StageSpec, order: TaskOrder, samples: int) -> str:
    """The message: every task and set of tasks that lacks records, and the remedies."""
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
class PoolQuotas:
    """A pool by class: how many records of each class a task owns, and which records vary."""

    by_class: Mapping[int, Mapping[Task | None, int]]  # class -> task (None: it varies) -> records
    # Element e: task -> records (class, index) that serve it in the epochs e, e + len, ...
    varying: tuple[Mapping[Task, Sequence[tuple[int, int]]], ...]


def pool_quotas(
    pool: Pool, shares: Sequence[Mapping[int, int]], epochs: Sequence[Mapping[Task, int]]
) -> PoolQuotas:
    """Turn the records that were allocated to a pool's demands into quotas of its tasks.

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
        free = extra[0]  # all epochs have the same number of varying records in each class
        varying = [_numbered(shift) for shift in extra]
    else:
        records = _numbered(spare)
        varying = [
            {task: records[task][: epoch[task] - pool.own[task]] for task in records}
            for epoch in epochs
        ]
    by_class: dict[int, dict[Task | None, int]] = {}
    for task, share in fixed.items():
        for mask, count in share.items():
            by_class.setdefault(mask, {})[task] = count
    for share in free.values():
        for mask, count in share.items():
            quotas = by_class.setdefault(mask, {})
            quotas[None] = quotas.get(None, 0) + count
    return PoolQuotas(by_class=by_class, varying=tuple(varying))


def _numbered(shares: Shares) -> dict[Task, list[tuple[int, int]]]:
    """Task -> its records as (class, index), counted from 0 in each class."""
    following: dict[int, int] = {}
    records: dict[Task, list[tuple[int, int]]] = {}
    for task, share in shares.items():
        records[task] = []
        for mask in sorted(share):
            start = following.get(mask, 0)
            following[mask] = start + share[mask]
            records[task] += [(mask, index) for index in range(start, following[mask])]
    return records


def settling_order(specs: Sequence[StageSpec]) -> list[StageSpec]:
    """The order in which stages are served: those with `take`, then those with `rest_of`.

    Both in training order. Also checks the specs.

    Raises:
        ValueError: a stage that is not well defined: its knob, the rule, the value.
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
