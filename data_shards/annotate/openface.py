"""The action-unit csv of OpenFace 2.x: a reader for all variants of the format, and a writer.

In: a csv of FeatureExtraction (one face) or FaceLandmarkVidMulti (several rows per frame). Out:
`Faces`, one row per (frame, face) as numpy columns, frames counted from 0. Read by the FER
annotation, written by the synthetic corpus. Other columns (gaze, pose, landmarks) are ignored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

INTENSITY_AUS: Final = (
    *("AU01", "AU02", "AU04", "AU05", "AU06", "AU07", "AU09", "AU10", "AU12"),
    *("AU14", "AU15", "AU17", "AU20", "AU23", "AU25", "AU26", "AU45"),
)
"""The 17 action units with an intensity column AUxx_r (0 to 5). There is no AU28_r."""
PRESENCE_AUS: Final = (*INTENSITY_AUS[:-1], "AU28", "AU45")
"""The 18 action units with a presence column AUxx_c (0 or 1)."""

_PLAIN: Final = ["frame", "face_id", "timestamp", "confidence", "success"]
_INTENSITY_COLUMNS: Final = [f"{au}_r" for au in INTENSITY_AUS]
_PRESENCE_COLUMNS: Final = [f"{au}_c" for au in PRESENCE_AUS]
_ALL_COLUMNS: Final = [*_PLAIN, *_INTENSITY_COLUMNS, *_PRESENCE_COLUMNS]
# Files of the oldest 2.x builds and of some converters lack these two.
_OPTIONAL: Final = frozenset({"face_id", "timestamp"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Faces:
    """The faces of one clip: R rows, one per (frame, face), in the file's order.

    A frame may have 0..k rows; R may be 0.

    frame_R: int64, 0-based rank by presentation time (the file counts from 1).
    face_id_R: int64, OpenFace's number of the face; not an identity, it may flip or skip.
    timestamp_R: float64, seconds. confidence_R: float64, 0..1.
    success_R: bool, False where tracking failed; such rows have action-unit values too.
    intensity_RI: float64, 0..5, columns as INTENSITY_AUS.
    presence_RC: bool, columns as PRESENCE_AUS.
    """

    frame_R: NDArray[np.int64]
    face_id_R: NDArray[np.int64]
    timestamp_R: NDArray[np.float64]
    confidence_R: NDArray[np.float64]
    success_R: NDArray[np.bool_]
    intensity_RI: NDArray[np.float64]
    presence_RC: NDArray[np.bool_]

    def __post_init__(self) -> None:
        rows = len(self.frame_R)
        for name in ("face_id_R", "timestamp_R", "confidence_R", "success_R"):
            column = getattr(self, name)
            if column.shape != (rows,):
                raise ValueError(f"faces: {name}: must have shape ({rows},), found {column.shape}")
        for name, aus in (("intensity_RI", INTENSITY_AUS), ("presence_RC", PRESENCE_AUS)):
            table = getattr(self, name)
            if table.shape != (rows, len(aus)):
                rule = f"must have shape ({rows}, {len(aus)})"
                raise ValueError(f"faces: {name}: {rule}, found {table.shape}")

    @property
    def num_rows(self) -> int:
        """Number of (frame, face) rows."""
        return len(self.frame_R)


def read_openface(source: Path | str) -> Faces:
    """Read an OpenFace csv: a Path is a file, a str is the csv's text itself.

    Header names may start with a space (builds that write ', '), the face_id and timestamp columns
    may be missing (0 then), other columns are ignored. Raises FileNotFoundError, or ValueError
    naming file, line and column.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise FileNotFoundError(
                f"{source}: no such OpenFace csv; run OpenFace or correct the path"
            )
        name, text = str(source), source.read_text(encoding="utf-8-sig", errors="replace")
    else:
        name, text = "<text>", source.removeprefix("\ufeff")
    lines = text.splitlines()
    header = [column.strip() for column in lines[0].split(",")] if lines else []
    positions = _column_positions(name, header)
    line_numbers = [number for number, line in enumerate(lines[1:], start=2) if line.strip()]
    table = np.zeros((len(line_numbers), len(_ALL_COLUMNS)))  # a missing optional column stays 0
    given = list(positions)
    for row, number in enumerate(line_numbers):
        cells = lines[number - 1].split(",")  # OpenFace never quotes
        if len(cells) != len(header):
            rule = f"must have {len(header)} fields like the header"
            raise ValueError(f"{name}:{number}: a row {rule}, found {len(cells)}")
        table[row, given] = [_number(cells[index]) for index in positions.values()]
    _check_values(name, line_numbers, table)
    first = len(_PLAIN)
    last = first + len(_INTENSITY_COLUMNS)
    return Faces(
        frame_R=table[:, 0].astype(np.int64) - 1,
        face_id_R=table[:, 1].astype(np.int64),
        timestamp_R=table[:, 2],
        confidence_R=table[:, 3],
        success_R=table[:, 4] == 1,
        intensity_RI=table[:, first:last],
        presence_RC=table[:, last:] == 1,
    )


def _number(cell: str) -> float:
    """The number in the cell, nan if there is none."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _column_positions(name: str, header: Sequence[str]) -> dict[int, int]:
    """Index in _ALL_COLUMNS -> index in the file, without optional columns that are missing."""
    if not any(header):
        raise ValueError(
            f"{name}:1: must start with OpenFace's header, found an empty file or line"
        )
    for column in _ALL_COLUMNS:
        count = header.count(column)
        if count > 1:
            raise ValueError(f"{name}:1: column {column}: must occur once, found {count} times")
        if count == 0 and column not in _OPTIONAL:
            hint = "run OpenFace with -aus" if column.startswith("AU") else "is this OpenFace 2.x?"
            raise ValueError(
                f"{name}:1: column {column}: must be in the header, found none; {hint}"
            )
    return {n: header.index(column) for n, column in enumerate(_ALL_COLUMNS) if column in header}


def _check_values(name: str, line_numbers: Sequence[int], table: NDArray[np.float64]) -> None:
    """Raise ValueError for the first cell that breaks the rule of its column."""
    for index, column in enumerate(_ALL_COLUMNS):
        values = table[:, index]
        good = np.isfinite(values)
        rule = "must be a finite number"
        if column == "frame":
            whole = good & (values >= 1) & (values == np.floor(values))
            good, rule = whole, "must be a whole number from 1"
        elif column == "face_id":
            good, rule = good & (values == np.floor(values)), "must be a whole number"
        elif column.endswith("_r"):
            good, rule = (values >= 0) & (values <= 5), "must be an intensity from 0 to 5"
        elif column.endswith("_c") or column == "success":
            good, rule = (values == 0) | (values == 1), "must be 0 or 1"
        if not good.all():
            row = int(np.argmin(good))
            where = f"{name}:{line_numbers[row]}: column {column}"
            raise ValueError(f"{where}: {rule}, found {values[row]:g}")


def format_openface(faces: Faces, *, spaced: bool = True) -> str:
    """The csv text of some faces as OpenFace writes it.

    Frames count from 1, confidence and action units have two decimals, time has three. `spaced`
    separates by ', ', so that column names start with a space as in older builds.
    """
    lines: list[list[str]] = [list(_ALL_COLUMNS)]
    for row in range(faces.num_rows):
        lines.append(
            [
                str(int(faces.frame_R[row]) + 1),
                str(int(faces.face_id_R[row])),
                f"{faces.timestamp_R[row]:.3f}",
                f"{faces.confidence_R[row]:.2f}",
                str(int(faces.success_R[row])),
                *(f"{value:.2f}" for value in faces.intensity_RI[row]),
                *(f"{value:.2f}" for value in faces.presence_RC[row].astype(np.float64)),
            ]
        )
    separator = ", " if spaced else ","
    return "".join(separator.join(cells) + "\n" for cells in lines)


def write_openface(path: Path, faces: Faces, *, spaced: bool = True) -> None:
    """Write `format_openface` to a file."""
    path.write_text(format_openface(faces, spaced=spaced), encoding="utf-8", newline="\n")
