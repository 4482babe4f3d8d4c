"""Raw corpora: each module here turns one corpus into items of a build.

A corpus module has `add_arguments(parser)` (which corpus, which part of it) and `open_source(args)
-> Source`. Items are recipes where making a record costs time: the build runs them in its workers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from data_shards.build.source_item import Recipe, Skipped
from data_shards.shards.record import Record

# Name on the command line -> module; imported only when it is called.
SOURCES: Final[Mapping[str, str]] = {
    "synthetic": "data_shards.sources.synthetic",
    **dict.fromkeys(("meld", "mosei", "ecf", "emt"), "data_shards.sources.emt"),
    "swift": "data_shards.sources.swift",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A corpus that is ready to be built: the same items in the same order every time."""

    items: Iterable[Record | Skipped | Recipe]
    total: int | None  # number of items, for the progress bar; None = not known
    provenance: Mapping[str, Any]  # JSON values: which corpus, options, hashes of its files
