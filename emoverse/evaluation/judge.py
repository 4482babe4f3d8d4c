"""Another model as judge of ERI answers, behind an OpenAI-compatible endpoint; optional.

Predictions go in, the same with a verdict (0 to 1) on every readable ERI answer come out. Verdicts
are kept in a file by model, prompt and texts, so that a killed judging goes on and nothing is asked
twice. Torch-free.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from data_shards.annotate.endpoint import (
    ChatClient,
    Endpoint,
    Message,
    Patience,
    Refused,
    Unanswered,
)
from data_shards.tasks import Task
from emoverse.evaluation.metrics_file import scores_json
from emoverse.evaluation.predictions import Prediction, rows_of_task

PROMPT_VERSION = 1  # verdicts of another prompt are not taken over
BEST = 10
QUOTED = 120  # characters of an answer without a verdict that the log shows
_SCORE = re.compile(r"(?<![\d.])(10|\d)(?:\s*/\s*10)?(?![\d.]*\d)")

_ASK = (
    "Two texts explain what a person in a video feels and why. The first is the reference. How "
    "well does the second agree with it, in the emotion and in the reasons given? Answer with one "
    f"integer from 0 (nothing agrees) to {BEST} (all agrees).\n\nReference: {{reference}}\n\n"
    "Text: {response}\n\nScore:"
)


def question(prediction: Prediction) -> list[Message]:
    """The chat messages of one verdict."""
    text = _ASK.format(reference=prediction.label, response=prediction.row.response)
    return [{"role": "user", "content": text}]


def read_verdict(text: str) -> float | None:
    """The one integer of 0 to 10 in an answer, as a share of 10; None without exactly one."""
    integers = {int(digits) for digits in _SCORE.findall(text)}
    return integers.pop() / BEST if len(integers) == 1 else None


def verdict_key(prediction: Prediction, model: str) -> str:
    """What a verdict is about: judge, prompt and texts, not the clip."""
    parts = (model, PROMPT_VERSION, prediction.label, prediction.row.response)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_verdicts(path: Path) -> dict[str, float]:
    """The verdicts of an earlier judging; a line that a crash cut off is left out."""
    verdicts: dict[str, float] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            try:
                record = json.loads(line)
                verdicts[str(record["key"])] = float(record["judge"])
            except (ValueError, KeyError, TypeError):
                continue
    return verdicts


def judge_predictions(
    predictions: Sequence[Prediction],
    endpoint: Endpoint,
    store: Path,
    *,
    patience: Patience | None = None,
    concurrency: int = 8,
    log: Callable[[str], None] = lambda text: None,
) -> list[Prediction]:
    """The predictions with verdicts; unreadable ERI answers get 0 without a question.

    An answer that the judge refuses or answers without a number gets no verdict; the count and the
    first reason are logged.
    Raises ValueError for wrong settings of the endpoint, RuntimeError if it does not answer.
    """
    known = read_verdicts(store)
    asked = {
        verdict_key(prediction, endpoint.model): prediction
        for prediction in predictions
        if prediction.row.task is Task.ERI and prediction.row.value is not None
    }
    todo = {key: prediction for key, prediction in asked.items() if key not in known}
    causes: list[str] = []
    if todo:
        store.parent.mkdir(parents=True, exist_ok=True)
        _end_line(store)
        with store.open("a", encoding="utf-8") as file:
            patience = patience or Patience()
            known |= asyncio.run(_ask_all(todo, endpoint, patience, concurrency, file, causes))
    missing = sum(key not in known for key in asked)
    why = f"; the first: {causes[0]}" if causes else ""
    log(f"judge {endpoint.model}: {len(asked)} answers, {len(todo)} asked, {missing} unscored{why}")
    return [_judged(prediction, endpoint.model, known) for prediction in predictions]


def _end_line(store: Path) -> None:
    """Ends a line that a crash cut off, so that the next verdict is not lost with it."""
    if store.is_file() and not store.read_bytes().endswith(b"\n"):
        with store.open("a", encoding="utf-8") as file:
            file.write("\n")


def _judged(prediction: Prediction, model: str, known: Mapping[str, float]) -> Prediction:
    if prediction.row.task is not Task.ERI:
        return prediction
    verdict = 0.0 if prediction.row.value is None else known.get(verdict_key(prediction, model))
    return replace(prediction, row=replace(prediction.row, judge=verdict))


async def _ask_all(
    todo: Mapping[str, Prediction],
    endpoint: Endpoint,
    patience: Patience,
    concurrency: int,
    file: TextIO,
    causes: list[str],
) -> dict[str, float]:
    """The verdicts by key; `causes` gets a line for each answer that keeps none."""
    gate = asyncio.Semaphore(concurrency)
    verdicts: dict[str, float] = {}
    async with ChatClient(patience, connections=concurrency) as client:

        async def ask_one(key: str, prediction: Prediction) -> None:
            async with gate:
                try:
                    text = await client.ask(endpoint, question(prediction))
                except Refused as error:
                    causes.append(str(error))
                    return
            verdict = read_verdict(text)
            if verdict is None:
                causes.append(f"not one integer from 0 to {BEST}: {text[:QUOTED]!r}")
                return
            verdicts[key] = verdict
            file.write(json.dumps({"key": key, "judge": verdict}) + "\n")
            file.flush()

        try:
            async with asyncio.TaskGroup() as group:
                for key, prediction in todo.items():
                    group.create_task(ask_one(key, prediction))
        except* Unanswered as errors:
            raise RuntimeError(
                f"the judge at {endpoint.base_url} does not answer: {errors.exceptions[0]}; the "
                "verdicts so far are kept, the same command goes on"
            ) from None
        except* ValueError as errors:
            raise ValueError(str(errors.exceptions[0])) from None
    return verdicts


def judge_state(
    metrics: dict[str, Any],
    predictions: Sequence[Prediction],
    endpoint: Endpoint,
    folder: Path,
    *,
    log: Callable[[str], None],
) -> list[Prediction]:
    """Adds the judge's score to a metrics.json's content; returns the judged predictions.

    folder: where the verdicts are kept (judge.jsonl).
    """
    judged = judge_predictions(predictions, endpoint, folder / "judge.jsonl", log=log)
    rows = rows_of_task(judged, Task.ERI)
    if rows:
        line = metrics["tasks"][str(Task.ERI)]
        line["metrics"]["judge"] = scores_json(Task.ERI, rows).get("judge")
        line["judge"] = {
            "model": endpoint.model,
            "base_url": endpoint.base_url,
            "prompt_version": PROMPT_VERSION,
            "unscored": sum(row.judge is None for row in rows),
        }
    return judged
