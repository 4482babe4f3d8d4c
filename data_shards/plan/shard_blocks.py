"""Where the records of a class lie: blocks of shards, cut into the cells of stages and tasks.

In: how many records of each class a shard holds, and the quota of each (stage, task) in each class.
Out: for a block, a class and a cell the i-th record, as (shard, slot). Stored are prefix sums per
block and class, never anything per record. The order inside a block and class is a keyed
permutation; its image is cut into one interval per cell and the reserve that nobody uses, so no
record can belong to two stages or two tasks.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_shards.plan.permutation import Permutation, derive_key
from data_shards.tasks import TASKS, Task, bit

MAX_RECORDS: Final = 1 << 31
"""Records of a corpus: products of two such counts still fit 64 bits."""
_CACHED_BLOCKS: Final = 64

Cell = tuple[str, Task | None]
"""Stage and task of a cell; None: the stage's records whose task varies from epoch to epoch."""

Number = TypeVar("Number", int, NDArray[np.int64])
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ClassTable(Protocol):
    """What a plan needs to know of a corpus; `data_shards.shards.index.ShardIndex` offers it."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever a record changes."""

    @property
    def num_shards(self) -> int: ...

    def class_counts(self, shard: int | None = None) -> Mapping[int, int]:
        """Class mask -> number of records, of one shard or of all."""

    def slots(self, shard: int, mask: int) -> NDArray[np.int64]:
        """Slots of the shard's records of a class, ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenBlock:
    """One block, ready to be read."""

    shards: tuple[int, ...]
    first: Mapping[
        int, tuple[int, ...]
    ]  # class -> records of it before each of the shards, and all
    cells: Mapping[int, Mapping[Cell, range]]  # class -> cell -> its ranks in the permuted class
    reserve: Mapping[int, range]  # class -> ranks that no stage uses
    orders: Mapping[int, Permutation]  # class -> rank -> number of the record in shard order


class Blocks:
    """The shards of a corpus in keyed order, in blocks of about `block_shards`, with their cells.

    Shards are numbered in packing order, so neighbours often hold the same source. Therefore the
    shard list is cut into `block_shards` runs of equal length and every block takes one shard of
    each run, by a keyed permutation per run: all blocks have nearly the mix of the whole corpus,
    and the cursors of all tasks stay together (docs/rates.md).
    """

    def __init__(self, table: ClassTable, *, seed: int, block_shards: int) -> None:
        self.table = table
        self.seed = seed
        self.classes = tuple(check_classes(table.class_counts()))
        self.num_blocks = -(-table.num_shards // block_shards)
        self._shards = _shard_order(table.num_shards, self.num_blocks, block_shards, seed)
        self._prefix = self._count()
        self._quotas: dict[int, dict[Cell, int]] = {mask: {} for mask in self.classes}
        self._open: OrderedDict[int, OpenBlock] = OrderedDict()

    def _count(self) -> dict[int, NDArray[np.int64]]:
        """Class -> records of it in the blocks before block b, [num_blocks + 1]."""
        counts = np.zeros((self.table.num_shards, len(self.classes)), dtype=np.int64)
        place = {mask: column for column, mask in enumerate(self.classes)}
        for shard in range(self.table.num_shards):
            for mask, number in self.table.class_counts(shard).items():
                if number:
                    counts[shard, place[mask]] = number
        in_block = np.zeros((self.num_blocks, len(self.classes)), dtype=np.int64)
        for run in self._shards.T:
            here = run >= 0
            in_block[here] += counts[run[here]]
        return {
            mask: np.concatenate(([0], np.cumsum(in_block[:, column])))
            for mask, column in place.items()
        }

    def cut(self, quotas: Mapping[int, Mapping[Cell, int]]) -> None:
        """Cut the classes into cells.

        Args:
            quotas: class -> cell -> number of records, together at most the class's records. The
                cells of a stage stand side by side.
        """
        for mask, cells in quotas.items():
            assert sum(cells.values()) <= self._prefix[mask][-1], f"class {mask} is overdrawn"
            self._quotas[mask] = {cell: quota for cell, quota in cells.items() if quota}
        self._open.clear()

    def prefix(self, mask: int, cell: Cell) -> NDArray[np.int64]:
        """Records of a cell of a class in the blocks before block b, [num_blocks + 1]."""
        return self._split(mask, self._prefix[mask]).get(cell, np.zeros_like(self._prefix[mask]))

    def _split(self, mask: int, before: Number) -> dict[Cell, Number]:
        """Cell -> how many of the first `before` records of a class belong to it.

        One cell after the other gets its share of what the cells before it left, rounded down.
        Each count grows by 0 or 1 with `before`, so no block gets a negative number, and is the
        quota when `before` is the whole class.
        """
        shares: dict[Cell, Number] = {}
        left = int(self._prefix[mask][-1])
        for cell, quota in self._quotas[mask].items():
            shares[cell] = before * quota // left
            before = before - shares[cell]
            left -= quota
        return shares

    def open(self, block: int) -> OpenBlock:
        """The shards and cells of a block; the last ones opened are kept."""
        return remember(self._open, block, _CACHED_BLOCKS, self._open_block)

    def _open_block(self, block: int) -> OpenBlock:
        shards = tuple(int(shard) for shard in self._shards[block] if shard >= 0)
        counts = [self.table.class_counts(shard) for shard in shards]
        first: dict[int, tuple[int, ...]] = {}
        cells: dict[int, dict[Cell, range]] = {}
        reserve: dict[int, range] = {}
        for mask in self.classes:
            first[mask] = (0, *accumulate(count.get(mask, 0) for count in counts))
            start, stop = (int(self._prefix[mask][block + step]) for step in (0, 1))
            before, after = self._split(mask, start), self._split(mask, stop)
            rank = 0
            cells[mask] = {}
            for cell in before:
                cells[mask][cell] = range(rank, rank + after[cell] - before[cell])
                rank = cells[mask][cell].stop
            reserve[mask] = range(rank, stop - start)
        orders = {
            mask: Permutation(first[mask][-1], derive_key(self.seed, "class", block, mask))
            for mask in self.classes
            if first[mask][-1]
        }
        return OpenBlock(shards=shards, first=first, cells=cells, reserve=reserve, orders=orders)

    def locate(self, block: int, mask: int, rank: int) -> tuple[int, int]:
        """(shard, slot) of the record at a rank of a class in a block."""
        opened = self.open(block)
        number = opened.orders[mask](rank)
        place = bisect_right(opened.first[mask], number) - 1
        shard = opened.shards[place]
        return shard, int(self.table.slots(shard, mask)[number - opened.first[mask][place]])

    def find(self, mask: int, cell: Cell, number: int) -> tuple[int, int]:
        """(block, rank in the class) of the number-th record of a cell, over all blocks."""
        prefix = self.prefix(mask, cell)
        block = int(np.searchsorted(prefix, number, side="right")) - 1
        return block, self.open(block).cells[mask][cell][number - int(prefix[block])]

    def offering(self, task: Task) -> list[int]:
        """The classes that offer a task."""
        return [mask for mask in self.classes if mask & bit(task)]


def _shard_order(
    num_shards: int, num_blocks: int, block_shards: int, seed: int
) -> NDArray[np.int64]:
    """The shards of each block, [num_blocks, runs]; -1 where a run has no shard for the block."""
    runs = []
    for start in range(0, num_shards, num_blocks):
        key = derive_key(seed, "shards", start // num_blocks)
        run = start + Permutation(num_blocks, key).table()
        runs.append(np.where(run < num_shards, run, -1))
    assert len(runs) <= block_shards
    return np.stack(runs, axis=1)


def check_classes(counts: Mapping[int, int]) -> dict[int, int]:
    """The classes that hold records, ascending by mask.

    Raises:
        ValueError: no record at all, a record without a task, or more than MAX_RECORDS.
    """
    for mask, number in counts.items():
        if not 0 < mask < 1 << len(TASKS) or number < 0:
            raise ValueError(
                f"task mask: must be 1..{(1 << len(TASKS)) - 1} with 0 or more records, found mask "
                f"{mask} with {number}; build the shards again"
            )
    if not 0 < sum(counts.values()) <= MAX_RECORDS:
        raise ValueError(
            f"the shards must hold 1..{MAX_RECORDS} records, found {sum(counts.values())}; build "
            "them again"
        )
    return {mask: counts[mask] for mask in sorted(counts) if counts[mask]}


def remember(cache: "OrderedDict[K, V]", key: K, limit: int, make: Callable[[K], V]) -> V:
    """cache[key], made when it is missing; the entry unused for longest goes above the limit."""
    if key not in cache:
        cache[key] = make(key)
        if len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
