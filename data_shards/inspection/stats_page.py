"""The counts of `emoverse stats` as one static HTML page: tables with bars, no script, no server.

In: the report as a JSON object. Out: a file. Every part of the report is shown: dictionaries of
numbers as tables, dictionaries of dictionaries as one table, the rest as text.
"""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #6a7686; --line: #d9dfe7;
        --paper: #f6f8fa; --card: #fff; --bar: #7aa2d6 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf2; --soft: #98a4b5; --line: #323c4a;
        --paper: #12171e; --card: #1a212b; --bar: #3f6ea8 } }
body { margin: 0 auto; padding: 2rem 1rem; max-width: 68rem; background: var(--paper);
       color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 0 0 .5rem }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
          padding: 1rem 1.25rem; margin: 1rem 0; overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .15rem .8rem .15rem 0; text-align: right }
th { color: var(--soft); font-weight: 500 } th:first-child, td:first-child { text-align: left }
td.note { min-width: 14rem; text-align: left; color: var(--soft) }
td.bar { min-width: 12rem; text-align: left } td.bar i { display: block; height: .7rem;
         background: var(--bar); border-radius: 2px }
pre { white-space: pre-wrap; color: var(--soft) }
"""
_TITLES: Final = {
    "table_one": "Beside Table I of the paper",
    "unexplained": "What nothing explains",
    "overlap": "Overlap of ECF's training set with MELD",
    "tasks_by_source": "Entries per task and source",
    "tasks": "Entries per task",
    "classes": "Records by the tasks they serve",
}
_FIRST: Final = ("table_one", "unexplained", "overlap", "tasks_by_source", "tasks", "classes")


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page, by a rename at the end. Raises FileNotFoundError if the folder is missing."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--html: no folder {path.parent}; make it first")
    part = path.with_name(f"{path.name}.part")
    part.write_text(page(report), encoding="utf-8")
    os.replace(part, path)


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    title = f"Statistics of {report.get('folder', 'the corpora')}"
    names = [name for name in _FIRST if name in report]
    names += [name for name in report if name not in _FIRST]
    parts = "".join(_section(name, report[name]) for name in names)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{parts}</body></html>\n"
    )


def _section(name: str, value: Any) -> str:
    if value in ({}, [], None):
        return ""
    title = _TITLES.get(name, name.replace("_", " "))
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>{_body(value)}</section>'


def _body(value: Any) -> str:
    if isinstance(value, Mapping):
        if value and all(_is_number(item) for item in value.values()):
            return _bars(value)
        if value and all(isinstance(item, Mapping) for item in value.values()):
            rows = {name: _flat(item) for name, item in value.items()}
            if all(_is_plain(cell) for row in rows.values() for cell in row.values()):
                return _table(rows)
        return "".join(
            f"<h3>{escape(str(name).replace('_', ' '))}</h3>{_body(item)}"
            for name, item in value.items()
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(isinstance(item, Mapping) for item in value):
            rows = {str(item.get("name", n)): _flat(item) for n, item in enumerate(value)}
            return _table({name: _without_name(row) for name, row in rows.items()})
        return f"<pre>{escape(', '.join(map(str, value)))}</pre>"
    return f"<pre>{escape(_show(value))}</pre>"


def _without_name(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "name"}


def _flat(item: Mapping[str, Any]) -> dict[str, Any]:
    """Nested numbers as columns of their own: parts.meld, ..."""
    flat: dict[str, Any] = {}
    for name, value in item.items():
        if isinstance(value, Mapping):
            flat |= {f"{name} {inner}": cell for inner, cell in value.items()}
        else:
            flat[name] = value
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str))


def _bars(counts: Mapping[str, Any]) -> str:
    top = max((abs(value) for value in counts.values()), default=0) or 1
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{_show(value)}</td>"
        f'<td class="bar"><i style="width:{100 * abs(value) / top:.1f}%"></i></td></tr>'
        for name, value in counts.items()
    )
    return f"<table>{rows}</table>"


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in columns)
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(_cell(row.get(column)) for column in columns)}</tr>"
        for name, row in rows.items()
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    kind = ' class="note"' if isinstance(value, str) else ""
    return f"<td{kind}>{escape(_show(value))}</td>"


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"
