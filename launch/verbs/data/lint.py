"""The verb `lint`: checks every file and record of a shard folder.

In: a shard folder. Out: a line per problem and the count; the exit code is 1 if there is a problem;
optionally the bad records as a file of decisions for `build --curation`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from data_shards.build.curation import write_curation
from data_shards.inspection.lint import ContentLimits, lint
from launch.verb_tools import add_json, print_result

_SHOWN_WARNINGS: Final = 20  # lines as text; the JSON has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, what to check, and where to write the bad records."""
    add, usual = parser.add_argument, ContentLimits()
    add("dir", type=Path, metavar="DIR", help="shard folder")
    add("--decode", action="store_true", help="also decode every clip in full")
    add("--strict", action="store_true", help="suspicious records count as wrong")
    add("--quarantine", type=Path, metavar="FILE", help="write bad records for build --curation")
    add("--min-seconds", type=float, default=usual.min_seconds, help="shorter clips are suspicious")
    add("--max-seconds", type=float, default=usual.max_seconds, help="longer clips are suspicious")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check the folder and print the report."""
    limits = ContentLimits(min_seconds=args.min_seconds, max_seconds=args.max_seconds)
    report = lint(args.dir, decode=args.decode, limits=limits)
    if args.quarantine is not None:
        write_curation(args.quarantine, report.quarantine(strict=args.strict))
    ok = report.ok and not (args.strict and report.warnings)
    return print_result(report.to_json() | {"ok": ok}, args, report_text)


def report_text(report: Mapping[str, Any]) -> str:
    """One line per problem and warning, then the count."""
    lines = [_problem_line(problem) for problem in report["problems"]]
    warnings = report["warnings"]
    lines += [f"suspicious: {_problem_line(warning)}" for warning in warnings[:_SHOWN_WARNINGS]]
    if len(warnings) > _SHOWN_WARNINGS:
        hidden = len(warnings) - _SHOWN_WARNINGS
        lines.append(f"suspicious: ... and {hidden} more; --json has all")
    decoded = f", {report['decoded']} decoded" if report["decoded"] else ""
    verdict = f"{len(report['problems'])} problem(s)" if report["problems"] else "ok"
    verdict += f", {len(warnings)} suspicious" if warnings else ""
    lines.append(
        f"{report['folder']}: {report['shards']} shards, {report['records']} records{decoded}: "
        f"{verdict}"
    )
    return "\n".join(lines)


def _problem_line(problem: Mapping[str, Any]) -> str:
    position = " ".join(name for name in (problem["shard"], problem["key"]) if name)
    if problem["offset"] is not None:
        position += f" at byte {problem['offset']}"
    return f"{position}: {problem['cause']}" if position else str(problem["cause"])
