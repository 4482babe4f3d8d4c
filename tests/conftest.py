"""Fixtures of all tests: Python in its own process, and shard folders without videos.

Records, clips and whole shard folders come from `tests.builders`.
"""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from data_shards.shards.index import ENTRY_DTYPE, ShardIndex, ShardInfo, sidecar, write_index
from data_shards.tasks import Task, mask_of

# No deadline: machines are busy. The same examples everywhere: a red test is red for everybody.
# To look for new ones: pytest --hypothesis-profile=explore
settings.register_profile("house", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("house")

# Where there is no GPU, Triton kernels run in its interpreter; read when triton is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A job that a shell put into the background is deaf to Ctrl-C, and so would be all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

RunPython = Callable[..., subprocess.CompletedProcess[str]]
MakeIndex = Callable[..., ShardIndex]


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several test processes: a file stays in one, for its fixtures; so do all SLURM tests."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        slurm = item.get_closest_marker("slurm") is not None
        item.add_marker(pytest.mark.xdist_group("slurm" if slurm else item.path.name))


@pytest.fixture
def run_python() -> RunPython:
    """Run `python ARGUMENTS...` with the source tree importable; nothing is checked."""

    def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture
def make_index() -> MakeIndex:
    """Write a shard folder in which the tars are empty space: enough for everything but reading."""
    return write_index_only


def write_index_only(
    folder: Path, counts: Mapping[Iterable[Task], int], *, num_shards: int = 2
) -> ShardIndex:
    """`counts`: per set of tasks, how many records offer exactly these; dealt to the shards."""
    masks = [mask for tasks, count in counts.items() for mask in [mask_of(tasks)] * count]
    folder.mkdir(parents=True)
    shards = []
    for number in range(num_shards):
        entries = np.zeros(len(masks[number::num_shards]), ENTRY_DTYPE)
        entries["tasks"] = masks[number::num_shards]
        entries["size"] = 1536
        entries["offset"] = 1536 * np.arange(len(entries))
        entries["frames"], entries["text_chars"] = 40, 100
        keys = "".join(f"r{number}-{slot}\n" for slot in range(len(entries))).encode()
        tar = folder / f"shard-{number:06d}.tar"
        with tar.open("wb") as file:
            file.truncate(1536 * len(entries) + 1024)
        sidecar(tar, ".idx").write_bytes(entries.tobytes())
        sidecar(tar, ".keys").write_bytes(keys)
        found, per_class = np.unique(entries["tasks"], return_counts=True)
        shards.append(
            ShardInfo(
                name=tar.name,
                bytes=tar.stat().st_size,
                records=len(entries),
                classes=dict(zip(found.tolist(), per_class.tolist(), strict=True)),
                idx_sha256=hashlib.sha256(entries.tobytes()).hexdigest(),
                keys_sha256=hashlib.sha256(keys).hexdigest(),
            )
        )
    write_index(folder, tuple(shards), options={"frames": "video"}, provenance={})
    return ShardIndex.load(folder)
