"""What the raw corpora have in common: finding files, times of day, broken characters.

In: folders as downloaded. Out: paths, seconds, clean text. Used by meld, ecf and mosei.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

_TIME: Final = re.compile(r"(\d{1,2}):([0-5]?\d):([0-5]?\d)(?:[,.](\d{1,6}))?")
# C1 control characters are what is left of cp1252 text that was read as Latin-1; five of the 32
# have no meaning in cp1252 and stay. The no-break space becomes a space.
_REPAIRS: Final = {
    code: bytes([code]).decode("cp1252", errors="ignore") or chr(code) for code in range(0x80, 0xA0)
} | {0xA0: " "}


def repair_text(text: str) -> str:
    """The text with cp1252 characters that were read as Latin-1 put right, without outer spaces."""
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


def csv_rows(reader: "csv.DictReader[str]", path: Path) -> Iterator[dict[str, str]]:
    """The rows of a csv. Raises ValueError with file and line where it is none: cut short, say."""
    try:
        yield from reader
    except csv.Error as error:
        rule = "must be a whole csv file; download it again"
        raise ValueError(f"{path}:{reader.line_num}: {rule}: {error}") from error


def find_files(folders: Iterable[Path], pattern: str, *, depth: int = 3) -> list[Path]:
    """Files that match the name pattern in the folders or up to `depth` folders below, sorted.

    Raises FileNotFoundError if one of the folders is missing.
    """
    found: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give the corpus as downloaded")
        for level in range(depth + 1):
            found.update(path for path in folder.glob("*/" * level + pattern) if path.is_file())
    return sorted(found)


def find_one(folders: Sequence[Path], patterns: Sequence[str], *, what: str) -> Path:
    """The file that matches the first of the patterns that any file matches.

    Raises FileNotFoundError if none does, ValueError if several different files do.
    """
    for pattern in patterns:
        found = find_files(folders, pattern)
        contents = {path.read_bytes() for path in found}
        if len(contents) > 1:
            listed = ", ".join(str(path) for path in found)
            raise ValueError(f"{what}: must be one file, found {listed}; name its own folder")
        if found:
            return found[0]
    places = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(f"{what}: no file {' or '.join(patterns)} in {places} or below")
