"""What a stage logged, as curves for the report: loss per task and achieved rates.

`RUN/<stage>/metrics.jsonl` goes in (its records are described in `telemetry.py`), `StageCurves`
come out. Torch-free. A stage that is still running, or was killed while it wrote a line, has
curves too.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.tasks import Task
from emoverse.config.schema import Config

Curve = tuple[Sequence[float], Sequence[float]]


class Speed(NamedTuple):
    """What a key of an interval tells of throughput: title and unit, the value being divided."""

    title: str
    unit: str
    divisor: float = 1.0


SPEEDS = {
    "samples_per_s": Speed("Samples", "per second"),
    "tokens_per_s": Speed("Packed tokens", "per second"),
    "data_wait": Speed("Waiting for data", "share of the time"),
    "memory_bytes": Speed("Peak memory so far", "GiB", 2.0**30),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCurves:
    """One stage: (steps, values) per task, the asked rates, and a few facts in words.

    share: of the samples of each logged interval. speed: what the intervals say of throughput.
    """

    name: str
    steps: int
    samples: int
    loss: Mapping[Task, Curve]
    share: Mapping[Task, Curve]
    asked: Mapping[Task, float]
    speed: Mapping[str, Curve]
    facts: Sequence[tuple[str, str]]


def read_curves(run_dir: Path, config: Config) -> list[StageCurves]:
    """The curves of every stage that has logged at least one interval, in the config's order."""
    found = []
    for name, stage in config.stages.items():
        path = run_dir / name / "metrics.jsonl"
        records = read_records(path) if path.is_file() else []
        intervals = [record for record in records if record.get("kind") == "interval"]
        if intervals:
            asked = {task: float(rate) for task, rate in stage.rates.items()}
            curves = _stage_curves(name, asked, records, intervals)
            trained = _trained(records, config.train.global_batch_size)
            found.append(curves if trained is None else replace(curves, samples=trained))
    return found


def _trained(records: Sequence[Mapping[str, Any]], batch: int) -> int | None:
    """Samples of the steps that count; None where the log does not say how many a stage has.

    Not the sum of the intervals: the steps between the last one and a stop are in none.
    """
    totals = [int(one["num_samples"]) for one in records if "num_samples" in one]
    if not totals:
        return None
    steps = {int(one["step"]) for one in records if one.get("kind") == "step"}
    return sum(max(min(batch, totals[-1] - (step - 1) * batch), 0) for step in steps)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that a crash cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _stage_curves(
    name: str,
    asked: Mapping[Task, float],
    records: Sequence[Mapping[str, Any]],
    intervals: Sequence[Mapping[str, Any]],
) -> StageCurves:
    loss: dict[Task, Curve] = {}
    share: dict[Task, Curve] = {}
    counts = [sum(_samples(one, task) for task in asked) for one in intervals]
    steps = [float(one["step"]) for one in intervals]
    for task in asked:
        logged = [
            (float(one["step"]), float(one["task"][task]["loss"]))
            for one in intervals
            if one["task"].get(task, {}).get("loss") is not None
        ]
        loss[task] = ([step for step, _ in logged], [value for _, value in logged])
        given = [_samples(one, task) for one in intervals]
        share[task] = (steps, [n / max(all_, 1) for n, all_ in zip(given, counts, strict=True)])
    return StageCurves(
        name=name,
        steps=int(steps[-1]),
        samples=sum(counts),
        loss=loss,
        share=share,
        asked=asked,
        speed={
            key: (
                [float(one["step"]) for one in intervals if one.get(key) is not None],
                [float(one[key]) / speed.divisor for one in intervals if one.get(key) is not None],
            )
            for key, speed in SPEEDS.items()
        },
        facts=_facts(records, intervals),
    )


def _samples(interval: Mapping[str, Any], task: Task) -> int:
    return int(interval["task"].get(task, {}).get("samples", 0))


def _facts(
    records: Sequence[Mapping[str, Any]], intervals: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Short facts of a stage; launches of a resumed stage add up."""
    starts = [record for record in records if record.get("kind") == "start"]
    ends = [record for record in records if record.get("kind") == "end"]
    speed = statistics.median(float(one["samples_per_s"]) for one in intervals)
    facts = [("samples per second", f"{speed:.1f}")]
    if starts:
        first = starts[-1]
        facts.append(("processes", str(first.get("world_size", "-"))))
        facts.append(("ZeRO stage", str(first.get("zero_stage", "-"))))
        if len(starts) > 1:
            facts.append(("launches", str(len(starts))))
    if ends and ends[-1].get("reason") == "done":
        facts.append(("minutes", f"{sum(float(end.get('seconds', 0)) for end in ends) / 60:.1f}"))
    return facts
