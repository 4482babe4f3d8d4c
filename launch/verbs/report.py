"""The verb `report`: writes RUN/report.html and RUN/summary.json from a run's results."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from launch.verb_tools import add_json, print_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, its text-only baseline, and answers of other systems."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--text-only", type=Path, metavar="RUN2", help="run directory of the text-only baseline"
    )
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="answers of another system (.jsonl) to show beside ours (repeatable)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write both files and print the summary."""
    # Here, since the help does not need the metrics.
    from emoverse.report.report import write_report
    from emoverse.report.summary import summary_text

    page = write_report(args.run, text_only_run=args.text_only, systems=_systems(args.system))
    summary = json.loads((args.run / "summary.json").read_text(encoding="utf-8"))
    text = f"{summary_text(summary)}\n{page}"
    return print_result({"report": str(page), **summary}, args, lambda _: text)


def _systems(words: Sequence[str]) -> dict[str, Path]:
    """Name -> file of answers. Raises ValueError for a word that is not NAME=FILE."""
    systems = {}
    for word in words:
        name, sign, path = word.partition("=")
        if not sign or not name or not path:
            raise ValueError(f"--system: give NAME=FILE.jsonl, found {word!r}")
        systems[name] = Path(path)
    return systems
