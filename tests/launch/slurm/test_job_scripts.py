"""The scripts of slurm/: what they ask for, their help, and that they are thin."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name != "job.sh")
EXPECTED = Path(__file__).resolve().parents[1] / "expected"


def test_there_is_a_script_per_step() -> None:
    names = {path.stem for path in SCRIPTS}
    assert names == {"build_shards", "stage1", "stage2", "evaluate"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_what_was_reviewed(path: Path) -> None:
    """Comments may change; what SLURM and the shell read is compared."""
    lines = [
        line
        for line in path.read_text().splitlines()
        if line.startswith("#SBATCH") or (line and not line.startswith("#"))
    ]
    assert "\n".join(lines) + "\n" == (EXPECTED / f"{path.stem}.txt").read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_asks_for_everything_once_and_runs_srun_once(path: Path) -> None:
    text = path.read_text()
    flags = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    assert len(flags) == text.count("#SBATCH")
    assert max(Counter(flags).values()) == 1
    assert len(re.findall(r"^exec srun ", text, re.MULTILINE)) == 1
    assert "--kill-on-bad-exit=1" in text and "--cpus-per-task=" in text
    trains = path.stem != "build_shards"  # a build saves every shard, it needs no warning
    for flag in ("requeue", "open-mode=append", *(["signal=USR2@180"] if trains else [])):
        assert f"#SBATCH --{flag}\n" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_needs_no_scheduler(path: Path) -> None:
    done = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert f"sbatch [FLAGS] slurm/{path.name}" in done.stdout
    assert "SBATCH" not in done.stdout and "set -euo" not in done.stdout


def test_outside_of_a_job_a_script_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "slurm/stage1.sh", "run.seed=1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2
    assert "submit it with sbatch" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["configs/emoverse_4b.yaml"]),
        (["run.seed=2"], ["configs/emoverse_4b.yaml", "run.seed=2"]),
        (["run.seed=2", "mine.yaml"], ["run.seed=2", "mine.yaml"]),
        (["a.yaml", "b.yaml", "run.name=x"], ["a.yaml", "b.yaml", "run.name=x"]),
        (["runs/lr=1/a.yaml", "run.seed=2"], ["runs/lr=1/a.yaml", "run.seed=2"]),
        (["a.yaml", "--accept-changes"], ["a.yaml", "--accept-changes"]),
        (["run.run_dir=/r/a"], ["configs/emoverse_4b.yaml", "run.run_dir=/r/a"]),
    ],
)
def test_the_default_config(words: list[str], expected: list[str], tmp_path: Path) -> None:
    """A script inside a job, with stand-ins for Python and srun that print their arguments."""
    for name, text in {
        "python": 'echo /run/stage1/logs/7; echo "$@" > asked',
        "srun": 'printf "%s\\n" "$@" > ran',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    done = subprocess.run(
        ["bash", ROOT / "slurm/stage1.sh", *words],
        capture_output=True,
        text=True,
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "x",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_CPUS_PER_TASK": "3",
            "EMOVERSE_PYTHON": str(tmp_path / "python"),
        },
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text().split() == [
        "-m",
        "launch.slurm.job_log",
        "stage1",
        *expected,
    ]
    ran = (tmp_path / "ran").read_text().splitlines()
    assert "--cpus-per-task=3" in ran and "--output=/run/stage1/logs/7/rank_%t.log" in ran
    after = ran[ran.index("launch.worker") + 1 :]
    assert after == [*expected, "--stage=stage1", "--max-requeues=20"]
    assert "log: /run/stage1/logs/7/rank_0.log" in done.stdout
    assert "emoverse status /run\n" in done.stdout
