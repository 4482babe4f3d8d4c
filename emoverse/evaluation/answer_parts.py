"""Answers of an evaluation under way, kept batch by batch, so that a killed one goes on.

`eval/<which>/parts/*.jsonl`: each process appends its batches to a file of its own; the first line
names the identity (state, data, protocol), every other line one answered batch. Batches are formed
globally, so any number of processes may go on. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from emoverse.evaluation.predictions import Prediction, from_json, to_json


def identity_hash(identity: Mapping[str, Any]) -> str:
    """sha256 over the JSON of what decides the answers."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_parts(folder: Path, identity: str) -> dict[int, list[Prediction]]:
    """Answered batches by number; files of another identity, and lines cut off, are left out."""
    found: dict[int, list[Prediction]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        # The text behind the last line end was cut off by a crash: it is no line.
        records = [_record(line) for line in lines[:-1]]
        if not records or records[0].get("identity") != identity:
            continue
        for record in records[1:]:
            if "batch" in record:
                found[int(record["batch"])] = [from_json(one) for one in record["answers"]]
    return found


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
        record = {"batch": batch, "answers": [to_json(one) for one in answers]}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()


def remove_parts(folder: Path) -> None:
    """When the whole file of predictions is in place."""
    shutil.rmtree(folder, ignore_errors=True)
