"""A run through submitit's local executor: launch, time limit, requeue, DONE; no SLURM needed."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emoverse.config.schema import Config, to_yaml
from launch import cli
from launch.slurm import job_log

pytestmark = [
    pytest.mark.timeout(240),
    # submitit starts its controllers and does not wait for them.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def started() -> Iterator[list[int]]:
    """Ids of the controllers that a test has started; ended with all their ranks."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        for child in descendants(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [below for child in children for below in descendants(int(child))] + [pid]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def has_usr2(pid: int) -> bool:
    """Does a signal USR2 wait for this process to go on?"""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return any(int(fields[name], 16) >> (signal.SIGUSR2 - 1) & 1 for name in ("SigPnd", "ShdPnd"))


def wait_until(run_dir: Path, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        said = [log.read_text() for log in run_dir.glob("stage1/logs/*/*_log.out")]
        assert time.monotonic() < deadline, "\n".join(said)
        time.sleep(0.1)


def launch(config: Config, tmp_path: Path, *words: str) -> int:
    path = tmp_path / "launched.yaml"
    path.write_text(to_yaml(config))
    cluster = str(ROOT / "configs/cluster/local.yaml")
    return cli.main(["launch", cluster, str(path), "--stage", "stage1", *words])


def test_launch_time_limit_requeue_and_done(
    tiny_config: Callable[..., Config],
    tmp_path: Path,
    started: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config("train.save_every=1")
    run_dir = config.run.run_dir
    # A limit of five minutes, and the signal 30 s after the start.
    assert launch(config, tmp_path, "cluster.minutes=5", "cluster.signal_s=270") == 0
    (record,) = job_log.read_jobs(run_dir)
    started.append(int(record.job))
    assert f"next: emoverse status {run_dir}" in capsys.readouterr().out

    def ends() -> list[dict[str, Any]]:
        events = job_log.read_job(run_dir, record.job).events
        return [event for event in events if event["event"] == "end"]

    # The ranks are held after their first checkpoint, so that they are not done by then. On a slow
    # machine the signal comes before it, and nothing has to be held.
    checkpoints = run_dir / "stage1/checkpoints"
    wait_until(run_dir, lambda: any(checkpoints.glob("step_*")) or ends())
    if not ends():
        ranks = [pid for pid in descendants(started[0]) if pid != started[0]]
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        wait_until(run_dir, lambda: all(map(has_usr2, ranks)))
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
    wait_until(run_dir, lambda: (run_dir / "stage1/DONE").exists())
    wait_until(run_dir, lambda: not any(map(is_alive, started)))
    *stopped, done = ends()
    assert stopped and all((end["code"], end["requeued"]) == (75, True) for end in stopped)
    assert (done["code"], done["requeued"]) == (0, False)
    starts = job_log.read_job(run_dir, record.job).starts
    assert [start["progress"] for start in starts[1:]] == [end["progress"] for end in stopped]
    said = next(run_dir.glob("stage1/logs/*/*_0_log.out")).read_text()
    assert "stopped and requeued" in said
    assert cli.main(["status", str(run_dir)]) == 0
    assert f"job {record.job} (stage1): done, start {len(starts)} on" in capsys.readouterr().out
    # What is done is not submitted again.
    assert launch(config, tmp_path) == 0
    assert "nothing to submit" in capsys.readouterr().out


def test_a_failure_is_not_repeated(
    tiny_config: Callable[..., Config], tiny_inputs: Any, tmp_path: Path, started: list[int]
) -> None:
    # Every check of the index passes; the records behind it are zeros.
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_inputs.shards.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(bytes(len(content)) if file.suffix == ".tar" else content)
    config = tiny_config(f"data.shards={broken}", "train.processes=1")
    assert launch(config, tmp_path, "cluster.tasks_per_node=1") == 0
    (record,) = job_log.read_jobs(config.run.run_dir)
    started.append(int(record.job))
    wait_until(config.run.run_dir, lambda: not any(map(is_alive, started)))
    (start, end) = job_log.read_job(config.run.run_dir, record.job).events
    assert (start["event"], end["event"], end["requeued"]) == ("start", "end", False)
    assert end["code"] in (1, 2)
