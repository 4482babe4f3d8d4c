"""`emoverse status` from the files of a run, with and without a scheduler."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.slurm import job_log


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Stage 1 at step 40 of 100, with one job that has been requeued once."""
    folder = tmp_path / "run"
    stage = folder / "stage1"
    (stage / "checkpoints/step_000030").mkdir(parents=True)
    (stage / "checkpoints/step_000020").mkdir()
    lines: list[dict[str, Any]] = [{"kind": "start", "step": 0, "num_steps": 100}]
    lines += [{"kind": "step", "step": step, "loss": 2.0} for step in range(1, 41)]
    lines += [{"kind": "interval", "step": 40, "loss": 1.5, "samples_per_s": 12.0, "eta_s": 3725.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (stage / "metrics.jsonl").write_text(text + '{"kind": "st')
    job_log.write_submission(folder, "7", parts=["stage1"], logs="LOG7", waits_for=None)
    start = {"parts": ["stage1"], "progress": 0, "nodes": "n[1-2]", "logs": "LOG7"}
    job_log.add_event(folder, "7", "start", **start)
    job_log.add_event(folder, "7", "end", code=75, requeued=True, reason=None, progress=30)
    job_log.add_event(folder, "7", "start", **{**start, "progress": 30, "nodes": "n[3-4]"})
    job_log.write_submission(folder, "8", parts=["stage2"], logs="LOG8", waits_for="afterok:7")
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_from_files_alone(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, _ = call(capsys, "status", run_dir)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "scheduler: does not answer; from files alone"
    assert lines[2] == str(run_dir)
    assert lines[3].startswith(
        "  stage1: begun, step 40/100, loss 1.500, 12.0 samples/s, 1h02m left, checkpoint at "
        "step 30, last line 0s ago"
    )
    assert lines[4].startswith("  job 7 (stage1): begun, no end recorded, start 2 on n[3-4], ")
    assert lines[5] == "    log LOG7"
    assert lines[6].startswith("  job 8 (stage2): submitted, not begun, waits for afterok:7, ")
    assert lines[8] == "  next: wait for 7, 8"


def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = tmp_path / "bin/squeue"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_with_the_scheduler(
    run_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "7|RUNNING|3:00|20:00|n[3-4]|None\\n8|PENDING|0:00|1-00:00:00||Dependency\\n"
    scheduler(tmp_path, monkeypatch, f"printf '{said}'")
    report = json.loads(call(capsys, "status", run_dir, "--json")[1])
    assert report["scheduler"] == "answers"
    one, two = report["runs"][0]["jobs"]
    assert (one["state"], one["time_left"], one["nodes"]) == ("running", "20:00", "n[3-4]")
    assert (two["state"], two["reason"]) == ("pending", "Dependency")


def test_a_job_that_was_ended_by_force(
    run_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler(tmp_path, monkeypatch, "true")  # it answers, and knows no job
    out = call(capsys, "status", run_dir)[1]
    assert out.count("killed or cancelled: no end recorded") == 2
    assert "next: submit again; the same command resumes" in out
    # The local executor's jobs are processes of this machine.
    job_log.write_submission(run_dir, "1", executor="local", parts=["stage1"], logs="L")
    assert "next: wait for 1\n" in call(capsys, "status", run_dir)[1]


def test_a_scheduler_that_fails_is_away(
    run_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler(tmp_path, monkeypatch, "echo slurm_load_jobs error >&2; exit 1")
    assert "from files alone" in call(capsys, "status", run_dir)[1]


def test_how_a_job_ended(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for code, reason, text in [
        (1, None, "failed with 1"),
        (75, "it has begun 21 times", "stopped on n[3-4], because: it has begun 21 times"),
        (0, None, "done"),
    ]:
        job_log.add_event(
            run_dir, "7", "end", code=code, requeued=False, reason=reason, progress=40
        )
        assert text in call(capsys, "status", run_dir)[1].replace(", start 2", "")
    (run_dir / "jobs/8.json").unlink()
    assert "next: submit again; the same command resumes" in call(capsys, "status", run_dir)[1]
    (run_dir / "stage1/DONE").write_text("{}")
    out = call(capsys, "status", run_dir)[1]
    assert "stage1: done, step 40/100" in out
    assert f"next: emoverse evaluate {run_dir}" in out


def test_a_folder_of_variants(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_log.write_submission(tmp_path / "other", "9_1", parts=["stage1"], logs="L", waits_for=None)
    report = json.loads(call(capsys, "status", tmp_path, "--json")[1])
    assert [Path(one["run_dir"]).name for one in report["runs"]] == ["other", "run"]
    # Launched below a run that was there before: its own lines and theirs.
    job_log.write_submission(run_dir / "seed1", "9_0", parts=["stage1"], logs="L", waits_for=None)
    report = json.loads(call(capsys, "status", run_dir, "--json")[1])
    assert [Path(one["run_dir"]).name for one in report["runs"]] == ["run", "seed1"]


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "status", tmp_path)
    assert code == 2
    assert "no run here" in err and "run.run_dir" in err
