"""The corpora that can be built, and what a corpus module gives the build.

A corpus module has `add_arguments(parser)` and `open_source(args) -> Source`; `SOURCES` lists it.
Where making a record takes time, the item is a function that the build calls in its workers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from data_shards.build.source_item import SourceItem

# Name on the command line -> module
SOURCES: Final[Mapping[str, str]] = {
    "synthetic": "data_shards.sources.synthetic",
    **dict.fromkeys(("meld", "mosei", "ecf", "emt"), "data_shards.sources.emt"),
    "swift": "data_shards.sources.swift",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A corpus that is ready to be built: the same items in the same order every time."""

    items: Iterable[SourceItem]
    total: int | None  # number of items, for the progress bar; None = not known
    provenance: Mapping[str, Any]  # JSON values: the corpus, its options, hashes of its files
