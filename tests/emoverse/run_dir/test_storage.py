"""A save in which every file operation fails in turn: nothing that was good is lost."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from emoverse.run_dir import storage
from emoverse.run_dir.checkpoint import (
    DamagedCheckpoint,
    find_checkpoint,
    read_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from emoverse.run_dir.run_lock import RunLock, RunLockLost, acquire

Operation = Callable[..., None]


def save(run: Path, step: int, *, keep: int = 2, work: Path | None = None) -> None:
    if work is None:
        work = run / "work"
        work.mkdir(parents=True, exist_ok=True)
    tensors = {"a": torch.full((50, 3), float(step)), "b": torch.arange(7.0)}
    state = {"step": step}
    moments = {key: {k: v.clone() for k, v in tensors.items()} for key in ("exp_avg", "exp_avg_sq")}
    save_checkpoint(
        run / "checkpoints", params=tensors, **moments, state=state, keep=keep, work=work
    )


class Faults:
    """Stands before every file operation of a save and lets the n-th one fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[..., None]) -> None:
        self.count, self.fail_at, self._act = 0, -1, act
        for name in storage.OPERATIONS:
            monkeypatch.setattr(storage, name, self._guarded(getattr(storage, name)))

    def _guarded(self, operation: Operation) -> Operation:
        def guarded(*arguments: Any) -> None:
            self.count += 1
            if self.count == self.fail_at:
                self._act(operation, *arguments)
            operation(*arguments)

        return guarded


def before(operation: Operation, *arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def denied(operation: Operation, *arguments: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def read_only(operation: Operation, *arguments: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def afterwards(operation: Operation, *arguments: Any) -> None:
    """The operation happens, and an error is reported all the same."""
    operation(*arguments)
    raise OSError(errno.EIO, "Input/output error")


def torn(operation: Operation, *arguments: Any) -> None:
    """A file gets half of its content."""
    operation(*arguments)
    path = arguments[0]
    if path.is_file():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def killed(operation: Operation, *arguments: Any) -> None:
    os._exit(137)


def loadable(run: Path) -> int:
    """Checks `latest` and every published checkpoint; the step that a resume would start from."""
    root = run / "checkpoints"
    named = root / (root / "latest").read_text().strip()
    verify_checkpoint(named)
    folders = sorted(root.glob("step_*"))
    for folder in folders:
        verify_checkpoint(folder)
    newest = find_checkpoint(root, lambda text: pytest.fail(text))
    assert newest == folders[-1] and newest is not None
    step = read_checkpoint(newest).step
    assert float(read_checkpoint(newest).params["a"][0, 0]) == step
    return step


def operations_of_a_save(monkeypatch: pytest.MonkeyPatch, run: Path, keep: int) -> int:
    with monkeypatch.context() as patch:
        save(run, 1, keep=keep)
        save(run, 2, keep=keep)
        faults = Faults(patch, before)
        save(run, 3, keep=keep)
    return faults.count


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of saves: what is forced to the disk, and when, is another test's."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / f"run{number}" for number in range(1000))


@pytest.mark.promise(3)
@pytest.mark.parametrize("act", [before, denied, read_only, afterwards, torn])
@pytest.mark.parametrize("keep", [1, 2])
def test_each_file_operation_of_a_save_may_fail(
    runs: Iterator[Path], monkeypatch: pytest.MonkeyPatch, act: Callable[..., None], keep: int
) -> None:
    total = operations_of_a_save(monkeypatch, next(runs), keep)
    assert total > 15
    seen = set()
    for number in range(1, total + 1):
        run = next(runs)
        save(run, 1, keep=keep)
        save(run, 2, keep=keep)
        with monkeypatch.context() as patch:
            Faults(patch, act).fail_at = number
            with pytest.raises(OSError, match=r"No space|denied|Read-only|Input/output"):
                save(run, 3, keep=keep)
        seen.add(loadable(run))
        save(run, 4, keep=keep)  # the next one works, and cleans up
        assert loadable(run) == 4
        assert not list((run / "work").iterdir())
        assert len(list((run / "checkpoints").glob("step_*"))) == keep
    assert seen == {2, 3}


@pytest.mark.promise(3)
def test_a_kill_at_each_file_operation(
    runs: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = operations_of_a_save(monkeypatch, next(runs), 2)
    for number in range(1, total + 1):
        run = next(runs)
        save(run, 1)
        save(run, 2)
        child = os.fork()
        if child == 0:
            Faults(pytest.MonkeyPatch(), killed).fail_at = number
            save(run, 3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137
        assert loadable(run) in (2, 3)
        save(run, 4)
        assert loadable(run) == 4


@pytest.mark.promise(7)
def test_an_owner_cut_off_at_any_file_operation_of_a_save(
    runs: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a successor finds when it has the run directory stays as it is."""

    def publish(lock: RunLock, step: int) -> None:
        with lock.writing() as work:
            save(lock.run_dir, step, work=work)

    def found(run: Path) -> list[str]:
        root = run / "checkpoints"
        return [*sorted(path.name for path in root.iterdir()), (root / "latest").read_text()]

    total = operations_of_a_save(monkeypatch, next(runs), 2)
    for number in range(1, total + 1):
        run = next(runs)
        former = acquire(run)
        publish(former, 1)
        publish(former, 2)
        seen: list[Any] = []

        def cut_off(*_: Any, run: Path = run, seen: list[Any] = seen) -> None:
            seen.extend([acquire(run, take_over=True), found(run)])

        with monkeypatch.context() as patch:
            Faults(patch, cut_off).fail_at = number
            with contextlib.suppress(RunLockLost):  # none if all was published before
                publish(former, 3)
            assert found(run) == seen[1]
            with pytest.raises(RunLockLost):
                publish(former, 4)
            assert found(run) == seen[1]
        before = loadable(run)
        assert before == (3 if "step_000003" in seen[1] else 2)
        publish(seen[0], 5)
        assert loadable(run) == 5
        for lock in (former, seen[0]):
            lock.release()


WITHOUT_ROOM = """
import json, resource, signal, sys
from pathlib import Path
import torch
from emoverse.run_dir import storage
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
found = []
for write, content in (
    (storage.write_tensors, {"a": torch.zeros(100_000)}),
    (storage.write_text, "x" * 100_000),
):
    try:
        write(Path(sys.argv[1]) / "file", content)
        found.append("written")
    except OSError as error:
        found.append(str(error))
print(json.dumps(found))
"""


@pytest.mark.promise(3)
def test_no_room_is_an_os_error(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    """Also where a library writes, which has an error of its own; no file beyond 1000 bytes."""
    done = run_python("-B", "-c", WITHOUT_ROOM, str(tmp_path))
    assert done.returncode == 0, done.stderr
    tensors, text = json.loads(done.stdout)
    assert "File too large" in tensors and str(tmp_path) in tensors
    assert "File too large" in text


FILES = ("trained.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.promise(3)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_every_damage_is_found_and_named(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step_000001"
    path = folder / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-2] if damage == "cut" else b"")
    with pytest.raises(DamagedCheckpoint, match=str(folder)) as found:
        verify_checkpoint(folder)
    if not (file == "manifest.json" and damage == "flip"):  # that one may accuse another file
        assert file in str(found.value)


@pytest.mark.promise(4)
def test_no_pickle_is_ever_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload in the place of any file is refused, and unpickling anything at all would fail."""
    import pickle

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    payload = pickle.dumps(Payload())
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step_000001"

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert read_checkpoint(folder).step == 1
    for file in FILES:
        good = (folder / file).read_bytes()
        (folder / file).write_bytes(payload)
        with pytest.raises(DamagedCheckpoint):
            verify_checkpoint(folder)
        (folder / file).write_bytes(good)
    assert not (tmp_path / "executed").exists()
