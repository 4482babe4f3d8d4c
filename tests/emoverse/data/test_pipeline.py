"""The pipeline against a plain sequential reference: damage, substitutes, views and tiles."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from data_shards.build.build import build_shards
from data_shards.media.video import encode_mp4
from data_shards.plan.plan import StageSpec, plan_stages
from data_shards.plan.sampler import WeightedTaskSampler
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import DamagedRecord, ShardReader
from data_shards.shards.record import Record, Video
from data_shards.stream import (
    Damage,
    DamagedSample,
    OnDamage,
    Sample,
    StepStream,
    ViewOptions,
    decode_view,
    view_of,
)
from data_shards.tasks import Task
from emoverse.data.collate import Batch, collate, plan_packs
from emoverse.data.encode import encode_sample
from emoverse.data.pipeline import BatchPipeline
from emoverse.data.shared_memory import SharedBuffer, SlotAllocator

SIZE, PACK_TOKENS = 4, 500
BROKEN_BYTES = ("r6", "r7")  # keys of records whose bytes on disk are damaged
Plain = Callable[[list[Batch]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """24 records: every second one has a peak frame, every second pair does not decode."""
    folder = tmp_path_factory.mktemp("pipeline") / "shards"
    index = build_shards(map(record, range(24)), folder, provenance={}, max_records_per_shard=9)
    for shard in range(index.num_shards):
        path = folder / index.shards[shard].name
        content = bytearray(path.read_bytes())
        for slot, key in enumerate(index.keys(shard)):
            if key in BROKEN_BYTES:
                content[int(index.entries(shard)[slot]["offset"]) + 700] ^= 4
        path.write_bytes(content)
    return index


def record(number: int) -> Record:
    clip = np.random.default_rng(number).integers(0, 255, (4, 32, 64, 3)).astype(np.uint8)
    mp4 = bytearray(encode_mp4(clip, 25))
    if number % 4 < 2:
        start = mp4.index(b"mdat") + 4
        mp4[start + 40 : start + 900] = bytes(860)
    return Record(
        key=f"r{number}",
        source="test",
        split="train",
        utterance="I won! " * (1 + number % 3),
        speaker="Anna",
        sentiment=1.0,
        tasks=(Task.MSA, Task.FER) if number % 2 else (Task.MSA,),
        expressions=("Smile",) * (number % 2) or None,
        peak_frame=2 if number % 2 else None,
        num_frames=4,
        media=Video(mp4=bytes(mp4)),
    )


def open_stream(index: ShardIndex, peak_tiles: int, on_damage: OnDamage = "replace") -> StepStream:
    half = Fraction(1, 2)
    spec = StageSpec(name="stage1", rates=((Task.MSA, half), (Task.FER, half)), take=18)
    stage = plan_stages(index, [spec], seed=1).stages["stage1"]
    sampler = WeightedTaskSampler(stage, index, global_batch_size=6, rank=0, world_size=1)
    view = ViewOptions(num_frames=2, image_size=SIZE, peak_tiles=peak_tiles)
    return StepStream(sampler, ShardReader(index.folder, index), view, on_damage=on_damage)


def reference_sample(stream: StepStream, position: int) -> Sample:
    """Reads and decodes one record after the other until one is intact."""
    stage, index = stream.sampler.stage_plan, stream.reader.index
    quarantine: list[Damage] = []
    placement = stage.at(position)
    while True:
        entry = index.entries(placement.shard)[placement.slot]
        try:
            found = stream.reader.read(placement.shard, placement.slot)
            view = view_of(found, placement.task, stream.view)
            frames = decode_view(found, view, stream.view)
        except ValueError as error:
            damage = Damage(
                position=position,
                task=placement.task,
                shard=index.shards[placement.shard].name,
                key=index.key(placement.shard, placement.slot),
                offset=int(entry["offset"]),
                cause=error.cause if isinstance(error, DamagedRecord) else str(error),
            )
            quarantine.append(damage)
            placement = stage.substitute(position, len(quarantine))
            continue
        return Sample(
            position=position,
            task=placement.task,
            record=found,
            view=view,
            frames=frames,
            placement=placement,
            quarantine=tuple(quarantine),
        )


@pytest.mark.parametrize("peak_tiles", [1, 4])
def test_batches_equal_those_of_a_sequential_reference(
    index: ShardIndex,
    pipeline_of: Callable[..., BatchPipeline],
    plain: Plain,
    monkeypatch: pytest.MonkeyPatch,
    peak_tiles: int,
) -> None:
    """With damaged bytes and clips, whose substitutes have other lengths and numbers of frames."""
    stream = open_stream(index, peak_tiles)
    pipeline = pipeline_of(stream, PACK_TOKENS)
    buffer = SharedBuffer(1, 6 * 5 * SIZE * SIZE * 3)
    decoded: list[int] = []  # positions
    decode = stream.decode

    def counting(sample: Sample, out: np.ndarray | None = None) -> np.ndarray | Damage:
        decoded.append(sample.position)
        return decode(sample, out)

    monkeypatch.setattr(stream, "decode", counting)
    num_replaced = most_packs = 0
    causes = set()
    for step in range(len(stream)):
        samples = [reference_sample(stream, slot.position) for slot in stream.sampler.share(step)]
        examples = [encode_sample(one, pipeline.tokenizer, pipeline.encode) for one in samples]
        packs = plan_packs(examples, PACK_TOKENS, pipeline.frame_shape)
        expected = [collate(pack, "sample") for pack in packs]
        slots = SlotAllocator(buffer, [0])
        slots.begin_step()
        decoded.clear()
        actual = pipeline.batches(step, slots)
        most = Counter({one.position: 1 + one.replaced for one in samples})
        assert Counter(decoded) <= most, "no intact clip is decoded twice"
        assert plain(actual) == plain(expected) == plain(pipeline.batches(step))
        for batch in actual:
            assert batch.pixels is not None
            assert buffer.offset_in(0, batch.pixels.numpy()) is not None
        num_replaced += sum(one.replaced for one in samples)
        causes |= {damage.cause.split(":")[0] for one in samples for damage in one.quarantine}
        most_packs = max(most_packs, len(actual))
    assert num_replaced >= 4 and most_packs >= 3 and len(causes) >= 2, causes


def test_damage_stops_at_the_first_damaged_position(
    index: ShardIndex, pipeline_of: Callable[..., BatchPipeline]
) -> None:
    stream = open_stream(index, 1, "stop")
    pipeline = pipeline_of(stream, PACK_TOKENS)
    for step in range(len(stream)):
        share = stream.sampler.share(step)
        reference = [reference_sample(stream, slot.position) for slot in share]
        damaged = [damage for one in reference for damage in one.quarantine[:1]]
        on_disk = [damage for damage in damaged if damage.key in BROKEN_BYTES]
        first = (on_disk or damaged)[0]  # records are read before any clip is decoded
        with pytest.raises(DamagedSample, match=f"record {first.key} in .* set data.on_damage"):
            pipeline.batches(step)


def test_features_are_stored_for_complete_samples(
    index: ShardIndex, pipeline_of: Callable[..., BatchPipeline]
) -> None:
    """The encoder then finds the features of every sample, substitutes included."""
    stored: dict[tuple[str, str], np.ndarray] = {}
    calls: list[str] = []

    def store(sample: Sample) -> None:
        if sample.frames is not None:
            calls.append(sample.record.key)
            features = np.full((len(sample.frames), 2, 3), sample.frames.mean(), np.float32)
            stored[sample.record.key, sample.view] = features

    stream = open_stream(index, 1)
    stream.wants_frames = lambda key, view: (key, view) not in stored
    pipeline = pipeline_of(stream, PACK_TOKENS)
    pipeline = dataclasses.replace(
        pipeline,
        store_features=store,
        encode=dataclasses.replace(
            pipeline.encode, features=lambda key, view: stored.get((key, view))
        ),
        frame_shape=dataclasses.replace(pipeline.frame_shape, feature_channels=3),
    )
    for step in range(len(stream)):
        first, num_calls = pipeline.batches(step), len(calls)
        again = pipeline.batches(step)
        assert len(calls) == num_calls, "what is stored is not decoded again"
        for batch in first + again:
            assert batch.pixels is None and batch.features is not None
            assert len(batch.features) == batch.num_images
