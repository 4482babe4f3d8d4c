"""The verb `preview`: shows the first records of a shard folder or tar, as text or as a page.

In: a shard folder, a folder of WebDataset tars, or one tar. Out: keys, queries, answers and media
of the records; with --save their media, with --page a page to decide on them.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.inspection.preview import preview, write_preview_page
from data_shards.tasks import TASKS, Task
from launch.verb_tools import add_json, print_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The source, which records, and what to write."""
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", help="shard folder, folder of WebDataset tars, or one tar")
    add("-n", "--count", type=int, default=5, help="number of records (default: 5)")
    names = [task.value for task in TASKS]
    add("--task", choices=names, help="only records and entries of this task")
    add("--give-emotion", action="store_true", help="state the gold emotion in ECPE queries")
    add("--save", type=Path, metavar="FOLDER", help="write the records' media there")
    add("--page", type=Path, metavar="FOLDER", help="write a page to look at and to decide on")
    add(
        "--curation",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="decisions with which the page begins (may be given several times)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the records, or write the page and print where it is."""
    task = None if args.task is None else Task(args.task)
    options: dict[str, Any] = {"task": task, "give_emotion": args.give_emotion}
    if args.page is not None:
        report = write_preview_page(
            args.dir, args.page, args.count, curation=args.curation, **options
        )
    else:
        report = {"records": preview(args.dir, args.count, save=args.save, **options)}
    return print_result(report, args, report_text)


def report_text(report: Mapping[str, Any]) -> str:
    """The records as blocks of text, or where the page is."""
    if "page" in report:
        return f"{report['page']}: {report['shown']} records"
    blocks = []
    for record in report["records"]:
        seconds = "" if record["duration_s"] is None else f", {record['duration_s']:.2f} s"
        peak = "" if record["peak_frame"] is None else f", peak {record['peak_frame']}"
        lines = [
            f"{record['key']}  [{record['source']}/{record['split']}]  "
            f"{record['num_frames']} frames{seconds}{peak}, {record['stored']}, "
            f"{record['media_bytes']} bytes"
        ]
        for task, entry in record["tasks"].items():
            query = entry["query"].replace("\n", "\n          ")
            lines += [f"  {task:<5} q: {query}", f"        a: {entry['answer']}"]
        if record["notes"]:
            notes = ", ".join(f"{name}={value}" for name, value in record["notes"].items())
            lines.append(f"  notes {notes}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) if blocks else "no such record"
