"""What a shard folder holds: entries per task and source, labels, availability classes, lengths.

In: a shard folder; annotation folders are counted in corpus_stats. Out: a dict of counts (a JSON
object). Counts of tasks and classes come from the index alone; sources, labels and text lengths
need every record to be read. Flow: build -> here; `emoverse stats DIR`.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.inspection.counts import cause_position, counted, summary, table_rows
from data_shards.media.mp4 import mp4_seconds
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import DamagedRecord, iter_records
from data_shards.shards.record import Record, Video
from data_shards.tasks import TASKS, Task, build_query, format_answer, tasks_in


def stats(folder: Path | str, *, index_only: bool = False) -> dict[str, Any]:
    """Count what a shard folder holds.

    Args:
        index_only: read no record: leaves out sources, splits, labels, pairs and text lengths.

    Raises:
        FileNotFoundError, ValueError: the shard folder is incomplete, or a record is damaged
            (`emoverse lint` lists all damage).
    """
    index = ShardIndex.load(folder)
    classes = index.class_counts()
    frames = np.concatenate([index.entries(shard)["frames"] for shard in range(index.num_shards)])
    tasks = {
        str(task): sum(count for mask, count in classes.items() if task in tasks_in(mask))
        for task in TASKS
    }
    report: dict[str, Any] = {
        "folder": str(folder),
        "fingerprint": index.fingerprint,
        "shards": index.num_shards,
        "records": index.num_records,
        "bytes": sum(info.bytes for info in index.shards),
        "options": dict(index.options),
        "provenance": dict(index.provenance),
        "tasks": tasks,
        "classes": {"+".join(tasks_in(mask)): count for mask, count in classes.items()},
        "lengths": {"frames": summary(frames.tolist())},
    }
    if index_only:
        return report | {"table_one": table_rows({"all": dict(tasks)}, index.num_records)}
    counts = _Counts()
    try:
        for record in iter_records(index):
            counts.add(record)
    except DamagedRecord as error:
        raise ValueError(f"{error}; 'emoverse lint {folder}' lists all damage") from error
    report |= counts.report(report["lengths"])
    return report | {"table_one": table_rows(report["tasks_by_source"], index.num_records)}


class _Counts:
    """Running counts over records."""

    def __init__(self) -> None:
        self._sources: Counter[str] = Counter()
        self._splits: Counter[str] = Counter()
        self._tasks: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._labels: defaultdict[Task, Counter[str]] = defaultdict(Counter)
        self._distance: Counter[str] = Counter()
        self._pairs: list[int] = []
        self._lengths: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, record: Record) -> None:
        self._sources[record.source] += 1
        self._splits[record.split] += 1
        self._tasks[record.source].update(str(task) for task in record.tasks)
        self._lengths["utterance words"].append(len(record.utterance.split()))
        if isinstance(record.media, Video) and (seconds := mp4_seconds(record.media.mp4)):
            self._lengths["seconds"].append(seconds)
        if record.conversation:
            self._lengths["turns"].append(len(record.conversation))
        for task in record.tasks:
            query = build_query(record, task, give_emotion=False)
            answer = format_answer(task, record.answer(task))
            self._lengths[f"{task} query chars"].append(len(query))
            self._lengths[f"{task} answer chars"].append(len(answer))
            self._count_labels(record, task)

    def _count_labels(self, record: Record, task: Task) -> None:
        answer = record.answer(task)
        if task in (Task.MSA, Task.ER):
            assert isinstance(answer, str)
            self._labels[task][answer] += 1
        elif task is Task.FER:
            self._labels[task].update(record.expressions or ())
        elif task is Task.ECPE:
            pairs = record.pairs or ()
            self._pairs.append(len(pairs))
            self._labels[task].update(pair.emotion for pair in pairs)
            self._distance.update(cause_position(p.target, p.cause) for p in pairs)

    def report(self, lengths: Mapping[str, Any]) -> dict[str, Any]:
        """The counts as a JSON object; `lengths` are those of the index."""
        return {
            "sources": counted(self._sources),
            "tasks_by_source": {
                source: {str(task): tasks[task] for task in TASKS}
                for source, tasks in sorted(self._tasks.items())
            },
            "splits": counted(self._splits),
            "labels": {str(t): counted(self._labels[t]) for t in TASKS if t in self._labels},
            "pairs_per_target": summary(self._pairs),
            "cause_place": counted(self._distance),
            "lengths": {**lengths, **{name: summary(v) for name, v in self._lengths.items()}},
        }
