"""The sections of the report behind the summary: metrics, errors, clips, setup; as HTML text.

`PageData` holds all that the page shows; every function takes it and returns the inner HTML of one
section. `report_page.py` puts them into the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from data_shards.tasks import Task
from emoverse.config.schema import Config, describe
from emoverse.evaluation.intervals import Score, score
from emoverse.evaluation.metrics import Row
from emoverse.evaluation.registry import METRICS
from emoverse.evaluation.tables import confusion, item_scores
from emoverse.paper.tables import CONDITIONS, paper_value
from emoverse.report.charts import heat_table, tidy
from emoverse.report.clips import Clip
from emoverse.report.curves import StageCurves
from emoverse.report.incidents import Incident
from emoverse.report.summary import BASE, Evaluation, TaskSummary, majority_rows_of

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
    incidents: Sequence[Incident]
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
            f'<tr class="group"><th scope="rowgroup" colspan="{len(rows) + 2}">'
            f"{task_name(line.task)}<small>{max(map(len, rows.values()))} clips</small></th></tr>"
        ]
        for metric in METRICS[line.task]:
            if not any(metric.applies(found) for found in rows.values()):
                continue
            cells = "".join(_score_cell(score(metric, found)) for found in rows.values())
            printed = paper_value(line.task, metric.name)
            cells += f'<td class="num">{"-" if printed is None else plain(printed / 100)}</td>'
            lines.append(f'<tr><th scope="row">{metric.title}</th>{cells}</tr>')
        lines += _further_rules(page, line, len(rows))
        for status in ("repaired", "unparseable"):
            counts = "".join(
                f'<td class="num">{sum(row.status == status for row in found) if found else "-"}'
                "</td>"
                for found in rows.values()
            )
            lines.append(
                f'<tr class="minor"><th scope="row">{status} answers</th>{counts}<td></td></tr>'
            )
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    if not bodies:
        return '<p class="empty">Nothing has been evaluated yet.</p>'
    head = "".join(
        f'<th scope="col" class="num">{system_title(name)}</th>' for name in page.lines[0].systems
    )
    return (
        '<div class="card scroll"><table class="metrics"><thead><tr><th scope="col">metric</th>'
        f'{head}<th scope="col" class="num">paper</th></tr></thead>{"".join(bodies)}</table></div>'
        '<p class="quiet">Small figures: 95% bootstrap interval over clips (official ECPE metrics: '
        "over conversations). Unparseable answers count as wrong. <em>paper</em> is EmoVerse-4B's "
        "figure of Table VI, which differs in its conditions:</p>"
        f"{_conditions(page)}"
    )


def _further_rules(page: PageData, line: TaskSummary, columns: int) -> list[str]:
    """Rules beside the first one, which has its column: their primary metric as minor rows."""
    state = page.evaluated.get(line.scored or "")
    task = state.metrics.get("tasks", {}).get(str(line.task), {}) if state else {}
    rows = []
    for rule, found in list(task.get("baselines", {}).items())[1:]:
        value = found[task["primary"]]["value"]
        shown = "-" if value is None else plain(value)
        rows.append(
            f'<tr class="minor"><th scope="row">rule {escape(rule)}, {task["primary"]}</th>'
            f'<td class="num">{shown}</td>{"<td></td>" * columns}</tr>'
        )
    return rows


def _conditions(page: PageData) -> str:
    protocol = protocol_of(page)
    ours = {
        "data": str(page.config.evaluation.shards),
        "model": page.config.model.base,
        "leakage": protocol.get("leakage") or "not recorded",
        "give_emotion": "given" if protocol.get("give_emotion") else "not given",
        "ecpe protocol": "target_given, and official",
        "parser": "tolerant",
        "visual": f"{page.config.data.visual}, {page.config.data.frames_per_clip} frames",
    }
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(CONDITIONS[key])}</td>'
        f"<td>{escape(str(ours[key]))}</td></tr>"
        for key in CONDITIONS
    )
    return (
        '<details class="card"><summary>Conditions of the paper and of this run</summary>'
        '<div class="scroll"><table class="pairs"><thead><tr><th scope="col">condition</th>'
        '<th scope="col">paper</th><th scope="col">this run</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
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
            what = {Task.FER: "phrase", Task.MSA: "polarity"}.get(line.task, "emotion")
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
