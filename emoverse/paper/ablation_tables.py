"""The paper's tables with our numbers beside them: evaluated runs in, JSON and text out.

In: HOME/VARIANT/eval/STATE/{metrics.json, predictions.jsonl} of the runs that `emoverse ablate`
(or a job array) made. Out: one dict with tables, effects and conditions; `ablation_page.py` shows
it. Everything is computed from the stored answers. Torch-free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.tasks import Task
from emoverse.evaluation.intervals import paired_difference, score
from emoverse.evaluation.metrics import Metric, Row
from emoverse.evaluation.predictions import read_predictions, rows_of_task
from emoverse.evaluation.registry import METRICS
from emoverse.paper.tables import (
    CONDITIONS,
    EFFECTS,
    NOT_TRANSCRIBED,
    TABLES,
    Column,
    Effect,
    PaperTable,
)

State = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """One evaluated state of one variant."""

    metrics: Mapping[str, Any]
    rows: Mapping[Task, Sequence[Row]]


def read_answers(home: Path) -> dict[State, Answers]:
    """Every evaluated (variant, state) that the tables name and HOME holds."""
    named = [row.ours for table in TABLES for row in table.rows if row.ours]
    answers = {}
    for variant, state in dict.fromkeys(named):
        folder = home / variant / "eval" / state
        if (folder / "metrics.json").is_file() and (folder / "predictions.jsonl").is_file():
            predictions = read_predictions(folder / "predictions.jsonl")
            answers[variant, state] = Answers(
                metrics=json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
                rows={task: rows_of_task(predictions, task) for task in Task},
            )
    return answers


def ablation_json(home: Path, numbers: Sequence[str] = ()) -> dict[str, Any]:
    """Tables (all, or those of `numbers`), the paper's effects, and the conditions of both sides.

    Raises FileNotFoundError if nothing has been evaluated below HOME.
    """
    answers = read_answers(home)
    if not answers:
        raise FileNotFoundError(
            f"{home}: no evaluated variant; `emoverse ablate CONFIG run.run_dir={home}` trains and "
            "evaluates them"
        )
    shown = [table for table in TABLES if not numbers or table.number in numbers]
    return {
        "home": str(home),
        "tables": [_table(table, answers) for table in shown],
        "effects": [
            _effect(effect, answers) for effect in EFFECTS if not numbers or effect.table in numbers
        ],
        "conditions": _conditions(answers),
    }


# --- tables ---


def _table(table: PaperTable, answers: Mapping[State, Answers]) -> dict[str, Any]:
    return {
        "number": table.number,
        "title": table.title,
        "columns": [column.title for column in table.columns],
        "rows": [
            {
                "label": row.label,
                "paper": list(row.values),
                "run": "/".join(row.ours) if row.ours else None,
                "ours": [_cell(column, row.ours, answers) for column in table.columns],
            }
            for row in table.rows
        ],
        "note": table.note,
    }


def _cell(
    column: Column, ours: State | None, answers: Mapping[State, Answers]
) -> dict[str, Any] | None:
    """Our value in percent with its interval; None where no run of ours stands for the row."""
    rows = answers[ours].rows[column.task] if ours is not None and ours in answers else []
    if not rows:
        return None
    one = score(_metric(column.task, column.metric), rows)
    if not math.isfinite(one.value):
        return None
    return {
        "value": round(100 * one.value, 2),
        "low": _percent(one.low),
        "high": _percent(one.high),
        "n": one.n,
    }


def _percent(value: float) -> float | None:
    return round(100 * value, 2) if math.isfinite(value) else None


def _metric(task: Task, name: str) -> Metric:
    return next(one for one in METRICS[task] if one.name == name)


# --- effects ---


def _effect(effect: Effect, answers: Mapping[State, Answers]) -> dict[str, Any]:
    """The claim with our paired difference in percent points, and whether it appears here.

    appears: at least two standard errors above 0; opposite: below; else not resolved.
    """
    line: dict[str, Any] = {
        "table": effect.table,
        "claim": effect.claim,
        "better": "/".join(effect.better),
        "worse": "/".join(effect.worse),
        "metric": f"{effect.task} {effect.metric}",
        "paper": effect.paper,
        "ours": None,
        "standard_error": None,
        "n": 0,
        "verdict": "not run",
    }
    if effect.better not in answers or effect.worse not in answers:
        return line
    better, worse = (answers[one].rows[effect.task] for one in (effect.better, effect.worse))
    if not {row.key for row in better} & {row.key for row in worse}:
        return line
    gap = paired_difference(_metric(effect.task, effect.metric), better, worse)
    if not (math.isfinite(gap.value) and math.isfinite(gap.standard_error)):
        return line | {"n": gap.n, "verdict": "not resolved"}
    # Two systems that answer alike have a difference of 0 without any error.
    clear = abs(gap.value) >= 2 * gap.standard_error and gap.value != 0
    verdict = "not resolved" if not clear else "appears" if gap.value > 0 else "opposite"
    return line | {
        "ours": round(100 * gap.value, 2),
        "standard_error": round(100 * gap.standard_error, 2),
        "n": gap.n,
        "verdict": verdict,
    }


# --- conditions ---


def _conditions(answers: Mapping[State, Answers]) -> dict[str, Any]:
    """What the paper's numbers and ours depend on, line by line, and where ours differ among us."""
    protocols = {"/".join(state): one.metrics.get("protocol", {}) for state, one in answers.items()}
    first = next(iter(protocols.values()))
    mixed = sorted(
        key for key in first if len({json.dumps(p.get(key)) for p in protocols.values()}) > 1
    )
    fingerprints = {str(one.metrics.get("data", {}).get("fingerprint")) for one in answers.values()}
    mixed += ["data"] * (len(fingerprints) > 1)
    mixed += ["parser"] * (len({str(one.metrics.get("parser")) for one in answers.values()}) > 1)
    metrics = next(iter(answers.values())).metrics
    ours = {
        "data": str(metrics.get("data", {}).get("shards", "-")),
        "model": str(metrics.get("run", "-")),
        "leakage": str(first.get("leakage") or "not recorded in the shards"),
        "give_emotion": "given" if first.get("give_emotion") else "not given",
        "ecpe protocol": "target_given (official beside it in metrics.json)",
        "parser": str(metrics.get("parser", "-")),
        "visual": f"{first.get('visual', '-')}, {first.get('frames_per_clip', '-')} frames",
    }
    lines = [{"what": key, "paper": CONDITIONS[key], "ours": ours[key]} for key in CONDITIONS]
    return {
        "lines": lines,
        "clips": {"/".join(state): one.metrics.get("clips") for state, one in answers.items()},
        "fingerprints": sorted(fingerprints),
        "unequal_protocols": mixed,
        # Evaluated on the way: the numbers are of an earlier checkpoint than the stage's last one.
        "unfinished": [
            "/".join(state)
            for state, one in answers.items()
            if one.metrics.get("stage_done") is False
        ],
    }


# --- text ---


def ablation_text(result: Mapping[str, Any]) -> str:
    """The same for a terminal: paper / ours in each cell, percent."""
    blocks = []
    for table in result["tables"]:
        head = f"Table {table['number']}: {table['title']} (paper | ours +- half of 95 %)"
        rows = [["", *table["columns"]]]
        rows += [
            [row["label"], *map(_pair_text, row["paper"], row["ours"])] for row in table["rows"]
        ]
        blocks.append("\n".join([head, *_aligned(rows), *([table["note"]] * bool(table["note"]))]))
    lines = [["table", "claim", "paper", "ours", "2 SE", "verdict"]]
    for one in result["effects"]:
        ours = "-" if one["ours"] is None else f"{one['ours']:+.2f}"
        error = "-" if one["ours"] is None else f"{2 * one['standard_error']:.2f}"
        lines.append(
            [one["table"], one["claim"], f"{one['paper']:+.2f}", ours, error, one["verdict"]]
        )
    blocks.append("\n".join(["The paper's effects, percent points:", *_aligned(lines)]))
    conditions = [["", "paper", "ours"]]
    conditions += [[c["what"], c["paper"], c["ours"]] for c in result["conditions"]["lines"]]
    blocks.append("\n".join(["Conditions:", *_aligned(conditions)]))
    mixed = result["conditions"]["unequal_protocols"]
    if mixed:
        blocks.append(f"Not comparable among each other: the runs differ in {', '.join(mixed)}.")
    unfinished = result["conditions"]["unfinished"]
    if unfinished:
        blocks.append(f"Evaluated before the stage was finished: {', '.join(unfinished)}.")
    return "\n\n".join(blocks)


def _pair_text(paper: float | None, ours: Mapping[str, Any] | None) -> str:
    left = "-" if paper is None else f"{paper:.2f}"
    if ours is None:
        return f"{left} | -"
    if ours["low"] is None:
        return f"{left} | {ours['value']:.2f}"
    return f"{left} | {ours['value']:.2f} +-{(ours['high'] - ours['low']) / 2:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


__all__ = ["NOT_TRANSCRIBED", "ablation_json", "ablation_text", "read_answers"]
