"""Decisions of people about records (keep, drop, correct) and ERI reasons, applied by the build.

In: `curation.jsonl` (from the preview page, from `lint --quarantine`, or written by hand) and the
JSONL of `annotate reasons`. Out: `Amendments`, which the build applies to each record before it is
stored, and a report of what was used. Flow: preview, lint, annotate -> here -> build.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from data_shards.build.source_item import BY_CURATION, Skipped
from data_shards.files import write_atomically
from data_shards.jsonl import Row, read_rows
from data_shards.shards.record import Record, from_members, to_members
from data_shards.tasks import TASKS, Task

Action = Literal["keep", "drop", "correct"]

FIELDS: Final = (
    *("utterance", "speaker", "sentiment", "emotion", "expressions", "reason", "pairs"),
    *("tasks", "peak_frame"),
)
_LINE_FIELDS: Final = frozenset({"key", "action", "field", "value", "reason", "task"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One line of a curation file."""

    key: str
    action: Action
    field: str = ""  # of the record's JSON, if corrected
    value: Any = None  # its new JSON value
    reason: str = ""  # why; free text
    location: str = ""  # FILE:LINE, for messages

    def to_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        document: dict[str, Any] = {"key": self.key, "action": self.action}
        if self.action == "correct":
            document |= {"field": self.field, "value": self.value}
        return document | {"reason": self.reason}


@dataclass(frozen=True, kw_only=True, slots=True)
class Amendments:
    """What to change before records are stored; called once per record, in the workers."""

    decisions: Mapping[str, tuple[Decision, ...]] = field(default_factory=dict)  # by key
    reasons: Mapping[str, str] = field(default_factory=dict)  # by key

    def __call__(self, record: Record) -> Record | Skipped:
        """The record with its reason and corrections, or a Skipped if it is dropped.

        Raises:
            ValueError: a correction makes the record invalid; names file and line.
        """
        reason = self.reasons.get(record.key)
        if reason is not None:
            tasks = tuple(task for task in TASKS if task in (*record.tasks, Task.ERI))
            record = replace(record, reason=" ".join(reason.split()), tasks=tasks)
        for decision in self.decisions.get(record.key, ()):
            if decision.action == "drop":
                return Skipped(
                    key=record.key,
                    source=record.source,
                    split=record.split,
                    reason=BY_CURATION,
                    detail=decision.reason or "no reason given",
                )
            if decision.action == "correct":
                record = _corrected(record, decision)
        return record

    def __bool__(self) -> bool:
        return bool(self.decisions or self.reasons)

    def report(self, keys: Iterable[str]) -> dict[str, Any]:
        """Number of records per kind of decision; `keys` are all keys of the source."""
        known = set(keys)
        counts = dict.fromkeys(get_args(Action), 0)
        for key in self.decisions.keys() & known:
            for action in {decision.action for decision in self.decisions[key]}:
                counts[action] += 1
        return {
            **counts,
            "reasons": len(self.reasons.keys() & known),
            # One file of reasons serves all splits, so other clips in it are no mistake.
            "reasons_of_other_clips": len(self.reasons.keys() - known),
            "unknown_keys": sorted(self.decisions.keys() - known),
        }


def _corrected(record: Record, decision: Decision) -> Record:
    """Change the record's JSON, whose reader checks types and rules."""
    members = to_members(record)
    document = json.loads(members["json"])
    document[decision.field] = decision.value
    members["json"] = json.dumps(document).encode("ascii")
    try:
        return from_members(record.key, members)
    except ValueError as error:
        where = decision.location
        raise ValueError(f"{where}: this correction is not possible: {error}") from error


def read_curation(paths: Sequence[Path]) -> dict[str, tuple[Decision, ...]]:
    """Decisions by key. If several files name a key, only the last of them counts for it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not a decision, or decisions of one file contradict each other; names
            file and line.
    """
    decisions: dict[str, tuple[Decision, ...]] = {}
    for path in paths:
        of_file: dict[str, list[Decision]] = {}
        for row in read_rows(path, "a curation file; the preview page exports one"):
            decision = _decision(row)
            earlier = of_file.setdefault(decision.key, [])
            for other in earlier:
                _require_agreement(other, decision)
            earlier.append(decision)
        decisions |= {key: tuple(listed) for key, listed in of_file.items()}
    return decisions


def _decision(row: Row) -> Decision:
    unknown = sorted(set(row.fields) - _LINE_FIELDS)
    if unknown:
        raise ValueError(
            f"{row.place}: {unknown[0]}: is not a field of a decision; the fields are "
            f"{', '.join(sorted(_LINE_FIELDS))}"
        )
    action = row.text("action")
    if action not in get_args(Action):
        raise ValueError(
            f"{row.place}: action: must be one of {', '.join(get_args(Action))}, found {action!r}"
        )
    reason = row.fields.get("reason") or ""
    if not isinstance(reason, str):
        raise ValueError(f"{row.place}: reason: must be text, found {reason!r}")
    correction: dict[str, Any] = {}
    if action == "correct":
        name = row.text("field")
        if name not in FIELDS or "value" not in row.fields:
            raise ValueError(
                f"{row.place}: a correction needs a value and a field of {', '.join(FIELDS)}, "
                f"found {name!r}"
            )
        correction = {"field": name, "value": row.fields["value"]}
    return Decision(
        key=row.text("key"),
        action=action,  # type: ignore[arg-type]
        reason=reason,
        location=row.place,
        **correction,
    )


def _require_agreement(first: Decision, second: Decision) -> None:
    same_field = first.action == second.action == "correct" and first.field == second.field
    if same_field and first.value != second.value:
        raise ValueError(
            f"{second.location}: key {first.key}: {first.field} is corrected to {second.value!r}, "
            f"but on {first.location} to {first.value!r}; keep one of the lines"
        )
    if (first.action == "drop") != (second.action == "drop"):
        raise ValueError(
            f"{second.location}: key {first.key}: {second.action} contradicts {first.action} on "
            f"{first.location}; keep one of the lines"
        )


def write_curation(path: Path, decisions: Iterable[Decision]) -> None:
    """Write decisions as `read_curation` reads them."""
    write_atomically(path, "".join(json.dumps(d.to_json()) + "\n" for d in decisions))
