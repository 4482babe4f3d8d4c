"""FER labels of a folder of clips: faces from OpenFace, then labels by equations 1 to 3.

In: a shard folder, whose clips OpenFace measures if it is installed, or a folder of ready csv files
with the clips' emotions. Out: JSONL of key, peak_frame, aus, phrases for `emoverse build --fer`.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from data_shards.annotate.action_units import (
    DEFAULT_OPTIONS,
    FerOptions,
    NotAnnotated,
    annotate_fer,
)
from data_shards.annotate.openface import read_openface
from data_shards.annotate.openface_run import (
    PROGRAMS,
    find_openface,
    measure_records,
    records_of,
)
from data_shards.files import write_atomically
from data_shards.jsonl import read_rows
from data_shards.progress import Progress
from data_shards.shards.index import INDEX_FILE, ShardIndex
from data_shards.shards.record import validate_key


def annotate_folder(
    folder: Path,
    options: FerOptions = DEFAULT_OPTIONS,
    *,
    csv_folder: Path | None = None,
    openface: str | None = None,
    faces: str = "single",
    skip_group_speakers: bool = False,
    emotions_file: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Annotate the clips of a folder; writes the JSONL and returns the counts.

    Args:
        folder: a shard folder, or a folder of OpenFace's KEY.csv.
        csv_folder: the csv files of a shard folder; missing ones are made if OpenFace is there.
        openface: OpenFace's program; None looks for that of `faces` on the PATH.
        faces: a key of PROGRAMS.
        skip_group_speakers: leave out clips of a shard folder that several people speak.
        emotions_file: JSONL of {"key", "emotion"} for a folder of csv files; None: emotions.jsonl
            in it.
        out: None: fer.jsonl beside the csv files.

    Raises FileNotFoundError for a missing folder or file, ValueError for bad input.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; give a shard folder or a folder of OpenFace csv files"
        )
    counts: Counter[str] = Counter()
    measured: Counter[str] = Counter()
    if (folder / INDEX_FILE).is_file():
        if csv_folder is None:
            raise ValueError(
                f"{folder}: a shard folder needs --csv FOLDER, where OpenFace's csv files are or "
                "shall be written"
            )
        measured = _measure(folder, csv_folder, openface, faces)
        emotions = _emotions_of_shards(folder, skip_group_speakers, counts)
    else:
        emotions = read_emotions(emotions_file or folder / "emotions.jsonl")
        csv_folder = folder
    lines: list[str] = []
    for key, emotion in emotions.items():
        path = csv_folder / f"{key}.csv"
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
    out = out or csv_folder / "fer.jsonl"
    write_atomically(out, "".join(lines))
    annotated = counts.pop("annotated", 0)
    return {
        "out": str(out),
        "clips": len(emotions) + counts["group-speaker"],
        "annotated": annotated,
        "not_annotated": {reason: count for reason, count in sorted(counts.items()) if count},
        "openface": dict(sorted(measured.items())),
    }


def _measure(folder: Path, csv_folder: Path, openface: str | None, faces: str) -> Counter[str]:
    """Measure the clips of a shard folder that have no csv yet, if OpenFace is there."""
    program = find_openface(openface, faces)
    if program is not None:
        total = ShardIndex.load(folder).num_records
        return measure_records(folder, csv_folder, program, progress=Progress(total, "clips"))
    if not csv_folder.is_dir():
        raise FileNotFoundError(
            f"{csv_folder}: no such folder, and {PROGRAMS[faces]} is not on the PATH; install "
            "OpenFace 2.x and name it with --openface, or give a folder of its csv files"
        )
    return Counter()


def _emotions_of_shards(
    folder: Path, skip_group_speakers: bool, counts: Counter[str]
) -> dict[str, str]:
    """Key -> emotion of the records that have one; counts what is left out."""
    emotions = {}
    for record in records_of(folder):
        if record.emotion is None:
            continue
        if skip_group_speakers and record.notes.get("group_speaker"):
            counts["group-speaker"] += 1
            continue
        emotions[record.key] = record.emotion
    return emotions


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
