"""The damage corpus is found in full: each kind by shard, record, place and cause, and only it."""

import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.inspection.lint import lint
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import DamagedRecord, ShardReader
from data_shards.shards.record import Record, Video
from data_shards.shards.writer import pack_record
from data_shards.stream import ViewOptions, decode_view
from data_shards.tasks import Task
from tests.builders import make_record, make_shards
from tests.data_shards import damage

NOWHERE = Path("/nonexistent")
NAMES = [kind.name for kind in damage.kinds(NOWHERE)]
VIEW = ViewOptions(num_frames=4, image_size=28)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [make_record(f"clip_{n}", utterance="Hi." * n, num_frames=12) for n in range(6)]
    return make_shards(tmp_path_factory.mktemp("damage") / "shards", records, per_shard=3)


def find(folder: Path) -> tuple[str, list[tuple[str, DamagedRecord | ValueError]]]:
    """When damage is noticed first, and all errors as (address, error)."""
    try:
        index = ShardIndex.load(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), "the message names the file"
        return "load", [("", error)]  # type: ignore[list-item]
    reader, errors, phase = ShardReader(folder, index), [], ""
    for number in range(index.num_records):
        shard, slot = index.address(number)
        address = f"{shard}/{slot}"
        try:
            record = reader.read(shard, slot)
        except ValueError as error:
            errors.append((address, error))
            phase = phase or "read"
            continue
        try:
            decode_view(record, "clip", VIEW)
        except ValueError as error:
            errors.append((address, reader.damaged(shard, slot, str(error))))
            phase = phase or "decode"
    return phase, errors  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_is_found_and_named(built: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    kind = next(kind for kind in damage.kinds(outside) if kind.name == name)
    folder = Path(shutil.copytree(built, tmp_path / "shards"))
    offset = int(ShardIndex.load(folder).entries(0)[1]["offset"])
    kind.spoil(folder)
    began = time.monotonic()
    phase, errors = find(folder)
    assert time.monotonic() - began < 20
    assert not outside.exists(), "nothing in a shard may act"
    order = ("load", "read", "decode")
    assert phase and order.index(phase) <= order.index(kind.found)
    assert re.search(kind.says, str(errors[0][1])), str(errors[0][1])
    assert len(str(errors[0][1])) < 1000
    if phase == "load":
        return
    assert len(errors) == kind.lost
    if kind.lost == 1:
        (address, error), *_ = errors
        assert address == "0/1" and isinstance(error, DamagedRecord)
        assert (error.shard, error.key, error.offset) == (damage.TAR, damage.KEY, offset)
    # The same is what `emoverse lint --decode` says, without a crash.
    report = lint(folder, decode=True)
    assert not report.ok and any(problem.shard == damage.TAR for problem in report.problems)


def test_the_corpus_is_large_and_the_whole_folder_is_intact(built: Path) -> None:
    assert len(NAMES) >= 30 and len(set(NAMES)) == len(NAMES)
    assert find(built) == ("", [])


BOMBS = [
    "json bomb, deep",
    "json bomb, wide",
    "video that claims a billion frames",
    "video with a huge picture",
]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_do_not_take_the_memory(
    built: Path, tmp_path: Path, name: str, run_python: Callable[..., subprocess.CompletedProcess]
) -> None:
    """In a process that may have 400 MB more than an empty one, and 20 seconds of processor."""
    folder = Path(shutil.copytree(built, tmp_path / "shards"))
    next(kind for kind in damage.kinds(NOWHERE) if kind.name == name).spoil(folder)
    program = f"""
import resource
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.writer import pack_record
from data_shards.stream import ViewOptions, decode_view
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, used + 400 * 2**20))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
try:
    record = ShardReader({str(folder)!r}, ShardIndex.load({str(folder)!r})).read(0, 1)
    decode_view(record, "clip", ViewOptions(num_frames=4, image_size=28))
except ValueError as error:
    print("refused:", error)
"""
    done = run_python("-c", program)
    assert done.stdout.startswith("refused:"), done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2**20  # KiB


def test_the_builder_refuses_what_the_reader_would() -> None:
    record = Record(
        key="clip_0",
        source="test",
        split="train",
        utterance="x" * 2**20,
        speaker="Ann",
        sentiment=0.5,
        tasks=(Task.MSA,),
        num_frames=1,
        media=Video(mp4=b"-"),
    )
    with pytest.raises(ValueError, match="its texts may have 1048576 bytes"):
        pack_record(record)
    with pytest.raises(ValueError, match="may have 268435456 bytes, found 268"):
        pack_record(replace(record, utterance="x", media=Video(mp4=bytes(2**28))))
