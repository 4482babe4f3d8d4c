"""What a shard folder holds: entries per task and source, labels, availability classes, lengths.

In: a shard folder, or annotation folders (corpus_stats). Out: a dict of counts (a JSON object), a
text table, an HTML page. Counts of tasks and classes come from the index alone; sources, labels and
text lengths need every record to be read. Flow: build -> here; `emoverse stats DIR`.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_shards.inspection import corpus_stats
from data_shards.inspection.counts import cause_position, counted, summary, table_rows, table_text
from data_shards.inspection.stats_page import write_page
from data_shards.media.mp4 import mp4_seconds
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import DamagedRecord, iter_records
from data_shards.shards.record import Record, Video
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `emoverse stats`."""
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", nargs="?", help="shard folder")
    add("--index-only", action="store_true", help="read the index, no record")
    add("--html", type=Path, metavar="FILE", help="also write the counts as a page")
    raw = parser.add_argument_group("annotation folders instead of DIR, without media").add_argument
    raw("--meld", type=Path, metavar="DIR", help="MELD's csv files")
    raw("--ecf", type=Path, metavar="DIR", nargs="+", default=[], help="files of ECF 2.0 and 1.0")
    raw("--mosei", type=Path, metavar="DIR", help="CMU-MOSEI's labels")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The counts of one shard folder, or of annotation folders."""
    corpora = args.meld is not None or args.mosei is not None or bool(args.ecf)
    if corpora == (args.dir is not None):
        raise ValueError("give either a shard folder or annotation folders (--meld --ecf --mosei)")
    if corpora:
        report = corpus_stats.corpus_stats(meld=args.meld, ecf=args.ecf, mosei=args.mosei)
    else:
        report = stats(args.dir, index_only=args.index_only)
    if args.html is not None:
        write_page(report, args.html)
    return report


def report_text(report: Mapping[str, Any]) -> str:
    """The counts as tables for people."""
    if "folder" not in report:
        return corpus_stats.report_text(report)
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
    if report.get("table_one"):
        lines += ["", *table_text(report["table_one"])]
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
