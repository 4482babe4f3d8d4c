"""The verb `stats`: counts a shard folder, or annotation folders beside the paper's Table I.

In: a shard folder, or folders of MELD, ECF and CMU-MOSEI. Out: tables as text, JSON, or a page.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from data_shards.inspection.corpus_stats import corpus_stats
from data_shards.inspection.corpus_stats import report_text as corpus_report_text
from data_shards.inspection.counts import table_text
from data_shards.inspection.stats import stats
from data_shards.inspection.stats_page import write_page
from data_shards.tasks import Task
from launch.verb_tools import add_json, print_result

_COLUMNS: Final = ("min", "mean", "median", "p95", "max")
_LABELS: Final[dict[Task, str]] = {
    Task.MSA: "polarity",
    Task.ER: "emotion",
    Task.FER: "phrase",
    Task.ECPE: "emotion of the pair",
}
_TOP_LABELS: Final = 12  # rows of a label table as text; the JSON has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder or the annotation folders, and the page."""
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", nargs="?", help="shard folder")
    add("--index-only", action="store_true", help="read the index, no record")
    add("--html", type=Path, metavar="FILE", help="also write the counts as a page")
    raw = parser.add_argument_group("annotation folders instead of DIR, without media").add_argument
    raw("--meld", type=Path, metavar="DIR", help="MELD's csv files")
    raw("--ecf", type=Path, metavar="DIR", nargs="+", default=[], help="files of ECF 2.0 and 1.0")
    raw("--mosei", type=Path, metavar="DIR", help="CMU-MOSEI's labels")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Count and print."""
    corpora = args.meld is not None or args.mosei is not None or bool(args.ecf)
    if corpora == (args.dir is not None):
        raise ValueError("give either a shard folder or annotation folders (--meld --ecf --mosei)")
    if corpora:
        report = corpus_stats(meld=args.meld, ecf=args.ecf, mosei=args.mosei)
    else:
        report = stats(args.dir, index_only=args.index_only)
    if args.html is not None:
        write_page(report, args.html)
    return print_result(report, args, report_text)


def report_text(report: Mapping[str, Any]) -> str:
    """The counts as tables."""
    if "folder" not in report:
        return corpus_report_text(report)
    lines = [
        f"{report['folder']}: {report['records']} records in {report['shards']} shards, "
        f"{report['bytes'] / 2**20:.1f} MiB"
    ]
    for name in ("sources", "splits"):
        if name in report:
            counts = ", ".join(f"{value} {count}" for value, count in report[name].items())
            lines.append(f"{name}: {counts}")
    lines += _count_table("entries per task", report["tasks"], report["records"])
    lines += _count_table("records by tasks they serve", report["classes"], report["records"])
    if report.get("table_one"):
        lines += ["", *table_text(report["table_one"])]
    for task, labels in report.get("labels", {}).items():
        title = f"{task}: {_LABELS[Task(task)]}"
        lines += _count_table(title, labels, sum(labels.values()))
    if report.get("cause_place"):
        positions = report["cause_place"]
        lines += _count_table("ecpe: position of the cause", positions, sum(positions.values()))
        per_target = report["pairs_per_target"]
        lines.append(f"  pairs per target: mean {per_target['mean']}, max {per_target['max']:g}")
    lines += ["", f"{'lengths':<28}" + "".join(f"{column:>9}" for column in _COLUMNS)]
    for name, lengths in report["lengths"].items():
        if lengths:
            lines.append(f"  {name:<26}" + "".join(f"{lengths[c]:>9g}" for c in _COLUMNS))
    return "\n".join(lines)


def _count_table(title: str, counts: Mapping[str, int], total: int) -> list[str]:
    lines = ["", title]
    for name, count in list(counts.items())[:_TOP_LABELS]:
        share = f"{count / total:>8.1%}" if total else ""
        lines.append(f"  {name:<26}{count:>9}{share}")
    if len(counts) > _TOP_LABELS:
        lines.append(f"  ... and {len(counts) - _TOP_LABELS} more")
    return lines
