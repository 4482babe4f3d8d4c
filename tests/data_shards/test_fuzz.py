"""Fuzzing what comes from outside: index, tar, json, video, JPEG. ValueError or a result, no more.

The default tier takes a few seconds; `-m slow` looks at a few thousand times as many inputs.
"""

import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_shards.media.mp4 import MAX_CLAIMS, require_modest_claims
from data_shards.media.pixels import jpeg_decode, jpeg_encode
from data_shards.media.video import DamagedVideo, count_frames, decode_frames, encode_mp4
from data_shards.shards.index import ENTRY_DTYPE, ShardIndex
from data_shards.shards.reader import DamagedRecord, ShardReader, untar
from data_shards.shards.record import Video, from_members, to_members
from data_shards.tasks import Task
from tests.builders import make_record, make_shards, tar_blocks

FRAMES = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3)).astype(np.uint8)
CLIP = encode_mp4(FRAMES, 25, gop=4)
RECORD = make_record("clip_0", tasks=(Task.MSA,), num_frames=8, media=Video(mp4=CLIP))
# Values that parsers stumble over, in the widths that headers use.
EDGES = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
SECONDS_EACH = 5.0

Property = Callable[..., None]
Pair = tuple[Property, Property]


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few bytes changed, edge values written, a part cut, doubled or moved."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "edge", "cut", "insert", "double", "end"])):
            case "flip" if data:
                data[at] ^= draw(st.integers(1, 255))
            case "edge":
                value = draw(EDGES).to_bytes(4, draw(st.sampled_from(["big", "little"])))
                data[at : at + 4] = value
            case "cut":
                del data[at : at + draw(st.integers(1, 600))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=40))
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 600))]
            case _:
                del data[at:]
    return bytes(data)


def tiers(examples: int, many: int, **strategies: Any) -> Callable[[Property], Pair]:
    """A property as two tests: a few examples for every day, many for the slow tier."""
    relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

    def both(check: Property) -> Pair:
        quick = settings(max_examples=examples, suppress_health_check=relaxed)
        slow = settings(max_examples=many, suppress_health_check=relaxed)
        at_length = slow(given(**strategies)(check))
        return quick(given(**strategies)(check)), pytest.mark.slow(
            pytest.mark.timeout(3600)(at_length)
        )

    return both


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "shards"
    records = [replace(RECORD, key=f"clip_{n}") for n in range(4)]
    return make_shards(folder, records, per_shard=2)


@pytest.fixture(autouse=True)
def modest() -> object:
    """No property may push the process beyond 1.5 GiB more than it had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5 * 2**20  # KiB


def in_time(call: Callable[[], object], allowed: tuple[type[Exception], ...]) -> None:
    began = time.process_time()
    try:
        call()
    except allowed as error:
        assert str(error)
    assert time.process_time() - began < SECONDS_EACH


def _any_index(built: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "shards"
    if not folder.exists():
        shutil.copytree(built, folder)
    name = data.draw(st.sampled_from(["index.json", "shard-000000.idx", "shard-000000.keys"]))
    spoiled = data.draw(mutations((built / name).read_bytes()))
    (folder / name).write_bytes(spoiled)
    if name != "index.json" and data.draw(st.booleans()):  # as a hostile builder: it is sealed
        document = json.loads((folder / "index.json").read_text())
        kind = "idx_sha256" if name.endswith("idx") else "keys_sha256"
        document["shards"][0][kind] = hashlib.sha256(spoiled).hexdigest()
        (folder / "index.json").write_text(json.dumps(document))

    def read_all() -> None:
        index = ShardIndex.load(folder)
        reader = ShardReader(folder, index)
        for number in range(min(index.num_records, 4)):
            try:
                reader.read(*index.address(number))
            except DamagedRecord:
                continue

    try:
        in_time(read_all, (ValueError, FileNotFoundError))
    finally:
        for path in ("index.json", name):
            shutil.copy(built / path, folder / path)


test_any_index, test_any_index_at_length = tiers(60, 20_000, data=st.data())(_any_index)


def _blocks() -> bytes:
    members = to_members(RECORD).items()
    return tar_blocks(*((f"clip_0.{name}", content) for name, content in members)) + bytes(512)


def _any_tar(blocks: bytes) -> None:
    def read() -> None:
        members = untar("clip_0", blocks)
        assert sum(map(len, members.values())) <= len(blocks)
        from_members("clip_0", members)

    in_time(read, (ValueError,))


test_any_tar, test_any_tar_at_length = tiers(
    150, 200_000, blocks=st.one_of(mutations(_blocks()), st.binary(max_size=3000))
)(_any_tar)


def _any_json(text: bytes) -> None:
    in_time(lambda: from_members("clip_0", {"json": text, "mp4": CLIP}), (ValueError,))


test_any_json, test_any_json_at_length = tiers(
    150, 200_000, text=st.one_of(mutations(to_members(RECORD)["json"]), st.binary(max_size=300))
)(_any_json)


def _any_video(mp4: bytes, data: st.DataObject) -> None:
    """Most of the file is its header here, so most changes hit the header."""
    wanted = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    in_time(lambda: decode_frames(mp4, wanted, num_frames=8), (DamagedVideo,))
    in_time(lambda: count_frames(mp4), (DamagedVideo,))


test_any_video, test_any_video_at_length = tiers(120, 100_000, mp4=mutations(CLIP), data=st.data())(
    _any_video
)


def _any_jpeg(jpeg: bytes) -> None:
    in_time(lambda: jpeg_decode(jpeg), (ValueError,))


test_any_jpeg, test_any_jpeg_at_length = tiers(
    100, 100_000, jpeg=mutations(jpeg_encode(FRAMES[0]))
)(_any_jpeg)


def test_claims_are_counted_wherever_they_stand() -> None:
    require_modest_claims(CLIP)
    most = (MAX_CLAIMS + 1).to_bytes(4, "big")
    table = b"\0\0\0\x24moov\0\0\0\x1cNAME\0\0\0\0\0\0\0\1"
    for box in (b"stsz", b"stz2"):
        with pytest.raises(ValueError, match="the headers of the video claim"):
            require_modest_claims(table.replace(b"NAME", box) + most + bytes(8))
    # Media data is not searched, and what is behind it is.
    media = b"\0\0\0\x18mdatstsz" + bytes(8) + most
    require_modest_claims(media)
    run = b"\0\0\0\x1cmoofstts" + bytes(4) + b"\0\0\0\1" + most + bytes(4)
    with pytest.raises(ValueError, match="claim"):
        require_modest_claims(media + run)
    assert ENTRY_DTYPE.itemsize == 21
