"""What a shard folder holds: entries per task, labels, availability classes, lengths.

In: a shard folder. Out: a dict of counts (a JSON object) and a text table. Counts of tasks and
classes come from the index alone; labels and text lengths need every record to be read.
Flow: build -> here; `emoverse stats DIR`.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_shards.index import ShardIndex
from data_shards.reader import DamagedRecord, ShardReader
from data_shards.record import Record
from data_shards.tasks import TASKS, Task, build_query, format_answer, tasks_in

_LABELS: Final[dict[Task, str]] = {
    Task.MSA: "polarity",
    Task.ER: "emotion",
    Task.FER: "phrase",
    Task.ECPE: "emotion of the pair",
}
_TOP_LABELS: Final = 12  # rows of a label table for people; the JSON has all


def stats(folder: Path | str, *, index_only: bool = False) -> dict[str, Any]:
    """Count what a shard folder holds.

    Args:
        index_only: read no record: leaves out sources, splits, labels, pairs and text lengths.

    Raises:
        FileNotFoundError, ValueError: the folder is not a whole shard folder, or a record is
            damaged (`emoverse lint` lists all of those).
    """
    index = ShardIndex.load(folder)
    classes = index.class_counts()
    frames = np.concatenate([index.entries(shard)["frames"] for shard in range(index.num_shards)])
    report: dict[str, Any] = {
        "folder": str(folder),
        "fingerprint": index.fingerprint,
        "shards": index.num_shards,
        "records": index.num_records,
        "bytes": sum(info.bytes for info in index.shards),
        "options": dict(index.options),
        "tasks": {
            str(task): sum(count for mask, count in classes.items() if task in tasks_in(mask))
            for task in TASKS
        },
        "classes": {"+".join(tasks_in(mask)): count for mask, count in classes.items()},
        "lengths": {"frames": summary(frames.tolist())},
    }
    if index_only:
        return report
    counts = _Counts()
    reader = ShardReader(folder, index, max_open=1)
    for shard, info in enumerate(index.shards):
        for slot in range(info.records):
            try:
                counts.add(reader.read(shard, slot))
            except DamagedRecord as error:
                raise ValueError(f"{error}; 'emoverse lint {folder}' lists all damage") from error
    reader.close()
    return report | counts.report(report["lengths"])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Smallest, mean, median, 95th percentile and largest of some numbers; empty for none."""
    if not values:
        return {}
    table = np.asarray(values, dtype=np.float64)
    return {
        "min": float(table.min()),
        "mean": round(float(table.mean()), 2),
        "median": float(np.median(table)),
        "p95": round(float(np.percentile(table, 95)), 2),
        "max": float(table.max()),
    }


class _Counts:
    """Running counts over records."""

    def __init__(self) -> None:
        self._sources: Counter[str] = Counter()
        self._splits: Counter[str] = Counter()
        self._labels: defaultdict[Task, Counter[str]] = defaultdict(Counter)
        self._distance: Counter[str] = Counter()
        self._pairs: list[int] = []
        self._lengths: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, record: Record) -> None:
        self._sources[record.source] += 1
        self._splits[record.split] += 1
        self._lengths["utterance words"].append(len(record.utterance.split()))
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
            self._distance.update(cause_place(p.target, p.cause) for p in pairs)

    def report(self, lengths: Mapping[str, Any]) -> dict[str, Any]:
        """The counts as a JSON object; `lengths` are those of the index."""
        return {
            "sources": _by_count(self._sources),
            "splits": _by_count(self._splits),
            "labels": {str(t): _by_count(self._labels[t]) for t in TASKS if t in self._labels},
            "pairs_per_target": summary(self._pairs),
            "cause_place": _by_count(self._distance),
            "lengths": {**lengths, **{name: summary(v) for name, v in self._lengths.items()}},
        }


def cause_place(target: int, cause: int) -> str:
    """Where a cause stands from its target: 'self', '1 before', '2 after', ..."""
    if target == cause:
        return "self"
    return f"{target - cause} before" if cause < target else f"{cause - target} after"


def _by_count(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `emoverse stats`."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="shard folder")
    parser.add_argument("--index-only", action="store_true", help="read the index, no record")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The counts of one folder."""
    return stats(args.dir, index_only=args.index_only)


def report_text(report: Mapping[str, Any]) -> str:
    """The counts as tables for people."""
    lines = [
        f"{report['folder']}: {report['records']} records in {report['shards']} shards, "
        f"{report['bytes'] / 2**20:.1f} MiB"
    ]
    for title, part in (("sources", "sources"), ("splits", "splits")):
        if part in report:
            listed = ", ".join(f"{name} {count}" for name, count in report[part].items())
            lines.append(f"{title}: {listed}")
    lines += _count_table("entries per task", report["tasks"], report["records"])
    lines += _count_table("records by tasks they serve", report["classes"], report["records"])
    for task, labels in report.get("labels", {}).items():
        title = f"{task}: {_LABELS[Task(task)]}"
        lines += _count_table(title, labels, sum(labels.values()))
    if report.get("cause_place"):
        places = report["cause_place"]
        lines += _count_table("ecpe: place of the cause", places, sum(places.values()))
        per_target = report["pairs_per_target"]
        lines.append(f"  pairs per target: mean {per_target['mean']}, max {per_target['max']:g}")
    lines += ["", f"{'lengths':<28}" + "".join(f"{n:>9}" for n in _COLUMNS)]
    for name, numbers in report["lengths"].items():
        if numbers:
            lines.append(f"  {name:<26}" + "".join(f"{numbers[c]:>9g}" for c in _COLUMNS))
    return "\n".join(lines)


_COLUMNS: Final = ("min", "mean", "median", "p95", "max")


def _count_table(title: str, counts: Mapping[str, int], total: int) -> list[str]:
    lines = ["", title]
    for name, count in list(counts.items())[:_TOP_LABELS]:
        share = f"{count / total:>8.1%}" if total else ""
        lines.append(f"  {name:<26}{count:>9}{share}")
    if len(counts) > _TOP_LABELS:
        lines.append(f"  ... and {len(counts) - _TOP_LABELS} more")
    return lines
