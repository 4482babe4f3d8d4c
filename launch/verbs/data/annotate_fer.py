"""`emoverse annotate fer DIR`: FER labels from action units.

In: a shard folder, whose clips OpenFace measures if it is installed, or a folder of ready csv files
with the clips' emotions. Out: JSONL of key, peak_frame, aus, phrases for `emoverse build --fer`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from data_shards.annotate.action_units import (
    DEFAULT_OPTIONS,
    Au28Rule,
    FerOptions,
    OnEmpty,
    PhraseChoice,
    PresenceRule,
    Ties,
)
from data_shards.annotate.au_phrases import EMOTION_TABLES, PHRASE_TABLES
from data_shards.annotate.fer import annotate_folder
from data_shards.annotate.openface_run import PROGRAMS
from launch.verb_tools import add_json, print_result, resumable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, OpenFace's program, and the rules of the labels."""
    add, default = parser.add_argument, DEFAULT_OPTIONS
    add("dir", type=Path, metavar="DIR", help="shard folder, or folder of OpenFace's KEY.csv")
    add("--csv", type=Path, metavar="FOLDER", help="csv files of a shard folder: read, or made")
    add(
        "--openface", metavar="PROGRAM", help="OpenFace's program (default: looked for on the PATH)"
    )
    add(
        "--faces",
        choices=tuple(PROGRAMS),
        default="single",
        help="FeatureExtraction, or the one for all faces",
    )
    add("--group-speakers", choices=("keep", "skip"), default="keep", help="clips of 'All', 'Both'")
    add("--emotions", type=Path, help='JSONL of {"key", "emotion"} (default: DIR/emotions.jsonl)')
    add("--out", type=Path, help="JSONL to write (default: fer.jsonl beside the csv files)")
    add(
        "--min-confidence",
        type=float,
        default=default.min_confidence,
        help="drop rows below (default: no filter)",
    )
    add("--success-only", action="store_true", help="drop rows where tracking failed")
    add("--face-id", type=int, default=default.face_id, help="only this face (default: every face)")
    add(
        "--score-aus",
        nargs="+",
        default=list(default.score_aus),
        metavar="AU",
        help="units of the score (default: all 17)",
    )
    add(
        "--frequent-aus",
        type=int,
        default=default.frequent_aus,
        help="score only the N units active most often",
    )
    add(
        "--presence",
        choices=get_args(PresenceRule),
        default=default.presence,
        help="when the peak shows a unit",
    )
    add("--threshold", type=float, default=default.threshold, help="intensity 0..5 for r_threshold")
    add(
        "--au28",
        choices=get_args(Au28Rule),
        default=default.au28,
        help="AU28, which has no intensity",
    )
    add(
        "--ties", choices=get_args(Ties), default=default.ties, help="which of several highest rows"
    )
    add(
        "--on-empty",
        choices=get_args(OnEmpty),
        default=default.on_empty,
        help="what to do without a common unit",
    )
    add(
        "--phrase",
        choices=get_args(PhraseChoice),
        default=default.phrase,
        help="which phrase of a unit",
    )
    add("--seed", type=int, default=default.seed, help="seed of the random phrase")
    add(
        "--emotion-table",
        choices=tuple(EMOTION_TABLES),
        default=default.emotion_table,
        help="units of an emotion",
    )
    add(
        "--phrase-table",
        choices=tuple(PHRASE_TABLES),
        default=default.phrase_table,
        help="phrases of a unit",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Annotate and print the counts."""
    return resumable("annotate fer", lambda: print_result(annotate(args), args, report_text))


def annotate(args: argparse.Namespace) -> dict[str, Any]:
    """Annotate the clips of a folder; returns the counts."""
    values = {name: getattr(args, name) for name in FerOptions.__dataclass_fields__}
    return annotate_folder(
        args.dir,
        FerOptions(**{**values, "score_aus": tuple(values["score_aus"])}),
        csv_folder=args.csv,
        openface=args.openface,
        faces=args.faces,
        skip_group_speakers=args.group_speakers == "skip",
        emotions_file=args.emotions,
        out=args.out,
    )


def report_text(report: Mapping[str, Any]) -> str:
    """The counts as lines."""
    lines = [f"{report['annotated']} of {report['clips']} clips annotated -> {report['out']}"]
    lines += [f"  {count} not annotated: {why}" for why, count in report["not_annotated"].items()]
    lines += [f"  OpenFace: {count} {what}" for what, count in report["openface"].items()]
    return "\n".join(lines)
