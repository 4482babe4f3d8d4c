"""Who owns a run directory: one process at a time, also when a network is cut.

In: the run directory. Out: a `RunLock` whose work folder has a name that only its owner knows:
    RUN/lease/TOKEN/               the owner's work folder
    RUN/lease/TOKEN/holder.json    host, process, job, start time
Everything that is published is written to the work folder and renamed from there. A takeover
renames the folder of exactly the owner that was checked, then removes it. From then on no path of
the former owner exists, so its next rename fails.

Names and keys on disk are fixed: processes of different versions must respect each other's locks.
"""

import contextlib
import errno
import json
import os
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "lease"
OWNER_FILE = "holder.json"
RENEW_S = 10.0  # between two heartbeats (the time stamp of the work folder)
STALE_S = 60.0  # without a heartbeat an owner on another machine counts as gone
PATIENCE_S = 15.0  # wait for an owner that is about to end
REMOVAL_S = 10.0  # time limit for removing the folder of a former owner
_POLL_S = 0.1
_GONE = (errno.ENOENT, errno.ESTALE)  # network file systems report the second one
_CANDIDATE, _REVOKED = ".lease-", ".fenced-"  # names before a lock is acquired, and after it ends


class RunInUse(ValueError):
    """The run directory is owned by a running process."""


class RunLockLost(RuntimeError):
    """Another process has taken over the run directory; this one must not write to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A process, described so that another one can tell whether it is still running."""

    token: str
    host: str
    processes: str  # boot id of the machine and PID namespace that `pid` belongs to
    pid: int
    born: int  # start time in clock ticks since boot: PIDs are reused
    job: str | None  # id from the scheduler; a requeued job keeps it
    life: int  # how often the scheduler has restarted the job
    since: str

    def follows(self, other: "Owner") -> bool:
        """True for a later restart of the same job: the scheduler has ended the other one."""
        return self.job is not None and self.job == other.job and self.life > other.life

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.since}"


class RunLock:
    """Ownership of a run directory by the process that created this object."""

    def __init__(self, run_dir: Path, token: str) -> None:
        self.run_dir, self.token = run_dir, token
        self.error: Exception | None = None  # why ownership was lost, set by the renewal thread
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    @property
    def work(self) -> Path:
        """Folder for files that are about to be published, on the same file system."""
        return self.run_dir / FOLDER / self.token

    def is_held(self) -> bool:
        """Whether this process is still the owner; also renews the heartbeat."""
        try:
            os.utime(self.work)
        except OSError as error:
            # A full or read-only disk does not end ownership.
            return error.errno not in _GONE
        return True

    def require(self) -> None:
        """Raise RunLockLost unless this process is still the owner."""
        if not self.is_held():
            successor = _current_owner(self.run_dir) or "another process"
            raise RunLockLost(
                f"{self.run_dir} was taken over by {successor}; this process writes nothing more "
                "there and ends"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """The work folder, for a block that publishes from it by renames.

        Raises:
            RunLockLost: ownership was lost before the block, or while it ran.
        """
        self.require()
        try:
            yield self.work
        except OSError:
            self.require()
            raise

    def release(self) -> None:
        """Release the run directory; does nothing after a takeover."""
        self._released.set()
        self._thread.join()
        _release(self.run_dir, self.token)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                self.require()
            except Exception as error:  # without renewals this process must not continue
                self.error = error
                return


def acquire(
    run_dir: Path,
    *,
    take_over: bool = False,
    patience_s: float | None = None,
    log: Callable[[str], None] = print,
) -> RunLock:
    """Make this process the owner of `run_dir`, which is created if missing.

    The lock is taken over if the owner's process has ended, if the owner is an earlier run of the
    same scheduler job, if it is on another machine and had no heartbeat for a minute, or
    immediately if `take_over` is set. A running owner has `patience_s` (default 15 s) to end.

    Raises:
        RunInUse: names the owner and what to do.
        ValueError: the directory cannot be written.
    """
    me = describe_owner(os.environ)
    candidate, lock = run_dir / f"{_CANDIDATE}{me.token}", run_dir / FOLDER
    patience_s = PATIENCE_S if patience_s is None else patience_s
    deadline = time.monotonic() + patience_s
    logged = False
    try:
        while True:
            _prepare(candidate, me)
            if _move(candidate, lock, me.token):
                break
            late = time.monotonic() > deadline
            wait = True
            for name in _names(lock):
                other, alive = _check_owner(lock / name, me, candidate.stat().st_mtime)
                if alive is None or take_over or (late and other is not None and me.follows(other)):
                    _revoke(run_dir, name)
                    wait = False
                    continue
                in_use = f"{run_dir} is in use by {other or 'an unknown process'} ({alive})"
                if late:
                    raise RunInUse(
                        f"run.run_dir: {in_use}; stop it, choose another run.run_dir, or give "
                        "--take-over if it is cut off: it can then write nothing more"
                    )
                if not logged:
                    log(f"{in_use}; waiting {patience_s:.0f} s for it to end")
                    logged = True
            time.sleep(_POLL_S if wait else 0)
        _clean(run_dir, lock / me.token)
    except OSError as error:
        _release(run_dir, me.token)
        raise ValueError(
            f"run.run_dir: {run_dir} must be a folder that can be written: {error}; make room, "
            "change its permissions, or choose another run.run_dir"
        ) from error
    finally:
        shutil.rmtree(candidate, ignore_errors=True)
    return RunLock(run_dir, me.token)


def _prepare(candidate: Path, me: Owner) -> None:
    """Create the folder that becomes the lock, or renew its time stamp.

    It may be missing again: owners remove candidates without a heartbeat, and this process may
    have been suspended.
    """
    owner_file = candidate / me.token / OWNER_FILE
    if not owner_file.exists():
        owner_file.parent.mkdir(parents=True, exist_ok=True)
        owner_file.write_text(json.dumps(asdict(me), indent=1) + "\n")
    for folder in (candidate, owner_file.parent):
        os.utime(folder)  # by the file system's own clock: clocks of machines differ


def _clean(run_dir: Path, work: Path) -> None:
    """Remove what processes left that died while they acquired the lock."""
    for path in run_dir.glob(f"{_REVOKED}*"):
        _remove(path)
    try:
        os.utime(work)
        now = work.stat().st_mtime
    except OSError as error:
        if error.errno in _GONE:
            return  # taken over just now; the first step consensus reports it
        raise
    for path in run_dir.glob(f"{_CANDIDATE}*"):
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path)


def describe_owner(environ: Mapping[str, str]) -> Owner:
    """This process, with a new token."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    task = environ.get("SLURM_ARRAY_TASK_ID")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Owner(
        token=secrets.token_hex(8),
        host=platform.node(),
        # PID namespaces have the same id on all machines, and machines may share a host name.
        processes=f"{boot} {os.readlink('/proc/self/ns/pid')}",
        pid=os.getpid(),
        born=_born(os.getpid()) or 0,
        job=f"{array}_{task}" if array else environ.get("SLURM_JOB_ID") or None,
        life=int(environ.get("SLURM_RESTART_COUNT") or 0),
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _move(candidate: Path, lock: Path, token: str) -> bool:
    """Try to become the owner; False if there is one: rename never replaces a non-empty folder."""
    try:
        os.rename(candidate, lock)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        # A network file system may rename, lose the reply, and miss the source on its retry.
        if error.errno in _GONE:
            return (lock / token).is_dir()
        raise
    return True


def _names(lock: Path) -> list[str]:
    """Names of work folders in the lock: one, or none if it was just released."""
    try:
        return sorted(os.listdir(lock))
    except FileNotFoundError:
        return []


def _revoke(run_dir: Path, name: str) -> None:
    """End the ownership of the owner with this token, and of no other, whatever happened meanwhile.

    After the rename no path of the former owner exists. On a network file system it may reach the
    folder through an open handle for some seconds more; once the folder is removed, that fails too.
    """
    away = run_dir / f"{_REVOKED}{name}"
    try:
        os.rename(run_dir / FOLDER / name, away)
    except OSError as error:
        if error.errno not in _GONE:  # else released, or revoked by another process
            raise
    _remove(away)


def _release(run_dir: Path, token: str) -> None:
    """End one's own lock, if it is still held; what cannot be removed now becomes stale."""
    with contextlib.suppress(OSError):
        _revoke(run_dir, token)
        (run_dir / FOLDER).rmdir()  # fails if there is a new owner


def _remove(path: Path) -> None:
    """Remove the folder of a former owner, also while other processes write to it or remove it.

    Raises:
        OSError: it still exists after `REMOVAL_S`.
    """
    deadline = time.monotonic() + REMOVAL_S
    while True:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            if not os.path.lexists(path):
                return
            if time.monotonic() > deadline:
                raise
            time.sleep(0 if error.errno in (*_GONE, errno.ENOTEMPTY) else _POLL_S)
        else:
            return


def _check_owner(folder: Path, me: Owner, now: float) -> tuple[Owner | None, str | None]:
    """The owner, None if unreadable; and why it counts as alive, None if it does not.

    `now`: by the file system's clock.
    """
    other = _read_owner(folder)
    if other is not None:
        if (other.host, other.processes) == (me.host, me.processes):
            is_me = (other.pid, other.born) == (me.pid, me.born)
            alive = _born(other.pid) == other.born and not is_me
            return other, "it is running" if alive else None
        if me.follows(other):
            return other, None
    try:
        age_s = now - folder.stat().st_mtime
    except OSError as error:
        return other, None if error.errno in _GONE else f"its folder cannot be read: {error}"
    heartbeat = f"its last heartbeat was {max(0, age_s):.0f} s ago"
    return other, heartbeat if age_s < STALE_S else None


def _born(pid: int) -> int | None:
    """Start time of a process of this machine in ticks since boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _current_owner(run_dir: Path) -> Owner | None:
    """The owner of the run directory now; None if there is none or it cannot be read."""
    with contextlib.suppress(OSError):
        for name in _names(run_dir / FOLDER):
            return _read_owner(run_dir / FOLDER / name)
    return None


def _read_owner(folder: Path) -> Owner | None:
    """None if the file is missing or damaged."""
    try:
        return Owner(**json.loads((folder / OWNER_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
