"""Which held-out (record, task) entries are answered, and in which batches: pure functions.

In: the index of a shard folder. Out: entries per task, and batches that are formed globally, so
that neither the number of ranks nor a resume changes which samples share a batch; also the labels
of training records on which the baseline rules are fitted. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.shards.index import ShardIndex
from data_shards.shards.open import CacheOptions, open_index
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Record
from data_shards.tasks import TASKS, Task, bit
from emoverse.evaluation.metrics import Row
from emoverse.evaluation.parsing import conversation_id

TRAINING_RECORDS = 2000  # records per task of the training shards on which the rules are fitted


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One (record, task) entry to answer and where the record lies."""

    task: Task
    shard: int
    slot: int


def choose_entries(index: ShardIndex, max_records: int | None) -> dict[Task, list[Entry]]:
    """At most `max_records` entries per task, in the order of the shards.

    Which ones is decided by a hash of the record's key: the same clips for every state and every
    run, spread over the whole split, and a larger limit adds clips to those of a smaller one.
    """
    chosen: dict[Task, list[Entry]] = {}
    for task in TASKS:
        entries = [
            Entry(task=task, shard=shard, slot=int(slot))
            for shard in range(index.num_shards)
            for slot in np.flatnonzero(index.entries(shard)["tasks"] & bit(task))
        ]
        if max_records is not None and len(entries) > max_records:
            entries.sort(key=lambda one: hashlib.sha256(_key(index, one).encode()).digest())
            entries = sorted(entries[:max_records], key=lambda one: (one.shard, one.slot))
        if entries:
            chosen[task] = entries
    return chosen


def _key(index: ShardIndex, entry: Entry) -> str:
    return index.key(entry.shard, entry.slot)


def plan_batches(
    index: ShardIndex, chosen: Mapping[Task, Sequence[Entry]], batch_size: int
) -> list[list[Entry]]:
    """Batches of one task each, neighbours in length together, the longest first.

    The longest first: a batch that does not fit into memory is found at once.
    """

    def length(entry: Entry) -> int:
        return int(index.entries(entry.shard)[entry.slot]["text_chars"])

    batches = []
    for entries in chosen.values():
        ordered = sorted(entries, key=lambda one: (-length(one), one.shard, one.slot))
        batches += [
            ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)
        ]
    return batches


def training_references(
    shards: str | Path, tasks: Iterable[Task], cache: CacheOptions | None = None
) -> dict[Task, list[Row]]:
    """Truths of the training shards, at most TRAINING_RECORDS per task; {} without the folder."""
    if isinstance(shards, Path) and not shards.is_dir():
        return {}
    index = open_index(shards, cache)
    reader = ShardReader(index.folder, index)
    chosen = choose_entries(index, TRAINING_RECORDS)
    rows = {
        task: [
            reference_row(reader.read(one.shard, one.slot), task) for one in chosen.get(task, ())
        ]
        for task in tasks
    }
    reader.close()
    return rows


def all_reference_rows(shards: str | Path, cache: CacheOptions | None = None) -> Iterator[Row]:
    """A row per (record, task) entry of a shard folder. Raises what `open_index` raises."""
    index = open_index(shards, cache)
    reader = ShardReader(index.folder, index)
    for task, entries in choose_entries(index, None).items():
        for entry in entries:
            yield reference_row(reader.read(entry.shard, entry.slot), task)
    reader.close()


def reference_row(record: Record, task: Task) -> Row:
    """The scorers' row of one entry, before it is answered."""
    return Row(
        key=record.key,
        task=task,
        reference=record.answer(task),
        value=None,
        sentiment=record.sentiment,
        emotion=record.emotion,
        target=record.target,
        conversation=conversation_id(record.source, record.conversation),
    )
