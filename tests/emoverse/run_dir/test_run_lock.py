"""One owner per run directory: who may take it over, and what the former owner can still do."""

import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emoverse.run_dir import run_lock, storage
from emoverse.run_dir.run_lock import FOLDER, OWNER_FILE, RunInUse, RunLock, RunLockLost, acquire


def rewrite_owner(run: Path, **changes: Any) -> None:
    """Change the owner file of the run."""
    (path,) = (run / FOLDER).glob(f"*/{OWNER_FILE}")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def elsewhere(run: Path, *, silent_s: float = 0, **changes: Any) -> RunLock:
    """A lock that looks as if a process of another machine had it."""
    lock = acquire(run)
    rewrite_owner(run, host="other", pid=1, born=1, **changes)
    then = time.time() - silent_s
    os.utime(lock.work, (then, then))
    return lock


def leftovers(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_a_run_directory_is_taken_and_given_back(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    lock = acquire(run)
    assert lock.is_held() and leftovers(run) == [FOLDER]
    with lock.writing() as work:
        storage.publish_text(run / "DONE", "x", work=work)
    lock.release()
    assert leftovers(run) == ["DONE"]
    acquire(run).release()
    lock.release()  # again: nothing to do


def test_an_owner_that_lives_is_waited_for_and_then_refused(tmp_path: Path) -> None:
    lock = acquire(tmp_path)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        rewrite_owner(tmp_path, pid=sleeper.pid, born=run_lock._born(sleeper.pid))
        logged: list[str] = []
        with pytest.raises(RunInUse, match=r"in use by process \d+ on .* \(it is running\); stop"):
            acquire(tmp_path, patience_s=0.3, log=logged.append)
        assert len(logged) == 1 and "waiting 0 s for it" in logged[0]
        assert leftovers(tmp_path) == [FOLDER]
        threading.Timer(0.3, sleeper.kill).start()
        successor = acquire(tmp_path, patience_s=20, log=logged.append)
        assert successor.is_held() and not lock.is_held()
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize(("silent_s", "free"), [(5, False), (run_lock.STALE_S + 5, True)])
def test_an_owner_elsewhere_is_checked_by_its_heartbeat(
    tmp_path: Path, silent_s: float, free: bool
) -> None:
    former = elsewhere(tmp_path, silent_s=silent_s)
    if free:
        assert acquire(tmp_path, patience_s=0).is_held() and not former.is_held()
    else:
        with pytest.raises(RunInUse, match=r"its last heartbeat was \d+ s ago"):
            acquire(tmp_path, patience_s=0)
        assert former.is_held()


@pytest.mark.promise(7)
def test_a_requeued_job_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    former = elsewhere(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(RunInUse, match="in use by job 77, process 1 on other"):
        acquire(tmp_path, patience_s=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert acquire(tmp_path, patience_s=0).is_held() and not former.is_held()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert run_lock.describe_owner(os.environ).job == "70_3"


@pytest.mark.promise(7)
def test_a_second_step_of_the_same_job_is_no_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launchers inside one allocation, on different nodes."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    former = elsewhere(tmp_path)
    with pytest.raises(RunInUse, match=r"its last heartbeat was \d+ s ago"):
        acquire(tmp_path, patience_s=0)
    assert former.is_held()


def test_a_restarted_job_waits_for_its_former_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    former = acquire(tmp_path)
    rewrite_owner(tmp_path, pid=os.getppid(), born=run_lock._born(os.getppid()))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    logged: list[str] = []
    assert acquire(tmp_path, patience_s=0.3, log=logged.append).is_held() and not former.is_held()
    assert len(logged) == 1 and "(it is running); waiting" in logged[0]


@pytest.mark.promise(7)
def test_a_machine_of_the_same_name_is_another_machine(tmp_path: Path) -> None:
    """Its table of processes has the same number too, and says nothing about ours."""
    former = acquire(tmp_path)
    table = os.readlink("/proc/self/ns/pid")
    rewrite_owner(tmp_path, processes=f"another boot {table}", pid=2**22 + 1, born=1)
    with pytest.raises(RunInUse, match=r"its last heartbeat was \d+ s ago"):
        acquire(tmp_path, patience_s=0)
    assert former.is_held()


@pytest.mark.promise(7)
def test_a_lock_is_only_taken_from_the_owner_that_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two see a dead owner; one takes over between the check and the act of the other."""
    elsewhere(tmp_path, silent_s=run_lock.STALE_S + 5)
    revoke, winner = run_lock._revoke, []

    def late(run: Path, name: str) -> None:
        monkeypatch.setattr(run_lock, "_revoke", revoke)
        winner.append(acquire(run))
        rewrite_owner(run, pid=os.getppid(), born=run_lock._born(os.getppid()))
        revoke(run, name)

    monkeypatch.setattr(run_lock, "_revoke", late)
    with pytest.raises(RunInUse, match="it is running"):
        acquire(tmp_path, patience_s=0)
    assert winner[0].is_held() and leftovers(tmp_path) == [FOLDER]


def test_take_over_asks_nobody(tmp_path: Path) -> None:
    former = elsewhere(tmp_path)
    assert acquire(tmp_path, take_over=True).is_held() and not former.is_held()
    assert leftovers(tmp_path) == [FOLDER]


@pytest.mark.promise(7)
def test_a_former_owner_publishes_nothing(tmp_path: Path) -> None:
    """Wherever it was cut off: before its block, or between the writing and the rename."""
    former = elsewhere(tmp_path)
    (tmp_path / "latest").write_text("good")
    with pytest.raises(RunLockLost, match="taken over by process"), former.writing() as work:
        storage.write_text(work / "latest", "bad")
        acquire(tmp_path, take_over=True)
        storage.rename(work / "latest", tmp_path / "latest")
    assert (tmp_path / "latest").read_text() == "good"
    with pytest.raises(RunLockLost), former.writing():
        pytest.fail("the block of a former owner has begun")
    former.release()
    assert leftovers(tmp_path) == ["latest", FOLDER]  # the successor's


def test_a_full_disk_does_not_lose_the_lock(tmp_path: Path) -> None:
    lock = acquire(tmp_path)
    with pytest.raises(OSError, match="No space"), lock.writing():
        raise OSError(28, "No space left on device")
    assert lock.is_held()


def test_the_renewal_writes_heartbeats_and_notices_a_takeover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "RENEW_S", 0.05)
    lock = acquire(tmp_path)
    os.utime(lock.work, (0, 0))
    wait_until(lambda: lock.work.stat().st_mtime > 0)
    acquire(tmp_path, take_over=True)
    wait_until(lambda: lock.error is not None)


def wait_until(condition: Any, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_failed_renewal_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renewal thread that died silently would leave an owner without heartbeats."""
    monkeypatch.setattr(run_lock, "RENEW_S", 0.02)
    lock = acquire(tmp_path)
    monkeypatch.setattr(lock, "is_held", lambda: 1 / 0)
    wait_until(lambda: isinstance(lock.error, ZeroDivisionError))


@pytest.mark.parametrize("text", ["", "{}", "[1]"])
def test_an_unreadable_owner_is_checked_by_its_heartbeat(tmp_path: Path, text: str) -> None:
    former = acquire(tmp_path)
    (former.work / OWNER_FILE).write_text(text)
    with pytest.raises(RunInUse, match=r"in use by an unknown process \(its last heartbeat"):
        acquire(tmp_path, patience_s=0)
    then = time.time() - run_lock.STALE_S - 5
    os.utime(former.work, (then, then))
    assert acquire(tmp_path, patience_s=0).is_held() and not former.is_held()


def test_a_process_that_was_halted_while_it_waited_goes_on(tmp_path: Path) -> None:
    """Its candidate folder may be gone: owners remove old ones."""
    elsewhere(tmp_path)

    def halt(text: str) -> None:
        for path in tmp_path.glob(".lease-*"):
            shutil.rmtree(path)
        rewrite_owner(
            tmp_path, host=platform.node(), processes=run_lock.describe_owner({}).processes
        )

    assert acquire(tmp_path, patience_s=20, log=halt).is_held()
    assert leftovers(tmp_path) == [FOLDER]


CHANGES = {"os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.utime", "open"}


def _die_at(number: int, run: Path, act: Callable[[], object]) -> bool:
    """Does a process that `act`s reach its n-th change below `run`? There it is killed."""
    child = os.fork()
    if child == 0:
        numbers = itertools.count(1)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in CHANGES and str(run) in str(arguments[0]) and next(numbers) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.promise(7)
@pytest.mark.parametrize("former", ["itself", "dead"])
def test_a_kill_between_any_two_operations_blocks_nobody(tmp_path: Path, former: str) -> None:
    """Of taking and giving back, and of taking over from the dead."""
    for number in itertools.count(1):
        run = tmp_path / str(number)
        if former == "dead":
            assert _die_at(10**6, run, lambda run=run: acquire(run)) is False
            assert (run / FOLDER).exists()
        killed = _die_at(
            number,
            run,
            lambda run=run: acquire(run).release() if former == "itself" else acquire(run),
        )
        lock = acquire(run, patience_s=0)
        assert lock.is_held() and not list(run.glob(".fenced-*"))
        assert len(run_lock._names(run / FOLDER)) == 1
        lock.release()
        assert all(name.startswith(".lease-") for name in leftovers(run))  # removed when old
        if not killed:
            break
    assert number > 8


def test_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    for name in (".lease-dead", ".fenced-dead", ".lease-waiting"):
        (tmp_path / name).mkdir()
        then = time.time() - (0 if name == ".lease-waiting" else run_lock.STALE_S + 5)
        os.utime(tmp_path / name, (then, then))
    acquire(tmp_path)
    assert leftovers(tmp_path) == [".lease-waiting", FOLDER]


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run\.run_dir: .*file/run must be a folder that can be"):
        acquire(tmp_path / "file" / "run")


def _contend(run: str, barrier: Any, answers: Any, take_over: bool) -> None:
    barrier.wait()
    try:
        lock = acquire(Path(run), take_over=take_over, patience_s=0)
    except RunInUse:
        barrier.wait()
        answers.put("refused")
    else:
        barrier.wait()
        answers.put("owner" if lock.is_held() else "lost")
    barrier.wait()  # an owner that has ended would be replaced


@pytest.mark.promise(7)
@pytest.mark.parametrize("take_over", [True, False])
def test_of_many_that_start_at_once_one_owns(tmp_path: Path, take_over: bool) -> None:
    """The others are refused, or were owners until the next one took over by force."""
    context = multiprocessing.get_context("fork")
    for _ in range(3):  # from the second time on the former owner is dead
        barrier, answers = context.Barrier(6, timeout=60), context.Queue()
        everyone = [
            context.Process(target=_contend, args=(str(tmp_path), barrier, answers, take_over))
            for _ in range(6)
        ]
        for process in everyone:
            process.start()
        found = sorted(answers.get(timeout=60) for _ in everyone)
        for process in everyone:
            process.join(60)
        assert found.count("owner") == 1
        assert set(found) <= {"owner", "lost" if take_over else "refused"}
        assert leftovers(tmp_path) == [FOLDER]
