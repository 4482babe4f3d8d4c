"""What the raw corpora have in common: finding files, csv files, times, broken characters.

In: folders as downloaded. Out: paths, rows, seconds, clean text. Used by meld, ecf and mosei.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from data_shards.jsonl import read_utf8

_WHOLE_CSV: Final = "must be a whole csv file; close its quotation marks or download it again"
_TIME: Final = re.compile(r"(\d{1,2}):([0-5]?\d):([0-5]?\d)(?:[,.](\d{1,6}))?")
# A C1 control character is a cp1252 character that was read as Latin-1; five of the 32 are not
# defined in cp1252 and stay. The no-break space becomes a space.
_REPAIRS: Final = {
    code: bytes([code]).decode("cp1252", errors="ignore") or chr(code) for code in range(0x80, 0xA0)
} | {0xA0: " "}


def repair_text(text: str) -> str:
    """Correct cp1252 characters that were read as Latin-1, and strip outer spaces."""
    return text.translate(_REPAIRS).strip()


def parse_time(text: str) -> float:
    """Seconds of `h:mm:ss,mmm` or `hh:mm:ss.mmm`; the fraction may have any number of digits.

    Raises ValueError for anything else.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a time must look like 0:04:42,198 or 00:04:42.198, found {text!r}")
    hours, minutes, seconds, fraction = match.groups()
    whole = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
    return whole + (int(fraction) / 10 ** len(fraction) if fraction else 0.0)


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, fields by column name) of the rows of a csv with a header; empty lines go.

    Args:
        columns: columns that every row must have; further columns may be there.

    Raises:
        ValueError: a column is missing or comes twice, a row has another number of fields than the
            header, or a quotation mark is not closed or stands in a wrong place; names file and
            line.
    """
    # No splitlines(): it would cut at U+0085, which old copies hold for an ellipsis.
    lines = list(io.StringIO(read_utf8(path), newline=""))
    reader = csv.reader(lines, strict=True)
    first = 1  # line where the row begins
    try:
        header = [name.strip() for name in next(reader, [])]
        for name in columns:
            if header.count(name) != 1:
                rule = f"column {name}: must be in the header once, found {header.count(name)}"
                raise ValueError(f"{path}:1: {rule} in {','.join(header)!r:.200}")
        first = reader.line_num + 1
        for row in reader:
            if row:
                _require_row(row, lines[first : reader.line_num], len(header), f"{path}:{first}")
                yield first, dict(zip(header, row, strict=False))
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{first}: {_WHOLE_CSV}: {error}") from error


def _require_row(row: Sequence[str], more_lines: Sequence[str], width: int, where: str) -> None:
    """Raise ValueError unless a row has the fields of the header, empty ones behind them aside.

    more_lines: the lines of the row after its first.
    """
    if len(row) < width:
        raise ValueError(f"{where}: the row is too short, it has {len(row)} fields of {width}")
    if any(cell.strip() for cell in row[width:]):
        rule = f"the row is too long, it has {len(row)} fields, the header {width}"
        raise ValueError(f"{where}: {rule}; put a text that holds a comma in quotation marks")
    # A mark that is not closed takes in whole rows, up to the next mark.
    for line, fields in zip(
        more_lines, csv.reader(more_lines, quoting=csv.QUOTE_NONE), strict=True
    ):
        if len(fields) >= width:
            rule = f"a quotation mark is not closed before the next row, {line.strip()!r:.80}"
            raise ValueError(f"{where}: {_WHOLE_CSV}: {rule}")


def find_files(folders: Iterable[Path], pattern: str, *, depth: int = 3) -> list[Path]:
    """Files that match the name pattern in the folders or up to `depth` folders below, sorted.

    Raises FileNotFoundError if one of the folders is missing.
    """
    paths: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give the corpus as downloaded")
        for level in range(depth + 1):
            paths.update(path for path in folder.glob("*/" * level + pattern) if path.is_file())
    return sorted(paths)


def find_one(folders: Sequence[Path], patterns: Sequence[str], *, what: str) -> Path:
    """The file that matches the first pattern with any match.

    Raises FileNotFoundError if none does, ValueError if several different files do.
    """
    for pattern in patterns:
        paths = find_files(folders, pattern)
        contents = {path.read_bytes() for path in paths}
        if len(contents) > 1:
            listed = ", ".join(str(path) for path in paths)
            raise ValueError(f"{what}: must be one file, found {listed}; name its own folder")
        if paths:
            return paths[0]
    listed = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(f"{what}: no file {' or '.join(patterns)} in {listed} or below")
