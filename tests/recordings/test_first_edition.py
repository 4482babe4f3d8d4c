"""A shard folder and a stopped run that the first edition of the packages wrote load and resume."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_shards.shards.open import open_index
from data_shards.shards.reader import ShardReader
from data_shards.tasks import Task

ROOT = Path(__file__).resolve().parents[2]
OLD = Path(__file__).parent / "first_edition"


def step_losses(run: Path, stage: str) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / stage / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "step"]


def test_old_shards_are_read() -> None:
    index = open_index(OLD / "shards")
    assert index.num_records == 12
    reader = ShardReader(index.folder, index)
    records = [reader.read(0, slot) for slot in range(12)]
    assert len({record.key for record in records}) == 12
    assert {Task.MSA, Task.ER} <= {task for record in records for task in record.tasks}


def test_an_old_run_resumes_and_ends_as_it_would_have(tmp_path: Path) -> None:
    """Stage 1 goes on at step 6 and stage 2 follows; losses of the uninterrupted old run."""
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)
    places = [f"{key}={OLD / 'shards'}" for key in ("data.shards", "evaluation.shards")]
    places += [f"run.run_dir={run}", f"data.cache_dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "launch.cli", "train", str(run / "config.yaml"), *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((OLD / "losses.json").read_text())
    for stage in ("stage1", "stage2"):
        steps, losses = zip(*step_losses(run, stage), strict=True)
        wanted_steps, wanted = zip(*whole[stage], strict=True)
        assert steps == wanted_steps
        # Other processors round otherwise; bit-equality on one machine is record.py's business.
        assert losses == pytest.approx(wanted, rel=2e-3)
