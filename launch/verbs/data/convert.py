"""The verb `convert`: ms-swift training data to a shard folder (import), and back (export).

`convert import FILE` is `build swift FILE`: checked, curated, in parallel, resumable.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

from data_shards.progress import Progress
from data_shards.shards.index import ShardIndex
from data_shards.sources.swift_export import Form, Visual, export_swift
from data_shards.tasks import TASKS, Task
from launch.verb_tools import add_json, print_result, resumable
from launch.verbs.data.build import add_source_arguments, build

_IMPORT: Final = "ms-swift data as a shard folder"
_EXPORT: Final = "a shard folder as ms-swift data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both kinds."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_export_arguments(kinds.add_parser("export", help=_EXPORT, description=_EXPORT))
    import_parser = kinds.add_parser("import", help=_IMPORT, description=_IMPORT)
    add_source_arguments(import_parser, "swift")
    import_parser.set_defaults(source="swift")


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", help="shard folder")
    add("--out", type=Path, required=True, help="folder to make; must be new or empty")
    add("--form", choices=get_args(Form), default="jsonl", help="lines, or one JSON list")
    add("--visual", choices=get_args(Visual), default="video", help="media of tasks other than FER")
    names = [task.value for task in TASKS]
    add("--task", choices=names, action="append", help="only this task (may be given again)")
    add("--give-emotion", action="store_true", help="state the gold emotion in ECPE queries")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Convert and print the counts."""
    if args.kind == "import":
        return resumable("convert import", lambda: print_result(build(args), args))
    return resumable("convert export", lambda: print_result(export(args), args, export_text))


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Write the rows and the media of a shard folder; returns the counts."""
    records = ShardIndex.load(args.dir).num_records
    return export_swift(
        args.dir,
        args.out,
        form=args.form,
        visual=args.visual,
        tasks=tuple(Task(name) for name in args.task) if args.task else TASKS,
        give_emotion=args.give_emotion,
        progress=Progress(records, "records"),
    )


def export_text(report: Mapping[str, Any]) -> str:
    """The counts as a line."""
    tasks = ", ".join(f"{task} {count}" for task, count in report["tasks"].items())
    return f"{report['out']}: {report['rows']} rows of {report['records']} records ({tasks})"
