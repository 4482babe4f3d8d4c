"""Freezing the code of a queued job: a copy of the packages in the run directory.

In: this program's own packages. Out: RUN/jobs/code-HASH/; equal content has one name and is written
once. Later edits of the working copy do not reach a job that waits or is requeued. The config is
frozen beside it, by `schema.freeze_config`.
"""

import hashlib
import os
import shutil
from pathlib import Path

import launch
from launch.slurm.job_log import JOBS

PACKAGES = ("data_shards", "emoverse", "launch")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


def source_root() -> Path:
    """The folder that holds the three packages of this program."""
    return Path(launch.__file__).resolve().parents[1]


def code_hash(root: Path) -> str:
    """12 hex digits over every file of the packages below `root`."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def code_folder(run_dir: Path) -> Path:
    """Where the snapshot of the current code is, or will be."""
    return run_dir.resolve() / JOBS / f"code-{code_hash(source_root())}"


def freeze_code(run_dir: Path) -> Path:
    """Copies the packages; returns the folder to put first on PYTHONPATH."""
    folder = code_folder(run_dir)
    if folder.is_dir():
        return folder
    # A name that no other launch uses at the same time, on any host.
    temporary = folder.with_name(f".{folder.name}-{os.uname().nodename}-{os.getpid()}")
    for package in PACKAGES:
        shutil.copytree(source_root() / package, temporary / package, ignore=LEFT_OUT)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)  # another launch has written the same copy meanwhile
    return folder
