"""Freezing what a queued job will run: its code and its config, copied into the run directory.

In: this program's own packages and a resolved config. Out: RUN/jobs/code-HASH/ and
RUN/jobs/config-HASH.yaml; equal content has one name and is written once. Later edits, of the
working copy or of a config file, do not reach a job that waits or is requeued.
"""

import hashlib
import os
import shutil
from pathlib import Path

import launch
from emoverse.config.schema import Config, to_yaml
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
    """Where the snapshot of the present code lies, or will lie."""
    return run_dir.resolve() / JOBS / f"code-{code_hash(source_root())}"


def freeze_code(run_dir: Path) -> Path:
    """Copies the packages; returns the folder to put first on PYTHONPATH."""
    folder = code_folder(run_dir)
    if folder.is_dir():
        return folder
    temporary = _beside(folder)
    for package in PACKAGES:
        shutil.copytree(source_root() / package, temporary / package, ignore=LEFT_OUT)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)  # another launch has made the same meanwhile
    return folder


def _beside(path: Path) -> Path:
    """A name that no other launch uses at the same time, on any machine."""
    return path.with_name(f".{path.name}-{os.uname().nodename}-{os.getpid()}")


def config_file(config: Config) -> Path:
    """Where the frozen config of this run lies, or will lie."""
    name = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]
    return config.run.run_dir.resolve() / JOBS / f"config-{name}.yaml"


def freeze_config(config: Config) -> Path:
    """Writes the resolved config; returns its file."""
    path = config_file(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.write_text(to_yaml(config), encoding="utf-8")
    temporary.replace(path)
    return path
