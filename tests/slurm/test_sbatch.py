"""`sbatch slurm/*.sh` on a real SLURM: to the end, through signals, lost nodes and mistakes."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.shards.open import open_index

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
STAGE1, STAGE2, EVALUATE = (f"slurm/{name}.sh" for name in ("stage1", "stage2", "evaluate"))
AFTER = ("--kill-on-invalid-dep=yes", "--cpus-per-task=1")


@pytest.fixture
def submit(cluster: Any, tmp_path: Path) -> Callable[..., str]:
    """`submit(STAGE1, run, flags...)`: one rank on each of two nodes unless flags say otherwise."""

    def call(script: str, run: Any, *flags: str, on: Any = cluster, **more: str) -> str:
        shape = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
        output = f"--output={tmp_path}/slurm-%j.out"
        return str(on.sbatch(*shape, output, *flags, script, *run.words, **more))

    return call


def said(tmp_path: Path, run: Any, job: str, part: str = "stage1") -> str:
    """All that a job has said: the shell and every rank."""
    logs = sorted((run.run_dir / part / "logs" / job).glob("rank_*.log"))
    files = [tmp_path / f"slurm-{job}.out", *logs]
    return "\n".join(f"== {file}\n{file.read_text()}" for file in files if file.exists())


def wait_for_step(run: Any, step: int, limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while step not in run.steps():
        assert time.monotonic() < deadline, f"step {step} did not come: {run.steps()}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, bytes]:
    """Weights of a run that nobody disturbed, filled by the first test that needs it."""
    return {}


@pytest.fixture
def reference(
    undisturbed: dict[str, bytes], cluster: Any, nano_run: Any, submit: Any, tmp_path: Path
) -> bytes:
    if not undisturbed:
        run = nano_run(name="undisturbed")
        job = submit(STAGE1, run)
        assert cluster.wait(job) == "COMPLETED", said(tmp_path, run, job)
        undisturbed["stage1"] = run.weights()
    return undisturbed["stage1"]


def test_both_stages_and_the_scores_by_dependency(
    cluster: Any, nano_run: Any, submit: Any, tmp_path: Path
) -> None:
    run = nano_run("stages.stage1.epochs=2", "stages.stage2.epochs=1")
    one = submit(STAGE1, run, "--ntasks-per-node=2")
    two = submit(STAGE2, run, *AFTER, f"--dependency=afterok:{one}")
    three = submit(EVALUATE, run, *AFTER, f"--dependency=afterok:{two}")
    assert cluster.wait(one) == "COMPLETED", said(tmp_path, run, one)
    text = said(tmp_path, run, one)
    assert "4 processes on cpu" in text and "on n[1-2]" in text
    assert f"log: {run.run_dir}/stage1/logs/{one}/rank_0.log" in text
    assert "next: sbatch slurm/stage2.sh" in text
    assert (run.stage() / "DONE").is_file()
    assert cluster.wait(two) == "COMPLETED", said(tmp_path, run, two, "stage2")
    assert (run.stage("stage2") / "DONE").is_file()
    assert cluster.wait(three) == "COMPLETED", said(tmp_path, run, three, "eval")
    for state in ("base", "stage1", "stage2"):
        assert (run.run_dir / "eval" / state / "metrics.json").is_file()
    assert (run.run_dir / "report.html").is_file()
    assert f"next: open {run.run_dir}/report.html" in said(tmp_path, run, three, "eval")


def test_a_signal_saves_requeues_and_changes_nothing(
    cluster: Any, nano_run: Any, submit: Any, tmp_path: Path, reference: bytes
) -> None:
    # Here a signal goes to all processes of the job: shell, srun, ranks and their data workers.
    run = nano_run("data.workers=1")
    job = submit(STAGE1, run)
    wait_for_step(run, 2)
    cluster.run("scancel", "--signal=USR2", "--full", job)
    assert cluster.wait(job) == "COMPLETED", said(tmp_path, run, job)
    text = said(tmp_path, run, job)
    assert "stopped and requeued" in text and "resumes from step" in text
    assert [event["event"] for event in run.events(job)] == ["start", "end"] * 2
    assert run.steps() == list(range(1, 13))
    assert run.weights() == reference


def ranks_of(job: str) -> list[int]:
    """Process ids of a job's ranks, as this machine numbers them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environ = (folder / "environ").read_bytes().split(b"\0")
            mine = f"SLURM_JOB_ID={job}".encode() in environ
            if mine and b"launch.worker" in words and b"srun" not in words[0]:
                found.append(int(folder.name))
    return found


def environ_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def has_usr2(pid: int) -> bool:
    """Does a signal USR2 wait for this process to go on?"""
    with contextlib.suppress(OSError):  # it has ended
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, mask = line.partition(":")
            if name in ("SigPnd", "ShdPnd") and int(mask, 16) >> (signal.SIGUSR2 - 1) & 1:
                return True
    return False


def test_the_time_limit_is_no_end(
    cluster: Any, nano_run: Any, submit: Any, tmp_path: Path, reference: bytes
) -> None:
    run = nano_run("train.save_every=100")
    job = submit(STAGE1, run, "--time=30", "--signal=USR2@120")
    wait_for_step(run, 2)
    # SLURM looks at limits every 30 s; the training must not be over by then.
    ranks = ranks_of(job)
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    minutes = int(cluster.job(job)["RunTime"].split(":")[1]) + 2
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    deadline = time.monotonic() + 150
    while len(run.events(job)) < 2:
        assert time.monotonic() < deadline, "the signal before the time limit did not come"
        for pid in filter(has_usr2, ranks):  # SLURM 22.05 lets them go on by itself
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    assert cluster.wait(job) == "COMPLETED", said(tmp_path, run, job)
    assert [event["event"] for event in run.events(job)] == ["start", "end"] * 2
    assert "stopped after step" in said(tmp_path, run, job)
    assert "(SIGUSR2)" in said(tmp_path, run, job)
    assert int(cluster.job(job)["Restarts"]) == 1
    assert run.weights() == reference


def test_a_job_of_higher_priority_comes_first(
    cluster: Any, nano_run: Any, submit: Any, tmp_path: Path, reference: bytes
) -> None:
    run = nano_run()
    job = submit(STAGE1, run, "--nodes=2", "--exclusive")
    wait_for_step(run, 2)
    high = cluster.sbatch(
        *("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    )
    assert cluster.wait(high) == "COMPLETED"
    assert cluster.wait(job) == "COMPLETED", said(tmp_path, run, job)
    assert int(cluster.job(job)["Restarts"]) == 1
    assert run.weights() == reference


def test_a_lost_node_is_replaced(
    cluster: Any, nano_run: Any, submit: Any, tmp_path: Path, reference: bytes
) -> None:
    run = nano_run("train.save_every=1")
    job = submit(STAGE1, run)
    wait_for_step(run, 2)
    lost = int(cluster.job(job)["NodeList"].strip("n[]")[-1])
    cluster.kill_node(lost)
    try:
        assert cluster.wait(job) == "COMPLETED", said(tmp_path, run, job)
    finally:
        cluster.start_node(lost)
        cluster.wait_for_idle()
    assert int(cluster.job(job)["Restarts"]) == 1
    assert run.weights() == reference


def test_a_node_without_network_cannot_touch_its_successor(
    cluster: Any, nano_run: Any, submit: Any, tmp_path: Path, reference: bytes
) -> None:
    run = nano_run("train.save_every=1")
    job = submit(STAGE1, run)
    wait_for_step(run, 2)
    # Rank 0 owns the run directory. It is held, cut off, and goes on when its job runs elsewhere.
    old = [pid for pid in ranks_of(job) if b"SLURM_PROCID=0\0" in environ_of(pid)]
    head = int(cluster.job(job)["BatchHost"].strip("n"))
    os.kill(old[0], signal.SIGSTOP)
    cluster.cut_cable(head)
    try:
        deadline = time.monotonic() + 120
        while len(run.events(job)) < 2:
            assert time.monotonic() < deadline, said(tmp_path, run, job)
            time.sleep(0.1)
        first_steps = run.steps()
        os.kill(old[0], signal.SIGCONT)
        assert cluster.wait(job) == "COMPLETED", said(tmp_path, run, job)
        deadline = time.monotonic() + 150
        while Path(f"/proc/{old[0]}").exists():
            assert time.monotonic() < deadline, "the cut-off rank did not end by itself"
            time.sleep(0.1)
    finally:
        cluster.cut_cable(head, cut=False)
        cluster.wait_for_idle()
    assert first_steps and run.steps() == list(range(1, 13))
    assert run.weights() == reference


def test_a_dead_rank_ends_the_job(cluster: Any, nano_run: Any, submit: Any, tmp_path: Path) -> None:
    """Nobody waits for a rank that is gone while its node lives, and nothing is repeated."""
    run = nano_run("train.save_every=1")
    job = submit(STAGE1, run)
    wait_for_step(run, 2)
    (dead,) = [pid for pid in ranks_of(job) if b"SLURM_PROCID=1\0" in environ_of(pid)]
    os.kill(dead, signal.SIGKILL)
    assert cluster.wait(job) == "FAILED", said(tmp_path, run, job)
    assert cluster.job(job)["Restarts"] == "0"
    assert run.weights()


def test_a_deterministic_failure_is_not_repeated(
    cluster: Any, nano_run: Any, submit: Any, nano_shards: Path, tmp_path: Path
) -> None:
    # Shards that pass every check of the index, with a tar full of zeros behind them.
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in nano_shards.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(bytes(len(content)) if file.suffix == ".tar" else content)
    run = nano_run(f"data.shards={broken}")
    job = submit(STAGE1, run)
    after = submit(STAGE2, run, *AFTER, f"--dependency=afterok:{job}")
    assert cluster.wait(job) == "FAILED", said(tmp_path, run, job)
    assert cluster.job(job)["Restarts"] == "0"
    assert cluster.wait(after, 20) == "CANCELLED"
    assert "is not requeued" in said(tmp_path, run, job)


def test_shards_are_built_by_a_job(cluster: Any, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    words = ("synthetic", f"--out={shards}", "--clips=8", "--identities=4", "--seed=1")
    output = f"--output={tmp_path}/build.out"
    job = cluster.sbatch("--cpus-per-task=1", output, "slurm/build_shards.sh", *words)
    assert cluster.wait(job) == "COMPLETED", (tmp_path / "build.out").read_text()
    assert open_index(shards).num_records == 8


def test_a_wrong_config_ends_before_any_rank(
    cluster: Any, nano_run: Any, submit: Any, tmp_path: Path
) -> None:
    run = nano_run("train.zero_stag=1")
    job = submit(STAGE1, run)
    assert cluster.wait(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "did you mean 'zero_stage'?" in said(tmp_path, run, job)
    assert not run.run_dir.exists()


def test_a_cancelled_job_stays_cancelled_and_its_run_loads(
    cluster: Any, nano_run: Any, submit: Any, tmp_path: Path
) -> None:
    run = nano_run("train.save_every=100")
    job = submit(STAGE1, run)
    wait_for_step(run, 2)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    time.sleep(1)
    assert cluster.job(job)["JobState"] == "CANCELLED", said(tmp_path, run, job)
    assert run.weights()


def test_signals_that_reach_the_tasks_only(
    task_only_cluster: Any, nano_run: Any, submit: Any, tmp_path: Path, reference: bytes
) -> None:
    run = nano_run("data.workers=1")
    job = submit(STAGE1, run, on=task_only_cluster)
    wait_for_step(run, 2)
    # To the shell alone, which has become srun and passes it on.
    task_only_cluster.run("scancel", "--signal=USR2", "--batch", job)
    assert task_only_cluster.wait(job) == "COMPLETED", said(tmp_path, run, job)
    assert int(task_only_cluster.job(job)["Restarts"]) == 1
    assert run.weights() == reference
