"""The counts of `emoverse stats` as one static HTML page: tables with bars.

In: the report as a JSON object. Out: a file. Every entry of the report is shown: dictionaries of
numbers as tables with bars, dictionaries of dictionaries as one table, the rest as text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from data_shards.files import write_atomically
from data_shards.pages.render import Section, render_page

_TITLES: Final = {
    "table_one": "Compared with Table I of the paper",
    "unexplained": "Unexplained differences",
    "overlap": "Overlap of ECF's training set with MELD",
    "tasks_by_source": "Entries per task and source",
    "tasks": "Entries per task",
    "classes": "Records by the tasks they serve",
}  # these sections come first


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of a table; `share` is the length of its bar, None in a table without bars."""

    name: str
    cells: Sequence[Any]
    share: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What a section shows: a heading, a text, or the rows of a table."""

    heading: str = ""
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Row] = ()


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page atomically. Raises FileNotFoundError if the folder is missing."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--html: no folder {path.parent}; create it first")
    write_atomically(path, page(report))


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    names = [name for name in _TITLES if name in report]
    names += [name for name in report if name not in _TITLES]
    shown = [name for name in names if report[name] not in ({}, [], None)]
    return render_page(
        "stats.html",
        title=f"Statistics of {report.get('folder', 'the corpora')}",
        command="stats",
        sections=[Section(name, _TITLES.get(name, _words(name))) for name in shown],
        blocks={name: list(_blocks(report[name])) for name in shown},
        shown=_shown,
    )


def _blocks(value: Any) -> Iterator[Block]:
    if isinstance(value, Mapping):
        if value and all(_is_number(item) for item in value.values()):
            yield _bars(value)
            return
        if value and all(isinstance(item, Mapping) for item in value.values()):
            rows = {str(name): _flat(item) for name, item in value.items()}
            if all(_is_plain(cell) for row in rows.values() for cell in row.values()):
                yield _table(rows)
                return
        for name, item in value.items():
            yield Block(heading=_words(str(name)))
            yield from _blocks(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(isinstance(item, Mapping) for item in value):
            named = {str(item.get("name", index)): _flat(item) for index, item in enumerate(value)}
            for row in named.values():
                row.pop("name", None)
            yield _table(named)
        else:
            yield Block(text=", ".join(map(str, value)))
    else:
        yield Block(text=_shown(value))


def _flat(item: Mapping[str, Any]) -> dict[str, Any]:
    """Nested numbers as columns of their own: parts meld, ..."""
    flat: dict[str, Any] = {}
    for name, value in item.items():
        if isinstance(value, Mapping):
            flat |= {f"{name} {inner}": cell for inner, cell in value.items()}
        else:
            flat[name] = value
    return flat


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (int, float, str))


def _bars(counts: Mapping[str, float]) -> Block:
    longest = max(abs(value) for value in counts.values()) or 1
    return Block(
        rows=[
            Row(name=str(name), cells=[value], share=abs(value) / longest)
            for name, value in counts.items()
        ]
    )


def _table(rows: Mapping[str, Mapping[str, Any]]) -> Block:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return Block(
        columns=[_words(name) for name in columns],
        rows=[
            Row(name=name, cells=[row.get(column) for column in columns])
            for name, row in rows.items()
        ],
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"
