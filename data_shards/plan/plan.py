"""The plan: which record is trained for which task at which position of which stage.

The paper trains stage 1 on 15,000 samples of the EMT dataset and stage 2 on the remaining ones, the
tasks of each mixed by sampling rates (section III-C, Tables I and II). This module makes that
exact. In: a corpus (the class counts of its shards), the stages and a seed. Out: per stage a pure
function `at(position) -> Placement`, computed in O(1) without a list of samples:

    position        ->  epoch, task, n (the sample is the n-th of its task)   rates.py
    epoch, task, n  ->  block of shards, rank of a record in it               epoch_order.py
    block, rank     ->  shard and slot                                        shard_blocks.py

How many records of each class a (stage, task) owns is decided once, for all stages together
(stage_pools.py, allocation.py). The order for a given (corpus, stages, seed) never changes:
ALGORITHM is part of the fingerprint and of every key. docs/rates.md is the long form of this page.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from data_shards.plan.allocation import allocate
from data_shards.plan.epoch_order import EpochOrder, RecordRank, pick
from data_shards.plan.permutation import Permutation, derive_key
from data_shards.plan.rates import TaskOrder
from data_shards.plan.shard_blocks import Blocks, ClassTable, check_classes
from data_shards.plan.stage_pools import (
    Pool,
    PoolQuotas,
    StageSpec,
    Supply,
    epoch_counts,
    pool_quotas,
    settle_pools,
    settling_order,
)
from data_shards.tasks import Task

__all__ = ["Placement", "Plan", "StagePlan", "StageSpec", "TaskCount", "plan_stages"]

ALGORITHM: Final = "emoverse-plan-1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A planned sample: one record, by its address, with exactly one task."""

    shard: int  # index of the shard in the corpus
    slot: int  # index of the record in the shard
    task: Task
    epoch: int  # from 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskCount:
    """What one task of a stage requests and gets, in the first epoch; `total` over all epochs."""

    task: Task
    rate: Fraction
    asked: int  # samples by the rate, before the shortage policy
    available: int  # most records it could have beside those of the earlier stages
    given: int  # samples after the shortage policy
    records: int  # different records that serve them
    total: int  # samples of all epochs together


class StagePlan:
    """The sampling order of one stage, a pure function of the position. Built by `plan_stages`."""

    def __init__(
        self,
        *,
        spec: StageSpec,
        order: TaskOrder,
        samples_per_epoch: int,
        repeats: bool,
        counts: tuple[TaskCount, ...],
        epoch_order: EpochOrder,
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
        self._epoch_order = epoch_order
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
        epoch, task, n = self._sample(position)
        return self._placement(epoch, task, self._epoch_order.record_at(epoch, task, n))

    def substitute(self, position: int, attempt: int) -> Placement:
        """The attempt-th (from 1) substitute for the record at a position, for the same task.

        First come the records of the same block that no stage uses, in keyed order from a start
        that differs by sample; then the records of the next samples of the task in the epoch.

        Raises:
            IndexError: there is no such position.
            ValueError: the attempt is below 1, or all substitutes were tried.
        """
        epoch, task, n = self._sample(position)
        if attempt < 1:
            raise ValueError(f"attempt must be at least 1, found {attempt}")
        block, index = self._epoch_order.block_of(epoch, task, n)
        reserve = self._blocks.open(block).reserve
        unused = [(mask, reserve[mask]) for mask in self._blocks.offering(task)]
        size = sum(len(ranks) for _, ranks in unused)
        if attempt <= size:
            key = derive_key(self._seed, self.name, "reserve", epoch, block, task)
            chosen = Permutation(size, key)((index + attempt - 1) % size)
            return self._placement(epoch, task, RecordRank(block, *pick(unused, chosen)))
        samples = self._drawn(task, epoch + 1) - self._drawn(task, epoch)
        if attempt - size >= samples:
            raise ValueError(
                f"stages.{self.name}: position {position}: all {attempt - 1} substitutes for task "
                f"{task} were tried; build the shards again"
            )
        following = (n + attempt - size) % samples
        return self._placement(epoch, task, self._epoch_order.record_at(epoch, task, following))

    def _sample(self, position: int) -> tuple[int, Task, int]:
        """(epoch, task, n): the position holds the n-th sample of the task in the epoch."""
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

    def _placement(self, epoch: int, task: Task, record: RecordRank) -> Placement:
        shard, slot = self._blocks.locate(*record)
        return Placement(shard=shard, slot=slot, task=task, epoch=epoch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All stages of a run, planned together. No record belongs to two stages."""

    stages: Mapping[str, StagePlan]
    fingerprint: str  # of the corpus, the stages, the seed, the block size and the algorithm


def plan_stages(
    table: ClassTable, specs: Sequence[StageSpec], *, seed: int, block_shards: int = 16
) -> Plan:
    """Plan all stages together.

    Args:
        table: the corpus, usually a `ShardIndex`.
        specs: the stages in training order.
        seed: of all permutations.
        block_shards: shards per block; larger blocks mix better and require a larger shard cache.

    Raises:
        ValueError: a knob outside its rule, or too few records: the message names every task of
            every stage that lacks some.
    """
    if block_shards < 1:
        raise ValueError(f"data.block_shards: must be at least 1, found {block_shards}")
    settling = settling_order(specs)
    counts = check_classes(table.class_counts())
    orders = {spec.name: _task_order(spec) for spec in specs}
    settled = settle_pools(counts, settling, orders)
    demands = [(name, demand) for name, (_, pool) in settled.items() for demand in pool.demands]
    shares = allocate(counts, [demand for _, demand in demands])
    quotas: dict[str, PoolQuotas] = {}
    for spec in specs:
        _, pool = settled[spec.name]
        own = [share for (name, _), share in zip(demands, shares, strict=True) if name == spec.name]
        epochs = epoch_counts(orders[spec.name], pool.samples, spec.epochs)
        quotas[spec.name] = pool_quotas(pool, own, epochs)

    root = derive_key(seed, ALGORITHM)
    blocks = Blocks(table, seed=root, block_shards=block_shards)
    blocks.assign(
        {
            mask: {
                (name, task): records
                for name, of_stage in quotas.items()
                for task, records in of_stage.by_class.get(mask, {}).items()
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
            epoch_order=EpochOrder(
                stage=spec.name,
                order=orders[spec.name],
                samples=pool.samples,
                repeats=pool.repeats,
                redraw=spec.epoch_tasks == "redraw",
                varying=quotas[spec.name].varying,
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
    """sha256 over everything that the sampling order depends on, and nothing else."""
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
