"""The history of a job in its run directory, and the bound on starts that it gives."""

import json
from pathlib import Path

import pytest

from emoverse.evaluation.predictions import PartWriter, remove_parts
from launch.context import RankContext
from launch.slurm import job_log
from launch.slurm.job_log import MAX_STARTS_WITHOUT_PROGRESS, JobRecord, restart_refusal
from launch.slurm.requeue import job_state, requeue


def record(*progress: int) -> JobRecord:
    events = [{"event": "start", "progress": steps} for steps in progress]
    return JobRecord(job="7", submitted={}, events=events)


def test_a_job_that_goes_on_may_begin_again() -> None:
    assert restart_refusal(record(), 0, 3) is None
    assert restart_refusal(record(0, 10, 20), 30, 3) is None


def test_too_many_starts_are_the_end() -> None:
    reason = restart_refusal(record(0, 10, 20, 30), 40, 3)
    assert reason is not None and "started 4 times and max_requeues is 3" in reason
    assert "submit again" in reason


def test_starts_that_save_nothing_are_the_end() -> None:
    same = [10] * MAX_STARTS_WITHOUT_PROGRESS
    reason = restart_refusal(record(0, *same), 10, 99)
    assert reason is not None and "saved nothing new (step 10)" in reason
    assert restart_refusal(record(0, *same), 11, 99) is None
    assert restart_refusal(record(0, *same[1:]), 10, 99) is None


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_starts_are_counted_over_lost_nodes(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = RankContext(launcher="slurm", job="7", address="n1", world_size=2)
    for _ in range(MAX_STARTS_WITHOUT_PROGRESS):
        job_log.record_start(run_dir, ["stage1"], context, 20, "LOG")
    with pytest.raises(RuntimeError, match=r"job 7 does not start again: .* saved nothing new"):
        job_log.record_start(run_dir, ["stage1"], context, 20, "LOG")
    (run_dir / "stage1/checkpoints/step_000004").mkdir(parents=True)
    job_log.record_start(run_dir, ["stage1"], context, 20, "LOG")
    found = job_log.read_job(run_dir, "7")
    assert [event["progress"] for event in found.starts] == [0, 0, 0, 4]
    # Only rank 0 of a job speaks.
    for silent in (RankContext(launcher="slurm", job="7", rank=1), RankContext(launcher="none")):
        job_log.record_start(run_dir, ["stage1"], silent, 0, "LOG")
    assert len(job_log.read_job(run_dir, "7").starts) == 4


def test_an_evaluation_that_keeps_answers_may_begin_again(run_dir: Path) -> None:
    """It has no checkpoints; a killed one goes on with the batches that are not answered yet."""
    context = RankContext(launcher="slurm", job="7", address="n1", world_size=2)
    target = run_dir / "eval/stage1"
    for number in range(2 * MAX_STARTS_WITHOUT_PROGRESS):
        job_log.record_start(run_dir, [job_log.EVAL], context, 20, "LOG")
        with PartWriter(target / "parts", "identity", rank=0) as parts:
            parts.write(number, [])
    remove_parts(target / "parts")
    (target / "predictions.jsonl").write_text("{}\n" * 40)
    for _ in range(MAX_STARTS_WITHOUT_PROGRESS):
        job_log.record_start(run_dir, [job_log.EVAL], context, 20, "LOG")
    with pytest.raises(RuntimeError, match=r"job 7 does not start again: .* saved nothing new"):
        job_log.record_start(run_dir, [job_log.EVAL], context, 20, "LOG")


def test_jobs_are_read_in_order_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    assert job_log.read_jobs(tmp_path) == []
    job_log.write_submission(tmp_path, "9", parts=["stage1"])
    (tmp_path / "jobs/config-0123456789ab.json").write_text("{}")  # is no job
    job_log.add_event(tmp_path, "9", "start", progress=0)
    (tmp_path / "jobs/8.jsonl").write_text('{"event": "start", "time": "2020-01-01T')
    (tmp_path / "jobs/7.jsonl").write_text(
        json.dumps({"event": "end", "time": "2020-01-01T00:00:00Z", "code": 0}) + '\n{"event"'
    )
    found = job_log.read_jobs(tmp_path)
    assert [one.job for one in found] == ["8", "7", "9"]
    assert [len(one.events) for one in found] == [0, 1, 1]
    assert found[2].submitted["parts"] == ["stage1"]


# Requeue, with a scontrol that writes down what it is asked ------------------------------------


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/says\n'
        f"[ ! -e {tmp_path}/refuses ] || {{ echo no permission >&2; exit 1; }}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return tmp_path


CONTEXT = RankContext(launcher="slurm", job="4700_3", address="n1", world_size=2)


def test_a_running_job_is_requeued(scontrol: Path) -> None:
    (scontrol / "says").write_text("JobId=4711 ArrayJobId=4700 JobState=RUNNING Reason=None")
    assert requeue(CONTEXT) is None
    asked = (scontrol / "asked").read_text().splitlines()
    assert asked == ["show job --oneliner 4700_3", "requeue 4700_3"]


def test_a_cancelled_job_stays_cancelled(scontrol: Path) -> None:
    (scontrol / "says").write_text("JobId=4711 JobState=CANCELLED Reason=None")
    assert requeue(CONTEXT) == "its state is CANCELLED"
    assert "requeue" not in (scontrol / "asked").read_text()


def test_a_job_that_was_requeued_from_outside_is_left_alone(scontrol: Path) -> None:
    """`scontrol requeue` by hand, or a pre-emption without a signal before it."""
    says = (
        f"JobId=4711 JobState=COMPLETING Reason=None Requeue=1 Restarts={CONTEXT.num_restarts + 1}"
    )
    (scontrol / "says").write_text(says)
    assert requeue(CONTEXT) is None
    assert "requeue" not in (scontrol / "asked").read_text()
    # A cancelled job looks the same, but for this number.
    (scontrol / "says").write_text(
        says.replace(f"={CONTEXT.num_restarts + 1}", f"={CONTEXT.num_restarts}")
    )
    assert requeue(CONTEXT) == "its state is COMPLETING"


def test_a_refusal_is_a_reason(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scontrol / "says").write_text("JobState=RUNNING")
    (scontrol / "refuses").touch()
    assert requeue(CONTEXT) == "scontrol failed (no permission); submit again to resume"
    monkeypatch.setenv("PATH", "/nowhere")
    reason = requeue(CONTEXT)
    assert reason is not None and "scontrol failed" in reason


def test_only_srun_and_submitit_can_requeue() -> None:
    reason = requeue(RankContext(launcher="variables"))
    assert reason is not None and "the same command resumes" in reason
    assert requeue(RankContext(launcher="submitit", job="1")) is None
    assert job_state("nothing") == "UNKNOWN"
