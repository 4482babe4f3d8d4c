"""Scores of a predictions file alone: no run, no shards, no model; the verb `evaluate FILE.jsonl`.

A result file (ours or ms-swift's) goes in, the content of a metrics.json comes out. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from data_shards.tasks import Task
from emoverse.evaluation.metrics_file import tasks_json
from emoverse.evaluation.parsing import Mode
from emoverse.evaluation.predictions import write_text_atomically
from emoverse.evaluation.result_files import read_results
from emoverse.run_dir.provenance import package_versions


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
        "clips": len({one.row.key for one in predictions}),
        "answers": len(predictions),
        "protocol": {"leakage": None, "give_emotion": give_emotion},
        "tasks": tasks_json(predictions, {}, give_emotion=give_emotion),
        "data": {"file": str(path), "fingerprint": hashlib.sha256(path.read_bytes()).hexdigest()},
        "versions": package_versions(),
    }
    if out is not None:
        write_text_atomically(out, json.dumps(metrics, indent=1) + "\n")
    return metrics
