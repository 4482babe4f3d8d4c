"""Blocks of shards, and which of their records belong to which stage and task.

A class is the set of records that offer exactly the same tasks, named by their bit mask.
In: how many records of each class a shard holds, and the quota of each owner, a (stage, task), in
each class. Out: the record at a rank of a class in a block, as (shard, slot). Inside a block the
records of a class are ordered by a keyed permutation, and the ranks are divided into one interval
per owner and a reserve that no stage uses, so no record belongs to two stages or two tasks.
Memory: prefix sums per block and class, nothing per record.
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

Owner = tuple[str, Task | None]
"""Stage and task; None: the stage's records whose task varies from epoch to epoch."""

Count = TypeVar("Count", int, NDArray[np.int64])
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ClassTable(Protocol):
    """What a plan reads of a corpus; `data_shards.shards.index.ShardIndex` implements it."""

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
    """One block with its ranks divided among the owners."""

    shards: tuple[int, ...]
    before: Mapping[int, tuple[int, ...]]  # class -> [shards + 1] records before each shard
    ranks: Mapping[int, Mapping[Owner, range]]  # class -> owner -> its ranks
    reserve: Mapping[int, range]  # class -> ranks that no stage uses
    orders: Mapping[int, Permutation]  # class -> rank -> index of the record in shard order


class Blocks:
    """The shards of a corpus in keyed order, in blocks of about `block_shards` shards.

    Shards are numbered in packing order, so neighbors often hold the same source. Therefore the
    shard list is divided into `block_shards` runs of equal length and every block takes one shard
    of each run, by a keyed permutation per run: every block has nearly the mix of the whole corpus,
    and all tasks are in the same block at nearly the same time (docs/rates.md, section 4).
    """

    def __init__(self, table: ClassTable, *, seed: int, block_shards: int) -> None:
        self.table = table
        self.seed = seed
        self.classes = tuple(check_classes(table.class_counts()))
        self.num_blocks = -(-table.num_shards // block_shards)
        self._shards = _shard_order(table.num_shards, self.num_blocks, block_shards, seed)
        self._prefix = self._count()
        self._quotas: dict[int, dict[Owner, int]] = {mask: {} for mask in self.classes}
        self._open: OrderedDict[int, OpenBlock] = OrderedDict()

    def _count(self) -> dict[int, NDArray[np.int64]]:
        """Class -> [num_blocks + 1] records of it in the blocks before block b."""
        counts = np.zeros((self.table.num_shards, len(self.classes)), dtype=np.int64)
        columns = {mask: column for column, mask in enumerate(self.classes)}
        for shard in range(self.table.num_shards):
            for mask, count in self.table.class_counts(shard).items():
                if count:
                    counts[shard, columns[mask]] = count
        in_block = np.zeros((self.num_blocks, len(self.classes)), dtype=np.int64)
        for run in self._shards.T:
            has_shard = run >= 0
            in_block[has_shard] += counts[run[has_shard]]
        return {
            mask: np.concatenate(([0], np.cumsum(in_block[:, column])))
            for mask, column in columns.items()
        }

    def assign(self, quotas: Mapping[int, Mapping[Owner, int]]) -> None:
        """Divide the records of every class among the owners.

        Args:
            quotas: class -> owner -> number of records, in all at most the class's records. The
                owners of one stage must be adjacent, so that its ranks are contiguous.
        """
        for mask, owners in quotas.items():
            assert sum(owners.values()) <= self._prefix[mask][-1], f"class {mask} is overdrawn"
            self._quotas[mask] = {owner: quota for owner, quota in owners.items() if quota}
        self._open.clear()

    def prefix(self, mask: int, owner: Owner) -> NDArray[np.int64]:
        """[num_blocks + 1] records of a class that an owner has in the blocks before block b."""
        return self._split(mask, self._prefix[mask]).get(owner, np.zeros_like(self._prefix[mask]))

    def _split(self, mask: int, before: Count) -> dict[Owner, Count]:
        """Owner -> how many of the first `before` records of a class belong to it.

        One owner after the other gets its proportion of what the owners before it left, rounded
        down. Each count grows by 0 or 1 with `before`, so no block gets a negative count, and
        equals the quota when `before` is the whole class.
        """
        shares: dict[Owner, Count] = {}
        left = int(self._prefix[mask][-1])
        for owner, quota in self._quotas[mask].items():
            shares[owner] = before * quota // left
            before = before - shares[owner]
            left -= quota
        return shares

    def open(self, block: int) -> OpenBlock:
        """The shards and the divided ranks of a block; the last ones used are kept."""
        return cached(self._open, block, _CACHED_BLOCKS, self._open_block)

    def _open_block(self, block: int) -> OpenBlock:
        shards = tuple(int(shard) for shard in self._shards[block] if shard >= 0)
        counts = [self.table.class_counts(shard) for shard in shards]
        before: dict[int, tuple[int, ...]] = {}
        ranks: dict[int, dict[Owner, range]] = {}
        reserve: dict[int, range] = {}
        for mask in self.classes:
            before[mask] = (0, *accumulate(count.get(mask, 0) for count in counts))
            start, stop = (int(self._prefix[mask][block + step]) for step in (0, 1))
            at_start, at_stop = self._split(mask, start), self._split(mask, stop)
            rank = 0
            ranks[mask] = {}
            for owner in at_start:
                ranks[mask][owner] = range(rank, rank + at_stop[owner] - at_start[owner])
                rank = ranks[mask][owner].stop
            reserve[mask] = range(rank, stop - start)
        orders = {
            mask: Permutation(before[mask][-1], derive_key(self.seed, "class", block, mask))
            for mask in self.classes
            if before[mask][-1]
        }
        return OpenBlock(shards=shards, before=before, ranks=ranks, reserve=reserve, orders=orders)

    def locate(self, block: int, mask: int, rank: int) -> tuple[int, int]:
        """(shard, slot) of the record at a rank of a class in a block."""
        opened = self.open(block)
        index = opened.orders[mask](rank)
        before = opened.before[mask]
        column = bisect_right(before, index) - 1
        shard = opened.shards[column]
        return shard, int(self.table.slots(shard, mask)[index - before[column]])

    def find(self, mask: int, owner: Owner, index: int) -> tuple[int, int]:
        """(block, rank in the class) of the index-th record of an owner, over all blocks."""
        prefix = self.prefix(mask, owner)
        block = int(np.searchsorted(prefix, index, side="right")) - 1
        return block, self.open(block).ranks[mask][owner][index - int(prefix[block])]

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
    for mask, count in counts.items():
        if not 0 < mask < 1 << len(TASKS) or count < 0:
            raise ValueError(
                f"task mask: must be 1..{(1 << len(TASKS)) - 1} with 0 or more records, found mask "
                f"{mask} with {count}; build the shards again"
            )
    if not 0 < sum(counts.values()) <= MAX_RECORDS:
        raise ValueError(
            f"the shards must hold 1..{MAX_RECORDS} records, found {sum(counts.values())}; build "
            "them again"
        )
    return {mask: counts[mask] for mask in sorted(counts) if counts[mask]}


def cached(cache: "OrderedDict[K, V]", key: K, limit: int, make: Callable[[K], V]) -> V:
    """cache[key], made when it is missing; above `limit` the least recently used entry goes."""
    if key not in cache:
        cache[key] = make(key)
        if len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
