"""The HTML of the report: values in, one self-contained page out.

The frame of the page is `report_shell.py`; pictures and videos are written into the page as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from data_shards.tasks import Task
from emoverse.evaluation.intervals import Score
from emoverse.evaluation.registry import primary
from emoverse.report.calibration import calibration_section
from emoverse.report.charts import Mark, Series, line_chart, range_strip, share_chart
from emoverse.report.curves import SPEEDS, StageCurves
from emoverse.report.examples import clips_section, hardest_section
from emoverse.report.incidents import incidents_section
from emoverse.report.page_frame import document
from emoverse.report.sections import (
    PageData,
    errors_section,
    metrics_section,
    plain,
    protocol_of,
    setup_section,
    system_title,
    task_name,
)
from emoverse.report.summary import MARGIN, TaskSummary

SYSTEM_COLORS = {"majority": "majority", "text_only": "text", "before": "before"}
STAGE_COLORS = ("stage1", "stage2")


def render_page(page: PageData) -> str:
    """The whole document."""
    sections = [
        ("results", "Results", _results(page)),
        ("training", "Training", _training(page)),
        ("throughput", "Throughput", _throughput(page)),
        ("metrics", "Metrics", metrics_section(page)),
        ("errors", "Errors", errors_section(page)),
        (
            "calibration",
            "Calibration",
            calibration_section(page.lines, page.evaluated),
        ),
        ("hardest", "Hardest", hardest_section(page.clips)),
        ("clips", "Clips", clips_section(page.clips)),
        ("incidents", "Incidents", incidents_section(page.incidents)),
        ("setup", "Setup", setup_section(page)),
    ]
    return document(page.config.run.name, _intro(page), sections, "emoverse report")


# --- the head ---


def _intro(page: PageData) -> str:
    config = page.config
    judged = [line for line in page.lines if line.beats is not None]
    good = sum(bool(line.beats) for line in judged)
    twin = any(line.systems.get("text_only") for line in judged)
    versus = "the majority and the text-only baseline" if twin else "the majority baseline"
    if judged:
        lead = (
            f"<strong>{good} of {len(judged)} tasks</strong> beat {versus} by at least {MARGIN:g} "
            "and two standard errors on the same held-out clips."
        )
    else:
        lead = "No stage of this run has been evaluated yet."
    facts = []
    answers = max((len(one.predictions) for one in page.evaluated.values()), default=0)
    if answers:
        clips = {p.row.key for one in page.evaluated.values() for p in one.predictions}
        facts.append((f"{len(clips):,}", "held-out clips"))
        facts.append((f"{answers:,}", "answers per state"))
    samples = sum(curve.samples for curve in page.curves)
    if samples:
        facts.append((f"{samples:,}", "samples trained"))
    if page.seconds is not None:
        facts.append((_duration(page.seconds), "from start to end"))
    if page.peak_memory_bytes is not None:
        facts.append((f"{page.peak_memory_bytes / 2**30:.1f} GiB", "peak memory"))
    tiles = "".join(f"<li><b>{value}</b><span>{label}</span></li>" for value, label in facts)
    chips = [f"base {config.model.base}", f"seed {config.run.seed}", config.model.precision]
    if config.model.blank_frames:
        chips.append("blank frames")
    protocol = protocol_of(page)
    if protocol.get("leakage"):
        chips.append(f"leakage rule {protocol['leakage']}")
    marks = "".join(f"<li>{escape(chip)}</li>" for chip in chips)
    return (
        f'<div class="intro"><h1>{escape(config.run.name)}</h1>'
        f'<ul class="chips" aria-label="Run">{marks}</ul><p class="lead">{lead}</p>'
        f'<ul class="tiles" aria-label="Figures">{tiles}</ul></div>'
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _color(name: str, systems: Sequence[str]) -> str:
    if name in SYSTEM_COLORS:
        return SYSTEM_COLORS[name]
    stages = [one for one in systems if one not in SYSTEM_COLORS]
    return STAGE_COLORS[-1] if name == stages[-1] and len(stages) > 1 else STAGE_COLORS[0]


# --- results ---


def _results(page: PageData) -> str:
    if not page.lines:
        return '<p class="empty">No task is configured.</p>'
    systems = list(page.lines[0].systems)
    head = "".join(
        f'<th scope="col" class="num"><i class="dot b-{_color(name, systems)}" '
        f'aria-hidden="true"></i>{escape(system_title(name))}</th>'
        for name in systems
    )
    body = "".join(_result_row(line, systems) for line in page.lines)
    return (
        '<div class="card scroll"><table class="summary"><caption class="quiet">Primary metric of '
        "each task on held-out clips</caption><thead><tr>"
        f'<th scope="col">task</th><th scope="col" class="wide">0 to 1, bars: two standard errors'
        f'</th>{head}<th scope="col" class="num">gain</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        '<p class="quiet">The underlined column is the one that counts: the last stage that trains '
        "the task. <em>gain</em> is that column minus the better baseline, plus or minus two "
        "standard errors of the difference on the same clips; green where it is at least "
        f"{MARGIN:g} and two standard errors over every baseline. <em>majority</em> never looks: "
        "the best constant answer, for ECPE the utterance itself and the one before it. "
        "<em>text only</em> is the same training with blank frames.</p>"
    )


def _result_row(line: TaskSummary, systems: Sequence[str]) -> str:
    marks = [
        Mark(
            name=system_title(name),
            value=found.value,
            error=found.standard_error,
            color=_color(name, systems),
        )
        for name, found in line.systems.items()
        if found is not None and math.isfinite(found.value)
    ]
    cells = "".join(
        f'<td class="num{" scored" if name == line.scored else ""}">{_value(found)}</td>'
        for name, found in line.systems.items()
    )
    gain = "-"
    if line.difference is not None:
        sign = "good" if line.beats else "flat"
        word = "clear gain" if line.beats else "no clear gain"
        gain = (
            f'<b class="{sign}" title="{word} over {system_title(line.against or "")}">'
            f"{line.difference.value:+.3f}</b>"
            f"<small>&plusmn; {plain(2 * line.difference.standard_error)}</small>"
        )
    scored = line.systems.get(line.scored) if line.scored else None
    clips = f", {scored.n} clips" if scored else ""
    return (
        f'<tr><th scope="row">{task_name(line.task)}<small>{primary(line.task).title}{clips}'
        f'</small></th><td class="wide">{range_strip(str(line.task), marks) if marks else ""}</td>'
        f'{cells}<td class="num">{gain}</td></tr>'
    )


def _value(found: Score | None) -> str:
    return plain(found.value) if found is not None else "-"


# --- training ---


def _training(page: PageData) -> str:
    if not page.curves:
        return '<p class="empty">No stage has written metrics.jsonl yet.</p>'
    return "".join(_stage_block(curve) for curve in page.curves)


def _stage_block(curve: StageCurves) -> str:
    def lines(values: Mapping[Task, tuple[Sequence[float], Sequence[float]]]) -> list[Series]:
        return [
            Series(name=task.upper(), color=str(task), xs=xs, ys=ys)
            for task, (xs, ys) in values.items()
        ]

    charts = [
        line_chart("Loss per task", lines(curve.loss), x_label="step", y_label="nats per token"),
        share_chart(
            "Achieved rates",
            lines(curve.share),
            list(curve.asked.values()),
            x_label="step",
            y_label="share of samples between two log lines",
        ),
    ]
    facts = [("steps", f"{curve.steps:,}"), ("samples", f"{curve.samples:,}"), *curve.facts]
    listed = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return (
        f'<div class="card"><h3>{_stage_title(curve)}</h3>'
        f'<dl class="facts">{listed}</dl><div class="pair">{"".join(charts)}</div></div>'
    )


def _stage_title(curve: StageCurves) -> str:
    return escape(curve.name.replace("stage", "Stage "))


def _throughput(page: PageData) -> str:
    blocks = []
    for curve in page.curves:
        charts = "".join(
            line_chart(
                speed.title,
                [Series(name=speed.title, color="stage1", xs=xs, ys=ys)],
                x_label="step",
                y_label=speed.unit,
            )
            for key, speed in SPEEDS.items()
            for xs, ys in [curve.speed[key]]
            if len(xs)
        )
        if charts:
            blocks.append(
                f'<div class="card"><h3>{_stage_title(curve)}</h3><div class="pair">{charts}</div>'
                "</div>"
            )
    return "".join(blocks) or '<p class="empty">No interval has been logged yet.</p>'
