"""The file operations of a save, one function each, so that tests can make every one fail.

In: paths below the run directory. Out: files that are on disk when they appear under their name:
written to the work folder of the run lock, flushed, and renamed. (`data_shards.files` writes
atomically where no run lock is needed.) Also the names of checkpoint folders. No torch at import.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.files import flush_to_disk

# The operations of a save; tests replace these by functions that fail.
OPERATIONS = ("make_folder", "write_tensors", "write_text", "sync", "rename", "remove")

_STEP = re.compile(r"step_(\d{6,})")


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimiser steps."""
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a published checkpoint."""
    match = _STEP.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def published(root: Path) -> list[Path]:
    """Checkpoints in `root`, newest first; a copy such as step_000500.bak does not count."""
    folders = [path for path in root.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def make_folder(path: Path) -> None:
    """Create a folder; its parent must exist."""
    path.mkdir()


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors by name as safetensors.

    Raises:
        OSError: as for any file; the library raises its own type when the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # torch: readers of names do without

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file."""
    path.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    flush_to_disk(path)


def rename(source: Path, target: Path) -> None:
    """Rename atomically; replaces a file, but never a folder with content."""
    source.rename(target)


def remove(path: Path) -> None:
    """Remove a folder and its content."""
    shutil.rmtree(path)


def publish_text(path: Path, text: str, *, work: Path) -> None:
    """Replace a small file: written to `work`, flushed, renamed. Readers see old or new.

    Raises:
        OSError: the disk is full or not writable; the old file is unchanged.
    """
    temporary = work / f"{path.name}.tmp"
    write_text(temporary, text)
    sync(temporary)
    rename(temporary, path)
    sync(path.parent)
