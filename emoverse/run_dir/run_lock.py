"""Who owns a run directory: one process at a time, also when a network is cut.

In: the run directory. Out: a `Lease`, whose work folder lies under a path that only its holder
knows:
    RUN/lease/TOKEN/               the holder's work folder
    RUN/lease/TOKEN/holder.json    host, process, job, since when
All that is published is made in the work folder and renamed from there. A successor renames the
very folder of the holder that it judged, so it can never take the lease from anybody else, and
removes it; from then on no path of the former holder exists, so its next rename fails.
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
HOLDER = "holder.json"
RENEW_S = 10.0  # between two signs of life
STALE_S = 60.0  # silence after which a holder on another machine counts as gone
PATIENCE_S = 15.0  # for a holder that is just ending
REMOVAL_S = 10.0  # for the folder of a former holder to be gone
_POLL_S = 0.1
_GONE = (errno.ENOENT, errno.ESTALE)  # the second one is how a network file system says it
_FRESH, _FENCED = ".lease-", ".fenced-"  # before it is a lease, and after


class RunInUse(ValueError):
    """The run directory is owned by a process that lives."""


class LostLease(RuntimeError):
    """A successor has taken the run directory over; this process must not write any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A process, such that another one can tell whether it still lives."""

    token: str
    host: str
    processes: str  # boot of the machine and table of processes that `pid` belongs to
    pid: int
    born: int  # clock ticks since boot: a later process may get the same number
    job: str | None  # of the scheduler; a requeued job keeps it
    life: int  # how often the scheduler has restarted the job
    since: str

    def follows(self, other: "Holder") -> bool:
        """Is this a later life of the same job? Then the scheduler has given the other one up."""
        return self.job is not None and self.job == other.job and self.life > other.life

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.since}"


class Lease:
    """A held run directory; the holder is the process that made it."""

    def __init__(self, run_dir: Path, token: str) -> None:
        self.run_dir, self.token = run_dir, token
        self.loss: Exception | None = None  # found out by the renewer, for the next vote
        self._done = threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True)
        self._renewer.start()

    @property
    def work(self) -> Path:
        """Folder for what is about to be published, on the same file system."""
        return self.run_dir / FOLDER / self.token

    def held(self) -> bool:
        """Is this process still the owner? Also gives a sign of life."""
        try:
            os.utime(self.work)
        except OSError as error:
            # A full or read-only disk takes nothing away from us.
            return error.errno not in _GONE
        return True

    def require(self) -> None:
        """Raise LostLease unless this process is still the owner."""
        if not self.held():
            successor = _holder_of(self.run_dir) or "another process"
            raise LostLease(
                f"{self.run_dir} was taken over by {successor}; this process writes nothing more "
                "there and ends"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """The work folder, for a block that renames out of it.

        Raises:
            LostLease: before the block, or because the block failed for this reason.
        """
        self.require()
        try:
            yield self.work
        except OSError:
            self.require()
            raise

    def release(self) -> None:
        """Gives the run directory back; does nothing if a successor has it."""
        self._done.set()
        self._renewer.join()
        _give_back(self.run_dir, self.token)

    def _renew(self) -> None:
        while not self._done.wait(RENEW_S):
            try:
                self.require()
            except Exception as error:  # who cannot look after the lease must not go on either
                self.loss = error
                return


def acquire(
    run_dir: Path,
    *,
    take_over: bool = False,
    patience_s: float | None = None,
    say: Callable[[str], None] = print,
) -> Lease:
    """Makes this process the owner of `run_dir`, which is created if need be.

    A holder makes room if its process has ended, if it is an earlier life of the same job, if it
    has been silent for a minute on another machine, or at once if `take_over` is set. One that
    lives gets `patience_s` (by default 15 s) to end.

    Raises:
        RunInUse: names the holder and what to do.
        ValueError: the directory cannot be written.
    """
    me = describe_holder(os.environ)
    fresh, lease = run_dir / f"{_FRESH}{me.token}", run_dir / FOLDER
    patience_s = PATIENCE_S if patience_s is None else patience_s
    deadline = time.monotonic() + patience_s
    told = False
    try:
        while True:
            _prepare(fresh, me)
            if _move(fresh, lease, me.token):
                break
            late = time.monotonic() > deadline
            waits = True
            for name in _names(lease):
                other, why = _judge(lease / name, me, fresh.stat().st_mtime)
                if why is None or take_over or (late and other is not None and me.follows(other)):
                    _fence(run_dir, name)
                    waits = False
                    continue
                about = f"{run_dir} is in use by {other or 'an unknown process'} ({why})"
                if late:
                    raise RunInUse(
                        f"run.run_dir: {about}; stop that one, or choose another run.run_dir, or "
                        "give --take-over if it is cut off: it will then write no more"
                    )
                if not told:
                    say(f"{about}; waiting {patience_s:.0f} s for it")
                    told = True
            time.sleep(_POLL_S if waits else 0)
        _clean(run_dir, lease / me.token)
    except OSError as error:
        _give_back(run_dir, me.token)
        raise ValueError(
            f"run.run_dir: {run_dir} must be a folder that can be written: {error}; make room, "
            "change its permissions, or choose another run.run_dir"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Lease(run_dir, me.token)


def _prepare(fresh: Path, me: Holder) -> None:
    """The folder that becomes the lease, with a sign of life.

    Made again if it is gone: another process removes what has shown no sign of life for long, and
    this one may have been halted.
    """
    holder = fresh / me.token / HOLDER
    if not holder.exists():
        holder.parent.mkdir(parents=True, exist_ok=True)
        holder.write_text(json.dumps(asdict(me), indent=1) + "\n")
    for folder in (fresh, holder.parent):
        os.utime(folder)  # by the file system's own clock: machines may disagree about the time


def _clean(run_dir: Path, work: Path) -> None:
    """Removes what processes left that died while they took over; the living touch theirs."""
    for path in run_dir.glob(f"{_FENCED}*"):
        _remove(path)
    try:
        os.utime(work)
        now = work.stat().st_mtime
    except OSError as error:
        if error.errno in _GONE:
            return  # a successor has taken it away this moment: the first vote will say so
        raise
    for path in run_dir.glob(f"{_FRESH}*"):
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path)


def describe_holder(environ: Mapping[str, str]) -> Holder:
    """This process, with a new token."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    task = environ.get("SLURM_ARRAY_TASK_ID")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Holder(
        token=secrets.token_hex(8),
        host=platform.node(),
        # The number of the table is the same on all machines, and so may be their name.
        processes=f"{boot} {os.readlink('/proc/self/ns/pid')}",
        pid=os.getpid(),
        born=_born(os.getpid()) or 0,
        job=f"{array}_{task}" if array else environ.get("SLURM_JOB_ID") or None,
        life=int(environ.get("SLURM_RESTART_COUNT") or 0),
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _move(fresh: Path, lease: Path, token: str) -> bool:
    """False if there is a holder: a folder with content is never replaced."""
    try:
        os.rename(fresh, lease)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        # A network file system may do it, lose the answer, and find nothing when it tries again.
        if error.errno in _GONE:
            return (lease / token).is_dir()
        raise
    return True


def _names(lease: Path) -> list[str]:
    """What stands where a holder's folder should stand: one name, or none any more."""
    try:
        return sorted(os.listdir(lease))
    except FileNotFoundError:
        return []


def _fence(run_dir: Path, name: str) -> None:
    """Ends the lease of the holder of this name, and of nobody else, whatever happened meanwhile.

    After the rename no path of the former holder exists. On a network file system it may still
    reach the folder by a handle for some seconds; once the folder is removed that fails as well.
    """
    away = run_dir / f"{_FENCED}{name}"
    try:
        os.rename(run_dir / FOLDER / name, away)
    except OSError as error:
        if error.errno not in _GONE:  # else it has just been released, or fenced by another one
            raise
    _remove(away)


def _give_back(run_dir: Path, token: str) -> None:
    """Ends one's own lease, if it is one; what cannot be removed now goes stale by itself."""
    with contextlib.suppress(OSError):
        _fence(run_dir, token)
        (run_dir / FOLDER).rmdir()  # fails if a successor has come


def _remove(path: Path) -> None:
    """Removes what a former holder had, also while it, or another successor, is at it.

    Raises:
        OSError: it is still there after some seconds.
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


def _judge(folder: Path, me: Holder, now: float) -> tuple[Holder | None, str | None]:
    """Who holds the lease, None if that cannot be read; and why it counts as alive, None if not.

    `now`: by the file system's clock.
    """
    other = _read_holder(folder)
    if other is not None:
        if (other.host, other.processes) == (me.host, me.processes):
            born, mine = _born(other.pid), (me.pid, me.born)
            alive = born == other.born and (other.pid, other.born) != mine
            return other, "it is running" if alive else None
        if me.follows(other):
            return other, None
    try:
        silence = now - folder.stat().st_mtime
    except OSError as error:
        return other, None if error.errno in _GONE else f"its folder cannot be read: {error}"
    sign = f"its last sign of life was {max(0, silence):.0f} s ago"
    return other, sign if silence < STALE_S else None


def _born(pid: int) -> int | None:
    """When a process of this machine started, in ticks since boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _holder_of(run_dir: Path) -> Holder | None:
    """Who holds the run directory now, if anybody does and can be read."""
    with contextlib.suppress(OSError):
        for name in _names(run_dir / FOLDER):
            return _read_holder(run_dir / FOLDER / name)
    return None


def _read_holder(folder: Path) -> Holder | None:
    """None if it is not there, or not what it should be."""
    try:
        return Holder(**json.loads((folder / HOLDER).read_text()))
    except (OSError, ValueError, TypeError):
        return None
