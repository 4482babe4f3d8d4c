"""What a rank does around its work: start, requeue, wait, end; and what it records."""

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emoverse.engine import deepspeed_engine, watchdog
from emoverse.engine.distributed import RankError, World
from emoverse.evaluation import evaluate
from emoverse.training import train
from emoverse.training.outcome import Outcome
from emoverse.training.shutdown import SECOND_SIGNAL_EXIT, StopFlag
from emoverse.training.train import TrainOptions
from launch import exit_codes, worker
from launch.context import RankContext
from launch.exit_codes import DONE, FAULT, STOPPED, WRONG_INPUT
from launch.slurm.job_log import add_event, read_job
from launch.slurm.requeue import REQUEUE_CODE
from launch.worker import Job, prepare_environment

ROOT = Path(worker.__file__).parents[1]
SLURM = RankContext(launcher="slurm", job="7", world_size=2, address="n1", port=12000)


def job(tmp_path: Path, context: RankContext, parts: tuple[str, ...] = ("stage1",)) -> Job:
    config: Any = SimpleNamespace(
        run=SimpleNamespace(run_dir=tmp_path / "run"),
        stages={"stage1": None, "stage2": None},
        train=SimpleNamespace(hang_minutes=1),
    )
    return Job(config=config, parts=parts, context=context, max_requeues=3, logs="LOG/%j")


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


def test_a_failure_is_recorded_and_not_requeued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job(tmp_path, SLURM).end(FAULT) == FAULT
    said = capsys.readouterr().err
    assert "failed with exit code 1 and is not requeued" in said and "see LOG/7" in said


@pytest.mark.parametrize(
    "context",
    [RankContext(launcher="none"), RankContext(launcher="slurm", job="7", rank=1, world_size=2)],
)
def test_only_rank_0_of_a_job_logs(
    context: RankContext, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job(tmp_path, context).start() == DONE
    assert job(tmp_path, context).end(FAULT) == FAULT
    assert capsys.readouterr().err == "" and not (tmp_path / "run").exists()


def test_an_end_that_cannot_be_recorded_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line on a full disk must not turn a finished stage into a failed job."""
    (tmp_path / "run/jobs").mkdir(parents=True)
    (tmp_path / "run/jobs/7.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(worker, "requeue", lambda context: None)
    assert job(tmp_path, SLURM).end(DONE) == DONE
    said = capsys.readouterr().err
    assert "cannot be recorded" in said and "No space left" in said and "job 7 done" in said
    assert job(tmp_path, SLURM).requeue() is None


def test_a_start_that_cannot_be_recorded_fails_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/jobs").mkdir(parents=True)
    (tmp_path / "run/jobs/7.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(worker, "check_run", lambda *_, **__: [])
    assert job(tmp_path, SLURM).start() == FAULT
    assert "No space left" in capsys.readouterr().err


def test_a_requeue_is_recorded_before_the_scheduler_ends_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Any] = []

    def scheduler(context: RankContext) -> None:
        recorded.extend(read_job(tmp_path / "run", "7").events)

    monkeypatch.setattr(worker, "requeue", scheduler)
    assert job(tmp_path, SLURM).requeue() is None
    assert [(event["code"], event["requeued"]) for event in recorded] == [(STOPPED, True)]


def test_a_refused_requeue_is_recorded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "requeue", lambda context: "no")
    assert job(tmp_path, SLURM).requeue() == "no"
    last = read_job(tmp_path / "run", "7").events[-1]
    assert (last["requeued"], last["reason"]) == (False, "no")


def test_the_bound_is_asked_before_the_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "requeue", lambda context: pytest.fail("must not be asked"))
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
    add_event(tmp_path / "run", "7", "start", start=0, progress=first)
    add_event(tmp_path / "run", "7", "start", start=1, progress=8)
    given: list[TrainOptions] = []

    def train_stages(*_: Any, options: TrainOptions, flag: StopFlag) -> Outcome:
        given.append(options)
        return Outcome.DONE

    monkeypatch.setattr(train, "train_stages", train_stages)
    monkeypatch.setattr(worker, "_check_hosts", lambda *_: None)
    monkeypatch.setattr(deepspeed_engine, "process_group", lambda *_, **__: nullcontext())
    for context in (SLURM, RankContext(launcher="none")):
        args = worker.parse(["config.yaml", "--stage=stage1", "--fresh"])
        assert worker.run_rank(job(tmp_path, context), args, StopFlag()) == DONE
    assert [options.resume for options in given] == [resumes, False]


def test_a_stopped_training_is_requeued_while_the_ranks_are_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0's answer decides how all ranks end; the evaluation behind it does not begin."""
    events: list[str] = []

    @contextmanager
    def group(*_: Any, **__: Any) -> Iterator[None]:
        events.append("group")
        yield
        events.append("end of group")

    def scheduler(context: RankContext) -> None:
        events.append("requeue")

    monkeypatch.setattr(deepspeed_engine, "process_group", group)
    monkeypatch.setattr(train, "train_stages", lambda *_, **__: Outcome.STOPPED)
    monkeypatch.setattr(worker, "_check_hosts", lambda *_: events.append("check"))
    monkeypatch.setattr(worker, "_evaluate", lambda *_: pytest.fail("must not begin"))
    monkeypatch.setattr(worker, "requeue", scheduler)
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: events.append("wait"))
    args = worker.parse(["config.yaml", "--evaluate"])
    code = worker.run_rank(job(tmp_path, SLURM, ("stage1", "eval")), args, StopFlag())
    assert code == STOPPED
    assert events == ["group", "check", "requeue", "wait", "end of group"]


@pytest.mark.parametrize(
    ("error", "code", "waits"),
    [
        (RankError("no base model", wrong_input=True), WRONG_INPUT, False),
        (RankError("damaged", wrong_input=False, traceback="the traceback\n"), FAULT, False),
        (torch.distributed.DistBackendError("gone"), FAULT, True),
        (KeyError("a bug"), FAULT, False),
    ],
)
def test_failures_by_exit_code(
    error: Exception,
    code: int,
    waits: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only a rank that lost another one waits for the scheduler; the reason stands last."""
    waited: list[Any] = []

    def fail(*_: Any, **__: Any) -> Outcome:
        raise error

    monkeypatch.setattr(deepspeed_engine, "process_group", lambda *_, **__: nullcontext())
    monkeypatch.setattr(train, "train_stages", fail)
    monkeypatch.setattr(worker, "_check_hosts", lambda *_: None)
    monkeypatch.setattr(Job, "wait_for_scheduler", lambda self, flag: waited.append(flag))
    args = worker.parse(["config.yaml", "--stage=stage1"])
    assert worker.run_rank(job(tmp_path, SLURM), args, StopFlag()) == code
    shown = capsys.readouterr().err
    assert bool(waited) == waits
    assert ("raceback" in shown) == (code == FAULT)
    assert shown.splitlines()[-1] == f"emoverse train: {error}"


def test_the_code_of_a_stopped_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = RankContext(launcher="submitit", job="9", world_size=2, address="127.0.0.1")
    assert job(tmp_path, local).after_stop(requeued=True) == REQUEUE_CODE
    assert job(tmp_path, local).after_stop(requeued=False) == STOPPED
    slept: list[float] = []
    monkeypatch.setattr(worker.time, "sleep", slept.append)
    assert job(tmp_path, SLURM).after_stop(requeued=True) == STOPPED
    assert slept == [worker.WAIT_FOR_END_S]


def test_a_rank_that_lost_another_waits_for_the_scheduler(tmp_path: Path) -> None:
    code = f"""
        import signal, sys, threading, time, os
        sys.path.insert(0, {str(ROOT / "tests/launch")!r})
        from pathlib import Path
        from emoverse.training.shutdown import listen
        from test_worker import SLURM, job
        from launch.context import RankContext
        job(Path({str(tmp_path)!r}), RankContext(launcher="none")).wait_for_scheduler(None)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with listen() as flag:
            job(Path({str(tmp_path)!r}), SLURM).wait_for_scheduler(flag)
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
        job(tmp_path, SLURM).wait_for_scheduler(quiet)
    assert len(naps) == 3


def test_an_evaluation_does_not_begin_after_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It came while the rank started, or in the last step of the training before."""
    monkeypatch.setattr(evaluate, "run", lambda *_, **__: pytest.fail("must not begin"))
    world = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    flag = StopFlag()
    flag.handle(signal.SIGUSR2, None)
    args = worker.parse(["config.yaml", "--evaluate"])
    assert worker._evaluate(job(tmp_path, SLURM), world, args, flag) is Outcome.STOPPED
    assert capsys.readouterr().out == "evaluation not begun (SIGUSR2)\n"


def test_shards_that_no_rank_finds_are_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("evaluation.shards: no such folder")

    target: Any = SimpleNamespace(out=tmp_path)
    aim = replace(job(tmp_path, RankContext(launcher="none"), ("eval",)), target=target)
    monkeypatch.setattr(evaluate, "run_target", fail)
    monkeypatch.setattr(deepspeed_engine, "process_group", lambda *_, **__: nullcontext())
    args = worker.parse(["config.json", f"--evaluate-target={tmp_path}"])
    assert worker.run_rank(aim, args, StopFlag()) == WRONG_INPUT
    assert capsys.readouterr().err == "emoverse evaluate: evaluation.shards: no such folder\n"
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_waits_for_other_ranks_is_requeued_at_once(tmp_path: Path) -> None:
    """The main thread is inside a collective, where no handler of Python runs."""
    code = f"""
        import ctypes, sys, torch
        sys.path.insert(0, {str(ROOT / "tests/launch")!r})
        from pathlib import Path
        from emoverse.engine.distributed import RankError, World
        from emoverse.evaluation import evaluate
        from emoverse.training.shutdown import listen
        from launch import worker
        from test_worker import SLURM, job

        def blocked(*_, **__):
            print("up", flush=True)
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2):  # taken twice: a wait that no signal interrupts
                ctypes.CDLL(None).pthread_mutex_lock(mutex)

        evaluate.run = blocked
        worker.requeue, worker.WAIT_FOR_END_S = lambda context: None, 0.1
        world = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
        with listen() as flag:
            args = worker.parse(["config.yaml", "--evaluate"])
            worker._evaluate(job(Path({str(tmp_path)!r}), SLURM, ("eval",)), world, args, flag)
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


def test_every_outcome_has_an_exit_code() -> None:
    assert set(exit_codes.OF_OUTCOME) == set(Outcome)
    assert exit_codes.OF_OUTCOME[Outcome.STOPPED] == STOPPED == SECOND_SIGNAL_EXIT
    assert exit_codes.OF_OUTCOME[Outcome.LOST_PEER] == FAULT == watchdog.EXIT_FAULT


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
