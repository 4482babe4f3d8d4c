"""What a rank does around its work: begin, requeue, wait, end; and what it notes."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emoverse.engine.distributed import World
from emoverse.evaluation import evaluate
from emoverse.training.shutdown import StopFlag
from launch import worker
from launch.context import Door
from launch.slurm.job_log import add_event, read_job
from launch.slurm.requeue import REQUEUE_CODE
from launch.worker import DONE, FAULT, STOPPED, Job, prepare_environment

ROOT = Path(worker.__file__).parents[1]
SLURM = Door(launcher="slurm", job="7", world_size=2, address="n1", port=12000)


def job(tmp_path: Path, door: Door, parts: tuple[str, ...] = ("stage1",)) -> Job:
    config: Any = SimpleNamespace(
        run=SimpleNamespace(run_dir=tmp_path / "run"), stages={"stage1": None, "stage2": None}
    )
    return Job(config=config, parts=parts, door=door, max_requeues=3, logs="LOG/%j")


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("stage1",), "job 7 done; next: sbatch slurm/stage2.sh, unless it is queued already"),
        (("stage2",), "job 7 done; next: sbatch slurm/evaluate.sh, unless it is queued already"),
        (("stage2", "eval"), "report.html"),
    ],
)
def test_the_end_says_what_comes_next(
    parts: tuple[str, ...], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job(tmp_path, SLURM, parts).end(DONE) == DONE
    assert text in capsys.readouterr().err
    (event,) = read_job(tmp_path / "run", "7").events
    assert (event["event"], event["code"], event["requeued"]) == ("end", 0, False)


def test_a_failure_is_noted_and_not_requeued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job(tmp_path, SLURM).end(FAULT) == FAULT
    said = capsys.readouterr().err
    assert "failed with exit code 1 and is not requeued" in said and "see LOG/7" in said


@pytest.mark.parametrize(
    "door", [Door(launcher="nobody"), Door(launcher="slurm", job="7", rank=1, world_size=2)]
)
def test_only_rank_0_of_a_job_speaks(
    door: Door, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job(tmp_path, door).begin() == DONE
    assert job(tmp_path, door).end(FAULT) == FAULT
    assert capsys.readouterr().err == "" and not (tmp_path / "run").exists()


def test_an_end_that_cannot_be_noted_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line on a full disk must not turn a finished stage into a failed job."""
    (tmp_path / "run/jobs").mkdir(parents=True)
    (tmp_path / "run/jobs/7.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(worker, "requeue", lambda door: None)
    assert job(tmp_path, SLURM).end(DONE) == DONE
    said = capsys.readouterr().err
    assert "cannot be noted" in said and "No space left" in said and "job 7 done" in said
    assert job(tmp_path, SLURM).requeue() is None


def test_a_start_that_cannot_be_noted_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/jobs").mkdir(parents=True)
    (tmp_path / "run/jobs/7.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(worker, "check_run", lambda *_, **__: [])
    assert job(tmp_path, SLURM).begin() == FAULT
    assert "No space left" in capsys.readouterr().err


def test_a_requeue_is_noted_before_the_scheduler_ends_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[Any] = []

    def scheduler(door: Door) -> None:
        noted.extend(read_job(tmp_path / "run", "7").events)

    monkeypatch.setattr(worker, "requeue", scheduler)
    assert job(tmp_path, SLURM).requeue() is None
    assert [(event["code"], event["requeued"]) for event in noted] == [(STOPPED, True)]


def test_a_refused_requeue_is_noted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "requeue", lambda door: "no")
    assert job(tmp_path, SLURM).requeue() == "no"
    last = read_job(tmp_path / "run", "7").events[-1]
    assert (last["requeued"], last["reason"]) == (False, "no")


def test_the_bound_is_asked_before_the_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "requeue", lambda door: pytest.fail("must not be asked"))
    path = tmp_path / "run/jobs/7.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text((json.dumps({"event": "start", "progress": 0}) + "\n") * 3)
    reason = job(tmp_path, SLURM).requeue()
    assert reason is not None and "saved nothing new" in reason


@pytest.mark.parametrize(("first", "resumes"), [(0, True), (5, False)])
def test_a_requeued_job_that_began_afresh_goes_on(
    first: int, resumes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--fresh refuses what was there before the job, not what the job itself has saved."""
    from emoverse.training import train

    add_event(tmp_path / "run", "7", "start", start=0, progress=first)
    add_event(tmp_path / "run", "7", "start", start=1, progress=8)
    found: list[Any] = []
    monkeypatch.setattr(train, "train_stages", lambda *_, launch, flag: found.append(launch) or 0)
    for door in (SLURM, Door(launcher="nobody")):
        args = worker.parse(["config.yaml", "--stage=stage1", "--fresh"])
        assert worker._work(job(tmp_path, door), args, StopFlag()) == DONE
    assert [launch.resume for launch in found] == [resumes, False]


def test_the_code_of_a_stopped_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = Door(launcher="submitit", job="9", world_size=2, address="127.0.0.1")
    assert job(tmp_path, local).after_stop(requeued=True) == REQUEUE_CODE
    assert job(tmp_path, local).after_stop(requeued=False) == STOPPED
    slept: list[float] = []
    monkeypatch.setattr(worker.time, "sleep", slept.append)
    assert job(tmp_path, SLURM).after_stop(requeued=True) == STOPPED
    assert slept == [worker.WAIT_FOR_END_S]


def test_a_rank_that_lost_another_waits_for_the_verdict(tmp_path: Path) -> None:
    code = f"""
        import signal, sys, threading, time, os
        sys.path.insert(0, {str(ROOT / "tests/launch")!r})
        from pathlib import Path
        from emoverse.training.shutdown import listen
        from test_worker import SLURM, job
        from launch.context import Door
        job(Path({str(tmp_path)!r}), Door(launcher="nobody")).wait_for_verdict(None)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with listen() as flag:
            job(Path({str(tmp_path)!r}), SLURM).wait_for_verdict(flag)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == FAULT, done.stderr
    assert "lost contact to another rank: waiting for the scheduler" in done.stderr
    (event,) = read_job(tmp_path / "run", "7").events
    assert event["reason"] == "lost contact to another rank"


def test_a_rank_that_was_cut_off_leaves_when_its_job_runs_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left

    monkeypatch.setattr(worker.os, "_exit", leave)
    add_event(tmp_path / "run", "7", "start", start=0)
    quiet: Any = SimpleNamespace(requested=False)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            add_event(tmp_path / "run", "7", "start", start=1)
        assert len(naps) < 9

    monkeypatch.setattr(worker.time, "sleep", nap)
    with pytest.raises(Left):
        job(tmp_path, SLURM).wait_for_verdict(quiet)
    assert len(naps) == 3


def test_an_evaluation_does_not_begin_after_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It came while the rank started, or in the last step of the training before."""
    monkeypatch.setattr(evaluate, "run", lambda *_, **__: pytest.fail("must not begin"))
    world = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    flag = StopFlag()
    flag.handle(signal.SIGUSR2, None)
    with pytest.raises(SystemExit) as stopped:
        worker._evaluate(job(tmp_path, SLURM), world, flag)
    assert stopped.value.code == STOPPED
    assert capsys.readouterr().out == "evaluation not begun (SIGUSR2)\n"


def test_an_evaluation_that_waits_for_other_ranks_is_requeued_at_once(tmp_path: Path) -> None:
    """The main thread is inside a collective, where no handler of Python runs."""
    code = f"""
        import ctypes, sys, torch
        sys.path.insert(0, {str(ROOT / "tests/launch")!r})
        from pathlib import Path
        from emoverse.evaluation import evaluate
        from emoverse.engine.distributed import World
        from emoverse.training.shutdown import listen
        from launch import worker
        from test_worker import SLURM, job

        def blocked(*_, **__):
            print("up", flush=True)
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2):  # taken twice: a wait that no signal interrupts
                ctypes.CDLL(None).pthread_mutex_lock(mutex)

        evaluate.run = blocked
        worker.requeue, worker.WAIT_FOR_END_S = lambda door: None, 0.1
        world = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
        with listen() as flag:
            worker._evaluate(job(Path({str(tmp_path)!r}), SLURM, ("eval",)), world, flag)
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR2)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == STOPPED, said
    assert "job 7 stopped and requeued" in said
    (event,) = read_job(tmp_path / "run", "7").events
    assert (event["code"], event["requeued"]) == (STOPPED, True)


def test_the_environment_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    environ = dict(worker.os.environ)
    monkeypatch.setattr(worker.os, "environ", environ)
    prepare_environment(SLURM)
    assert (environ["RANK"], environ["MASTER_ADDR"]) == ("0", "n1")
    assert environ["OMP_NUM_THREADS"] == "6"
    # Ranks on several hosts do not meet on the loopback device.
    assert "GLOO_SOCKET_IFNAME" not in environ
