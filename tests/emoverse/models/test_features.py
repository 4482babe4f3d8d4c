"""The feature cache: equal to the live path, shared, and never a torn or foreign value."""

import multiprocessing
import os
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from emoverse.models import features
from emoverse.models.emoverse import EmoVerse, compose
from emoverse.models.features import (
    CacheKey,
    FeatureCache,
    KeyedFeatures,
    blank_feature,
    cache_key,
    compute_features,
    record_ordinals,
    vision_fingerprint,
)
from emoverse.models.internvl.checkpoint import build_native

Make = Callable[..., Any]
KEY = CacheKey(
    vision="v",
    shards="s",
    num_records=5,
    frames_per_clip=2,
    image_size=56,
    tokens=4,
    channels=128,
    dtype="float32",
)


@pytest.fixture
def model(make_tiny: Make, make_settings: Make) -> EmoVerse:
    config = make_tiny("phi3")
    return compose(build_native(config, seed=3), config, make_settings())


def clip(seed: int, frames: int = 2) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (frames, 56, 56, 3), dtype=np.uint8)


def test_equal_to_the_live_path(tmp_path: Path, model: EmoVerse) -> None:
    """Bit for bit clip by clip; to rounding when a batch goes through the tower together."""
    cache = FeatureCache(tmp_path, KEY)
    clips = [clip(seed) for seed in range(5)]
    for ordinal, frames in enumerate(clips):
        cache.put(ordinal, "clip", compute_features(model, frames))
    together = model.vision_features(torch.from_numpy(np.concatenate(clips)))
    for ordinal, frames in enumerate(clips):
        stored = torch.from_numpy(cache.get(ordinal, "clip"))
        assert torch.equal(stored, model.vision_features(torch.from_numpy(frames)))
        batched = together[2 * ordinal : 2 * ordinal + 2]
        torch.testing.assert_close(stored, batched, atol=1e-5, rtol=1e-5)


def test_views_are_separate(tmp_path: Path, model: EmoVerse) -> None:
    cache = FeatureCache(tmp_path, KEY)
    peak = compute_features(model, clip(9, 1))
    cache.put(3, "peak", peak)
    assert cache.has(3, "peak") and not cache.has(3, "clip") and not cache.has(2, "peak")
    whole = compute_features(model, clip(8))
    cache.put(3, "clip", whole)
    cache.put(4, "clip", compute_features(model, clip(7)))
    assert torch.equal(torch.from_numpy(cache.get(3, "peak")), peak)
    assert torch.equal(torch.from_numpy(cache.get(3, "clip")), whole)
    with pytest.raises(KeyError, match="no features of record 0, view clip"):
        cache.get(0, "clip")
    with pytest.raises(IndexError, match="record 5 of a cache for 5 records"):
        cache.has(5, "clip")


def test_bfloat16_is_exact(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, replace(KEY, dtype="bfloat16"))
    values = torch.randn(2, 4, 128).bfloat16()
    cache.put(0, "clip", values)
    assert torch.equal(torch.from_numpy(cache.get(0, "clip")).bfloat16(), values)


def test_wrong_values_are_refused(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, KEY)
    with pytest.raises(ValueError, match=r"view clip must be torch.float32 of shape \(2, 4, 128\)"):
        cache.put(0, "clip", torch.zeros(1, 4, 128))
    with pytest.raises(ValueError, match=r"found torch.bfloat16"):
        cache.put(0, "peak", torch.zeros(1, 4, 128, dtype=torch.bfloat16))


def test_survives_the_process(tmp_path: Path) -> None:
    FeatureCache(tmp_path, KEY).put(1, "peak", torch.ones(1, 4, 128))
    again = FeatureCache(tmp_path, KEY)
    assert again.has(1, "peak") and (again.get(1, "peak") == 1).all()
    assert pickle.loads(pickle.dumps(again)).has(1, "peak")
    assert [path.name for path in tmp_path.iterdir()] == [again.path.name]


def _store(folder: Path, ordinals: range) -> None:
    cache = FeatureCache(folder, KEY)
    for ordinal in ordinals:
        cache.put(ordinal, "clip", torch.full((2, 4, 128), float(ordinal)))


def test_several_processes_share_one_file(tmp_path: Path) -> None:
    """Both create, both write, overlapping; a third that was open before sees everything."""
    watcher = FeatureCache(tmp_path, KEY)
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_store, args=(tmp_path, ordinals))
        for ordinals in (range(4), range(1, 5))
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert all((watcher.get(ordinal, "clip") == ordinal).all() for ordinal in range(5))


def test_the_slower_creator_uses_the_first_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FeatureCache(tmp_path, KEY)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    second = FeatureCache(tmp_path, KEY)
    first.put(0, "peak", torch.ones(1, 4, 128))
    assert second.has(0, "peak")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_torn_write_is_never_read(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, KEY)
    cache.put(2, "clip", torch.ones(2, 4, 128))
    descriptor = os.open(cache.path, os.O_RDWR)
    os.pwrite(descriptor, b"\0\0\0", KEY.slot_start(2, "clip") + 100)
    os.close(descriptor)
    torn = FeatureCache(tmp_path, KEY)
    assert not torn.has(2, "clip")
    torn.put(2, "clip", torch.ones(2, 4, 128))
    assert torn.has(2, "clip") and (torn.get(2, "clip") == 1).all()


def test_another_key_is_another_file(tmp_path: Path) -> None:
    one = FeatureCache(tmp_path, KEY)
    for changes in ({"vision": "w"}, {"shards": "t"}, {"frames_per_clip": 3}):
        assert FeatureCache(tmp_path, replace(KEY, **changes)).path != one.path


def test_a_foreign_or_cut_file_is_refused(tmp_path: Path) -> None:
    path = FeatureCache(tmp_path, KEY).path
    os.truncate(path, KEY.file_bytes - 1)
    with pytest.raises(ValueError, match=r"does not match its name; delete it"):
        FeatureCache(tmp_path, KEY)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage(10, 5, 5))
    with pytest.raises(ValueError, match=r"requires up to .* or set model.cache_features: false"):
        FeatureCache(tmp_path, KEY)


def test_unused_slots_cost_nothing(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, replace(KEY, num_records=100_000))
    cache.put(99_999, "clip", torch.ones(2, 4, 128))
    assert cache.path.stat().st_size > 500 * 2**20
    assert cache.path.stat().st_blocks * 512 < 2**20


def test_fingerprint_follows_the_tower_only(model: EmoVerse) -> None:
    before = vision_fingerprint(model)
    assert before == vision_fingerprint(model)
    with torch.no_grad():
        model.native.lm_head.weight += 1
        assert vision_fingerprint(model) == before
        model.native.model.vision_tower.embeddings.cls_token += 1
    assert vision_fingerprint(model) != before


def fake_index() -> Any:
    """Two shards with two records and one."""
    keys = (("a", "b"), ("c",))
    return SimpleNamespace(
        fingerprint="s",
        num_records=3,
        num_shards=2,
        keys=lambda shard: keys[shard],
        ordinal=lambda shard, slot: 2 * shard + slot,
    )


def test_key_of_a_model(model: EmoVerse) -> None:
    key = cache_key(model, fake_index(), 2)
    assert key == replace(KEY, vision=vision_fingerprint(model), num_records=3)
    assert cache_key(model.to(torch.bfloat16), fake_index(), 2).dtype == "bfloat16"


def test_by_record_key(tmp_path: Path) -> None:
    ordinals = record_ordinals(fake_index())
    assert ordinals == {"a": 0, "b": 1, "c": 2}
    keyed = KeyedFeatures(FeatureCache(tmp_path, KEY), ordinals)
    assert keyed.wants_frames("c", "clip") and keyed("c", "clip") is None
    keyed.cache.put(2, "clip", torch.ones(2, 4, 128))
    assert not keyed.wants_frames("c", "clip")
    found = keyed("c", "clip")
    assert found is not None and found.shape == (2, 4, 128)


def test_blank_feature(model: EmoVerse) -> None:
    blank = blank_feature(model)
    assert blank.shape == (4, 128) and blank.dtype == np.float32
    assert np.array_equal(blank, blank_feature(model))
