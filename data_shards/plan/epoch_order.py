"""How the tasks of one stage walk over the blocks, epoch by epoch.

In: which cells of which blocks belong to the stage's tasks. Out: the record behind "the n-th sample
of this task in this epoch", as a rank of a class in a block. In every epoch all tasks go through
the blocks in the same keyed order, each at its own pace, and all pass the end of a block at nearly
the same time, so that a shard is fetched about once. Epochs differ in the order of the blocks and
in the order inside them.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.plan.permutation import Permutation, derive_key
from data_shards.plan.rates import TaskOrder
from data_shards.plan.shard_blocks import Blocks, Number, remember
from data_shards.tasks import Task

_CACHED_EPOCHS: Final = 4
_CACHED_RINGS: Final = 256


class Spot(NamedTuple):
    """A record, as the rank of a class in a block."""

    block: int
    mask: int
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Path:
    """The order of the blocks in one epoch, and how far each task has come when a block begins."""

    blocks: NDArray[np.int64]  # [num_blocks]
    before: Mapping[Task, NDArray[np.int64]]  # [num_blocks + 1] samples of the task


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ring:
    """A task's own records of a block, and its samples there in one epoch.

    An epoch goes on round the ring from where the last one stopped, so that all records are used
    equally often. Every turn has an order of its own: a record comes again when all others have.
    """

    cells: Sequence[tuple[int, range]]  # (class, ranks)
    size: int  # records
    start: int  # samples before this epoch
    samples: int  # samples of this epoch
    fixed: Permutation | None  # where records repeat: makes a part of a turn a fair part
    orders: dict[int, Permutation]  # turn -> order, made when it is needed


class Walk:
    """The records of one stage in the order of training, task by task.

    Args:
        samples: samples per epoch.
        repeats: whether records come again within an epoch.
        redraw: whether the tasks of the stage's records are dealt anew in every epoch.
        varying: per epoch, again from the first after the last: task -> records (class, number in
            the stage's varying cell) that serve it in this epoch only.
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
        # Records that the task owns in the blocks before block b, [num_blocks + 1].
        self._own = {
            task: sum((blocks.prefix(mask, (stage, task)) for mask in blocks.offering(task)), zero)
            for task in order.tasks
        }
        spots = {
            (mask, number): self._varying_spot(mask, number)
            for mask, number in {r for epoch in varying for of in epoch.values() for r in of}
        }
        self._extras = [
            {task: [spots[record] for record in records] for task, records in epoch.items()}
            for epoch in varying
        ]
        self._paths: OrderedDict[int, _Path] = OrderedDict()
        self._rings: OrderedDict[tuple[int, Task, int], _Ring] = OrderedDict()

    def spot(self, epoch: int, task: Task, rank: int) -> Spot:
        """The record of the rank-th sample of a task in an epoch."""
        block, place = self.block_of(epoch, task, rank)
        owned = int(self._path(epoch).before[task][-1])
        if rank < owned:
            spot = self._own_record(epoch, task, block, place)
        else:
            spot = self._extras[epoch % len(self._extras)][task][rank - owned]
        return self._redrawn(epoch, spot) if self._redraw else spot

    def block_of(self, epoch: int, task: Task, rank: int) -> tuple[int, int]:
        """The block of a sample, and its number among the samples of its task there.

        The few samples by which epochs differ come last, wherever their records lie.
        """
        path = self._path(epoch)
        before = path.before[task]
        if rank >= before[-1]:
            extra = self._extras[epoch % len(self._extras)][task][rank - int(before[-1])]
            return extra.block, rank
        turn = int(np.searchsorted(before, rank, side="right")) - 1
        return int(path.blocks[turn]), rank - int(before[turn])

    def _varying_spot(self, mask: int, number: int) -> Spot:
        block, rank = self._blocks.find(mask, (self._stage, None), number)
        return Spot(block, mask, rank)

    def _own_record(self, epoch: int, task: Task, block: int, place: int) -> Spot:
        ring = remember(self._rings, (epoch, task, block), _CACHED_RINGS, self._new_ring)
        turn, place = divmod(place, ring.size)
        if turn not in ring.orders:
            width = min(ring.size, ring.samples - turn * ring.size)
            ring.orders[turn] = Permutation(width, self._key("order", epoch, block, task, turn))
        number = (ring.start + turn * ring.size + ring.orders[turn](place)) % ring.size
        if ring.fixed is not None:
            number = ring.fixed(number)
        return Spot(block, *pick(ring.cells, number))

    def _new_ring(self, address: tuple[int, Task, int]) -> _Ring:
        epoch, task, block = address
        opened = self._blocks.open(block)
        cells = [
            (mask, opened.cells[mask].get((self._stage, task), range(0)))
            for mask in self._blocks.offering(task)
        ]
        size = sum(len(cell) for _, cell in cells)
        before, after = (int(self._own[task][block + step]) for step in (0, 1))
        start, stop = (
            self._drawn(task, epoch + step, after) - self._drawn(task, epoch + step, before)
            for step in (0, 1)
        )
        fixed = Permutation(size, self._key("ring", block, task)) if self._repeats else None
        return _Ring(
            cells=cells, size=size, start=start, samples=stop - start, fixed=fixed, orders={}
        )

    def _redrawn(self, epoch: int, spot: Spot) -> Spot:
        """The record that stands at a spot in this epoch: the stage's own of a class, permuted."""
        cells = self._blocks.open(spot.block).cells[spot.mask]
        ranges = [ranks for (stage, _), ranks in cells.items() if stage == self._stage]
        start, stop = ranges[0].start, ranges[-1].stop
        key = self._key("redraw", epoch, spot.block, spot.mask)
        return spot._replace(rank=start + Permutation(stop - start, key)(spot.rank - start))

    def _path(self, epoch: int) -> _Path:
        return remember(self._paths, epoch, _CACHED_EPOCHS, self._new_path)

    def _new_path(self, epoch: int) -> _Path:
        blocks = Permutation(self._blocks.num_blocks, self._key("blocks", epoch)).table()
        before = {}
        for task, own in self._own.items():
            samples = np.diff(self._drawn(task, epoch + 1, own) - self._drawn(task, epoch, own))
            before[task] = np.concatenate(([0], np.cumsum(samples[blocks])))
        return _Path(blocks=blocks, before=before)

    def _drawn(self, task: Task, epoch: int, before: Number) -> Number:
        """Samples of a task before an epoch from the first `before` of its own records.

        Each record was used in every epoch, or, where records repeat, an equal number of times:
        the samples so far in proportion, rounded down.
        """
        if not self._repeats:
            return before * epoch
        own = int(self._own[task][-1])
        times, rest = divmod(self._order.count(task, epoch * self._samples), own)
        return before * times + before * rest // own

    def _key(self, *parts: str | int) -> int:
        return derive_key(self._seed, self._stage, *parts)


def pick(ranges: Sequence[tuple[int, range]], number: int) -> tuple[int, int]:
    """(class, rank): the number-th rank of some ranges one after the other."""
    for mask, ranks in ranges:
        if number < len(ranks):
            return mask, ranks[number]
        number -= len(ranks)
    raise AssertionError("the number lies beyond all ranges")
