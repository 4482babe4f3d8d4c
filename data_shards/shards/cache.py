"""A bounded cache on the local disk for the files of a remote shard folder.

All ranks and data workers of a node share it. Each file is fetched once, by the first process that
reads it or by a prefetch thread, while the others wait for a lock. When the cache is full, the
least recently used files are removed; no other files are. A file appears under its name only when
it is complete. Flow: fetch (bytes) -> here -> index (side files), reader (tars).
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

_PREFETCH_THREADS: Final = 4  # they wait for the network
_MAX_QUEUED: Final = 256  # files; any more are dropped and fetched when they are read
_POLL_S: Final = 0.05


class CacheTooSmall(ValueError):
    """The cache cannot hold the files that are read at the same time."""


class ShardCache:
    """Files of one remote folder.

    Args:
        url: address of the shard folder.
        folder: the cache, shared by the processes of this machine; one per dataset.
        max_bytes: most bytes of files in the folder, including those of running transfers.
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
        """A file by name, fetched if it is not cached; it may be removed again at any time.

        Args:
            size: its exact size in bytes; None if it is not known.

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
                f"{self.max_bytes} in total; raise it to hold two blocks of shards"
            )
        with self._locked(name):
            if self._touch(path, size):  # another process was faster
                return path
            partial = self.folder / f".part-{size or 0}-{name}"
            try:
                # Reserved under the lock of the room, so that other processes count it at once.
                self._make_room(partial, size or 0)
                download(f"{self.url}/{name}", partial, size)
                with self._locked(".room"):  # so that the file is counted under exactly one name
                    partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            self.fetches += 1
        return path

    def open(self, name: str, size: int | None) -> BinaryIO:
        """The file, opened; like `path`, but it can still be read after it was removed.

        Close it soon: an open file occupies the disk after the cache has removed it.
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
        """Remove a file whose content is wrong; the next `path` fetches it again."""
        (self.folder / name).unlink(missing_ok=True)

    def prefetch(self, files: Iterable[tuple[str, int | None]]) -> None:
        """Fetch files (name, size) in this order, in the background; `path` reports errors."""
        if self._pid != os.getpid():  # threads do not survive a fork
            self._pid = os.getpid()
            self._waiting = queue.Queue(_MAX_QUEUED)
            for _ in range(_PREFETCH_THREADS):
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
            with contextlib.suppress(OSError, ValueError):  # the caller of `path` gets the error
                self.path(name, size)

    @staticmethod
    def _touch(path: Path, size: int | None) -> bool:
        """Whether the complete file is cached; if so, it becomes the most recently used."""
        try:
            if size is not None and path.stat().st_size != size:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock of the cache, exclusively among processes and threads."""
        with (self.folder / ".locks" / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, partial: Path, size: int) -> None:
        """Free `size` bytes, and reserve them by an empty `partial` with the size in its name."""
        while True:
            with self._locked(".room"):
                cached, reserved = self._survey(partial)
                used = reserved + sum(file_size for _, file_size, _ in cached)
                for _, file_size, path in sorted(cached):
                    if used + size <= self.max_bytes:
                        break
                    path.unlink(missing_ok=True)
                    used -= file_size
                if used + size <= self.max_bytes:
                    partial.touch()
                    return
            time.sleep(_POLL_S)  # the rest is reserved by other transfers, which end or fail

    def _survey(self, own: Path) -> tuple[list[tuple[int, int, Path]], int]:
        """(last use, bytes, path) of the complete files, and the bytes reserved by transfers."""
        cached, reserved = [], 0
        for path in self.folder.iterdir():
            if path == own or not path.is_file():
                continue
            if path.name.startswith(".part-"):
                _, size, name = path.name.split("-", 2)
                if self._is_left_behind(name):
                    path.unlink(missing_ok=True)
                else:
                    reserved += int(size)
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                cached.append((status.st_mtime_ns, status.st_size, path))
        return cached, reserved

    def _is_left_behind(self, name: str) -> bool:
        """Whether the process of a transfer was killed: its lock is free."""
        with (self.folder / ".locks" / name).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": None, "_pid": 0}
