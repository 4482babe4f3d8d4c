"""Who owns a run directory: one process at a time, also when a network is cut.

In: the run directory. Out: a `Lease`, whose work folder lies under a path that only its holder
knows:
    RUN/lease/holder.json   host, process, job, since when
    RUN/lease/TOKEN/        the holder's work folder
All that is published is made in the work folder and renamed from there. A successor moves RUN/lease
away in one rename; from then on no path of the former holder exists, so its next rename fails.
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
_POLL_S = 0.1
_GONE = (errno.ENOENT, errno.ESTALE)  # the second one is how a network file system says it


class RunInUse(ValueError):
    """The run directory is owned by a process that lives."""


class LostLease(RuntimeError):
    """A successor has taken the run directory over; this process must not write any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A process, such that another one can tell whether it still lives."""

    token: str
    host: str
    processes: str  # the table of processes that `pid` belongs to (containers have their own)
    pid: int
    born: int  # clock ticks since boot: a later process may get the same number
    job: str | None  # of the scheduler; a requeued job keeps it
    since: str

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.since}"


class Lease:
    """A held run directory; the holder is the process that made it."""

    def __init__(self, run_dir: Path, token: str) -> None:
        self.run_dir, self.token = run_dir, token
        self.loss: LostLease | None = None  # found out by the renewer, for the next vote
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
            successor = _read_holder(self.run_dir / FOLDER) or "another process"
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
        fenced = self.run_dir / f".{FOLDER}-{self.token}"
        holder = _read_holder(self.run_dir / FOLDER)
        if holder is not None and holder.token == self.token:
            with contextlib.suppress(OSError):  # then it goes stale by itself
                os.rename(self.run_dir / FOLDER, fenced)
                shutil.rmtree(fenced)

    def _renew(self) -> None:
        while not self._done.wait(RENEW_S):
            try:
                self.require()
            except LostLease as loss:
                self.loss = loss
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
    fresh, lease = run_dir / f".{FOLDER}-{me.token}", run_dir / FOLDER
    try:
        (fresh / me.token).mkdir(parents=True)
        (fresh / HOLDER).write_text(json.dumps(asdict(me), indent=1) + "\n")
    except OSError as error:
        raise ValueError(
            f"run.run_dir: {run_dir} must be a folder that can be written: {error}; make room, "
            "change its permissions, or choose another run.run_dir"
        ) from error
    patience_s = PATIENCE_S if patience_s is None else patience_s
    deadline = time.monotonic() + patience_s
    told = False
    try:
        while not _move(fresh, lease):
            os.utime(fresh)  # the file system's own clock: machines may disagree about the time
            other = _read_holder(lease)
            why = _in_use(other, me, fresh.stat().st_mtime, lease) if other else None
            late = time.monotonic() > deadline
            same_job = other is not None and me.job is not None and me.job == other.job
            if other is None or why is None or take_over or (late and same_job):
                _fence(lease, run_dir / f".fenced-{me.token}")
            elif late:
                raise RunInUse(
                    f"run.run_dir: {run_dir} is in use by {other} ({why}); stop that one, or "
                    "choose another run.run_dir, or give --take-over if it is cut off: it will "
                    "then write no more"
                )
            elif not told:
                say(f"{run_dir} is in use by {other} ({why}); waiting {patience_s:.0f} s for it")
                told = True
            time.sleep(_POLL_S if told else 0)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _clean(run_dir, lease)
    return Lease(run_dir, me.token)


def _clean(run_dir: Path, lease: Path) -> None:
    """Removes what processes left that died while they took over; the living touch theirs."""
    try:
        now = lease.stat().st_mtime
    except OSError:
        return  # a successor is moving it away this moment: the first vote will say so
    for path in (*run_dir.glob(f".{FOLDER}-*"), *run_dir.glob(".fenced-*")):
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path)


def describe_holder(environ: Mapping[str, str]) -> Holder:
    """This process, with a new token."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    task = environ.get("SLURM_ARRAY_TASK_ID")
    return Holder(
        token=secrets.token_hex(8),
        host=platform.node(),
        processes=os.readlink("/proc/self/ns/pid"),
        pid=os.getpid(),
        born=_born(os.getpid()) or 0,
        job=f"{array}_{task}" if array else environ.get("SLURM_JOB_ID") or None,
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _move(fresh: Path, lease: Path) -> bool:
    """False if there is a holder: a folder with content is never replaced."""
    try:
        os.rename(fresh, lease)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _fence(lease: Path, away: Path) -> None:
    """After the rename no path of the former holder exists; that it succeeds once decides races."""
    try:
        os.rename(lease, away)
    except FileNotFoundError:
        return  # it has just been released
    shutil.rmtree(away, ignore_errors=True)


def _in_use(other: Holder, me: Holder, now: float, lease: Path) -> str | None:
    """Why the holder counts as alive, None if it does not. `now`: by the file system's clock."""
    if (other.host, other.processes) == (me.host, me.processes):
        alive = _born(other.pid) == other.born and (other.pid, other.born) != (me.pid, me.born)
        return "it is running" if alive else None
    if me.job is not None and me.job == other.job:
        return None
    try:
        silence = now - (lease / other.token).stat().st_mtime
    except OSError:
        return None
    return f"its last sign of life was {max(0, silence):.0f} s ago" if silence < STALE_S else None


def _born(pid: int) -> int | None:
    """When a process of this machine started, in ticks since boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _read_holder(lease: Path) -> Holder | None:
    """None if nobody holds it, or the file is not what it should be."""
    try:
        return Holder(**json.loads((lease / HOLDER).read_text()))
    except (OSError, ValueError, TypeError):
        return None
