"""Readers of CMU-MOSEI's files: MMSA's label.csv, the SDK's csd, a per-segment table, the folds and
the raw transcripts.

In: one file each. Out: plain values. Facts are from thuiar/MMSA@a94e65d and
CMU-MultimodalSDK@4f2eadc. A video id is text: it may be all digits, start with '-' or contain '_'.
"""

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from data_shards.jsonl import read_utf8
from data_shards.sources.raw_files import read_csv, repair_text

# The csd's columns after the sentiment, in their order and with this project's names.
CSD_EMOTIONS: Final = ("joy", "sadness", "anger", "surprise", "disgust", "fear")
SPLITS: Final = ("train", "dev", "test")
_MODES: Final = {"train": "train", "valid": "dev", "dev": "dev", "test": "test"}
_TABLE_SPLITS: Final = {"0": "train", "1": "dev", "2": "test"}  # '3': in no fold


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """One labelled span of a whole video."""

    video: str
    index: int  # position in its file, which is not sorted by time
    start_s: float  # may be slightly negative
    end_s: float
    sentiment: float  # -3 to 3
    intensities: tuple[float, ...] | None  # 0 to 3 per CSD_EMOTIONS; None = the file has none
    split: str = ""  # empty: the file has none, or the segment is in no fold


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRow:
    """One row of MMSA's label.csv: a clip file Raw/<video>/<clip>.mp4."""

    video: str
    clip: str
    text: str
    sentiment: float
    split: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a raw transcript."""

    index: str
    start_s: float
    end_s: float
    text: str
    was_repaired: bool = False  # it was not UTF-8


def read_label_csv(path: Path) -> list[LabelRow]:
    """The rows of MMSA's label.csv; copies have the columns in different orders.

    Raises ValueError with file and line for a missing column, a wrong label or mode, or a clip that
    is listed twice.
    """
    rows = []
    seen: set[tuple[str, str]] = set()
    for line, fields in read_csv(path, ("video_id", "clip_id", "text", "label", "mode")):
        where = f"{path}:{line}"
        mode = fields["mode"].strip().lower()
        if mode not in _MODES:
            raise ValueError(f"{where}: mode: must be one of {', '.join(_MODES)}, found {mode!r}")
        video, clip = fields["video_id"], fields["clip_id"].strip()
        if not clip.isdecimal():
            raise ValueError(f"{where}: clip_id: must be a whole number, found {clip!r}")
        if (video, clip) in seen:
            raise ValueError(f"{where}: the clip {video}$_${clip} comes twice")
        seen.add((video, clip))
        rows.append(
            LabelRow(
                video=video,
                clip=clip,
                text=repair_text(fields["text"]),
                sentiment=_number(fields["label"], where, "label", -3, 3),
                split=_MODES[mode],
            )
        )
    return rows


def read_table(path: Path) -> list[Interval]:
    """The per-segment table (columns file, index, start, end, label7, split).

    Its sentiment is rounded away from zero to seven classes, which keeps the sign. Its column
    label6 is not used, because it labels every segment without emotion as happy: intensities are
    None.
    """
    intervals = []
    for line, fields in read_csv(path, ("file", "index", "start", "end", "label7", "split")):
        where = f"{path}:{line}"
        intervals.append(
            Interval(
                video=fields["file"],
                index=int(_number(fields["index"], where, "index", 0, math.inf)),
                start_s=_number(fields["start"], where, "start", -math.inf, math.inf),
                end_s=_number(fields["end"], where, "end", -math.inf, math.inf),
                sentiment=_number(fields["label7"], where, "label7", -3, 3),
                intensities=None,
                split=_TABLE_SPLITS.get(fields["split"].strip(), ""),
            )
        )
    return intervals


def read_csd(path: Path) -> list[Interval]:
    """The SDK's CMU_MOSEI_Labels.csd, an HDF5 file: features (n, 7) and intervals (n, 2) per video.

    Raises ValueError if the file is not such a csd, or h5py is not installed.
    """
    try:
        import h5py  # optional: only this format needs it
    except ImportError as error:
        raise ValueError(
            f"{path}: reading a csd needs h5py; pip install 'emoverse[mosei]'"
        ) from error
    intervals = []
    try:
        with h5py.File(path, "r") as file:
            data = file["All Labels"]["data"]
            for video in sorted(data):
                labels = data[video]["features"][()].tolist()
                spans = data[video]["intervals"][()].tolist()
                for index, (label, span) in enumerate(zip(labels, spans, strict=True)):
                    intervals.append(_csd_interval(video, index, label, span))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a csd of MOSEI's labels: {error}") from error
    return intervals


def _csd_interval(video: str, index: int, label: list[float], span: list[float]) -> Interval:
    if len(label) != 1 + len(CSD_EMOTIONS) or len(span) != 2:
        raise ValueError(f"{video}: must have 7 labels and 2 times, found {label} and {span}")
    if not -3 <= label[0] <= 3 or not all(0 <= value <= 3 for value in label[1:]):
        raise ValueError(f"{video}: labels are out of range: {label}")
    return Interval(
        video=video,
        index=index,
        start_s=span[0],
        end_s=span[1],
        sentiment=float(label[0]),
        intensities=tuple(float(value) for value in label[1:]),
    )


def read_folds(path: Path) -> dict[str, str]:
    """Video -> split, of the SDK's cmu_mosei_std_folds.py (parsed, never run) or of a JSON copy."""
    text = read_utf8(path)
    lists: Mapping[str, Any]
    try:
        if path.suffix == ".json":
            lists = json.loads(text)
        else:
            lists = {
                target.id: ast.literal_eval(node.value)
                for node in ast.parse(text).body
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name) and isinstance(node.value, ast.List)
            }
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(lists, dict):
        raise ValueError(f"{path}: must hold three lists by name, found {lists!r:.80}")
    split_of: dict[str, str] = {}
    for mode in ("train", "valid", "test"):
        name = f"standard_{mode}_fold"
        videos = lists.get(name)
        if not isinstance(videos, list) or not all(isinstance(video, str) for video in videos):
            raise ValueError(f"{path}: must hold a list {name} of texts, found {sorted(lists)}")
        for video in videos:
            if split_of.setdefault(video, _MODES[mode]) != _MODES[mode]:
                raise ValueError(f"{path}: video {video} is in two folds")
    return split_of


def read_transcript(path: Path) -> list[Line]:
    """The lines `video___index___start___end___text` of one video, in the order of the file.

    A line that is not UTF-8 is read as cp1252.
    """
    lines = []
    for number, encoded in enumerate(path.read_bytes().split(b"\n"), start=1):
        line, was_repaired = _decoded(encoded)
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("___", 4)
        # The file name gives the id: an id that ends with '_' would shift the separators.
        if len(fields) != 5 or fields[0] != path.stem:
            fields = [path.stem, *line.removeprefix(f"{path.stem}___").split("___", 3)]
        where = f"{path}:{number}"
        if len(fields) != 5:
            raise ValueError(f"{where}: must be video___index___start___end___text, found {line!r}")
        start, end = (_number(value, where, "time", -math.inf, math.inf) for value in fields[2:4])
        lines.append(
            Line(
                index=fields[1],
                start_s=start,
                end_s=end,
                text=repair_text(fields[4]),
                was_repaired=was_repaired,
            )
        )
    return lines


def _decoded(line: bytes) -> tuple[str, bool]:
    """(text, whether it had to be repaired) of one line."""
    try:
        return line.decode("utf-8"), False
    except UnicodeDecodeError:
        return line.decode("latin-1"), True  # `repair_text` makes cp1252 of its control characters


def _number(text: str, where: str, name: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or math.isinf(value):
        rule = "a number" if math.isinf(high) else f"a number from {low} to {high}"
        raise ValueError(f"{where}: {name}: must be {rule}, found {text!r}")
    return value
