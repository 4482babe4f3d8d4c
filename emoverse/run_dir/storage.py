"""The file operations that make a checkpoint, one function each, so that tests can fail every one.

In: paths below the run directory. Out: files that are on the disk when they appear under their
name. What is published is written elsewhere, forced to the disk, and renamed. Also the names of
checkpoints, for readers too. No torch at import.
"""

import errno
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a save is made of; tests replace these by functions that fail.
OPERATIONS = ("make_folder", "write_tensors", "write_text", "sync", "rename", "remove")

_STEP = re.compile(r"step_(\d{6,})")


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimiser steps."""
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step that the name of a published checkpoint says."""
    found = _STEP.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def published(root: Path) -> list[Path]:
    """Checkpoints in `root`, newest first; a copy such as step_000500.bak is none of ours."""
    folders = [path for path in root.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def make_folder(path: Path) -> None:
    """A new folder; its parent exists."""
    path.mkdir()


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Tensors by name as safetensors.

    Raises:
        OSError: as for any file; the library has an error of its own for a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # needs torch, which not every reader has loaded

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """A small text file."""
    path.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Forces a file, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems have no such call for folders: they keep names
        # in order by themselves, or not at all.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Atomic; replaces a file, but no folder that holds anything."""
    source.rename(target)


def remove(path: Path) -> None:
    """A folder with all it holds."""
    shutil.rmtree(path)


def publish_text(path: Path, text: str, *, work: Path) -> None:
    """Replaces a small file: made in `work`, forced to the disk, renamed. Readers see old or new.

    Raises:
        OSError: the disk is full or not writable; the old file is as it was.
    """
    temporary = work / f"{path.name}.tmp"
    write_text(temporary, text)
    sync(temporary)
    rename(temporary, path)
    sync(path.parent)
