"""Packing: nothing is lost, nothing leaks across segments, weights are those of the loss mode."""

import io
import math
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.stream import Damage
from data_shards.tasks import TASKS, Task
from emoverse.data.collate import (
    Batch,
    FrameShape,
    collate,
    pack,
    plan_packs,
    zero_batch,
)
from emoverse.data.encode import Example
from emoverse.loss import LossMode

VOCAB, CONTEXT, TOKENS, SIZE, CHANNELS = 50, 49, 2, 4, 3
SHAPE = FrameShape(image_context_id=CONTEXT, tokens_per_frame=TOKENS, image_size=SIZE)
FEATURE_SHAPE = FrameShape(
    image_context_id=CONTEXT, tokens_per_frame=TOKENS, image_size=SIZE, feature_channels=CHANNELS
)
MODES: list[LossMode] = ["sample", "token", "square"]


def example(position: int, prompt: int, answer: int, frames: int = 0, **changes: Any) -> Example:
    """An example with its frames first, `prompt` tokens of text and `answer` supervised ones."""
    rng = np.random.default_rng([position, prompt, answer, frames])
    text = rng.integers(0, CONTEXT, prompt + answer)
    ids_T = np.concatenate([np.full(frames * TOKENS, CONTEXT), text]).astype(np.int64)
    labels_T = np.where(np.arange(len(ids_T)) < len(ids_T) - answer, -100, ids_T)
    pixels = rng.integers(0, 256, (frames, SIZE, SIZE, 3)).astype(np.uint8) if frames else None
    values = {
        "position": position,
        "task": TASKS[position % len(TASKS)],
        "key": f"r{position}",
        "ids_T": ids_T,
        "labels_T": labels_T.astype(np.int64),
        "pixels_F": pixels,
        "view": "clip" if frames else "none",
        "num_frames": frames,
    }
    return Example(**(values | changes))


@st.composite
def steps(draw: st.DrawFn) -> list[Example]:
    shapes = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(0, 3))
    return [example(n, *shape) for n, shape in enumerate(draw(st.lists(shapes, max_size=9)))]


def batches_of(step: list[Example], pack_tokens: int, mode: LossMode) -> list[Batch]:
    return [collate(group, mode) for group in plan_packs(step, pack_tokens, SHAPE)]


def losses(batch: Batch) -> torch.Tensor:
    """Weighted losses of a causal stand-in for a model that only sees its own segment."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64)
    head = torch.randn(8, VOCAB, generator=generator, dtype=torch.float64)
    hidden = []
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        place = 1 + batch.position_ids_T[start:end, None]
        hidden.append(torch.cumsum(table[batch.ids_T[start:end]], 0) / place)
    logits = torch.cat(hidden)[batch.supervised_rows] @ head
    losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    return losses * batch.row_weights


@settings(max_examples=60, deadline=None)
@given(steps(), st.integers(25, 120), st.sampled_from(MODES))
def test_packed_equals_unpacked(step: list[Example], pack_tokens: int, mode: LossMode) -> None:
    packed = batches_of(step, pack_tokens, mode)
    alone = [collate([one], mode) for one in step]

    def total(batches: list[Batch]) -> float:
        return sum(float(losses(batch).sum()) for batch in batches)

    assert total(packed) == pytest.approx(total(alone), rel=1e-6)  # the weights are float32
    assert sum(b.normaliser for b in packed) == pytest.approx(sum(b.normaliser for b in alone))
    by_task = torch.zeros(2, len(TASKS), dtype=torch.float64)
    for row, batches in enumerate((packed, alone)):
        for batch in batches:
            by_task[row].index_add_(0, batch.task_of_row, losses(batch))
    assert torch.allclose(by_task[0], by_task[1], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(steps(), st.integers(25, 120), st.sampled_from(MODES))
def test_batches_hold_the_step_once_and_their_weights_sum_to_the_normaliser(
    step: list[Example], pack_tokens: int, mode: LossMode
) -> None:
    batches = batches_of(step, pack_tokens, mode)
    assert sorted(p for batch in batches for p in batch.positions) == list(range(len(step)))
    for batch in batches:
        check_shapes(batch)
        inside = [step[position] for position in batch.positions]
        assert batch.keys == tuple(one.key for one in inside)
        assert batch.tasks == tuple(one.task for one in inside)
        assert sum(len(one.ids_T) for one in inside) <= pack_tokens
        assert float(batch.weights_T.double().sum()) == pytest.approx(batch.normaliser, rel=1e-6)
        assert float(batch.row_weights.double().sum()) == pytest.approx(batch.normaliser, rel=1e-6)
        frames = sum(one.num_frames for one in inside)
        assert batch.num_images == (frames or 1)
    if mode == "sample":
        assert sum(batch.normaliser for batch in batches) == pytest.approx(len(step))


def check_shapes(batch: Batch) -> None:
    length, rows = batch.num_tokens, len(batch.supervised_rows)
    for tensor, dtype in (
        (batch.ids_T, torch.int64),
        (batch.labels_T, torch.int64),
        (batch.position_ids_T, torch.int64),
        (batch.weights_T, torch.float32),
    ):
        assert tensor.shape == (length,) and tensor.dtype == dtype
    for tensor, dtype in (
        (batch.supervised_rows, torch.int64),
        (batch.targets, torch.int64),
        (batch.row_weights, torch.float32),
        (batch.task_of_row, torch.int64),
    ):
        assert tensor.shape == (rows,) and tensor.dtype == dtype
    assert batch.cu_seqlens.dtype == torch.int32
    lengths = batch.cu_seqlens.diff()
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == length
    assert batch.max_seqlen == int(lengths.max()) and isinstance(batch.max_seqlen, int)
    expected = torch.cat([torch.arange(int(n)) for n in lengths])
    assert torch.equal(batch.position_ids_T, expected)
    # Row t predicts t + 1, and both lie in one segment.
    assert torch.equal(batch.targets, batch.ids_T[batch.supervised_rows + 1])
    assert torch.equal(batch.targets, batch.labels_T[batch.supervised_rows + 1])
    assert torch.equal(batch.row_weights, batch.weights_T[batch.supervised_rows + 1])
    assert bool((batch.position_ids_T[batch.supervised_rows + 1] > 0).all())
    assert int((batch.labels_T != -100).sum()) == rows
    assert int((batch.ids_T == CONTEXT).sum()) == batch.num_images * TOKENS
    frames = batch.pixels if batch.features is None else batch.features
    assert (0 if frames is None else len(frames)) == batch.num_images


def test_weights_of_the_modes() -> None:
    step = [example(0, 3, 1), example(1, 2, 4)]
    expected = {"sample": (1.0, 0.25, 2.0), "token": (1.0, 1.0, 5.0), "square": (1.0, 0.5, 3.0)}
    for mode in MODES:
        batch = collate(step, mode)
        first, second, normaliser = expected[mode]
        assert batch.weights_T.tolist() == [0, 0, 0, first, 0, 0, *[second] * 4]
        assert batch.normaliser == normaliser
        assert batch.supervised_rows.tolist() == [2, 5, 6, 7, 8]
        assert batch.task_of_row.tolist() == [0, 1, 1, 1, 1]
    assert math.isclose(collate([example(0, 1, 2)], "square").normaliser, math.sqrt(2))


def test_frames_stand_in_the_order_of_their_places() -> None:
    step = [example(0, 1, 1, 2), example(1, 1, 1), example(2, 1, 1, 1)]
    batch = collate(step, "sample")
    assert batch.pixels is not None and batch.pixels.dtype == torch.uint8
    assert step[0].pixels_F is not None and step[2].pixels_F is not None
    expected = np.concatenate([step[0].pixels_F, step[2].pixels_F])
    assert np.array_equal(batch.pixels.numpy(), expected)
    undecoded = [replace(one, pixels_F=None) for one in step]
    given = collate(undecoded, "sample", expected)
    assert given.pixels is not None
    assert given.pixels.data_ptr() == expected.__array_interface__["data"][0], "not copied"


def test_features_instead_of_pixels() -> None:
    grey = np.ones((TOKENS, CHANNELS), dtype=np.float32)
    cached = example(
        0, 2, 1, 2, pixels_F=None, features=np.broadcast_to(grey, (2, TOKENS, CHANNELS))
    )
    batch = collate([cached, example(1, 2, 1)], "sample")
    assert batch.pixels is None and batch.features is not None
    assert batch.features.shape == (2, TOKENS, CHANNELS)
    assert batch.features.dtype == torch.float32
    check_shapes(batch)
    with pytest.raises(ValueError, match="either pixels or cached features"):
        collate([cached, example(1, 2, 1, 1)], "sample")


@pytest.mark.parametrize("shape", [SHAPE, FEATURE_SHAPE])
def test_text_only_pack_gets_a_filler(shape: FrameShape) -> None:
    (group,) = plan_packs([example(0, 3, 2), example(1, 2, 1)], 8, shape)
    batch = collate(group, "sample")
    check_shapes(batch)
    assert batch.positions == (0, 1)
    assert batch.normaliser == 2.0
    assert batch.num_images == 1 and batch.num_tokens == 8 + TOKENS
    assert len(batch.cu_seqlens) == 4
    assert (batch.features is None) == (shape.feature_channels is None)


@pytest.mark.parametrize("shape", [SHAPE, FEATURE_SHAPE])
def test_zero_batch(shape: FrameShape) -> None:
    batch = zero_batch(shape)
    check_shapes(batch)
    assert batch.normaliser == 0.0
    assert batch.num_images == 1 and batch.num_tokens == TOKENS
    assert batch.positions == batch.keys == batch.tasks == ()
    assert float(batch.row_weights.sum()) == 0.0
    frames = batch.pixels if shape.feature_channels is None else batch.features
    assert frames is not None
    assert frames.shape[1:] == ((SIZE, SIZE, 3) if batch.features is None else (TOKENS, CHANNELS))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(41, 100), st.randoms())
def test_first_fit_decreasing(lengths: list[int], pack_tokens: int, random: Any) -> None:
    step = [example(n, length, 1) for n, length in enumerate(lengths)]
    packs = pack(step, pack_tokens)
    shuffled = list(step)
    random.shuffle(shuffled)
    by_position = [[one.position for one in group] for group in packs]
    assert [[one.position for one in group] for group in pack(shuffled, pack_tokens)] == by_position
    assert all(group == sorted(group) for group in by_position)
    sums = [sum(len(one.ids_T) for one in group) for group in packs]
    assert all(0 < total <= pack_tokens for total in sums)
    # No two packs could be one.
    assert all(a + b > pack_tokens for n, a in enumerate(sums) for b in sums[n + 1 :])


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        collate([], "sample")
    with pytest.raises(ValueError, match="record r0, task msa: nothing is supervised"):
        collate([example(0, 3, 0)], "sample")
    message = (
        r"data.pack_tokens must be at least as long as the longest sample, but record r0 \(task "
        r"msa\) has 11 tokens and data.pack_tokens is 10"
    )
    with pytest.raises(ValueError, match=message):
        pack([example(0, 10, 1)], 10)


def test_reports_reach_the_batch() -> None:
    damage = Damage(position=1, task=Task.ER, shard="s", key="k", offset=0, cause="crc")
    step = [example(0, 2, 1, cut_turns=3), example(1, 2, 1, quarantine=(damage,))]
    batch = collate(step, "sample")
    assert batch.cut_turns == (3, 0)
    assert batch.quarantine == (damage,)


def test_batch_moves_and_pickles() -> None:
    batch = collate([example(0, 2, 1, 1)], "sample")
    moved = batch.to("cpu", non_blocking=True)
    assert torch.equal(moved.ids_T, batch.ids_T) and moved.keys == batch.keys
    assert batch.to("meta").pixels.is_meta  # type: ignore[union-attr]
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(batch)
    again = ForkingPickler.loads(buffer.getvalue())
    assert torch.equal(again.ids_T, batch.ids_T)
    assert torch.equal(again.pixels, batch.pixels)
    assert again.normaliser == batch.normaliser
