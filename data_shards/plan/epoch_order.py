"""Sampling order of one stage: which record is the n-th sample of a task in an epoch.

In: the stage's task sequence and the records that each of its tasks owns in every block of shards.
Out: a record, as a rank of a class in a block. In every epoch all tasks visit the blocks in the
same keyed order, each at its own pace, and all reach the end of a block at nearly the same
position, so that a shard is fetched about once per epoch. Epochs differ in the order of the blocks
and in the order of the records inside them. Flow: rates (position -> task, n) -> here ->
shard_blocks (rank -> shard and slot).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.plan.permutation import Permutation, derive_key
from data_shards.plan.rates import TaskOrder
from data_shards.plan.shard_blocks import Blocks, Count, cached
from data_shards.tasks import Task

_CACHED_EPOCHS: Final = 4
_CACHED_CYCLES: Final = 256


class RecordRank(NamedTuple):
    """A record, as its rank in the permuted class of a block."""

    block: int
    mask: int
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _BlockOrder:
    """The order of the blocks in one epoch, and the samples of each task before each of them."""

    blocks: NDArray[np.int64]  # [num_blocks]
    before: Mapping[Task, NDArray[np.int64]]  # task -> [num_blocks + 1] samples


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cycle:
    """The records of a block that a task owns, and the task's samples there in one epoch.

    The records are used cyclically, and an epoch starts where the last one stopped, so all are used
    equally often. Every pass has its own order: a record comes again when all others have come.
    """

    ranges: Sequence[tuple[int, range]]  # (class, ranks)
    size: int  # records
    start: int  # samples before this epoch
    samples: int  # samples of this epoch
    fixed: Permutation | None  # where records repeat: makes any stretch of a pass a fair sample
    orders: dict[int, Permutation]  # pass -> order, made when it is needed


class EpochOrder:
    """The records of one stage in sampling order, task by task.

    Args:
        stage: its name, part of every key.
        order: the task sequence of the stage.
        samples: samples per epoch.
        repeats: whether records come again within an epoch.
        redraw: whether tasks are dealt again in every epoch among the stage's records of a class.
        varying: element e: task -> records (class, index among the varying records of the stage)
            that serve it only in the epochs e, e + len(varying), ...
        blocks: the shards, assigned to stages and tasks.
        seed: of all permutations.
    """

    def __init__(
        self,
        *,
        stage: str,
        order: TaskOrder,
        samples: int,
        repeats: bool,
        redraw: bool,
        varying: Sequence[Mapping[Task, Sequence[tuple[int, int]]]],
        blocks: Blocks,
        seed: int,
    ) -> None:
        self._stage = stage
        self._order = order
        self._samples = samples
        self._repeats = repeats
        self._redraw = redraw
        self._blocks = blocks
        self._seed = seed
        zero = np.zeros(blocks.num_blocks + 1, dtype=np.int64)
        # task -> [num_blocks + 1] records that it owns in the blocks before block b.
        self._owned = {
            task: sum((blocks.prefix(mask, (stage, task)) for mask in blocks.offering(task)), zero)
            for task in order.tasks
        }
        ranks = {
            (mask, index): self._varying_record(mask, index)
            for mask, index in {
                record for epoch in varying for records in epoch.values() for record in records
            }
        }
        self._varying = [
            {task: [ranks[record] for record in records] for task, records in epoch.items()}
            for epoch in varying
        ]
        self._block_orders: OrderedDict[int, _BlockOrder] = OrderedDict()
        self._cycles: OrderedDict[tuple[int, Task, int], _Cycle] = OrderedDict()

    def record_at(self, epoch: int, task: Task, n: int) -> RecordRank:
        """The record of the n-th sample (from 0) of a task in an epoch."""
        block, index = self.block_of(epoch, task, n)
        owned = int(self._block_order(epoch).before[task][-1])
        if n < owned:
            record = self._owned_record(epoch, task, block, index)
        else:
            record = self._varying[epoch % len(self._varying)][task][n - owned]
        return self._redrawn(epoch, record) if self._redraw else record

    def block_of(self, epoch: int, task: Task, n: int) -> tuple[int, int]:
        """The block of the n-th sample of a task, and its index among the task's samples there.

        The few samples by which epochs differ come last, wherever their records lie.
        """
        order = self._block_order(epoch)
        before = order.before[task]
        if n >= before[-1]:
            record = self._varying[epoch % len(self._varying)][task][n - int(before[-1])]
            return record.block, n
        turn = int(np.searchsorted(before, n, side="right")) - 1
        return int(order.blocks[turn]), n - int(before[turn])

    def _varying_record(self, mask: int, index: int) -> RecordRank:
        block, rank = self._blocks.find(mask, (self._stage, None), index)
        return RecordRank(block, mask, rank)

    def _owned_record(self, epoch: int, task: Task, block: int, index: int) -> RecordRank:
        """The record of the index-th sample of a task in a block, in one epoch."""
        cycle = cached(self._cycles, (epoch, task, block), _CACHED_CYCLES, self._new_cycle)
        turn, index = divmod(index, cycle.size)
        if turn not in cycle.orders:
            width = min(cycle.size, cycle.samples - turn * cycle.size)
            cycle.orders[turn] = Permutation(width, self._key("order", epoch, block, task, turn))
        index = (cycle.start + turn * cycle.size + cycle.orders[turn](index)) % cycle.size
        if cycle.fixed is not None:
            index = cycle.fixed(index)
        return RecordRank(block, *pick(cycle.ranges, index))

    def _new_cycle(self, address: tuple[int, Task, int]) -> _Cycle:
        epoch, task, block = address
        ranks = self._blocks.open(block).ranks
        ranges = [
            (mask, ranks[mask].get((self._stage, task), range(0)))
            for mask in self._blocks.offering(task)
        ]
        size = sum(len(records) for _, records in ranges)
        before, after = (int(self._owned[task][block + step]) for step in (0, 1))
        start, stop = (
            self._drawn(task, epoch + step, after) - self._drawn(task, epoch + step, before)
            for step in (0, 1)
        )
        fixed = Permutation(size, self._key("ring", block, task)) if self._repeats else None
        return _Cycle(
            ranges=ranges, size=size, start=start, samples=stop - start, fixed=fixed, orders={}
        )

    def _redrawn(self, epoch: int, record: RecordRank) -> RecordRank:
        """The record that replaces another in this epoch: the stage's records of a class, permuted.

        The records of a stage are contiguous ranks (`Blocks.assign`).
        """
        ranks = self._blocks.open(record.block).ranks[record.mask]
        own = [records for (stage, _), records in ranks.items() if stage == self._stage]
        start, stop = own[0].start, own[-1].stop
        key = self._key("redraw", epoch, record.block, record.mask)
        return record._replace(rank=start + Permutation(stop - start, key)(record.rank - start))

    def _block_order(self, epoch: int) -> _BlockOrder:
        return cached(self._block_orders, epoch, _CACHED_EPOCHS, self._new_block_order)

    def _new_block_order(self, epoch: int) -> _BlockOrder:
        blocks = Permutation(self._blocks.num_blocks, self._key("blocks", epoch)).table()
        before = {}
        for task, owned in self._owned.items():
            samples = np.diff(self._drawn(task, epoch + 1, owned) - self._drawn(task, epoch, owned))
            before[task] = np.concatenate(([0], np.cumsum(samples[blocks])))
        return _BlockOrder(blocks=blocks, before=before)

    def _drawn(self, task: Task, epoch: int, records: Count) -> Count:
        """Samples of a task before an epoch that come from the first `records` records it owns.

        Each record was used once in every epoch, or, where records repeat, all equally often: the
        samples so far in proportion to the records, rounded down.
        """
        if not self._repeats:
            return records * epoch
        owned = int(self._owned[task][-1])
        uses, rest = divmod(self._order.count(task, epoch * self._samples), owned)
        return records * uses + records * rest // owned

    def _key(self, *purpose: str | int) -> int:
        return derive_key(self._seed, self._stage, *purpose)


def pick(ranges: Sequence[tuple[int, range]], index: int) -> tuple[int, int]:
    """(class, rank) of the index-th element of some ranges of ranks, one after the other."""
    for mask, ranks in ranges:
        if index < len(ranks):
            return mask, ranks[index]
        index -= len(ranks)
    raise AssertionError("the index lies beyond all ranges")
