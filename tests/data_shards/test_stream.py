"""From the plan to decoded samples: views, purity, and what happens to damaged records."""

import json
import pickle
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards import stream as stream_module
from data_shards.build.build import BuildOptions, build_shards
from data_shards.media.pixels import resize_frame, tile_image
from data_shards.media.video import DamagedVideo, clip_indices, decode_frames, encode_mp4
from data_shards.plan.plan import StageSpec, plan_stages
from data_shards.plan.sampler import WeightedTaskSampler
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Record, Video
from data_shards.stream import (
    Damage,
    DamagedSample,
    Sample,
    StepStream,
    ViewOptions,
    decode_view,
    view_of,
)
from data_shards.tasks import Task
from tests.builders import make_record, make_shards

NUM_RECORDS = 24
NUM_FRAMES = 10
VIEW = ViewOptions(num_frames=4, image_size=28)


def make_records() -> list[Record]:
    """Each clip its own colour, frame j brighter by j; every second record can serve FER."""
    frames = np.random.default_rng(0).integers(0, 60, (NUM_FRAMES, 32, 32, 3))
    frames += np.arange(NUM_FRAMES).reshape(-1, 1, 1, 1) * 10
    return [
        make_record(
            f"clip_{n:02d}",
            utterance="Hello. " * (n % 5),
            sentiment=None,
            expressions=("Smile",) if n % 2 else None,
            tasks=(Task.ER, Task.FER) if n % 2 else (Task.ER,),
            num_frames=NUM_FRAMES,
            peak_frame=n % NUM_FRAMES if n % 2 else None,
            media=Video(mp4=encode_mp4((frames + 4 * n).astype(np.uint8), 25)),
        )
        for n in range(NUM_RECORDS)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("stream") / "shards", make_records(), per_shard=5)


def open_stream(
    folder: Path, *, rank: int = 0, world_size: int = 1, view: ViewOptions = VIEW, **options: Any
) -> StepStream:
    """16 samples in steps of 4: half ER, half FER."""
    index = ShardIndex.load(folder)
    spec = StageSpec(
        name="stage1",
        rates=((Task.ER, Fraction(1, 2)), (Task.FER, Fraction(1, 2))),
        take=16,
        rest_of=(),
        epochs=1,
        shortage="error",
        epoch_tasks="keep",
    )
    plan = plan_stages(index, (spec,), seed=1)
    sampler = WeightedTaskSampler(
        plan.stages["stage1"], index, global_batch_size=4, rank=rank, world_size=world_size
    )
    return StepStream(sampler, ShardReader(folder, index), view, **options)


def all_samples(stream: StepStream) -> list[Sample]:
    return [sample for step in range(len(stream)) for sample in stream[step]]


def identity(sample: Sample) -> tuple[int, str, str]:
    return sample.position, sample.task, sample.record.key


def test_each_sample_has_the_frames_of_its_task(built: Path) -> None:
    samples = all_samples(open_stream(built))
    assert sorted(sample.position for sample in samples) == list(range(16))
    assert Counter(sample.task for sample in samples) == {Task.ER: 8, Task.FER: 8}
    for sample in samples:
        record = sample.record
        assert isinstance(record.media, Video) and sample.frames is not None
        if sample.task is Task.FER:
            assert sample.view == "peak" and record.peak_frame is not None
            indices: tuple[int, ...] = (record.peak_frame,)
        else:
            assert sample.view == "clip"
            indices = clip_indices(NUM_FRAMES, 4)
        frames = decode_frames(record.media.mp4, indices)
        np.testing.assert_array_equal(sample.frames, [resize_frame(f, 28) for f in frames])
        assert sample.frames.dtype == np.uint8 and sample.replaced == 0


def test_a_step_is_a_pure_function(built: Path) -> None:
    """Any order, any process: the same samples, bit for bit."""
    stream = open_stream(built)
    copy = pickle.loads(pickle.dumps(stream))
    forwards = [stream[step] for step in range(4)]
    backwards = [copy[step] for step in (3, 2, 1, 0)][::-1]
    for first, second in zip(forwards, backwards, strict=True):
        assert list(map(identity, first)) == list(map(identity, second))
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one.frames, other.frames)
    for step in (-1, 4):
        with pytest.raises(IndexError, match=rf"step must be 0\.\.3, found {step}"):
            stream[step]


def test_ranks_share_each_step(built: Path) -> None:
    whole = open_stream(built)
    parts = [open_stream(built, rank=rank, world_size=3) for rank in range(3)]
    for step in range(len(whole)):
        shared = [identity(sample) for part in parts for sample in part[step]]
        assert sorted(shared) == sorted(map(identity, whole[step]))


def test_unwanted_frames_are_not_decoded(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(stream_module, "decode_frames", None)  # calling it would fail

    def wants_frames(key: str, view: str) -> bool:
        asked.append((key, view))
        return False

    samples = all_samples(open_stream(built, wants_frames=wants_frames))
    assert all(sample.frames is None for sample in samples)
    assert asked == [(sample.record.key, sample.view) for sample in samples]


def test_only_the_views_frames_are_decoded(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[int] = Counter()

    def counting(mp4: bytes, indices: Any, **options: Any) -> Any:
        counts[len(indices)] += 1
        assert options["num_frames"] > 0  # a video with more or fewer frames is damage
        return decode_frames(mp4, indices, **options)

    monkeypatch.setattr(stream_module, "decode_frames", counting)
    all_samples(open_stream(built))
    assert counts == {1: 8, 4: 8}


def test_peak_frame_for_all_tasks_where_there_is_one(built: Path) -> None:
    samples = all_samples(open_stream(built, view=replace(VIEW, visual="peak_frame")))
    for sample in samples:
        assert sample.frames is not None
        has_peak = sample.record.peak_frame is not None
        assert (sample.view, len(sample.frames)) == (("peak", 1) if has_peak else ("clip", 4))


def test_a_peak_frame_may_be_tiled_like_a_still_image(built: Path, tmp_path: Path) -> None:
    small = replace(VIEW, image_size=14)
    plain = {sample.position: sample for sample in all_samples(open_stream(built, view=small))}
    for sample in all_samples(open_stream(built, view=replace(small, peak_tiles=4))):
        record, expected = sample.record, plain[sample.position].frames
        assert isinstance(record.media, Video) and sample.frames is not None
        if sample.view == "peak":
            assert record.peak_frame is not None
            frame = decode_frames(record.media.mp4, [record.peak_frame])[0]
            expected = tile_image(frame, max_tiles=4, size=14)
            assert len(expected) > 2  # with its thumbnail
        np.testing.assert_array_equal(sample.frames, expected)
    options = BuildOptions(frames="extracted", frames_per_clip=4, frame_size=28)
    build_shards(make_records(), tmp_path / "extracted", options=options, provenance={})
    with pytest.raises(ValueError, match=r"peak_tiles: .* stores extracted frames .* found 4"):
        open_stream(tmp_path / "extracted", view=replace(VIEW, peak_tiles=4))


def test_a_record_of_one_frame_is_a_still_image(built: Path) -> None:
    record = all_samples(open_stream(built))[0].record
    assert view_of(replace(record, num_frames=1, peak_frame=0), Task.ER, VIEW) == "peak"
    assert view_of(replace(record, num_frames=1, peak_frame=None), Task.ER, VIEW) == "clip"


def test_extracted_frames_serve_the_same_views(built: Path, tmp_path: Path) -> None:
    options = BuildOptions(frames="extracted", frames_per_clip=4, frame_size=28, jpeg_quality=95)
    folder = tmp_path / "extracted"
    build_shards(make_records(), folder, options=options, provenance={}, max_records_per_shard=5)
    of_video = all_samples(open_stream(built))
    of_jpegs = all_samples(open_stream(folder))
    assert sorted(sample.position for sample in of_jpegs) == list(range(16))
    by_key = {(sample.record.key, sample.task): sample for sample in of_video}
    for sample in of_jpegs:
        other = by_key.get((sample.record.key, sample.task))
        if other is not None:
            assert sample.frames is not None and other.frames is not None
            assert sample.frames.shape == other.frames.shape
            assert np.abs(sample.frames.astype(int) - other.frames).mean() < 20  # noise, 4:2:0
    with pytest.raises(ValueError, match=r"frames_per_clip: .* stores 4 extracted frames.*found 8"):
        open_stream(folder, view=replace(VIEW, num_frames=8))
    without_peak = replace(of_jpegs[0].record, tasks=(Task.ER,))
    media = replace(without_peak.media, peak_jpeg=None)  # type: ignore[type-var]
    record = replace(without_peak, media=media)
    assert view_of(record, Task.ER, replace(VIEW, visual="peak_frame")) == "clip"
    with pytest.raises(ValueError, match="4 extracted frames, the view has 2"):
        decode_view(record, "clip", replace(VIEW, num_frames=2))


@pytest.mark.parametrize("how", ["exact", "fast", "tiles", "extracted"])
def test_frames_can_be_decoded_into_given_memory(built: Path, tmp_path: Path, how: str) -> None:
    """`read` and `decode` give what `stream[step]` gives, in the given memory."""
    options = {"fast": {"resize": "fast"}, "tiles": {"peak_tiles": 4}}.get(how, {})
    folder, view = built, replace(VIEW, **options)
    if how == "extracted":
        folder = tmp_path / "extracted"
        jpegs = BuildOptions(frames="extracted", frames_per_clip=4, frame_size=28)
        build_shards(make_records(), folder, options=jpegs, provenance={})
    stream = open_stream(folder, view=view)
    kinds = Counter[str]()
    for step in range(len(stream)):
        for whole, sample in zip(stream[step], stream.read(step), strict=True):
            assert identity(whole) == identity(sample) and whole.frames is not None
            kinds[f"{sample.view} {sample.undecoded}"] += 1
            frames = sample.frames
            if sample.undecoded:
                assert frames is None
                out = np.zeros((sample.undecoded, 28, 28, 3), np.uint8)
                frames = stream.decode(sample, out)
                assert frames is out
            np.testing.assert_array_equal(frames, whole.frames)
    # The number of tiles is known only after decoding.
    assert kinds == {"clip 4": 8, "peak 0" if how == "tiles" else "peak 1": 8}


def damage(folder: Path, keys: set[str]) -> None:
    """Flip one bit in each record's first header."""
    index = ShardIndex.load(folder)
    for shard in range(index.num_shards):
        path = folder / index.shards[shard].name
        content = bytearray(path.read_bytes())
        for slot, key in enumerate(index.keys(shard)):
            if key in keys:
                content[int(index.entries(shard)[slot]["offset"]) + 700] ^= 4
        path.write_bytes(content)


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(built, tmp_path / "shards"))


def test_damage_stops_and_says_where(folder: Path) -> None:
    victim = open_stream(folder)[1][0]
    damage(folder, {victim.record.key})
    with pytest.raises(DamagedSample) as caught:
        open_stream(folder)[1]
    error = caught.value
    assert re.fullmatch(
        rf"position {victim.position} \(task {victim.task}\): record {victim.record.key} in "
        rf"shard-00000\d\.tar at byte \d+ is damaged: checksum must be \w+, found \w+; set "
        r"data\.on_damage to 'replace' .* or build the shards again",
        str(error),
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert error.damage.key == victim.record.key
    open_stream(folder)[0]  # other steps are untouched


def test_a_video_that_does_not_decode_is_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are what the builder wrote, but the clip, or every one, is broken itself."""
    tried: list[bytes] = []

    def broken(mp4: bytes, indices: Any, **options: Any) -> Any:
        tried.append(mp4)
        assert len(tried) < 9, "the attempts are not counted"
        raise DamagedVideo("the frame at 7 is corrupt")

    monkeypatch.setattr(stream_module, "decode_frames", broken)
    with pytest.raises(DamagedSample, match="is damaged: mp4: the frame at 7 is corrupt"):
        open_stream(folder)[0]
    monkeypatch.setattr(stream_module, "MAX_ATTEMPTS", 2)
    with pytest.raises(DamagedSample, match="2 substitutes are damaged too; build the shards"):
        open_stream(folder, on_damage="replace")[0]


def test_media_damage_is_a_value_that_can_be_substituted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, *_ = (sample for sample in open_stream(folder).read(1) if sample.view == "clip")
    media = victim.record.media
    assert isinstance(media, Video)

    def broken(mp4: bytes, indices: Any, **options: Any) -> Any:
        if mp4 == media.mp4:
            raise DamagedVideo("the frame at 7 is corrupt")
        return decode_frames(mp4, indices, **options)

    monkeypatch.setattr(stream_module, "decode_frames", broken)
    stream = open_stream(folder, on_damage="replace")
    found = stream.decode(victim)
    assert isinstance(found, Damage) and found.cause == "mp4: the frame at 7 is corrupt"
    assert (found.position, found.task, found.key) == identity(victim)
    other = stream.substitute(victim, found)
    assert other.quarantine == (found,) and other.undecoded and other.task is victim.task
    assert other.record.key != victim.record.key
    whole = next(sample for sample in stream[1] if sample.position == victim.position)
    np.testing.assert_array_equal(stream.complete(other).frames, whole.frames)
    assert identity(whole) == identity(other) and whole.quarantine == other.quarantine
    with pytest.raises(DamagedSample, match=r"the frame at 7 is corrupt; set data\.on_damage"):
        open_stream(folder).substitute(victim, found)


def test_damage_is_replaced_by_the_same_task(folder: Path) -> None:
    before = all_samples(open_stream(folder))
    victims = {sample.record.key for sample in before if sample.position in (0, 1, 5)}
    damage(folder, victims)
    stream = open_stream(folder, on_damage="replace")
    after = all_samples(stream)
    assert [(s.position, s.task) for s in after] == [(s.position, s.task) for s in before]
    for old, new in zip(before, after, strict=True):
        assert new.record.key not in victims and new.task in new.record.tasks
        assert (new.replaced > 0) == (old.record.key in victims)
        if new.replaced:
            first = new.quarantine[0]
            assert (first.position, first.task, first.key) == identity(old)
            assert first.shard.startswith("shard-") and "checksum" in first.cause
        else:
            assert new.record.key == old.record.key
    again = all_samples(open_stream(folder, on_damage="replace"))
    assert list(map(identity, again)) == list(map(identity, after))
    assert [s.quarantine for s in again] == [s.quarantine for s in after]


def test_substitutes_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of attempts, or by the records that the task has."""
    damage(folder, {record.key for record in make_records()})
    with pytest.raises(DamagedSample, match=r"is damaged: .*; .*substitutes for task"):
        open_stream(folder, on_damage="replace")[0]
    monkeypatch.setattr(stream_module, "MAX_ATTEMPTS", 2)
    with pytest.raises(DamagedSample, match="2 substitutes are damaged too; build the shards"):
        open_stream(folder, on_damage="replace")[0]


def test_options_are_checked(built: Path) -> None:
    with pytest.raises(ValueError, match="on_damage must be 'stop' or 'replace', found 'skip'"):
        open_stream(built, on_damage="skip")
    with pytest.raises(ValueError, match="must be at least 1, found 0 and 28"):
        ViewOptions(num_frames=0, image_size=28)
    with pytest.raises(ValueError, match="peak_tiles must be at least 1, found 0"):
        ViewOptions(num_frames=1, image_size=28, peak_tiles=0)
    with pytest.raises(ValueError, match="visual must be 'video' or 'peak_frame', found 'x'"):
        ViewOptions(num_frames=1, image_size=28, visual="x")  # type: ignore[arg-type]


def run_with_restarts(folder: Path, worlds: tuple[int, ...], stops: tuple[int, ...]) -> list[Any]:
    """All samples, step by step, with another number of ranks after each stop.

    Only the state travels, as JSON, with what the ledger would enter into the quarantine.
    """
    trained, start, state = [], 0, None
    for world, stop in zip(worlds, (*stops, 4), strict=True):
        ranks = [
            open_stream(folder, rank=rank, world_size=world, on_damage="replace")
            for rank in range(world)
        ]
        if state is not None:
            start = {rank.sampler.load_state(json.loads(state)) for rank in ranks}.pop()
        quarantine = list(ranks[0].sampler.quarantine)
        for step in range(start, stop):
            samples = sorted((s for rank in ranks for s in rank[step]), key=lambda s: s.position)
            trained += [(identity(sample), sample.frames.tobytes()) for sample in samples]
            quarantine += [asdict(damage) for sample in samples for damage in sample.quarantine]
        ranks[0].sampler.quarantine = quarantine
        state = json.dumps(ranks[0].sampler.state(stop))
    return [*trained, quarantine]


def test_resume_at_every_step_and_on_other_ranks_changes_nothing(folder: Path) -> None:
    """1 -> 2 -> 4 -> 1 ranks, with a damaged record that is replaced on the way."""
    damage(folder, {open_stream(folder)[2][1].record.key})
    whole = run_with_restarts(folder, (1,), ())
    assert len(whole) == 17 and len(whole[-1]) == 1
    for stop in range(5):
        assert run_with_restarts(folder, (1, 1), (stop,)) == whole
        assert run_with_restarts(folder, (1, 2), (stop,)) == whole
    assert run_with_restarts(folder, (1, 2, 4, 1), (1, 2, 3)) == whole
    assert run_with_restarts(folder, (4, 3, 1, 2), (1, 1, 3)) == whole


def test_more_ranks_than_records_and_shards_of_one(tmp_path: Path) -> None:
    """Uneven ends: every rank gets through every step, with nothing to do in some."""
    records = make_records()[:3]
    folder = tmp_path / "few"
    build_shards(records, folder, provenance={}, max_records_per_shard=1)
    index = ShardIndex.load(folder)
    spec = StageSpec(name="stage1", rates=((Task.ER, Fraction(1)),), epochs=5)
    stage = plan_stages(index, (spec,), seed=1, block_shards=2).stages["stage1"]
    for batch, world in ((8, 8), (4, 3), (7, 7), (64, 64)):
        seen = []
        for rank in range(world):
            sampler = WeightedTaskSampler(
                stage, index, global_batch_size=batch, rank=rank, world_size=world
            )
            stream = StepStream(sampler, ShardReader(folder, index), VIEW)
            assert len(stream) == -(-15 // batch)
            seen += all_samples(stream)
        assert sorted(sample.position for sample in seen) == list(range(15))
        assert Counter(sample.record.key for sample in seen) == dict.fromkeys(
            (record.key for record in records), 5
        )
