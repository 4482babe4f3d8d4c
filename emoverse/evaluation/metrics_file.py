"""What `metrics.json` says about some predictions: scores, rules beside them, the authors' script.

Predictions and the references on which the rules are fitted go in, JSON values come out. Used by
`evaluate.py` for answers of our own and by `score_results` for result files of other systems.
Torch-free.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_shards.shards.index import INDEX_FILE, ShardIndex
from data_shards.tasks import TASKS, Task
from emoverse.config.schema import Config
from emoverse.evaluation.baselines import RULES, rule_rows
from emoverse.evaluation.intervals import Score, scores
from emoverse.evaluation.metrics import Row
from emoverse.evaluation.predictions import Prediction, rows_of_task
from emoverse.evaluation.registry import primary
from emoverse.evaluation.tables import answered_right, calibration, confusion, item_scores
from emoverse.paper.authors_script import DIFFERENCES, Text, script_results


def with_baseline(
    predictions: Sequence[Prediction],
    training: Mapping[Task, Sequence[Row]],
    *,
    give_emotion: bool,
) -> list[Prediction]:
    """The predictions, each with the answer of its task's first rule beside the model's."""
    answered: dict[tuple[Task, str], Any] = {}
    for task in TASKS:
        rows = rows_of_task(predictions, task)
        ruled = rule_rows(
            RULES[task][0], task, training.get(task, ()), rows, give_emotion=give_emotion
        )
        answered |= {(task, row.key): row.value for row in ruled}
    return [replace(one, baseline=answered[one.row.task, one.row.key]) for one in predictions]


def tasks_json(
    predictions: Sequence[Prediction],
    training: Mapping[Task, Sequence[Row]],
    *,
    give_emotion: bool,
) -> dict[str, Any]:
    """The part `tasks` of metrics.json: every answered task."""
    present = {one.row.task for one in predictions}
    return {
        str(task): _task_json(task, predictions, training.get(task, ()), give_emotion)
        for task in TASKS
        if task in present
    }


def _task_json(
    task: Task, predictions: Sequence[Prediction], training: Sequence[Row], give_emotion: bool
) -> dict[str, Any]:
    """All that metrics.json says about one task."""
    mine = [one for one in predictions if one.row.task is task]
    rows = [one.row for one in mine]
    table = confusion(task, rows)
    calibrated = calibration([(one.row, one.confidence) for one in mine])
    baselines = {
        rule: scores_json(task, rule_rows(rule, task, training, rows, give_emotion=give_emotion))
        for rule in RULES[task]
    }
    fitted = f"{len(training)} training records" if training else "evaluated records"
    return {
        "n": len(rows),
        "primary": primary(task).name,
        "metrics": scores_json(task, rows),
        "majority": baselines[RULES[task][0]],
        "majority_fitted_on": fitted,
        "baselines": baselines,
        "answers": dict(sorted(Counter(row.status for row in rows).items())),
        "unparseable": sum(row.status == "unparseable" for row in rows),
        "unfinished": sum(not one.finished for one in mine),
        "rules": dict(sorted(Counter(one.rule for one in mine).items())),
        "confusion": asdict(table) if table else None,
        "items": [asdict(item) for item in item_scores(rows)],
        "calibration": asdict(calibrated) if calibrated else None,
        "paper": paper_json(task, mine),
        # The official ECPE protocol is complete only where such targets were asked too.
        "without_truth": sum(row.reference == () for row in rows),
    }


def keep_judge(metrics: Mapping[str, Any], path: Path) -> None:
    """Verdicts outlive an evaluation that asks no judge; so does the name of who gave them.

    path: the metrics.json that this one replaces, if there is one.
    """
    line = metrics["tasks"].get(str(Task.ERI))
    if line is None or "judge" not in line["metrics"] or not path.is_file():
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))["tasks"].get(str(Task.ERI), {})
    if "judge" in earlier:
        line["judge"] = earlier["judge"]


def paper_json(task: Task, predictions: Sequence[Prediction]) -> dict[str, Any] | None:
    """The same answers by the authors' script, and which clips it counts otherwise; None if never.

    counted_otherwise: answers that are right here and wrong by their texts, or the other way.
    """
    if task not in DIFFERENCES:
        return None
    texts = [
        Text(one.row.key, one.row.response, one.label, one.row.sentiment) for one in predictions
    ]
    otherwise = [
        one.row.key
        for one in predictions
        if answered_right(one.row) != (one.row.response == one.label)
    ]
    return {
        "script": [found.to_json() for found in script_results(task, texts)],
        "counted_otherwise": len(otherwise),
        "examples": otherwise[:5],
        "differences": list(DIFFERENCES[task]),
    }


def scores_json(task: Task, rows: Sequence[Row]) -> dict[str, Any]:
    """Every metric of these rows with its interval."""
    return {name: _score_json(found) for name, found in scores(task, rows).items()}


def _score_json(found: Score) -> dict[str, Any]:
    """nan becomes null: JSON has no nan."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(found).items()
    }


def protocol_of(config: Config, index: ShardIndex) -> dict[str, Any]:
    """What a number depends on besides the weights; two metrics compare only where it is equal."""
    return {
        "leakage": leakage_rule(config.data.shards, index),
        "give_emotion": config.data.give_emotion,
        "blank_frames": config.model.blank_frames,
        "frames_per_clip": config.data.frames_per_clip,
        "visual": config.data.visual,
        "resize": config.data.resize,
        "peak_tiles": config.data.peak_tiles,
        "history_frames": config.data.history_frames,
        "decoding": "greedy",
        "max_new_tokens": {str(k): v for k, v in config.evaluation.max_new_tokens.items()},
        "max_records_per_task": config.evaluation.max_records,
        "precision": config.model.precision,
    }


def leakage_rule(training: str | Path, evaluated: ShardIndex) -> str | None:
    """The leakage rule of the records that were trained; None = their folder names none.

    The evaluated folder answers where the training folder is no longer there.
    """
    try:
        document = json.loads((Path(training) / INDEX_FILE).read_text(encoding="utf-8"))
        provenance = document["provenance"]
    except (OSError, ValueError, KeyError):
        provenance = evaluated.provenance
    rule = provenance.get("leakage")
    return None if rule is None else str(rule)


def log_line(line: Mapping[str, Any]) -> str:
    """A task's primary metric beside the rule's, for the log."""
    found, rule = (line[name][line["primary"]]["value"] for name in ("metrics", "majority"))
    values = " ".join("-" if value is None else f"{value:.3f}" for value in (found, rule))
    return f"{line['primary']} and majority: {values} ({line['n']} clips)"
