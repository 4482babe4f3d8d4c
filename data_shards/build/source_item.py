"""What a source gives the build per clip: a recipe for the record, or why there is none.

A recipe is a function of nothing that a worker process can call (so it is picklable) and that gives
the same every time, as long as the file that it reads (`FileRecipe`) stays the same. Clips that do
not become records are counted and listed in `skipped.jsonl` beside the shards.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from data_shards.shards.record import Record

SKIPPED_FILE: Final = "skipped.jsonl"
BY_CHOICE: Final = "curation"  # the reason of clips that the user leaves out: never an error


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A clip of the annotation that does not become a record."""

    key: str
    source: str
    split: str
    reason: str  # one or two words joined by '-': what the report counts
    detail: str  # file and cause

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}: {self.detail}"


Recipe = Callable[[], Record | Skipped]
Stamp = tuple[int, int]  # bytes of a file, and when it was last changed, in ns


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecipe:
    """A recipe that reads a file."""

    make: Recipe
    path: Path | None  # None: the file was not found when the recipe was made

    def __call__(self) -> Record | Skipped:
        return self.make()


def stamp(item: object) -> Stamp | None:
    """How the file that an item reads looks now; None: it reads none, or the file is not there.

    Size and time of change, as make and git look at files: a look of microseconds, where hashing
    the contents of a corpus takes as long as copying it.
    """
    if not isinstance(item, FileRecipe) or item.path is None:
        return None
    try:
        found = item.path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def count_skipped(rows: Iterable[Skipped]) -> dict[str, dict[str, int]]:
    """Source -> reason -> how many, both sorted."""
    counts = Counter((row.source, row.reason) for row in rows)
    found: dict[str, dict[str, int]] = {}
    for (source, reason), number in sorted(counts.items()):
        found.setdefault(source, {})[reason] = number
    return found


def skipped_lines(rows: Iterable[Skipped]) -> str:
    """One JSON object per line, each ended by a newline."""
    return "".join(json.dumps(asdict(row), ensure_ascii=True) + "\n" for row in rows)


def skipped_from_json(document: dict[str, Any]) -> Skipped:
    """The inverse of one line."""
    return Skipped(**document)
