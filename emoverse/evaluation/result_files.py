"""Result files of other systems: ms-swift's jsonl (version 2 and later) -> predictions.

In: one JSON object per line with `response`, `label` or `labels`, and `query` or `messages`;
further keys (`images`, `videos`, `id`, `sentiment`, `task`) are used where they are there. Out:
`Prediction`s like our own. Our own predictions.jsonl is read by the same call. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_shards.files import write_atomically
from data_shards.jsonl import read_utf8
from data_shards.tasks import IDENTIFIER, TASKS, Answer, Pair, Task, format_answer, parse_answer
from emoverse.evaluation.metrics import END_OF_SCALE, Row
from emoverse.evaluation.metrics_file import tasks_json
from emoverse.evaluation.parsing import Mode, read_again, read_text
from emoverse.evaluation.predictions import Prediction, from_json
from emoverse.inference.held_out import all_reference_rows
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
    lines: dict[tuple[Task, str, str], int] = {}  # clip and question -> first line
    for line_number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("a line must be a JSON object")
            if "truth" in fields and "task" in fields:
                result = from_json(fields)
                asked = (result.row.task, result.row.key, "")
            else:
                result = _foreign(fields, task, line_number)
                asked = (result.row.task, result.row.key, result.question)
            first = lines.setdefault(asked, line_number)
            if first != line_number:  # two files in one, for example: clips would count twice
                raise ValueError(
                    f"{asked[0]} of {asked[1]} is answered on line {first} already; remove one of "
                    "the two lines"
                )
            keys[asked[:2]] += 1
            if keys[asked[:2]] > 1:  # several questions about one clip
                key = f"{result.row.key}#{keys[asked[:2]]}"
                result = replace(result, row=replace(result.row, key=key))
            results.append(result)
        except (ValueError, KeyError, TypeError) as error:
            name = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise ValueError(f"{path}:{line_number}: not a result: {name}{error}") from error
    if not results:
        raise ValueError(f"{path}: holds no answer; each line is a JSON object with a response")
    return read_again(results, mode)


def _foreign(fields: Mapping[str, Any], given_task: Task | None, line: int) -> Prediction:
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


def expected_rows(source: str | Path, tasks: Iterable[Task]) -> dict[tuple[Task, str], Row]:
    """The clips that a result file has to answer: (task, key) -> row without an answer.

    source: a shard folder, local or remote, or a jsonl file of labels such as another result file.
    Raises what `open_index` and `read_results` raise.
    """
    if str(source).endswith(".jsonl"):
        rows = [prediction.row for prediction in read_results(Path(source))]
        rows = [replace(row, value=None, number=None, unread_pairs=0) for row in rows]
    else:
        rows = list(all_reference_rows(source))
    wanted = set(tasks)
    return {(row.task, row.key): row for row in rows if row.task in wanted}


def join_expected(
    predictions: Sequence[Prediction], expected: Mapping[tuple[Task, str], Row]
) -> list[Prediction]:
    """The predictions of the expected clips, with the fields of the expected rows.

    A clip without an answer becomes one of status 'missing', which counts as wrong.

    Raises:
        ValueError: an answer to a clip that is not expected, or another label than the expected.
    """
    answers = {(one.row.task, one.row.key): one for one in predictions}
    if unknown := sorted(answers.keys() - expected.keys()):
        task, key = unknown[0]
        raise ValueError(
            f"--expect: {len(unknown)} answers are to clips that are not expected, the first is "
            f"{task} of {key}; give the shards or the file that these answers belong to"
        )
    joined = []
    for asked, row in expected.items():
        answer = answers.get(asked)
        if answer is None:
            joined.append(_missing(row))
            continue
        if answer.row.reference != row.reference:
            raise ValueError(
                f"--expect: {row.task} of {row.key}: the label must be {row.reference!r} as in the "
                f"expected data, found {answer.row.reference!r}"
            )
        known = {name: getattr(row, name) for name in ("sentiment", "emotion", "target")}
        known["conversation"] = row.conversation or answer.row.conversation
        joined.append(replace(answer, row=replace(answer.row, **known)))
    return joined


def _missing(row: Row) -> Prediction:
    return Prediction(
        row=replace(row, status="missing"),
        label=format_answer(row.task, row.reference),
        rule="missing",
        finished=False,
        baseline=None,
        question="",
        shard=-1,
        slot=-1,
        source="missing",
    )


def score_results(
    path: Path,
    *,
    task: Task | None = None,
    mode: Mode = "tolerant",
    give_emotion: bool = False,
    expect: str | Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Scores of the answers in `path`; written to `out` where it is given.

    give_emotion: whether the ECPE queries held the target's emotion (for the rules beside it). The
    rules are fitted on the evaluated records, since a file holds no others; metrics.json says so.
    expect: shards or labels of all clips that had to be answered; missing ones count as wrong.
    Raises what `read_results`, `expected_rows` and `join_expected` raise.
    """
    predictions = read_results(path, task=task, mode=mode)
    if expect is not None:
        answered = {prediction.row.task for prediction in predictions}
        predictions = join_expected(predictions, expected_rows(expect, answered))
    metrics = {
        "which": path.name,
        "parser": mode,
        "clips": len({prediction.row.key for prediction in predictions}),
        "answers": len(predictions),
        "protocol": {"leakage": None, "give_emotion": give_emotion},
        "tasks": tasks_json(predictions, {}, give_emotion=give_emotion),
        "expected": None if expect is None else str(expect),
        "data": {"file": str(path), "fingerprint": hashlib.sha256(path.read_bytes()).hexdigest()},
        "versions": package_versions(),
    }
    if out is not None:
        write_atomically(out, json.dumps(metrics, indent=1) + "\n")
    return metrics
