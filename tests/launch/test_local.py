"""The local launcher: one exit code for all ranks; none outlives a failure or the launcher."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from emoverse.config.schema import Config, load_config, load_frozen
from emoverse.training.shutdown import STOP_SIGNALS
from launch import cli, local, worker
from launch.exit_codes import FAULT, STOPPED, WRONG_INPUT
from launch.local import exit_code, rank_environment, run_local, run_ranks
from launch.progress import Screen

ROOT = Path(worker.__file__).parents[1]


def script(code: str) -> list[str]:
    return [sys.executable, "-c", "import os, signal, sys, time\n" + textwrap.dedent(code)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def wait_for(file: Path, limit_s: float = 90) -> str:
    deadline = time.monotonic() + limit_s
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.02)
    return file.read_text()


def test_ranks_get_the_five_variables_and_quiet_libraries() -> None:
    environ = rank_environment(
        {"HOME": "/x", "RANK": "9", "OMP_NUM_THREADS": "7"}, rank=1, world_size=2, port=29500
    )
    assert {name: environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
    }
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.1", "29500")
    assert environ["OMP_NUM_THREADS"] == "7"  # the user's wish wins
    assert environ["HOME"] == "/x" and environ["TORCHDYNAMO_DISABLE"] == "1"
    assert int(rank_environment({}, rank=0, world_size=10**6, port=1)["OMP_NUM_THREADS"]) == 1


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([2, 2], 2),
        ([0, 75], 1),
        ([2, 1], 1),
        ([-9, 1], 1),
        ([-11, -11], 1),
    ],
)
def test_one_exit_code_for_all(codes: list[int], code: int) -> None:
    assert exit_code(codes) == code


def test_rank_0_is_shown_and_every_rank_is_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = script(
        """
        print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"])
        sys.exit(75)
        """
    )
    assert run_ranks(command, num_ranks=2, logs=tmp_path) == STOPPED
    assert run_ranks(command, num_ranks=2, logs=tmp_path) == STOPPED
    assert capfd.readouterr().out == "rank 0 of 2\n" * 2
    assert (tmp_path / "rank_0.log").read_text() == "rank 0 of 2\n" * 2
    assert (tmp_path / "rank_1.log").read_text() == "rank 1 of 2\n" * 2


def test_a_full_disk_does_not_silence_rank_0() -> None:
    """Nobody would read its pipe any more, and it would wait for ever in the middle of a print."""
    shown = io.StringIO()
    with open("/dev/full", "wb", buffering=0) as log:
        local._copy(io.BytesIO(b"one\ntwo\n"), log, Screen(shown))
    assert shown.getvalue() == "one\ntwo\n"


@pytest.mark.promise(5)
def test_one_failing_rank_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_AFTER_FAILURE_S", 0.3)
    command = script(
        f"""
        rank = os.environ["RANK"]
        open({str(tmp_path)!r} + "/pid" + rank, "w").write(str(os.getpid()))
        if rank == "1":
            sys.exit(3)
        time.sleep(600)
        """
    )
    begin = time.monotonic()
    assert run_ranks(command, num_ranks=3, logs=tmp_path) == FAULT
    assert time.monotonic() - begin < 100  # far less than the others sleep
    for rank in (0, 2):
        pid = (tmp_path / f"pid{rank}").read_text() if (tmp_path / f"pid{rank}").exists() else "0"
        assert not is_alive(int(pid))


@pytest.mark.promise(6)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("handles", [True, False])
def test_a_signal_reaches_all_ranks(tmp_path: Path, number: signal.Signals, handles: bool) -> None:
    install = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))" if handles else ""
    command = script(
        f"""
        {install}
        open({str(tmp_path)!r} + "/up" + os.environ["RANK"], "w").write("x")
        time.sleep(600)
        """
    )

    def interrupt() -> None:
        for rank in range(2):
            wait_for(tmp_path / f"up{rank}")
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt).start()
    assert run_ranks(command, num_ranks=2, logs=tmp_path) == STOPPED
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("other", ["time.sleep(600)", "sys.exit(75)", "sys.exit(0)"])
def test_a_signal_while_a_rank_starts_or_leaves_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Rank 0 has no handler and dies; rank 1 waits for it in vain, or ends in its own time."""
    monkeypatch.setattr(local, "GRACE_AFTER_FAILURE_S", 0.3)
    command = script(
        f"""
        told = []
        if os.environ["RANK"] == "1":
            signal.signal(signal.SIGTERM, lambda *_: told.append(1))
        open({str(tmp_path)!r} + "/up" + os.environ["RANK"], "w").write("x")
        while not told:
            time.sleep(0.01)
        {other}
        """
    )

    def interrupt() -> None:
        for rank in range(2):
            wait_for(tmp_path / f"up{rank}")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    assert run_ranks(command, num_ranks=2, logs=tmp_path) == STOPPED


@pytest.mark.promise(5)
def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    rank = script(
        f"""
        import threading
        from launch.worker import _end_with_input
        threading.Thread(target=_end_with_input, daemon=True).start()
        open({str(tmp_path)!r} + "/pid" + os.environ["RANK"], "w").write(str(os.getpid()))
        time.sleep(600)
        """
    )
    launcher = script(
        f"""
        from pathlib import Path
        from launch.local import run_ranks
        run_ranks({rank!r}, num_ranks=2, logs=Path({str(tmp_path)!r}))
        """
    )
    process = subprocess.Popen(launcher, cwd=ROOT)
    pids = [int(wait_for(tmp_path / f"pid{number}")) for number in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)


def test_a_wrong_config_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run: {name: x}\nnonsense: 1\n")
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        assert worker.main([str(path), "--stage", "stage1"]) == WRONG_INPUT
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "nonsense" in capsys.readouterr().err


def test_a_run_directory_may_hold_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks get the config as a file of the run directory, and take it for a file."""
    monkeypatch.chdir(tmp_path)
    config = load_config([ROOT / "configs/debug_cpu.yaml"], ["run.run_dir=lr=1e-4"])
    asked: list[list[str]] = []
    monkeypatch.setattr(local, "run_ranks", lambda command, **_: asked.append(list(command)) or 0)
    assert run_local(config, stages=["stage1"]) == 0
    assert worker.read_config(worker.parse(asked[0][3:]).config) == config


def test_a_second_launcher_does_not_change_what_the_ranks_of_the_first_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run lock will refuse it; until then it must not touch the config of the first."""
    asked: list[str] = []
    monkeypatch.setattr(local, "run_ranks", lambda command, **_: asked.append(command[3]) or 0)
    first, second = (
        load_config([ROOT / "configs/debug_cpu.yaml"], [f"run.run_dir={tmp_path}", word])
        for word in ("run.seed=1", "run.seed=2")
    )
    for config in (first, second, first):
        assert run_local(config, stages=["stage1"]) == 0
    assert [load_frozen(Path(name)) for name in asked] == [first, second, first]
    assert len(list((tmp_path / "stage1/logs").iterdir())) == 2


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Path:
    """A program instead of Python for the ranks; it writes its arguments to the file returned."""
    program, asked = tmp_path / "program", tmp_path / "asked"
    program.write_text(f"#!/bin/sh\necho $* >> {asked}\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return asked


def debug_config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(
        [ROOT / "configs/debug_cpu.yaml"], [f"run.run_dir={tmp_path / 'run'}", *overrides]
    )


def test_a_run_directory_that_cannot_be_made_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = [f"run.run_dir={tmp_path / 'file/run'}", f"data.shards={tmp_path}"]
    assert cli.main(["train", str(ROOT / "configs/debug_cpu.yaml"), *words]) == WRONG_INPUT
    said = capsys.readouterr().err
    assert "run.run_dir: " in said and "Not a directory" in said and "Traceback" not in said


def test_no_stage_begins_after_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It came too late for the last vote of stage 1, which ends as done all the same."""
    asked = stand_in(tmp_path, monkeypatch, f"trap '' TERM; kill -USR2 {os.getpid()}; sleep 0.3")
    assert run_local(debug_config(tmp_path), stages=["stage1", "stage2"]) == STOPPED
    assert [line.split()[4] for line in asked.read_text().splitlines()] == ["stage1"]
    said = capfd.readouterr().out
    assert "stage2 is not begun; the same command resumes (SIGUSR2)" in said


def test_the_time_limit_is_that_of_all_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = debug_config(tmp_path, "train.max_minutes=0.05")
    asked = stand_in(tmp_path, monkeypatch, "sleep 0.8")
    assert run_local(config, stages=["stage1"] * 9) == STOPPED
    spent = [float(line.rpartition("=")[2]) for line in asked.read_text().splitlines()]
    assert spent == sorted(spent) and spent[0] == 0 and len(spent) <= 4 and spent[-1] < 3.05
    assert all(later - earlier > 0.7 for earlier, later in pairwise(spent))
    said = capfd.readouterr().out
    assert "stage1 is not begun; the same command resumes (time limit of 0.05 minutes)" in said


def test_importing_the_worker_does_not_import_torch() -> None:
    code = "import launch.worker, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
