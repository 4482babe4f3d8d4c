"""What a stage logged, as curves for the report: loss per task and achieved rates.

`RUN/<stage>/metrics.jsonl` goes in (its records are described in `telemetry.py`), `StageCurves`
come out, also for a stage that is still running or was killed while writing a line. Torch-free.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.files import read_complete_lines
from data_shards.tasks import Task
from emoverse.config.schema import Config

Curve = tuple[Sequence[float], Sequence[float]]


class Speed(NamedTuple):
    """How a throughput key of an interval is shown: its value is divided by `divisor`."""

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
    """One stage: (steps, values) per task, the configured rates, and a few facts in words.

    share: of the samples of each logged interval. speed: (steps, values) per key of SPEEDS.
    """

    name: str
    steps: int
    samples: int
    loss: Mapping[Task, Curve]
    share: Mapping[Task, Curve]
    rates: Mapping[Task, float]
    speed: Mapping[str, Curve]
    facts: Sequence[tuple[str, str]]


def read_curves(run_dir: Path, config: Config) -> list[StageCurves]:
    """The curves of every stage that has logged at least one interval, in the config's order."""
    stages = []
    for name, stage in config.stages.items():
        records = list(read_complete_lines(run_dir / name / "metrics.jsonl"))
        intervals = [record for record in records if record.get("kind") == "interval"]
        if intervals:
            rates = {task: float(rate) for task, rate in stage.rates.items()}
            curves = _stage_curves(name, rates, records, intervals)
            trained = _num_trained(records, config.train.global_batch_size)
            stages.append(curves if trained is None else replace(curves, samples=trained))
    return stages


def _num_trained(records: Sequence[Mapping[str, Any]], batch: int) -> int | None:
    """Samples of the steps that count; None where the log does not record a stage's total.

    Not the sum of the intervals: the steps between the last one and a stop are in none.
    """
    totals = [int(record["num_samples"]) for record in records if "num_samples" in record]
    if not totals:
        return None
    steps = {int(record["step"]) for record in records if record.get("kind") == "step"}
    return sum(max(min(batch, totals[-1] - (step - 1) * batch), 0) for step in steps)


def _stage_curves(
    name: str,
    rates: Mapping[Task, float],
    records: Sequence[Mapping[str, Any]],
    intervals: Sequence[Mapping[str, Any]],
) -> StageCurves:
    loss: dict[Task, Curve] = {}
    share: dict[Task, Curve] = {}
    totals = [sum(_samples(interval, task) for task in rates) for interval in intervals]
    steps = [float(interval["step"]) for interval in intervals]
    for task in rates:
        logged = [
            (float(interval["step"]), float(interval["task"][task]["loss"]))
            for interval in intervals
            if interval["task"].get(task, {}).get("loss") is not None
        ]
        loss[task] = ([step for step, _ in logged], [value for _, value in logged])
        counts = [_samples(interval, task) for interval in intervals]
        share[task] = (steps, [n / max(total, 1) for n, total in zip(counts, totals, strict=True)])
    speed: dict[str, Curve] = {}
    for key, shown in SPEEDS.items():
        timed = [interval for interval in intervals if interval.get(key) is not None]
        speed[key] = (
            [float(interval["step"]) for interval in timed],
            [float(interval[key]) / shown.divisor for interval in timed],
        )
    return StageCurves(
        name=name,
        steps=int(steps[-1]),
        samples=sum(totals),
        loss=loss,
        share=share,
        rates=rates,
        speed=speed,
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
    speed = statistics.median(float(interval["samples_per_s"]) for interval in intervals)
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
