"""The verb `export`: a trained state, or an adapter folder, as a model that others can load."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.verb_tools import add_json, print_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, in which layout, and where to."""
    parser.add_argument(
        "source", type=Path, metavar="RUN|ADAPTER", help="run directory, or an adapter folder"
    )
    parser.add_argument(
        "--layout",
        required=True,
        choices=("internvl2", "transformers", "adapter"),
        help="merged like the released InternVL2, merged for transformers, or a PEFT adapter",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--which", metavar="STAGE", help="stage of the run; default: the last one that is trained"
    )
    parser.add_argument(
        "--base", metavar="FOLDER", help="base model of an adapter folder, or where it lies now"
    )
    parser.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp32"),
        default="keep",
        help="type of the stored weights; keep: as in the base",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not load the result and compare its logits"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Export and print what was written; 1 if the copy computes other logits."""
    from emoverse.export.export import export  # torch, which the help does not need

    result = export(
        args.source,
        args.out,
        layout=args.layout,
        stage=args.which,
        base=args.base,
        dtype=args.dtype,
        check=not args.no_check,
    )
    return print_result(result, args, report_text)


def report_text(result: Mapping[str, Any]) -> str:
    """The result for a terminal."""
    lines = [
        f"{result['state']} -> {result['out']} ({result['layout']}, {result['bytes']:,} bytes)"
    ]
    check: Mapping[str, Any] | None = result.get("check")
    if check is not None:
        verdict = "within" if result["ok"] else "beyond"
        lines.append(
            f"logits against the base with unmerged adapters ({check['dtype']}): relative RMS "
            f"{check['relative_rms']:.1e}, largest {check['max_abs']:.1e}, same next token "
            f"{check['same_choice']:.0%}: {verdict} the bound {check['bound']:g}"
        )
    return "\n".join(lines)
