"""What a source gives the build per clip: a recipe for the record, or why there is none.

A recipe is a function of nothing that a worker process can call (so it is picklable) and that gives
the same every time. Clips that do not become records are counted and listed in `skipped.jsonl`
beside the shards.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from data_shards.record import Record

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
