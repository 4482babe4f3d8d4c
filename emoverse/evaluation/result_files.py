"""Result files of other systems: ms-swift's jsonl (version 2 and later) -> predictions.

In: one JSON object per line with `response`, `label` or `labels`, and `query` or `messages`;
further keys (`images`, `videos`, `id`, `sentiment`, `task`) are used where they are there. Out:
`Prediction`s like our own. Our own predictions.jsonl is read by the same call. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.files import write_atomically
from data_shards.jsonl import read_utf8
from data_shards.tasks import IDENTIFIER, TASKS, Answer, Pair, Task, parse_answer
from emoverse.evaluation.metrics import END_OF_SCALE, Row
from emoverse.evaluation.metrics_file import tasks_json
from emoverse.evaluation.parsing import Mode, read_again, read_text
from emoverse.evaluation.predictions import Prediction, from_json
from emoverse.run_dir.provenance import package_versions


def read_results(
    path: Path, *, task: Task | None = None, mode: Mode = "tolerant"
) -> list[Prediction]:
    """The answers of a result file, read in `mode`.

    task: of all lines that name none, neither by `task` nor by its identifier in the query.
    Raises FileNotFoundError, or ValueError with file and line for a line that is no result.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a jsonl file with one answer per line")
    results: list[Prediction] = []
    keys: Counter[tuple[Task, str]] = Counter()
    own: dict[tuple[Task, str], int] = {}
    for line_number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("a line must be a JSON object")
            if "truth" in fields and "task" in fields:
                results.append(from_json(fields))
                row = results[-1].row
                first = own.setdefault((row.task, row.key), line_number)
                if first != line_number:  # two files in one, say: every clip would count twice
                    raise ValueError(f"{row.task} of {row.key} is answered on line {first} already")
            else:
                results.append(_foreign(fields, task, keys, line_number))
        except (ValueError, KeyError, TypeError) as error:
            name = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise ValueError(f"{path}:{line_number}: not a result: {name}{error}") from error
    if not results:
        raise ValueError(f"{path}: holds no answer; each line is a JSON object with a response")
    return read_again(results, mode)


def _foreign(
    fields: Mapping[str, Any], given_task: Task | None, keys: Counter[tuple[Task, str]], line: int
) -> Prediction:
    query = _query(fields)
    task = _task(fields, query) or given_task
    if task is None:
        raise ValueError(
            "the task is not known: no key 'task', and no task identifier such as <emotion> in "
            "the query; name it with --task"
        )
    label = fields.get("label", fields.get("labels"))
    response = fields.get("response")
    if not isinstance(response, str) or not isinstance(label, str):
        raise ValueError("'response' and 'label' (or 'labels') must be texts")
    parsed = parse_answer(task, label)
    if parsed.value is None:
        raise ValueError(f"the label {label!r} is no {task} answer ({parsed.rule})")
    key = _key(fields) or f"line-{line}"
    keys[task, key] += 1
    if keys[task, key] > 1:  # several questions about one clip
        key = f"{key}#{keys[task, key]}"
    row = Row(
        key=key,
        task=task,
        reference=parsed.value,
        value=None,
        sentiment=_sentiment(fields),
        emotion=_emotion(task, parsed.value),
        target=_target(parsed.value),
        conversation=str(fields.get("conversation") or _conversation(task, query)),
    )
    row, rule = read_text(row, response)
    return Prediction(
        row=row,
        label=label,
        rule=rule,
        finished=True,
        baseline=None,
        question=query,
        shard=-1,
        slot=-1,
        source=str(fields.get("source", "results")),
    )


def _query(fields: Mapping[str, Any]) -> str:
    """The question: `query`, else the last message of the user."""
    if isinstance(fields.get("query"), str):
        return str(fields["query"])
    messages = fields.get("messages")
    if not isinstance(messages, list):
        return ""
    asked = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    return asked[-1] if asked and isinstance(asked[-1], str) else ""


def _task(fields: Mapping[str, Any], query: str) -> Task | None:
    if fields.get("task"):
        try:
            return Task(str(fields["task"]).lower())
        except ValueError:
            names = ", ".join(TASKS)
            raise ValueError(f"task: must be one of {names}, found {fields['task']!r}") from None
    named = [task for task, identifier in IDENTIFIER.items() if identifier in query]
    return named[0] if len(named) == 1 else None


def _key(fields: Mapping[str, Any]) -> str:
    """The clip's name: `key` or `id`, else the first video or image."""
    for name in ("key", "id"):
        if fields.get(name) is not None:
            return str(fields[name])
    for name in ("videos", "images"):
        files = fields.get(name)
        if isinstance(files, list) and files:
            first = files[0]
            return str(first.get("path", first) if isinstance(first, dict) else first)
    return ""


def _sentiment(fields: Mapping[str, Any]) -> float | None:
    """The true intensity, where a line has one; N/P leaves out 0, so it must not be overlooked."""
    value = fields.get("sentiment")
    if value is None:
        return None
    line_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not line_number or not abs(value) <= END_OF_SCALE:  # also refuses nan
        raise ValueError(f"sentiment: must be a number from -3 to 3, found {value!r}")
    return float(value)


def _emotion(task: Task, reference: Answer) -> str | None:
    if task is Task.ER:
        return str(reference)
    pairs = [prediction for prediction in reference if isinstance(prediction, Pair)]
    return pairs[0].emotion if pairs else None


def _target(reference: Answer) -> int:
    return next((prediction.target for prediction in reference if isinstance(prediction, Pair)), 0)


def _conversation(task: Task, query: str) -> str:
    """A hash of what stands before the identifier, which is the conversation of an ECPE query."""
    before = query.partition(IDENTIFIER[task])[0].strip()
    if task is not Task.ECPE or not before:
        return ""
    return hashlib.sha256(before.encode()).hexdigest()[:16]


def score_results(
    path: Path,
    *,
    task: Task | None = None,
    mode: Mode = "tolerant",
    give_emotion: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """Scores of the answers in `path`; written to `out` where it is given.

    give_emotion: whether the ECPE queries held the target's emotion (for the rules beside it). The
    rules are fitted on the evaluated records, since a file holds no others; metrics.json says so.
    Raises what `read_results` raises.
    """
    predictions = read_results(path, task=task, mode=mode)
    metrics = {
        "which": path.name,
        "parser": mode,
        "clips": len({prediction.row.key for prediction in predictions}),
        "answers": len(predictions),
        "protocol": {"leakage": None, "give_emotion": give_emotion},
        "tasks": tasks_json(predictions, {}, give_emotion=give_emotion),
        "data": {"file": str(path), "fingerprint": hashlib.sha256(path.read_bytes()).hexdigest()},
        "versions": package_versions(),
    }
    if out is not None:
        write_atomically(out, json.dumps(metrics, indent=1) + "\n")
    return metrics
