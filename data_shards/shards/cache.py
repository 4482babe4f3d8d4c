"""A bounded folder on this machine's disk for the files of a remote shard folder.

All ranks and data workers of a node share it: each file is fetched once, by whoever needs it first
or by a prefetch thread, while the others wait at a lock. What was unused for longest goes when room
is needed. A file appears under its name only when it is whole. Nothing but files that were fetched
is ever removed. Flow: fetch (bytes) -> here -> index (side files), reader (tars).
"""

import contextlib
import fcntl
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from data_shards.shards.fetch import download

_PREFETCHERS: Final = 4  # threads; they wait for the network
_QUEUED: Final = 256  # files; more are forgotten, reading fetches them when it comes to them
_ROOM_LOOK_S: Final = 0.05


class CacheTooSmall(ValueError):
    """The cache cannot hold what is needed at the same time."""


class ShardCache:
    """Files of one remote folder.

    Args:
        url: address of the shard folder.
        folder: where to keep them; shared by the processes of this machine, one per dataset.
        max_bytes: most bytes of files in the folder, transfers under way included.
    """

    def __init__(self, url: str, folder: Path, max_bytes: int) -> None:
        self.url = url.rstrip("/")
        self.folder = folder
        self.max_bytes = max_bytes
        self.fetches = 0  # of this process, for telemetry and tests
        self._waiting: queue.Queue[tuple[str, int | None]] | None = None
        self._pid = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".locks").mkdir(exist_ok=True)

    def path(self, name: str, size: int | None) -> Path:
        """The file of that name, fetched if it is not there; it may be removed again at any time.

        Args:
            size: what it must be; None for a file whose size nothing tells.

        Raises:
            CacheTooSmall: it is larger than the cache.
            FileNotFoundError, ValueError, OSError: see `fetch.download`.
        """
        path = self.folder / name
        if self._touch(path, size):
            return path
        if size is not None and size > self.max_bytes:
            raise CacheTooSmall(
                f"data.cache_gib: {self.url}/{name} has {size} bytes, the cache may have "
                f"{self.max_bytes} in all; raise it to hold two blocks of shards"
            )
        with self._locked(name):
            if self._touch(path, size):  # another process was faster
                return path
            part = self.folder / f".part-{size or 0}-{name}"
            try:
                # The mark is made under the lock that guards the room, so that it counts at once.
                self._make_room(part, size or 0)
                download(f"{self.url}/{name}", part, size)
                with self._locked(".room"):  # whoever counts files sees it under one of its names
                    part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            self.fetches += 1
        return path

    def open(self, name: str, size: int | None) -> BinaryIO:
        """The file of that name, like `path`; what is open can be read though it is removed.

        Do not keep it open: it would keep its place on the disk when the cache removes it.
        """
        while True:
            path = self.path(name, size)
            with contextlib.suppress(FileNotFoundError):  # removed between the two calls
                return path.open("rb")

    def read(self, name: str, size: int | None) -> bytes:
        """The content of a small file."""
        with self.open(name, size) as file:
            return file.read()

    def drop(self, name: str) -> None:
        """Forget a file whose content turned out to be wrong: the next `path` fetches it again."""
        (self.folder / name).unlink(missing_ok=True)

    def prefetch(self, files: Iterable[tuple[str, int | None]]) -> None:
        """Fetch (name, size) in this order, in the background; errors wait for `path`."""
        if self._pid != os.getpid():  # threads do not survive a fork
            self._pid = os.getpid()
            self._waiting = queue.Queue(_QUEUED)
            for _ in range(_PREFETCHERS):
                threading.Thread(target=self._fetch_waiting, daemon=True).start()
        assert self._waiting is not None
        for name, size in files:
            if not self._touch(self.folder / name, size):
                with contextlib.suppress(queue.Full):
                    self._waiting.put_nowait((name, size))

    def _fetch_waiting(self) -> None:
        assert self._waiting is not None
        while True:
            name, size = self._waiting.get()
            with contextlib.suppress(OSError, ValueError):  # whoever reads it gets the error
                self.path(name, size)

    @staticmethod
    def _touch(path: Path, size: int | None) -> bool:
        """Is the whole file there? Then it counts as just used."""
        try:
            if size is not None and path.stat().st_size != size:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process, and one thread of it, at a time."""
        with (self.folder / ".locks" / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, part: Path, size: int) -> None:
        """Make place for `size` bytes, and hold it by an empty `part` whose name says the size."""
        while True:
            with self._locked(".room"):
                kept, held = self._survey(part)
                used = held + sum(there for _, there, _ in kept)
                for _, there, path in sorted(kept):
                    if used + size <= self.max_bytes:
                        break
                    path.unlink(missing_ok=True)
                    used -= there
                if used + size <= self.max_bytes:
                    part.touch()
                    return
            time.sleep(_ROOM_LOOK_S)  # transfers of others hold the rest; they end or fail

    def _survey(self, own: Path) -> tuple[list[tuple[int, int, Path]], int]:
        """(last use, bytes, path) of the whole files, and the bytes that transfers will have."""
        kept, held = [], 0
        for path in self.folder.iterdir():
            if path == own or not path.is_file():
                continue
            if path.name.startswith(".part-"):
                _, size, name = path.name.split("-", 2)
                if self._is_left_behind(name):
                    path.unlink(missing_ok=True)
                else:
                    held += int(size)
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                kept.append((status.st_mtime_ns, status.st_size, path))
        return kept, held

    def _is_left_behind(self, name: str) -> bool:
        """Nobody holds the lock of a transfer any more: its process was killed."""
        with (self.folder / ".locks" / name).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": None, "_pid": 0}
