"""The verb `report`: a run directory in, `report.html` and `summary.json` out.

Composes `summary.py` (numbers), `curves.py` (logs), `clips.py` (examples), `incidents.py` and
`page.py` (HTML). What a run does not have yet (a stage, the text-only baseline, the shards) is left
out or shown as '-'. Torch is not required: a report can be written on any machine that has the run
directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from data_shards.files import write_atomically
from emoverse.evaluation.result_files import read_results
from emoverse.report.clips import pick_clips
from emoverse.report.curves import read_curves
from emoverse.report.incidents import read_incidents
from emoverse.report.page import PageData, render_report
from emoverse.report.summary import load_run_config, read_evaluations, summarise, summary_json


def write_report(
    run_dir: Path,
    *,
    text_only_run: Path | None = None,
    systems: Mapping[str, Path] | None = None,
    seconds: float | None = None,
    peak_memory_bytes: int | None = None,
) -> Path:
    """Write `report.html` and `summary.json` into the run directory; return the page's path.

    text_only_run: the run directory of the text-only baseline. systems: result files of other
    systems by name; their answers are shown where they answered the same clips. seconds and
    peak_memory_bytes are what the caller measured; when not given, those of an earlier summary of
    the same run are kept.
    Raises FileNotFoundError when a folder is not a run directory.
    """
    config = load_run_config(run_dir)
    evaluated = read_evaluations(run_dir, config)
    text_only = {}
    if text_only_run is not None:
        text_only = read_evaluations(text_only_run, load_run_config(text_only_run))
    others = {name: read_results(path) for name, path in (systems or {}).items()}
    summary_path = run_dir / "summary.json"
    if summary_path.is_file():
        earlier = json.loads(summary_path.read_text())
        seconds = earlier.get("seconds") if seconds is None else seconds
        if peak_memory_bytes is None:
            peak_memory_bytes = earlier.get("peak_memory_bytes")
    lines = summarise(config, evaluated, text_only)
    summary = summary_json(
        lines, config, evaluated, seconds=seconds, peak_memory_bytes=peak_memory_bytes
    )
    provenance_path = run_dir / "provenance.json"
    page = PageData(
        config=config,
        lines=lines,
        evaluated=evaluated,
        text_only=text_only,
        curves=read_curves(run_dir, config),
        clips=pick_clips(config, evaluated, text_only, lines, others),
        incidents=read_incidents(run_dir, config),
        provenance=json.loads(provenance_path.read_text()) if provenance_path.is_file() else {},
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes,
    )
    path = run_dir / "report.html"
    write_atomically(path, render_report(page))
    write_atomically(summary_path, json.dumps(summary, indent=2) + "\n")
    return path
