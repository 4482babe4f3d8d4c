"""The file between evaluation and report: `eval/<which>/predictions.jsonl`, one answer per line.

`evaluate.py` writes it, `report.py` reads it; the scores of `scoring.py` can be computed again from
it alone. Each line is also a result line of ms-swift (`query`, `response`, `label`, `images`);
`result_files.py` reads those of other systems. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from data_shards.files import write_atomically
from data_shards.tasks import Answer, Pair, Task
from emoverse.evaluation.metrics import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One evaluated entry: its row for the scorers, and what a reader of the report wants to see.

    label: the reference in the answer's format. rule: what the parser did. finished: the model
    ended its answer itself. baseline: the answer of a rule that sees no input (`baselines.py`).
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
        "truth": row.reference,
        "baseline": prediction.baseline,
        "sentiment": row.sentiment,
        "emotion": row.emotion,
        "target": row.target,
        "number": row.number,
        "conversation": row.conversation,
        "judge": row.judge,
        "unread_pairs": row.unread_pairs,
        "confidence": prediction.confidence,
        "shard": prediction.shard,
        "slot": prediction.slot,
        "source": prediction.source,
    }


def from_json(fields: Mapping[str, Any]) -> Prediction:
    """The inverse of `to_json`."""
    task = Task(fields["task"])
    reference = _answer_from_json(task, fields["truth"])
    if reference is None:
        raise ValueError("truth must not be null")
    return Prediction(
        row=Row(
            key=fields["key"],
            task=task,
            reference=reference,
            value=_answer_from_json(task, fields["value"]),
            response=fields["response"],
            status=fields["status"],
            sentiment=fields["sentiment"],
            emotion=fields["emotion"],
            target=fields["target"],
            number=fields["number"],
            conversation=fields["conversation"],
            judge=fields["judge"],
            unread_pairs=fields.get("unread_pairs", 0),  # absent before version 0.2
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


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """All predictions as JSON lines, atomically."""
    lines = [json.dumps(to_json(prediction), ensure_ascii=False) for prediction in predictions]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of one file. Raises ValueError with file and line at a line that is none."""
    predictions = []
    with path.open(encoding="utf-8") as file:
        for line_number, line in enumerate(file, start=1):
            try:
                predictions.append(from_json(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{line_number}: not a prediction ({type(error).__name__}: {error}); "
                    "run `emoverse evaluate` on the run again"
                ) from error
    return predictions


def rows_of_task(predictions: Sequence[Prediction], task: Task) -> list[Row]:
    """The scorers' rows of one task, in file order."""
    return [prediction.row for prediction in predictions if prediction.row.task is task]


def identity_hash(identity: Mapping[str, Any]) -> str:
    """sha256 over the JSON of what decides the answers."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_parts(folder: Path, identity: str) -> dict[int, list[Prediction]]:
    """Answered batches by number; files of another identity, and lines cut off, are left out."""
    predictions: dict[int, list[Prediction]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        # The text behind the last line end was cut off by a crash: it is no line.
        records = [_record(line) for line in lines[:-1]]
        if not records or records[0].get("identity") != identity:
            continue
        for record in records[1:]:
            if "batch" in record:
                predictions[int(record["batch"])] = [
                    from_json(prediction) for prediction in record["answers"]
                ]
    return predictions


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # bytes lost in a crash; the batch is answered again
        return {}
    return record if isinstance(record, dict) else {}


class PartWriter:
    """Appends answered batches to a new file; the file appears with the first batch."""

    def __init__(self, folder: Path, identity: str, rank: int) -> None:
        self._path = folder / f"rank{rank}-{os.getpid()}-{time.time_ns()}.jsonl"
        self._identity = identity
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, batch: int, answers: Sequence[Prediction]) -> None:
        """One batch, handed to the system at once: only a crash of the host can lose it."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8", newline="\n")
            self._file.write(json.dumps({"identity": self._identity}) + "\n")
        record = {"batch": batch, "answers": [to_json(prediction) for prediction in answers]}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()


def remove_parts(folder: Path) -> None:
    """When the whole file of predictions is in place."""
    shutil.rmtree(folder, ignore_errors=True)
