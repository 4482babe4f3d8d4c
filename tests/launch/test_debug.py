"""The debug config on CPU as it stands: 20 steps through both stages, checked and offloaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips that the head of the config asks for."""
    folder = tmp_path_factory.mktemp("debug") / "shards"
    words = ["build", "synthetic", "--out", str(folder), "--clips", "200", "--identities", "40"]
    assert cli.main([*words, "--seed", "1"]) == 0
    return folder


@pytest.mark.parametrize(
    ("words", "outside"),
    [
        ((), {"offload_optimizer"}),
        (("train.zero_stage=3", "train.offload=all"), {"offload_optimizer", "offload_param"}),
    ],
    ids=["shipped", "all weights"],
)
def test_twenty_steps_on_cpu(
    words: tuple[str, ...], outside: set[str], shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    folders = (f"data.shards={shards}", f"evaluation.shards={shards}", f"run.run_dir={run}")
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", "configs/debug_cpu.yaml", *folders, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # other tests run beside this one
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("stage1", "stage2"):
        assert json.loads((run / stage / "DONE").read_text())["step"] == 10
        zero = json.loads((run / stage / "deepspeed.json").read_text())["zero_optimization"]
        assert {key for key in zero if key.startswith("offload")} == outside
        lines = (run / stage / "metrics.jsonl").read_text().splitlines()
        steps = [line for line in map(json.loads, lines) if line["kind"] == "step"]
        losses = [step["loss"] for step in steps]
        assert len(losses) == 10 and sum(losses[-3:]) < sum(losses[:3])
