"""The plan: which record is trained for which task at which position. A page of the paper.

In: a corpus (the class counts of its shards), the stages and a seed. Out: per stage a pure function
`at(position) -> Placement`, exact in its rates, with no list behind it at any size of corpus:

    position  ->  epoch, task, rank of the sample among those of its task     rates.py
    rank      ->  block of shards, and a record of it: all tasks walk together    walk.py
    record    ->  shard and slot, by a keyed permutation of the block           blocks.py

How many records of which class a (stage, task) owns is settled once, for all stages together
(pools.py, allocate.py). The order for a given (corpus, stages, seed) never changes: ALGORITHM is
part of the fingerprint and of every key. docs/rates.md is the long form of this page.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from data_shards.plan.allocation import allocate
from data_shards.plan.epoch_order import Spot, Walk, pick
from data_shards.plan.permutation import Permutation, derive_key
from data_shards.plan.rates import TaskOrder
from data_shards.plan.shard_blocks import Blocks, ClassTable, check_classes
from data_shards.plan.stage_pools import (
    Pool,
    PoolCells,
    StageSpec,
    Supply,
    epoch_counts,
    pool_cells,
    settle_pools,
    settling_order,
)
from data_shards.tasks import Task

__all__ = ["Placement", "Plan", "StagePlan", "StageSpec", "TaskCount", "plan_stages"]

ALGORITHM: Final = "emoverse-plan-1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A sample: one record, by its address, with exactly one task."""

    shard: int
    slot: int
    task: Task
    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskCount:
    """What one task of a stage asked and got; all but `total` are per epoch (the first one)."""

    task: Task
    rate: Fraction
    asked: int  # samples by the rate, before the shortage policy
    available: int  # most records it could have beside what the earlier stages hold
    given: int  # samples after the shortage policy
    records: int  # different records behind them
    total: int  # samples of all epochs together


class StagePlan:
    """The order of one stage: a pure function of the position. Built by `plan_stages`."""

    def __init__(
        self,
        *,
        spec: StageSpec,
        order: TaskOrder,
        samples_per_epoch: int,
        repeats: bool,
        counts: tuple[TaskCount, ...],
        walk: Walk,
        blocks: Blocks,
        seed: int,
        fingerprint: str,
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.order = order
        self.counts = counts
        self.fingerprint = fingerprint
        self.epochs = spec.epochs
        self.samples_per_epoch = samples_per_epoch
        self.num_samples = samples_per_epoch * spec.epochs
        self.repeats = repeats  # records come again within an epoch
        self._walk = walk
        self._blocks = blocks
        self._seed = seed

    def num_steps(self, global_batch_size: int) -> int:
        """Steps of `global_batch_size` samples; only the last one may be shorter."""
        return -(-self.num_samples // global_batch_size)

    def at(self, position: int) -> Placement:
        """The sample at a position, 0 .. num_samples - 1.

        Raises:
            IndexError: there is no such position.
        """
        epoch, task, rank = self._address(position)
        return self._placement(epoch, task, self._walk.spot(epoch, task, rank))

    def substitute(self, position: int, attempt: int) -> Placement:
        """The attempt-th (from 1) stand-in for the record at a position, for the same task.

        First the records of the same block that no stage uses, then the next samples of the task.

        Raises:
            IndexError: there is no such position.
            ValueError: the attempt is below 1 or all stand-ins were tried.
        """
        epoch, task, rank = self._address(position)
        if attempt < 1:
            raise ValueError(f"attempt must be at least 1, found {attempt}")
        block, place = self._walk.block_of(epoch, task, rank)
        reserve = self._blocks.open(block).reserve
        unused = [(mask, reserve[mask]) for mask in self._blocks.offering(task)]
        size = sum(len(ranks) for _, ranks in unused)
        if attempt <= size:
            key = derive_key(self._seed, self.name, "reserve", epoch, block, task)
            number = Permutation(size, key)((place + attempt - 1) % size)
            return self._placement(epoch, task, Spot(block, *pick(unused, number)))
        samples = self._drawn(task, epoch + 1) - self._drawn(task, epoch)
        if attempt - size >= samples:
            raise ValueError(
                f"stages.{self.name}: position {position}: all {attempt - 1} samples that could "
                f"stand in for task {task} were tried; build the shards again"
            )
        following = (rank + attempt - size) % samples
        return self._placement(epoch, task, self._walk.spot(epoch, task, following))

    def _address(self, position: int) -> tuple[int, Task, int]:
        """Epoch, task, and the sample's rank among those of its task in the epoch."""
        if not 0 <= position < self.num_samples:
            raise IndexError(
                f"stages.{self.name}: position must be 0..{self.num_samples - 1}, found {position}"
            )
        epoch = position // self.samples_per_epoch
        task = self.order.task_at(position)
        return epoch, task, self.order.count(task, position) - self._drawn(task, epoch)

    def _drawn(self, task: Task, epoch: int) -> int:
        """Samples of a task before an epoch."""
        return self.order.count(task, epoch * self.samples_per_epoch)

    def _placement(self, epoch: int, task: Task, spot: Spot) -> Placement:
        shard, slot = self._blocks.locate(*spot)
        return Placement(shard=shard, slot=slot, task=task, epoch=epoch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All stages of a run, planned together: they share no record."""

    stages: Mapping[str, StagePlan]
    fingerprint: str  # of the corpus, the stages, the seed, the block size and the algorithm


def plan_stages(
    table: ClassTable, specs: Sequence[StageSpec], *, seed: int, block_shards: int = 16
) -> Plan:
    """Plan all stages together.

    Args:
        table: the corpus, usually a `ShardIndex`.
        specs: the stages in the order of training.
        seed: of all permutations.
        block_shards: shards per block; larger blocks mix better and need a larger shard cache.

    Raises:
        ValueError: a knob outside its rule, or records that do not suffice (every short task).
    """
    if block_shards < 1:
        raise ValueError(f"data.block_shards: must be at least 1, found {block_shards}")
    settling = settling_order(specs)
    counts = check_classes(table.class_counts())
    orders = {spec.name: _task_order(spec) for spec in specs}
    settled = settle_pools(counts, settling, orders)
    demands = [(name, demand) for name, (_, pool) in settled.items() for demand in pool.demands]
    shares = allocate(counts, [demand for _, demand in demands])
    cells: dict[str, PoolCells] = {}
    for spec in specs:
        _, pool = settled[spec.name]
        own = [share for (name, _), share in zip(demands, shares, strict=True) if name == spec.name]
        epochs = epoch_counts(orders[spec.name], pool.samples, spec.epochs)
        cells[spec.name] = pool_cells(pool, own, epochs)

    root = derive_key(seed, ALGORITHM)
    blocks = Blocks(table, seed=root, block_shards=block_shards)
    blocks.cut(
        {
            mask: {
                (name, task): quota
                for name, of_stage in cells.items()
                for task, quota in of_stage.quotas.get(mask, {}).items()
            }
            for mask in counts
        }
    )
    fingerprint = _fingerprint(table, specs, orders, seed, block_shards)
    stages = {}
    for spec in specs:
        supply, pool = settled[spec.name]
        stages[spec.name] = StagePlan(
            spec=spec,
            order=orders[spec.name],
            samples_per_epoch=pool.samples,
            repeats=pool.repeats,
            counts=_count_tasks(spec, orders[spec.name], supply, pool),
            walk=Walk(
                stage=spec.name,
                order=orders[spec.name],
                samples=pool.samples,
                repeats=pool.repeats,
                redraw=spec.epoch_tasks == "redraw",
                varying=cells[spec.name].varying,
                blocks=blocks,
                seed=root,
            ),
            blocks=blocks,
            seed=root,
            fingerprint=hashlib.sha256(f"{fingerprint} {spec.name}".encode()).hexdigest(),
        )
    return Plan(stages=stages, fingerprint=fingerprint)


def _task_order(spec: StageSpec) -> TaskOrder:
    try:
        return TaskOrder(dict(spec.rates))
    except ValueError as error:
        raise ValueError(f"stages.{spec.name}.rates: {error}") from None


def _count_tasks(
    spec: StageSpec, order: TaskOrder, supply: Supply, pool: Pool
) -> tuple[TaskCount, ...]:
    return tuple(
        TaskCount(
            task=task,
            rate=rate,
            asked=order.count(task, pool.asked),
            available=supply.available(task),
            given=order.count(task, pool.samples),
            records=pool.own[task] + pool.spare.get(task, 0),
            total=order.count(task, pool.samples * spec.epochs),
        )
        for task, rate in order.rates.items()
    )


def _fingerprint(
    table: ClassTable,
    specs: Sequence[StageSpec],
    orders: Mapping[str, TaskOrder],
    seed: int,
    block_shards: int,
) -> str:
    """sha256 over everything that the order depends on, and nothing else."""
    document = {
        "algorithm": ALGORITHM,
        "corpus": table.fingerprint,
        "seed": seed,
        "block_shards": block_shards,
        "stages": [
            {
                "name": spec.name,
                "rates": {task.value: str(rate) for task, rate in orders[spec.name].rates.items()},
                "take": spec.take,
                "rest_of": sorted(spec.rest_of),
                "epochs": spec.epochs,
                "shortage": spec.shortage,
                "epoch_tasks": spec.epoch_tasks,
            }
            for spec in specs
        ],
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
