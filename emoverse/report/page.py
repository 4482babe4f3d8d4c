"""What the report shows, section by section: values in, one self-contained page out.

`PageData` holds the run's results. Python computes and formats what a section needs; the templates
beside this file (`templates/report.html`, `templates/sections/`) lay it out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from data_shards.pages.render import Section, fixed, render_page
from data_shards.progress import format_duration
from data_shards.tasks import IDENTIFIER, Task
from emoverse.config.schema import Config, describe
from emoverse.evaluation.intervals import Score, score
from emoverse.evaluation.metrics import Row
from emoverse.evaluation.registry import METRICS, primary
from emoverse.evaluation.tables import Confusion, ItemScore, calibration, confusion, item_scores
from emoverse.paper.tables import CONDITIONS, paper_value
from emoverse.report.charts import Chart, Mark, Series, line_chart, range_strip, share_chart, tidy
from emoverse.report.clips import Clip
from emoverse.report.curves import SPEEDS, Curve, StageCurves
from emoverse.report.incidents import Incident
from emoverse.report.summary import BASE, MARGIN, Evaluation, TaskSummary, majority_rows_of

TEMPLATES = Path(__file__).with_name("templates")
MAX_INCIDENTS = 200
TASK_TITLES = {
    Task.MSA: "Sentiment",
    Task.ER: "Emotion",
    Task.FER: "Facial expressions",
    Task.ERI: "Emotion reason",
    Task.ECPE: "Emotion-cause pairs",
}
SYSTEM_COLORS = {"majority": "majority", "text_only": "text", "before": "before"}
STAGE_COLORS = ("stage1", "stage2")
SECTIONS = [
    Section(name, name.capitalize())
    for name in (
        *("results", "training", "throughput", "metrics", "errors", "calibration"),
        *("hardest", "clips", "incidents", "setup"),
    )
]


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

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The protocol of the last evaluation that recorded one."""
        protocols = [state.metrics.get("protocol") for state in self.evaluated.values()]
        return next((protocol for protocol in reversed(protocols) if protocol is not None), {})


def render_report(page: PageData) -> str:
    """The whole document."""
    return render_page(
        "report.html",
        folder=TEMPLATES,
        title=page.config.run.name,
        command="report",
        sections=SECTIONS,
        page=page,
        task_titles=TASK_TITLES,
        system_title=_system_title,
        primary=primary,
        margin=MARGIN,
        chips=_chips(page),
        facts=_facts(page),
        colors=_colors(page),
        strips=_strips(page),
        training=[
            (_stage_title(curve), _stage_facts(curve), _charts(curve)) for curve in page.curves
        ],
        throughput=_throughput(page),
        metrics=_metrics(page),
        conditions=_conditions(page),
        errors=_errors(page),
        calibration=_calibration(page),
        marked=_marked,
        max_incidents=MAX_INCIDENTS,
        answering=_answering(page),
        settings=describe(page.config),
        provenance=json.dumps(page.provenance, indent=2, ensure_ascii=False),
    )


def _system_title(name: str) -> str:
    if name in ("before", BASE):
        return "before"
    if name.startswith("stage"):
        return f"after {name.replace('stage', 'stage ')}"
    return "text only" if name == "text_only" else name


# --- the head and the results ---


def _facts(page: PageData) -> list[tuple[str, str]]:
    facts = []
    answers = max((len(state.predictions) for state in page.evaluated.values()), default=0)
    if answers:
        clips = {p.row.key for state in page.evaluated.values() for p in state.predictions}
        facts.append((f"{len(clips):,}", "held-out clips"))
        facts.append((f"{answers:,}", "answers per state"))
    samples = sum(curve.samples for curve in page.curves)
    if samples:
        facts.append((f"{samples:,}", "samples trained"))
    if page.seconds is not None:
        facts.append((format_duration(page.seconds), "from start to end"))
    if page.peak_memory_bytes is not None:
        facts.append((f"{page.peak_memory_bytes / 2**30:.1f} GiB", "peak memory"))
    return facts


def _chips(page: PageData) -> list[str]:
    config = page.config
    chips = [f"base {config.model.base}", f"seed {config.run.seed}", config.model.precision]
    if config.model.blank_frames:
        chips.append("blank frames")
    if page.protocol.get("leakage"):
        chips.append(f"leakage rule {page.protocol['leakage']}")
    return chips


def _colors(page: PageData) -> dict[str, str]:
    """System -> class suffix; the last of several stages has a colour of its own."""
    systems = list(page.lines[0].systems) if page.lines else []
    stages = [name for name in systems if name not in SYSTEM_COLORS]
    colors = SYSTEM_COLORS | dict.fromkeys(stages, STAGE_COLORS[0])
    if len(stages) > 1:
        colors[stages[-1]] = STAGE_COLORS[-1]
    return colors


def _strips(page: PageData) -> dict[Task, Markup]:
    """The range strip of every task that has a finite score."""
    colors, strips = _colors(page), {}
    for line in page.lines:
        marks = [
            Mark(
                name=_system_title(name),
                value=result.value,
                error=result.standard_error,
                color=colors[name],
            )
            for name, result in line.systems.items()
            if result is not None and math.isfinite(result.value)
        ]
        strips[line.task] = range_strip(str(line.task), marks) if marks else Markup()
    return strips


# --- training and throughput ---


def _stage_title(curve: StageCurves) -> str:
    return curve.name.replace("stage", "Stage ")


def _stage_facts(curve: StageCurves) -> list[tuple[str, str]]:
    return [("steps", f"{curve.steps:,}"), ("samples", f"{curve.samples:,}"), *curve.facts]


def _charts(curve: StageCurves) -> list[Chart | None]:
    def lines(values: Mapping[Task, Curve]) -> list[Series]:
        return [
            Series(name=task.upper(), color=str(task), xs=xs, ys=ys)
            for task, (xs, ys) in values.items()
        ]

    return [
        line_chart("Loss per task", lines(curve.loss), x_label="step", y_label="nats per token"),
        share_chart(
            "Achieved rates",
            lines(curve.share),
            list(curve.rates.values()),
            x_label="step",
            y_label="share of samples between two log lines",
        ),
    ]


def _throughput(page: PageData) -> list[tuple[str, list[Chart | None]]]:
    """Per stage the charts of what was logged."""
    blocks = []
    for curve in page.curves:
        charts = [
            line_chart(
                speed.title,
                [Series(name=speed.title, color="stage1", xs=xs, ys=ys)],
                x_label="step",
                y_label=speed.unit,
            )
            for key, speed in SPEEDS.items()
            for xs, ys in [curve.speed[key]]
            if len(xs)
        ]
        if charts:
            blocks.append((_stage_title(curve), charts))
    return blocks


# --- metrics, errors, calibration ---


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskMetrics:
    """One task in the table of metrics.

    scores: metric title, one score per system, the paper's value (0 to 1). details: title, one
    text per system and one for the paper.
    """

    task: Task
    num_clips: int
    scores: Sequence[tuple[str, Sequence[Score], float | None]]
    details: Sequence[tuple[str, Sequence[str]]]


def _rows_by_system(page: PageData, line: TaskSummary) -> dict[str, list[Row]]:
    """The rows of every system of the result table that answered the task; [] where none did."""
    states = {name: state.rows(line.task) for name, state in page.evaluated.items()}
    source = line.scored or next(iter(page.evaluated), None)
    text_only = page.text_only.get(line.scored or "")
    rows = {
        "majority": majority_rows_of(page.evaluated[source], line.task) if source else [],
        "text_only": text_only.rows(line.task) if text_only else [],
    }
    for name in line.systems:
        if name not in rows:
            rows[name] = states.get(BASE if name == "before" else name, [])
    return rows


def _metrics(page: PageData) -> list[TaskMetrics]:
    """Every metric of every task for every system, with intervals."""
    tables = []
    for line in page.lines:
        by_system = _rows_by_system(page, line)
        if not any(by_system.values()):
            continue
        scores = []
        for metric in METRICS[line.task]:
            if any(metric.applies(rows) for rows in by_system.values()):
                percent = paper_value(line.task, metric.name)
                paper = None if percent is None else percent / 100
                results = [score(metric, rows) for rows in by_system.values()]
                scores.append((metric.title, results, paper))
        details = _further_rules(page, line, len(by_system))
        for status in ("repaired", "unparseable"):
            counts = [
                str(sum(row.status == status for row in rows)) if rows else "-"
                for rows in by_system.values()
            ]
            details.append((f"{status} answers", [*counts, ""]))
        tables.append(
            TaskMetrics(
                task=line.task,
                num_clips=max(map(len, by_system.values())),
                scores=scores,
                details=details,
            )
        )
    return tables


def _further_rules(
    page: PageData, line: TaskSummary, num_systems: int
) -> list[tuple[str, Sequence[str]]]:
    """The primary metric of the rules beside the first one, which has a column of its own."""
    state = page.evaluated.get(line.scored or "")
    task = state.metrics.get("tasks", {}).get(str(line.task), {}) if state else {}
    rules = list(task.get("baselines", {}).items())[1:]
    return [
        (
            f"rule {rule}, {task['primary']}",
            [fixed(result[task["primary"]]["value"]), *[""] * num_systems],
        )
        for rule, result in rules
    ]


def _conditions(page: PageData) -> list[tuple[str, str, str]]:
    """Condition, the paper's, this run's."""
    protocol = page.protocol
    ours = {
        "data": str(page.config.evaluation.shards),
        "model": str(page.config.model.base),
        "leakage": str(protocol.get("leakage") or "not recorded"),
        "give_emotion": "given" if protocol.get("give_emotion") else "not given",
        "ecpe protocol": "target_given, and official",
        "parser": "tolerant",
        "visual": f"{page.config.data.visual}, {page.config.data.frames_per_clip} frames",
    }
    return [(name, paper, ours[name]) for name, paper in CONDITIONS.items()]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskErrors:
    """What a task's scored state confuses; `item` says what the items are (phrase, emotion)."""

    task: Task
    title: str
    confusion: Confusion | None
    item: str
    items: Sequence[ItemScore]


def _errors(page: PageData) -> list[TaskErrors]:
    errors = []
    for line in page.lines:
        rows = page.evaluated[line.scored].rows(line.task) if line.scored is not None else []
        if line.scored is not None and rows:
            errors.append(
                TaskErrors(
                    task=line.task,
                    title=f"{line.task.upper()}, {_system_title(line.scored)}",
                    confusion=confusion(line.task, rows),
                    item={Task.FER: "phrase", Task.MSA: "polarity"}.get(line.task, "emotion"),
                    items=item_scores(rows),
                )
            )
    return errors


def _calibration(page: PageData) -> list[Chart | None]:
    """A reliability diagram of every task whose answers can be right as a whole."""
    charts = []
    for line in page.lines:
        if line.scored is None:
            continue
        answers = [
            (prediction.row, prediction.confidence)
            for prediction in page.evaluated[line.scored].predictions
            if prediction.row.task is line.task
        ]
        result = calibration(answers)
        if result is None:
            continue
        bins = [bin_ for bin_ in result.bins if bin_.n]
        answered = Series(
            name=line.task.upper(),
            color=str(line.task),
            xs=[bin_.confidence for bin_ in bins],
            ys=[bin_.right for bin_ in bins],
        )
        perfect = Series(
            name="perfectly calibrated", color="majority", xs=[0.0, 1.0], ys=[0.0, 1.0]
        )
        charts.append(
            line_chart(
                f"{line.task.upper()}, {line.scored}: ECE {result.error:.3f}",
                [answered, perfect],
                x_label="probability of the answer",
                y_label="share of right answers",
                head=("probability", "answers", "mean", "right"),
                rows=[
                    (
                        f"{bin_.low:.1f} to {bin_.high:.1f}",
                        str(bin_.n),
                        f"{bin_.confidence:.3f}",
                        f"{bin_.right:.3f}",
                    )
                    for bin_ in bins
                ],
            )
        )
    return charts


# --- clips and setup ---


def _marked(question: str) -> Markup:
    """A question with the task identifiers highlighted."""
    text = escape(question)
    for identifier in IDENTIFIER.values():
        text = text.replace(escape(identifier), Markup("<mark>{}</mark>").format(identifier))
    return text


def _answering(page: PageData) -> list[tuple[str, str]]:
    """How the answers were produced and scored."""
    rows = [(key.replace("_", " "), _shown(value)) for key, value in page.protocol.items()]
    for state in list(page.evaluated.values())[-1:]:
        for name in ("data", "versions"):
            for key, value in state.metrics.get(name, {}).items():
                rows.append((f"{name}: {key.replace('_', ' ')}", _shown(value)))
    return rows


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return tidy(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    return str(value)
