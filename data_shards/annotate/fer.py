"""The verb `emoverse annotate fer DIR`: faces from OpenFace, then labels by equations 1 to 3.

In: a shard folder, whose clips OpenFace measures if it is installed, or a folder of ready csv files
with the clips' emotions. Out: JSONL of key, peak_frame, aus, phrases for `emoverse build --fer`.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from data_shards.annotate.action_units import (
    DEFAULT_OPTIONS,
    Au28Rule,
    FerOptions,
    NotAnnotated,
    OnEmpty,
    PhraseChoice,
    PresenceRule,
    Ties,
    annotate_fer,
)
from data_shards.annotate.au_phrases import EMOTION_TABLES, PHRASE_TABLES
from data_shards.annotate.openface import read_openface
from data_shards.annotate.openface_run import (
    PROGRAMS,
    find_openface,
    measure_records,
    records_of,
)
from data_shards.jsonl import read_rows
from data_shards.progress import Progress
from data_shards.shards.index import INDEX_FILE, ShardIndex
from data_shards.shards.record import validate_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `emoverse annotate fer`."""
    d = DEFAULT_OPTIONS
    add = parser.add_argument
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
        default=d.min_confidence,
        help="drop rows below (default: no filter)",
    )
    add("--success-only", action="store_true", help="drop rows where tracking failed")
    add("--face-id", type=int, default=d.face_id, help="only this face (default: every face)")
    add(
        "--score-aus",
        nargs="+",
        default=list(d.score_aus),
        metavar="AU",
        help="units of the score (default: all 17)",
    )
    add(
        "--frequent-aus",
        type=int,
        default=d.frequent_aus,
        help="score only the N units active most often",
    )
    add(
        "--presence",
        choices=get_args(PresenceRule),
        default=d.presence,
        help="when the peak shows a unit",
    )
    add("--threshold", type=float, default=d.threshold, help="intensity 0..5 for r_threshold")
    add("--au28", choices=get_args(Au28Rule), default=d.au28, help="AU28, which has no intensity")
    add("--ties", choices=get_args(Ties), default=d.ties, help="which of several highest rows")
    add(
        "--on-empty",
        choices=get_args(OnEmpty),
        default=d.on_empty,
        help="what to do without a common unit",
    )
    add("--phrase", choices=get_args(PhraseChoice), default=d.phrase, help="which phrase of a unit")
    add("--seed", type=int, default=d.seed, help="seed of the random phrase")
    add(
        "--emotion-table",
        choices=tuple(EMOTION_TABLES),
        default=d.emotion_table,
        help="units of an emotion",
    )
    add(
        "--phrase-table",
        choices=tuple(PHRASE_TABLES),
        default=d.phrase_table,
        help="phrases of a unit",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Annotate the clips of a folder; writes the JSONL and returns the counts.

    Raises FileNotFoundError for a missing folder or file, ValueError for bad input.
    """
    names = FerOptions.__dataclass_fields__
    values = {name: getattr(args, name) for name in names}
    options = FerOptions(**{**values, "score_aus": tuple(values["score_aus"])})
    folder: Path = args.dir
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; give a shard folder or a folder of OpenFace csv files"
        )
    counts: Counter[str] = Counter()
    measured: Counter[str] = Counter()
    if (folder / INDEX_FILE).is_file():
        emotions, csvs, measured = _from_shards(args, counts)
    else:
        emotions, csvs = read_emotions(args.emotions or folder / "emotions.jsonl"), folder
    lines: list[str] = []
    for key, emotion in emotions.items():
        path = csvs / f"{key}.csv"
        if not path.is_file():
            counts["no-csv"] += 1
            continue
        result = annotate_fer(read_openface(path), emotion, options, key=key)
        if isinstance(result, NotAnnotated):
            counts[result.reason] += 1
            continue
        counts["annotated"] += 1
        label = {"peak_frame": result.peak_frame, "aus": result.aus, "phrases": result.phrases}
        lines.append(json.dumps({"key": key, **label}) + "\n")
    out: Path = args.out or csvs / "fer.jsonl"
    part = out.with_name(f"{out.name}.part")
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, out)
    annotated = counts.pop("annotated", 0)
    return {
        "out": str(out),
        "clips": len(emotions) + counts["group-speaker"],
        "annotated": annotated,
        "not_annotated": {why: number for why, number in sorted(counts.items()) if number},
        "openface": dict(sorted(measured.items())),
    }


def _from_shards(
    args: argparse.Namespace, counts: Counter[str]
) -> tuple[dict[str, str], Path, Counter[str]]:
    """Emotions and csv folder of a shard folder, after OpenFace has measured what lacks a csv."""
    csvs: Path | None = args.csv
    if csvs is None:
        raise ValueError(
            f"{args.dir}: a shard folder needs --csv FOLDER, where OpenFace's csv files are or "
            "shall be written"
        )
    program = find_openface(args.openface, args.faces)
    measured: Counter[str] = Counter()
    if program is not None:
        total = ShardIndex.load(args.dir).num_records
        measured = measure_records(args.dir, csvs, program, progress=Progress(total, "clips"))
    elif not csvs.is_dir():
        raise FileNotFoundError(
            f"{csvs}: no such folder, and {PROGRAMS[args.faces]} is not on the PATH; install "
            "OpenFace 2.x and name it with --openface, or give a folder of its csv files"
        )
    emotions = {}
    for record in records_of(args.dir):
        if record.emotion is None:
            continue
        if args.group_speakers == "skip" and record.notes.get("group_speaker"):
            counts["group-speaker"] += 1
            continue
        emotions[record.key] = record.emotion
    return emotions, csvs, measured


def read_emotions(path: Path) -> dict[str, str]:
    """Key -> emotion of a JSONL file. Raises FileNotFoundError; ValueError names file and line."""
    emotions: dict[str, str] = {}
    for row in read_rows(path, 'a JSONL of {"key", "emotion"}'):
        key, emotion = row.text("key"), row.text("emotion")
        validate_key(key)
        if key in emotions:
            raise ValueError(f"{row.place}: key: must be unique, found {key!r} again")
        emotions[key] = emotion
    return emotions


def report_text(report: Mapping[str, Any]) -> str:
    """The counts of `run` as lines for people."""
    lines = [f"{report['annotated']} of {report['clips']} clips annotated -> {report['out']}"]
    lines += [f"  {count} not annotated: {why}" for why, count in report["not_annotated"].items()]
    lines += [f"  OpenFace: {count} {what}" for what, count in report["openface"].items()]
    return "\n".join(lines)
