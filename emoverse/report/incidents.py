"""Interruptions of a run: requeues, restarts, stops, skipped steps, replaced records.

In: RUN/STAGE/metrics.jsonl (records by kind, see `telemetry.py`), the newest checkpoint's
state.json (damaged records that were replaced), and RUN/jobs/JOB.jsonl (starts and ends of a
scheduler's jobs, docs/cluster.md). Out: `Incident`s in order. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.files import read_complete_lines
from emoverse.config.schema import Config
from emoverse.run_dir import storage


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """One event of a stage; `step` is the optimiser step, None where unknown."""

    stage: str
    step: int | None
    kind: str
    text: str


def read_incidents(run_dir: Path, config: Config) -> list[Incident]:
    """All incidents of a run, stage by stage in the order of the log."""
    incidents = []
    for stage in config.stages:
        folder = run_dir / stage
        incidents += _logged(stage, read_complete_lines(folder / "metrics.jsonl"))
        incidents += _replaced(stage, folder)
    for path in sorted((run_dir / "jobs").glob("*.jsonl")):
        incidents += _of_job(path.stem, read_complete_lines(path))
    return incidents


def _logged(stage: str, records: Iterable[Mapping[str, Any]]) -> list[Incident]:
    incidents, launches = [], 0
    for record in records:
        kind = record.get("kind")
        if kind == "start":
            launches += 1
            if launches > 1:
                world = record.get("world_size", "?")
                incidents.append(
                    _at(stage, record, "restart", f"launch {launches}, {world} processes")
                )
        elif kind == "end" and record.get("reason") not in (None, "done"):
            incidents.append(_at(stage, record, "stop", str(record["reason"])))
        elif kind == "skip":
            text = "; ".join(str(record[key]) for key in ("reason", "dump") if record.get(key))
            incidents.append(_at(stage, record, "skipped step", text))
        elif kind == "note":
            incidents.append(_at(stage, record, "note", str(record.get("text", ""))))
    return incidents


def _of_job(job: str, events: Iterable[Mapping[str, Any]]) -> list[Incident]:
    """Every start of a scheduler's job after the first, and ends without a requeue."""
    incidents, starts, stages = [], 0, ""
    for event in events:
        kind, text = "", ""
        if event.get("event") == "start":
            starts, stages = starts + 1, ", ".join(map(str, event.get("parts", ())))
            if starts > 1:
                nodes = f"{event.get('ranks', '?')} ranks on {event.get('nodes', '?')}"
                kind, text = "requeue", f"start {starts} of job {job}, {nodes}"
        elif event.get("code") and not event.get("requeued"):
            reason = event.get("reason") or f"exit code {event['code']}"
            kind, text = "job ended", f"job {job} was not requeued: {reason}"
        if kind:
            time = f", {event['time']}" if event.get("time") else ""
            incidents.append(Incident(stage=stages, step=None, kind=kind, text=text + time))
    return incidents


def _at(stage: str, record: Mapping[str, Any], kind: str, text: str) -> Incident:
    step = record.get("step")
    return Incident(stage=stage, step=int(step) if step is not None else None, kind=kind, text=text)


def _replaced(stage: str, folder: Path) -> list[Incident]:
    """Damaged records that the stage replaced, as its newest checkpoint lists them."""
    newest = next(iter(storage.published(folder / "checkpoints")), None)
    if newest is None:
        return []
    path = newest / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [Incident(stage=stage, step=None, kind="damage", text=f"{path} cannot be read")]
    return [
        Incident(
            stage=stage,
            step=None,
            kind="replaced record",
            text=f"{record.get('key')} of {record.get('shard')} ({record.get('task')}, position "
            f"{record.get('position')}): {record.get('cause')}",
        )
        for record in state.get("data", {}).get("quarantine", ())
    ]
