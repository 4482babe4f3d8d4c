"""What a source gives the build per clip: a record, a function that makes it, or why there is none.

A record factory takes no arguments and is picklable, so that a worker process can call it. It gives
the same record every time, as long as the file that it reads (`FileItem`) stays the same. Clips
that do not become records are counted, and listed in `skipped.jsonl` beside the shards; records
that a person should look at are listed in `suspicious.jsonl`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TypeAlias

from data_shards.shards.record import Record

SKIPPED_FILE: Final = "skipped.jsonl"
SUSPICIOUS_FILE: Final = "suspicious.jsonl"
BY_CURATION: Final = "curation"  # the reason of clips that the user leaves out: never an error


@dataclass(frozen=True, kw_only=True, slots=True)
class Remark:
    """What the build has to say about a clip."""

    key: str
    source: str
    split: str
    reason: str  # one or two words joined by '-': what the report counts
    detail: str  # file and cause

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}: {self.detail}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped(Remark):
    """A clip of the annotation that does not become a record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspicious(Remark):
    """A clip that becomes a record and that a person should look at."""


RecordFactory: TypeAlias = Callable[[], Record | Skipped]
SourceItem: TypeAlias = Record | Skipped | RecordFactory
FileStamp: TypeAlias = tuple[int, int]  # size of a file in bytes, time of its last change in ns


@dataclass(frozen=True, kw_only=True, slots=True)
class FileItem:
    """A record factory that reads a file."""

    make: RecordFactory
    path: Path | None  # None: the file did not exist when the item was made

    def __call__(self) -> Record | Skipped:
        return self.make()


def file_stamp(item: SourceItem) -> FileStamp | None:
    """Size and time of change of the file that an item reads; None if it reads no existing file.

    This is how make and git notice changes: it takes microseconds, where hashing the contents of a
    corpus takes as long as copying it.
    """
    if not isinstance(item, FileItem) or item.path is None:
        return None
    try:
        status = item.path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def count_remarks(rows: Iterable[Remark]) -> dict[str, dict[str, int]]:
    """Source -> reason -> count, both sorted."""
    counts: dict[str, dict[str, int]] = {}
    for (source, reason), count in sorted(
        Counter((row.source, row.reason) for row in rows).items()
    ):
        counts.setdefault(source, {})[reason] = count
    return counts


def remark_lines(rows: Iterable[Remark]) -> str:
    """One JSON object per line, each ended by a newline."""
    return "".join(json.dumps(asdict(row), ensure_ascii=True) + "\n" for row in rows)
