"""`BuildJournal`: the work folder of an unfinished build, from which a killed build resumes.

`.NAME.building/` beside the output folder NAME holds `build.json` (what is built: only the same
build may resume here), `shards/` (the future NAME) and `done/`, with one file per finished shard.
That file is written after the shard is on the disk, so a shard without one is incomplete and is
removed. It also holds the stamps of the shard's media files from before they were read: where one
has changed, that shard and all after it are built again. The end is one rename of `shards/` to
NAME.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, Self

from data_shards.build.source_item import (
    FileItem,
    FileStamp,
    Skipped,
    SourceItem,
    Suspicious,
    file_stamp,
)
from data_shards.files import flush_to_disk, write_atomically
from data_shards.shards.index import ENTRY_DTYPE, ShardInfo
from data_shards.shards.writer import shard_files

_IDENTITY_FILE: Final = "build.json"
_LOCK_FILE: Final = "lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedShard:
    """A shard that is on the disk, and where in the source it ends."""

    info: ShardInfo
    items: int  # source items up to the end of this shard, counted from the first
    skipped: tuple[Skipped, ...]  # clips skipped since the shard before
    suspicious: tuple[Suspicious, ...]  # of its records
    keys: tuple[str, ...]  # of its records
    media: tuple[FileStamp | None, ...]  # per item since the shard before


class BuildJournal:
    """An open work folder, locked against a second build of the same output."""

    def __init__(self, folder: Path, lock: IO[str], finished: tuple[FinishedShard, ...]) -> None:
        self._folder = folder
        self._lock = lock
        self.finished = finished

    @property
    def shards(self) -> Path:
        """Where the shards are written."""
        return self._folder / "shards"

    def has_finished(self) -> bool:
        """Whether the disk holds a finished shard from which the next start can resume."""
        return _done_file(self._folder, 0).exists()

    @classmethod
    def open(cls, out_dir: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> Self:
        """Make the work folder of an output folder, or resume in the one that a killed build left.

        Args:
            identity: JSON values that describe what is built; another build's folder is refused.
            fresh: remove what an earlier build left.

        Raises:
            ValueError: the folder is in use by a running build, or was left by another build.
        """
        folder = work_folder(out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK_FILE).open("w")
        try:
            # A lock of the process (fcntl), not of the open file (flock): forked workers that
            # outlive a killed build for a moment must not hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ValueError(
                f"build: another build of {out_dir} is running ({folder} is locked); wait for it"
            ) from error
        try:
            if fresh:
                _empty(folder)
            _claim(folder, out_dir, identity)
            return cls(folder, lock, _finished_shards(folder))
        except BaseException:
            lock.close()
            raise

    def drop_outdated(
        self, source: Iterator[SourceItem], notice: Callable[[str], None] | None = None
    ) -> list[SourceItem]:
        """Read the items of the finished shards; drop the shards from the first changed file on.

        Args:
            notice: called with a sentence about what has changed.

        Returns:
            the items that were read and must be built again: those of one shard, or none.
        """
        items_before = 0
        for index, shard in enumerate(self.finished):
            items = list(islice(source, shard.items - items_before))
            items_before = shard.items
            stamps = [file_stamp(item) for item in items]
            if stamps == list(shard.media):
                continue
            changed = [now != then for now, then in zip(stamps, shard.media, strict=False)]
            item = items[changed.index(True)] if True in changed else None
            path = item.path if isinstance(item, FileItem) else None
            if notice is not None:
                dropped = len(self.finished) - index
                shards = "1 finished shard is" if dropped == 1 else f"{dropped} finished shards are"
                notice(
                    f"{path or 'a media file'} has changed since it was read: {shards} built again"
                )
            self.finished = self.finished[:index]
            _remove_all_but(self._folder, self.finished)
            return items
        return []

    def mark_finished(
        self,
        index: int,
        *,
        info: ShardInfo,
        items: int,
        skipped: Sequence[Skipped],
        suspicious: Sequence[Suspicious],
        media: Sequence[FileStamp | None],
    ) -> None:
        """Record that a shard is finished; its files are on the disk already."""
        document = {
            "info": info.to_json(),
            "items": items,
            "skipped": [asdict(row) for row in skipped],
            "suspicious": [asdict(row) for row in suspicious],
            "media": media,
        }
        write_atomically(_done_file(self._folder, index), json.dumps(document) + "\n")

    def publish(self, out_dir: Path) -> None:
        """Move the shards to their final folder with one rename."""
        for path in (*self.shards.iterdir(), self.shards):
            flush_to_disk(path)
        self.shards.rename(out_dir)  # replaces an empty folder, refuses any other
        flush_to_disk(out_dir.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self._folder)
        self._lock.close()

    def close(self) -> None:
        """Keep the finished shards for the next start."""
        self._lock.close()


def work_folder(out_dir: Path) -> Path:
    """Where an output folder is built: beside it, on the same file system."""
    out_dir = out_dir.resolve()
    return out_dir.parent / f".{out_dir.name}.building"


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK_FILE:
            path.unlink()


def _claim(folder: Path, out_dir: Path, identity: Mapping[str, Any]) -> None:
    path = folder / _IDENTITY_FILE
    wanted = json.loads(json.dumps(dict(identity)))
    if path.exists():
        present = json.loads(path.read_text(encoding="utf-8"))
        if present != wanted:
            raise ValueError(
                f"build: {folder} holds an unfinished build of {out_dir} with another "
                f"{', '.join(_differences(present, wanted))}; finish it with its own command, or "
                "discard it with --fresh"
            )
    for name in ("shards", "done"):
        (folder / name).mkdir(exist_ok=True)
    if not path.exists():
        write_atomically(path, json.dumps(wanted, indent=1, sort_keys=True) + "\n")


def _differences(present: Any, wanted: Any, name: str = "") -> list[str]:
    """Dotted names of the values that differ."""
    if isinstance(present, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(present.keys() | wanted.keys())
            if present.get(key) != wanted.get(key)
            for line in _differences(
                present.get(key), wanted.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [f"{name} ({present!r:.60} there, {wanted!r:.60} here)"]


def _done_file(folder: Path, index: int) -> Path:
    return folder / "done" / f"{index:06d}.json"


def _finished_shards(folder: Path) -> tuple[FinishedShard, ...]:
    """The finished shards in order; everything else is removed."""
    finished: list[FinishedShard] = []
    while (path := _done_file(folder, len(finished))).exists():
        shard = _read_done_file(path, folder / "shards")
        if shard is None:
            break
        finished.append(shard)
    _remove_all_but(folder, finished)
    return tuple(finished)


def _remove_all_but(folder: Path, finished: Sequence[FinishedShard]) -> None:
    """Remove the files in `done/` of other shards first, then all other files in `shards/`."""
    kept = {_done_file(folder, index) for index in range(len(finished))}
    kept |= {
        path for shard in finished for path in shard_files(folder / "shards" / shard.info.name)
    }
    for path in (*sorted((folder / "done").iterdir()), *(folder / "shards").iterdir()):
        if path not in kept:
            path.unlink()


def _read_done_file(path: Path, shards: Path) -> FinishedShard | None:
    """A finished shard; None if its files do not have the recorded sizes."""
    document = json.loads(path.read_text(encoding="utf-8"))
    info = ShardInfo.from_json(document["info"])
    tar, idx, keys_file = shard_files(shards / info.name)
    sizes = ((tar, info.bytes), (idx, info.records * ENTRY_DTYPE.itemsize))
    if any(not file.is_file() or file.stat().st_size != size for file, size in sizes):
        return None
    keys = tuple(keys_file.read_text(encoding="ascii").splitlines()) if keys_file.is_file() else ()
    if len(keys) != info.records:
        return None
    return FinishedShard(
        info=info,
        items=document["items"],
        skipped=tuple(Skipped(**row) for row in document["skipped"]),
        suspicious=tuple(Suspicious(**row) for row in document.get("suspicious", ())),
        keys=keys,
        media=tuple(None if at is None else (at[0], at[1]) for at in document.get("media", ())),
    )
