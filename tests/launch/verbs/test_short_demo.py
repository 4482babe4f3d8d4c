"""The whole demo with few clips and few steps: every part meets every other part."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_shards.tasks import TASKS
from emoverse.models.architecture import base_folder

ROOT = Path(__file__).resolve().parents[3]
SHORT = (
    *("--clips", "240", "--test-clips", "60"),
    "stages.stage1.pool.take=100",
    "stages.stage1.epochs=1",
    "stages.stage2.epochs=1",
    "evaluation.max_records=8",
    "train.tensorboard=false",
)
# What a reader of summary.json relies on.
COLUMNS = {"metric", "majority", "text_only", "before", "stage1", "stage2"}

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory and what the demo printed."""
    out = tmp_path_factory.mktemp("short") / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "demo", "--out", str(out), *SHORT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_the_summary_has_a_figure_for_every_task_and_state(finished: tuple[Path, str]) -> None:
    out, printed = finished
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["tasks"]) == {task.value for task in TASKS}
    for task, row in summary["tasks"].items():
        assert set(row) >= COLUMNS, task
        assert all(0 <= row[name] <= 1 for name in COLUMNS - {"metric"}), (task, row)
        assert re.search(rf"^{task} +{row['metric']} ", printed, re.MULTILINE), printed
    assert summary["seconds"] > 0
    assert 2**28 < summary["peak_memory_bytes"] < 8 * 2**30
    assert f"open {out / 'report.html'}" in printed


def test_both_runs_trained_the_same_plan_to_the_end(finished: tuple[Path, str]) -> None:
    out, _ = finished
    plans = [(run / "plan" / "plan.json").read_bytes() for run in (out, out / "text_only")]
    assert plans[0] == plans[1]
    for run in (out, out / "text_only"):
        assert (run / "stage1" / "DONE").is_file() and (run / "stage2" / "DONE").is_file()
    assert (out / "report.html").stat().st_size > 10_000


def test_the_demo_starts_from_the_packaged_base(finished: tuple[Path, str]) -> None:
    out, _ = finished
    assert "base: nano" in (out / "config.yaml").read_text()
    assert base_folder("nano") == ROOT / "emoverse/assets/nano_base"
