"""What went otherwise than planned: requeues, restarts, stops, skipped steps, replaced records.

In: RUN/STAGE/metrics.jsonl (records by kind, see `telemetry.py`), the newest checkpoint's
state.json (damaged records that were replaced), and RUN/jobs/JOB.jsonl (starts and ends of a
scheduler's jobs, docs/cluster.md). Out: `Incident`s in order, and their table. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from emoverse.config.schema import Config
from emoverse.report.curves import read_records
from emoverse.run_dir import storage

MAX_SHOWN = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """One event of a stage, at the optimiser step that it belongs to (None: not known)."""

    stage: str
    step: int | None
    kind: str
    text: str


def read_incidents(run_dir: Path, config: Config) -> list[Incident]:
    """All incidents of a run, stage by stage in the order of the log."""
    found = []
    for stage in config.stages:
        folder = run_dir / stage
        path = folder / "metrics.jsonl"
        if path.is_file():
            found += _logged(stage, read_records(path))
        found += _replaced(stage, folder)
    for path in sorted((run_dir / "jobs").glob("*.jsonl")):
        found += _of_job(path.stem, read_records(path))
    return found


def _logged(stage: str, records: Sequence[Mapping[str, Any]]) -> list[Incident]:
    found, launches = [], 0
    for record in records:
        kind, text = record.get("kind"), ""
        if kind == "start":
            launches += 1
            if launches > 1:
                world = record.get("world_size", "?")
                found.append(_at(stage, record, "restart", f"launch {launches}, {world} processes"))
        elif kind == "end" and record.get("reason") not in (None, "done"):
            found.append(_at(stage, record, "stop", str(record["reason"])))
        elif kind == "skip":
            text = str(record.get("reason", ""))
            dump = record.get("dump")
            found.append(_at(stage, record, "skipped step", f"{text}; {dump}" if dump else text))
        elif kind == "note":
            found.append(_at(stage, record, "note", str(record.get("text", ""))))
    return found


def _of_job(job: str, events: Sequence[Mapping[str, Any]]) -> list[Incident]:
    """Every start of a scheduler's job but its first, and ends that it did not recover from."""
    found, starts, parts = [], 0, ""
    for event in events:
        kind, text = "", ""
        if event.get("event") == "start":
            starts, parts = starts + 1, ", ".join(map(str, event.get("parts", ())))
            if starts > 1:
                where = f"{event.get('ranks', '?')} ranks on {event.get('nodes', '?')}"
                kind, text = "requeue", f"job {job} began for the {starts}. time, {where}"
        elif event.get("code") and not event.get("requeued"):
            why = event.get("reason") or f"exit code {event['code']}"
            kind, text = "job ended", f"job {job} was not requeued: {why}"
        if kind:
            when = f", {event['time']}" if event.get("time") else ""
            found.append(Incident(stage=parts, step=None, kind=kind, text=text + when))
    return found


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
            text=f"{one.get('key')} of {one.get('shard')} ({one.get('task')}, position "
            f"{one.get('position')}): {one.get('cause')}",
        )
        for one in state.get("data", {}).get("quarantine", ())
    ]


def incidents_section(incidents: Sequence[Incident]) -> str:
    """The table, or one sentence that there is nothing to tell."""
    if not incidents:
        return (
            '<p class="empty">Nothing to tell: no restart, no skipped step, no replaced record '
            "in the logs of this run.</p>"
        )
    body = "".join(
        f'<tr><th scope="row">{escape(one.kind)}</th><td>{escape(one.stage)}</td>'
        f'<td class="num">{"-" if one.step is None else one.step}</td>'
        f"<td>{escape(one.text)}</td></tr>"
        for one in incidents[:MAX_SHOWN]
    )
    more = len(incidents) - MAX_SHOWN
    rest = f'<p class="quiet">and {more} more in metrics.jsonl</p>' if more > 0 else ""
    return (
        '<div class="card scroll"><table class="incidents"><thead><tr><th scope="col">what</th>'
        '<th scope="col">stage</th><th scope="col" class="num">step</th><th scope="col">how</th>'
        f"</tr></thead><tbody>{body}</tbody></table>{rest}</div>"
    )
