"""The sections of the report behind the summary: metrics, errors, clips, setup; as HTML text.

`PageData` holds all that the page shows; every function takes it and returns the inner HTML of one
section. `report_page.py` puts them into the page.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from data_shards.tasks import IDENTIFIER, Task
from emoverse.config import Config, describe
from emoverse.metric_table import METRICS
from emoverse.report_charts import heat_table, tidy
from emoverse.report_clips import Clip, Said
from emoverse.report_curves import StageCurves
from emoverse.score_tables import confusion, item_scores
from emoverse.scoring import Row
from emoverse.significance import Score, score
from emoverse.summary import BASE, Evaluation, TaskSummary, majority_rows_of

TASK_TITLES = {
    Task.MSA: "Sentiment",
    Task.ER: "Emotion",
    Task.FER: "Facial expressions",
    Task.ERI: "Emotion reason",
    Task.ECPE: "Emotion-cause pairs",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PageData:
    """All that the page shows."""

    config: Config
    lines: Sequence[TaskSummary]
    evaluated: Mapping[str, Evaluation]
    text_only: Mapping[str, Evaluation]
    curves: Sequence[StageCurves]
    clips: Sequence[Clip]
    provenance: Mapping[str, Any]
    seconds: float | None
    peak_memory_bytes: int | None


def system_title(name: str) -> str:
    return {
        "majority": "majority",
        "text_only": "text only",
        "before": "before",
        BASE: "before",
    }.get(name, f"after {name.replace('stage', 'stage ')}" if name.startswith("stage") else name)


def task_name(task: Task) -> str:
    return (
        f'<span class="task"><i class="dot b-{task}" aria-hidden="true"></i>'
        f"<b>{task.upper()}</b> <span>{TASK_TITLES[task]}</span></span>"
    )


def plain(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def protocol_of(page: PageData) -> Mapping[str, Any]:
    found = [
        one.metrics["protocol"] for one in page.evaluated.values() if "protocol" in one.metrics
    ]
    return found[-1] if found else {}


# --- metrics and errors ---


def _rows_by_system(page: PageData, line: TaskSummary) -> dict[str, list[Row]]:
    """The rows of every system of the result table that answered the task; [] where none did."""
    states = {name: one.rows(line.task) for name, one in page.evaluated.items()}
    source = line.scored or next(iter(page.evaluated), None)
    twin = page.text_only.get(line.scored or "")
    return {
        "majority": majority_rows_of(page.evaluated[source], line.task) if source else [],
        "text_only": twin.rows(line.task) if twin else [],
        **{
            name: states.get(BASE if name == "before" else name, [])
            for name in line.systems
            if name not in ("majority", "text_only")
        },
    }


def metrics_section(page: PageData) -> str:
    """Every metric of every task for every system, with intervals."""
    bodies = []
    for line in page.lines:
        rows = _rows_by_system(page, line)
        if not any(rows.values()):
            continue
        lines = [
            f'<tr class="group"><th scope="rowgroup" colspan="{len(rows) + 1}">'
            f"{task_name(line.task)}<small>{max(map(len, rows.values()))} clips</small></th></tr>"
        ]
        for metric in METRICS[line.task]:
            cells = "".join(_score_cell(score(metric, found)) for found in rows.values())
            lines.append(f'<tr><th scope="row">{metric.title}</th>{cells}</tr>')
        for status in ("repaired", "unparseable"):
            counts = "".join(
                f'<td class="num">{sum(row.status == status for row in found) if found else "-"}'
                "</td>"
                for found in rows.values()
            )
            lines.append(f'<tr class="minor"><th scope="row">{status} answers</th>{counts}</tr>')
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    if not bodies:
        return '<p class="empty">Nothing has been evaluated yet.</p>'
    head = "".join(
        f'<th scope="col" class="num">{system_title(name)}</th>' for name in page.lines[0].systems
    )
    return (
        '<div class="card scroll"><table class="metrics"><thead><tr><th scope="col">metric</th>'
        f"{head}</tr></thead>{''.join(bodies)}</table></div>"
        '<p class="quiet">Small figures: 95% bootstrap interval over clips. Unparseable answers '
        "count as wrong.</p>"
    )


def _score_cell(found: Score) -> str:
    if not found.n:
        return '<td class="num">-</td>'
    return (
        f'<td class="num">{plain(found.value)}<small>{plain(found.low)} to {plain(found.high)}'
        "</small></td>"
    )


def errors_section(page: PageData) -> str:
    blocks = []
    for line in page.lines:
        if line.scored is None:
            continue
        rows = page.evaluated[line.scored].rows(line.task)
        title = f"{line.task.upper()}, {system_title(line.scored)}"
        table = confusion(line.task, rows)
        if table is not None and rows:
            blocks.append(
                f'<div class="card">{heat_table(title, table.classes, table.answers, table.counts)}'
                "</div>"
            )
        items = item_scores(rows)
        if items:
            body = "".join(
                f'<tr><th scope="row">{escape(item.name)}</th><td class="meter">'
                f'<i style="--share:{item.f1:.3f}" class="b-{line.task}"></i></td>'
                f'<td class="num">{item.f1:.2f}</td><td class="num">{item.precision:.2f}</td>'
                f'<td class="num">{item.recall:.2f}</td><td class="num">{item.support}</td></tr>'
                for item in items
            )
            what = "phrase" if line.task is Task.FER else "emotion"
            blocks.append(
                f'<div class="card scroll"><table class="items"><caption>{title}</caption><thead>'
                f'<tr><th scope="col">{what}</th><td></td><th scope="col" class="num">F1</th>'
                '<th scope="col" class="num">precision</th><th scope="col" class="num">recall</th>'
                f'<th scope="col" class="num">true</th></tr></thead><tbody>{body}</tbody></table>'
                "</div>"
            )
    return (
        f'<div class="columns">{"".join(blocks)}</div>'
        if blocks
        else ('<p class="empty">Nothing has been evaluated yet.</p>')
    )


# --- clips ---


def clips_section(page: PageData) -> str:
    if not page.clips:
        return '<p class="empty">No answers to show yet.</p>'
    tasks = list(dict.fromkeys(clip.task for clip in page.clips))
    buttons = '<button type="button" data-filter="" aria-pressed="true">All</button>' + "".join(
        f'<button type="button" data-filter="{task}" aria-pressed="false">{task.upper()}</button>'
        for task in tasks
    )
    return (
        '<p class="quiet">Chosen by rule, alternately right and wrong answers of the scored state, '
        "so the mix says nothing about the scores.</p>"
        f'<div class="filter" role="group" aria-label="Show the clips of one task">{buttons}</div>'
        f'<div class="clips">{"".join(_clip(i, clip) for i, clip in enumerate(page.clips))}</div>'
    )


def _clip(number: int, clip: Clip) -> str:
    if clip.mp4 is None:
        screen = f'<div class="novideo">{escape(clip.note)}</div>'
        note = ""
    else:
        data = base64.b64encode(clip.mp4).decode("ascii")
        screen = (
            f'<div class="screen"><video controls muted loop playsinline preload="auto" '
            f'aria-label="Clip {escape(clip.key)}" src="data:video/mp4;base64,{data}"></video>'
            '<button type="button" class="play" aria-label="Play the clip" hidden></button></div>'
        )
        note = f'<p class="note">{escape(clip.note)}</p>' if clip.note else ""
    rows = "".join(_said(one) for one in clip.answers)
    question = escape(clip.question)
    for identifier in IDENTIFIER.values():
        question = question.replace(escape(identifier), f"<mark>{escape(identifier)}</mark>")
    return (
        f'<article class="clip card" data-task="{clip.task}" aria-labelledby="clip-{number}">'
        f'{screen}<div><h3 id="clip-{number}">{task_name(clip.task)}</h3>'
        f'<p class="key">{escape(clip.key)}</p>{note}'
        f'<p class="question" tabindex="0">{question}</p><table class="said"><tbody>'
        f'<tr class="truth"><th scope="row">truth</th><td>{_text(clip.truth)}</td><td></td></tr>'
        f"{rows}</tbody></table></div></article>"
    )


def _said(one: Said) -> str:
    sign = {"right": "&#10003;", "partly": "&#8776;", "wrong": "&#10007;"}[one.verdict]
    return (
        f'<tr><th scope="row">{escape(system_title(one.system))}</th><td>{_text(one.text)}</td>'
        f'<td class="verdict {one.verdict}"><span aria-hidden="true">{sign}</span>'
        f'<span class="sr">{one.verdict}</span></td></tr>'
    )


def _text(text: str) -> str:
    return escape(text) if text.strip() else '<span class="quiet">(empty)</span>'


# --- setup ---


def setup_section(page: PageData) -> str:
    protocol = protocol_of(page)
    rows = [(key.replace("_", " "), _show(value)) for key, value in protocol.items()]
    last = list(page.evaluated.values())[-1:]
    for name in ("data", "versions"):
        for key, value in (last[0].metrics.get(name, {}) if last else {}).items():
            rows.append((f"{name}: {key.replace('_', ' ')}", _show(value)))
    table = _pairs_table("How the answers were made and scored", rows)
    config = _pairs_table("", describe(page.config))
    provenance = escape(json.dumps(page.provenance, indent=2, ensure_ascii=False))
    return (
        f'<div class="card scroll">{table}</div>'
        f'<details class="card"><summary>The resolved config</summary>'
        f'<div class="scroll">{config}</div></details>'
        f'<details class="card"><summary>Provenance</summary><pre>{provenance}</pre></details>'
    )


def _pairs_table(caption: str, rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td><code>{escape(value)}</code></td></tr>'
        for key, value in rows
    )
    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<table class="pairs">{head}<tbody>{body}</tbody></table>'


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return tidy(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_show(one)}" for key, one in value.items())
    return str(value)
