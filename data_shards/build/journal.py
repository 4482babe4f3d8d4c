"""The folder of a build that is not finished: what is in it survives a kill, and nothing else does.

`.NAME.building/` beside the output folder NAME holds `build.json` (what is built: another build may
not go on here), `shards/` (the future NAME) and `done/`, with one mark per finished shard. A mark
is written by rename after the shard is on the disk, so a shard without a mark is of no account and
is removed. A mark also says how the shard's media files looked before they were read: where one has
changed, that shard and all behind it are made again. The end is one rename of `shards/` to NAME.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, Self

from data_shards.build.source_item import FileRecipe, Skipped, Stamp, skipped_from_json, stamp
from data_shards.files import flush_to_disk
from data_shards.shards.index import ENTRY_DTYPE, ShardInfo
from data_shards.shards.writer import shard_files

_IDENTITY: Final = "build.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedShard:
    """A shard that is on the disk, and how far in the source it ends."""

    info: ShardInfo
    items: int  # source items before the next shard, counted from the first
    skipped: tuple[Skipped, ...]  # clips passed over since the shard before
    keys: tuple[str, ...]  # of its records
    media: tuple[Stamp | None, ...]  # per item since the shard before


class Unfinished:
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
        """Whether the next start will find a finished shard; asks the disk, whose word counts."""
        return _mark(self._folder, 0).exists()

    @classmethod
    def open(cls, out_dir: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> Self:
        """Make the work folder of an output folder, or go on in the one that a kill has left.

        Args:
            identity: JSON values that say what is built; another build's folder is refused.
            fresh: remove what an earlier build has left.

        Raises:
            ValueError: the folder is in use by a running build, or was left by another build.
        """
        folder = work_folder(out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
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
                _remove_work(folder)
            _claim(folder, out_dir, identity)
            return cls(folder, lock, _finished_shards(folder))
        except BaseException:
            lock.close()
            raise

    def drop_outdated(
        self, source: Iterator[Any], notice: Callable[[str], None] | None = None
    ) -> list[Any]:
        """Read the items of the finished shards; drop the shards from the first changed file on.

        Returns the items that were read and must be made again: those of one shard, or none.
        `notice` is told what has changed.
        """
        read = 0
        for number, shard in enumerate(self.finished):
            items = list(islice(source, shard.items - read))
            read = shard.items
            stamps = [stamp(item) for item in items]
            if stamps == list(shard.media):
                continue
            changed = [a != b for a, b in zip(stamps, shard.media, strict=False)]
            item = items[changed.index(True)] if True in changed else None
            what = item.path if isinstance(item, FileRecipe) else None
            again = len(self.finished) - number
            if notice is not None:
                shards = "1 finished shard is" if again == 1 else f"{again} finished shards are"
                notice(
                    f"{what or 'a media file'} has changed since it was read: {shards} made again"
                )
            self.finished = self.finished[:number]
            _remove_all_but(self._folder, self.finished)
            return items
        return []

    def mark(
        self,
        number: int,
        *,
        info: ShardInfo,
        items: int,
        skipped: Sequence[Skipped],
        media: Sequence[Stamp | None],
    ) -> None:
        """Say that a shard is finished (see FinishedShard); its files are on the disk already."""
        rows = [asdict(row) for row in skipped]
        document = {"info": info.to_json(), "items": items, "skipped": rows, "media": media}
        write_durably(_mark(self._folder, number), json.dumps(document) + "\n")

    def publish(self, out_dir: Path) -> None:
        """Give the shards their final name, as one step."""
        for path in (*self.shards.iterdir(), self.shards):
            flush_to_disk(path)
        self.shards.rename(out_dir)  # replaces an empty folder, refuses any other
        flush_to_disk(out_dir.parent)
        self.remove()

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self._folder)
        self._lock.close()

    def close(self) -> None:
        """Leave the finished shards for the next start."""
        self._lock.close()


def work_folder(out_dir: Path) -> Path:
    """Where an output folder is built: beside it, on the same file system."""
    out_dir = out_dir.resolve()
    return out_dir.parent / f".{out_dir.name}.building"


def write_durably(path: Path, text: str) -> None:
    """Write a file so that it is there in whole or not at all, also after a power cut."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    flush_to_disk(temporary)
    os.replace(temporary, path)
    flush_to_disk(path.parent)


def _remove_work(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _claim(folder: Path, out_dir: Path, identity: Mapping[str, Any]) -> None:
    path = folder / _IDENTITY
    wanted = json.loads(json.dumps(dict(identity)))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != wanted:
            raise ValueError(
                f"build: {folder} holds an unfinished build of {out_dir} with another "
                f"{', '.join(_differences(found, wanted))}; finish it with its own command, or "
                "throw it away with --fresh"
            )
    for name in ("shards", "done"):
        (folder / name).mkdir(exist_ok=True)
    if not path.exists():
        write_durably(path, json.dumps(wanted, indent=1, sort_keys=True) + "\n")


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Dotted names of the values that differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key)
            for line in _differences(
                found.get(key), wanted.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [f"{name} ({found!r:.60} there, {wanted!r:.60} here)"]


def _mark(folder: Path, number: int) -> Path:
    return folder / "done" / f"{number:06d}.json"


def _finished_shards(folder: Path) -> tuple[FinishedShard, ...]:
    """The marked shards in order; everything else is removed."""
    finished: list[FinishedShard] = []
    while (mark := _mark(folder, len(finished))).exists():
        shard = _read_mark(mark, folder / "shards")
        if shard is None:
            break
        finished.append(shard)
    _remove_all_but(folder, finished)
    return tuple(finished)


def _remove_all_but(folder: Path, finished: Sequence[FinishedShard]) -> None:
    """Remove the marks behind the finished shards, then every file that is not theirs."""
    for later in sorted((folder / "done").iterdir())[len(finished) :]:
        later.unlink()
    kept = {path for shard in finished for path in shard_files(folder / "shards" / shard.info.name)}
    for path in (folder / "shards").iterdir():
        if path not in kept:
            path.unlink()


def _read_mark(mark: Path, shards: Path) -> FinishedShard | None:
    """A marked shard; None if its files are not the ones that were marked."""
    document = json.loads(mark.read_text(encoding="utf-8"))
    info = ShardInfo.from_json(document["info"])
    tar, idx, keys = shard_files(shards / info.name)
    sizes: Sequence[tuple[Path, int]] = (
        (tar, info.bytes),
        (idx, info.records * ENTRY_DTYPE.itemsize),
    )
    if any(not path.is_file() or path.stat().st_size != size for path, size in sizes):
        return None
    names = tuple(keys.read_text(encoding="ascii").splitlines()) if keys.is_file() else ()
    if len(names) != info.records:
        return None
    return FinishedShard(
        info=info,
        items=document["items"],
        skipped=tuple(skipped_from_json(row) for row in document["skipped"]),
        keys=names,
        media=tuple(None if at is None else (at[0], at[1]) for at in document.get("media", ())),
    )
