"""The file between evaluation and report: `eval/<which>/predictions.jsonl`, one answer per line.

`evaluate.py` writes it, `report.py` reads it; the scores of `scoring.py` can be computed again from
it alone. Each line is also a result line of ms-swift (`query`, `response`, `label`, `images`);
`result_files.py` reads those of other systems. Torch-free.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.tasks import Answer, Pair, Task
from emoverse.evaluation.metrics import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One evaluated entry: its row for the scorers, and what a reader of the report wants to see.

    label: the truth in the answer's format. rule: what the parser did. finished: the model ended
    its answer itself. baseline: the answer of the rule that never looks (`baselines.py`).
    shard, slot: where the record lies, -1 for answers of another system. confidence: probability
    that the model gave to the whole answer, None where it is not known.
    """

    row: Row
    label: str
    rule: str
    finished: bool
    baseline: Answer | None
    question: str
    shard: int
    slot: int
    source: str
    confidence: float | None = None


def _answer_from_json(task: Task, value: Any) -> Answer | None:
    if value is None or task in (Task.MSA, Task.ER, Task.ERI):
        return None if value is None else str(value)
    if task is Task.FER:
        return tuple(map(str, value))
    return tuple(Pair(int(target), str(emotion), int(cause)) for target, emotion, cause in value)


def to_json(prediction: Prediction) -> dict[str, Any]:
    """One line of the file; the key order is the reading order."""
    row = prediction.row
    return {
        "key": row.key,
        "task": str(row.task),
        "query": prediction.question,
        "response": row.response,
        "label": prediction.label,
        "images": [row.key],
        "status": row.status,
        "rule": prediction.rule,
        "finished": prediction.finished,
        "value": row.value,
        "truth": row.truth,
        "baseline": prediction.baseline,
        "sentiment": row.sentiment,
        "emotion": row.emotion,
        "target": row.target,
        "number": row.number,
        "conversation": row.conversation,
        "judge": row.judge,
        "confidence": prediction.confidence,
        "shard": prediction.shard,
        "slot": prediction.slot,
        "source": prediction.source,
    }


def from_json(fields: Mapping[str, Any]) -> Prediction:
    """The inverse of `to_json`."""
    task = Task(fields["task"])
    truth = _answer_from_json(task, fields["truth"])
    if truth is None:
        raise ValueError("truth must not be null")
    return Prediction(
        row=Row(
            key=fields["key"],
            task=task,
            truth=truth,
            value=_answer_from_json(task, fields["value"]),
            response=fields["response"],
            status=fields["status"],
            sentiment=fields["sentiment"],
            emotion=fields["emotion"],
            target=fields["target"],
            number=fields["number"],
            conversation=fields["conversation"],
            judge=fields["judge"],
        ),
        label=fields["label"],
        rule=fields["rule"],
        finished=fields["finished"],
        baseline=_answer_from_json(task, fields["baseline"]),
        question=fields["query"],
        shard=fields["shard"],
        slot=fields["slot"],
        source=fields["source"],
        confidence=fields["confidence"],
    )


def write_text_atomically(path: Path, text: str) -> None:
    """Write, sync and rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """All predictions as JSON lines, atomically."""
    lines = [json.dumps(to_json(one), ensure_ascii=False) for one in predictions]
    write_text_atomically(path, "".join(f"{line}\n" for line in lines))


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of one file. Raises ValueError with file and line at a line that is none."""
    found = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                found.append(from_json(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: not a prediction ({type(error).__name__}: {error}); "
                    "run `emoverse evaluate` on the run again"
                ) from error
    return found


def rows_of_task(predictions: Sequence[Prediction], task: Task) -> list[Row]:
    """The scorers' rows of one task, in file order."""
    return [one.row for one in predictions if one.row.task is task]
