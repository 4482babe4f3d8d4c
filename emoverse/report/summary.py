"""The result table of a run: every system's score per task and the margin over the baselines.

The evaluations of a run directory (and of its text-only baseline) go in; `TaskSummary` lines, the
content of `summary.json` and a table for the terminal come out. Everything is computed again from
`eval/*/predictions.jsonl`; what a run does not have yet is None, shown as '-'. Torch-free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_shards.tasks import TASKS, Task
from emoverse.config.schema import Config, load_config
from emoverse.evaluation.intervals import Difference, Score, paired_difference, score
from emoverse.evaluation.metrics import Row
from emoverse.evaluation.predictions import Prediction, read_predictions, rows_of_task
from emoverse.evaluation.registry import primary

MARGIN = 0.05
"""A task counts as learned when it beats a baseline by this much and by two standard errors."""

BASE = "base"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The answers of one trained state: `base` or a stage."""

    which: str
    metrics: Mapping[str, Any]
    predictions: Sequence[Prediction]

    def rows(self, task: Task) -> list[Row]:
        return rows_of_task(self.predictions, task)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSummary:
    """One line of the result table; `systems` maps a column to its score (None: not evaluated).

    The columns are majority, text_only, before and the stages. `scored`: the stage whose score
    counts. `difference`: that stage minus the better baseline, on the same clips.
    """

    task: Task
    systems: Mapping[str, Score | None]
    scored: str | None
    against: str | None
    difference: Difference | None
    beats: bool | None


def read_evaluations(run_dir: Path, config: Config) -> dict[str, Evaluation]:
    """The evaluations that the run directory holds, in the order base, then the stages."""
    evaluated = {}
    for which in (BASE, *config.stages):
        folder = run_dir / "eval" / which
        path = folder / "predictions.jsonl"
        if path.is_file():
            metrics_path = folder / "metrics.json"
            metrics = json.loads(metrics_path.read_text()) if metrics_path.is_file() else {}
            evaluated[which] = Evaluation(
                which=which, metrics=metrics, predictions=read_predictions(path)
            )
    return evaluated


def load_run_config(run_dir: Path) -> Config:
    """The resolved config of a run. Raises FileNotFoundError for a folder that is not a run."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found; a run directory holds the resolved config.yaml, which "
            "`emoverse train CONFIG` writes; give the folder that it wrote"
        )
    return load_config([path])


def scored_stage(task: Task, config: Config, evaluated: Mapping[str, Evaluation]) -> str | None:
    """The last stage that trains the task; where that is not evaluated, the last one that is."""
    stages = [name for name in config.stages if evaluated.get(name)]
    training = [name for name in stages if task in config.stages[name].rates]
    candidates = training or stages
    return candidates[-1] if candidates else None


def majority_rows_of(evaluation: Evaluation, task: Task) -> list[Row]:
    """The answers of the majority rule, as the evaluation stored them beside the model's."""
    return [
        replace(
            prediction.row,
            value=prediction.baseline,
            response="",
            status="parsed",
            number=None,
            judge=None,
        )
        for prediction in evaluation.predictions
        if prediction.row.task is task
    ]


def summarise_task(
    task: Task,
    config: Config,
    evaluated: Mapping[str, Evaluation],
    text_only: Mapping[str, Evaluation],
) -> TaskSummary:
    """One line of the table: every system's primary metric, and the margin over the baselines."""
    metric = primary(task)
    scored = scored_stage(task, config, evaluated)
    states = {which: state.rows(task) for which, state in evaluated.items()}
    source = scored or next(iter(evaluated), None)
    baselines = {"majority": majority_rows_of(evaluated[source], task)} if source else {}
    if scored is not None and scored in text_only:
        baselines["text_only"] = text_only[scored].rows(task)
    columns = {name: baselines.get(name) for name in ("majority", "text_only")}
    columns["before"] = states.get(BASE)
    columns |= {name: states.get(name) for name in config.stages}
    differences = {}
    if scored is not None and states[scored]:
        keys = {row.key for row in states[scored]}
        for name, rows in baselines.items():
            if keys & {row.key for row in rows}:
                differences[name] = paired_difference(metric, states[scored], rows)
    against = min(differences, key=lambda name: differences[name].value, default=None)
    return TaskSummary(
        task=task,
        systems={name: score(metric, rows) if rows else None for name, rows in columns.items()},
        scored=scored,
        against=against,
        difference=differences.get(against) if against else None,
        beats=all(map(clearly_better, differences.values())) if differences else None,
    )


def clearly_better(difference: Difference) -> bool:
    """The rule of the table: at least MARGIN and at least two standard errors above.

    Never without a standard error, which a single clip does not have.
    """
    error = difference.standard_error
    return math.isfinite(error) and difference.value >= max(MARGIN, 2 * error)


def summarise(
    config: Config, evaluated: Mapping[str, Evaluation], text_only: Mapping[str, Evaluation]
) -> list[TaskSummary]:
    """All tasks that the run trains or was evaluated on, in canonical order."""
    named = {task for stage in config.stages.values() for task in stage.rates}
    named |= {p.row.task for state in evaluated.values() for p in state.predictions}
    return [summarise_task(task, config, evaluated, text_only) for task in TASKS if task in named]


def rounded(value: float | None) -> float | None:
    """Rounded for files; NaN and None become null."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


def summary_json(
    lines: Sequence[TaskSummary],
    config: Config,
    evaluated: Mapping[str, Evaluation],
    *,
    seconds: float | None,
    peak_memory_bytes: int | None,
) -> dict[str, Any]:
    """The content of `summary.json`."""
    tasks = {}
    for line in lines:
        scored = line.systems.get(line.scored) if line.scored else None
        tasks[str(line.task)] = {
            "metric": primary(line.task).name,
            **{
                name: rounded(result.value) if result else None
                for name, result in line.systems.items()
            },
            "scored": line.scored,
            "against": line.against,
            "difference": rounded(line.difference.value) if line.difference else None,
            "standard_error": rounded(line.difference.standard_error) if line.difference else None,
            "n": scored.n if scored else 0,
            "beats_baselines": line.beats,
        }
    last = list(evaluated.values())[-1:]
    return {
        "run": config.run.name,
        "protocol": last[0].metrics.get("protocol", {}) if last else {},
        "tasks": tasks,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes,
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """`summary.json` as a table for a terminal."""
    skip = {"metric", "scored", "against", "difference", "standard_error", "n", "beats_baselines"}
    first: Mapping[str, Any] = next(iter(summary["tasks"].values()), {})
    systems = [name for name in first if name not in skip]
    head = ["task", "metric", *systems, "difference", "clips", "beats both"]
    table = [head]
    for task, line in summary["tasks"].items():
        margin = "-"
        if line["difference"] is not None:
            error = line["standard_error"]
            margin = f"{line['difference']:+.3f} +- {2 * error:.3f}" if error is not None else "-"
        values = ["-" if line[name] is None else f"{line[name]:.3f}" for name in systems]
        beats = {True: "yes", False: "NO", None: "-"}[line["beats_baselines"]]
        table.append([task, line["metric"], *values, margin, str(line["n"]), beats])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
