"""Examples to batches: packed back to back, without padding, one weight per supervised token.

In: examples of one step (`encode.py`). Out: `Batch`, the only thing the model sees.
The weights are those of emoverse/loss.py.
Shapes: T packed tokens, S supervised rows, B segments, F frames of all segments, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.media.pixels import blank_pixels
from data_shards.stream import Damage
from data_shards.tasks import TASKS, Task
from emoverse.data.encode import IGNORED, Example
from emoverse.loss import LossMode, token_weights

_TASK_INDEX = {task: index for index, task in enumerate(TASKS)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Packed examples.

    Row t predicts token t + 1. `labels_T[t]` and `weights_T[t]` describe token t as a target; the
    four tensors of length S hold the same by row, as the output head needs it.
    Fillers count in B, T and F, but supervise nothing and are not among the samples.
    """

    ids_T: Tensor  # int64
    labels_T: Tensor  # int64, -100 where not supervised
    position_ids_T: Tensor  # int64, from 0 in every segment
    weights_T: Tensor  # float32, 0 where not supervised
    cu_seqlens: Tensor  # int32 [B + 1], boundaries of the segments
    max_seqlen: int  # tokens of the longest segment
    pixels: Tensor | None  # uint8 [F, H, W, 3]
    features: Tensor | None  # float [F, tokens per frame, C]
    num_images: int  # F
    supervised_rows: Tensor  # int64 [S], ascending
    targets: Tensor  # int64 [S]
    row_weights: Tensor  # float32 [S]
    task_of_row: Tensor  # int64 [S], index in TASKS
    positions: tuple[int, ...]  # of the samples in the plan
    tasks: tuple[Task, ...]
    keys: tuple[str, ...]
    cut_turns: tuple[int, ...]
    quarantine: tuple[Damage, ...]  # of all samples together
    normaliser: float  # sum of the weights of the samples, before rounding to float32

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.ids_T)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with all tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        fields = _fields(self)
        for name, value in fields.items():
            if isinstance(value, Tensor):
                fields[name] = change(value)
        return Batch(**fields)

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[dict[str, Any]]]:
        # As arrays: pickle can leave the memory of an array in place (workers.py), while every
        # tensor would take a file descriptor and a shared memory segment of its own.
        fields = _fields(self)
        for name, value in fields.items():
            if isinstance(value, Tensor):
                fields[name] = value.numpy()
        return _rebuild, (fields,)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FrameShape:
    """The shape of a frame of the base model; enough to make a filler.

    feature_channels: C if batches carry features, None if they carry pixels.
    """

    image_context_id: int
    tokens_per_frame: int
    image_size: int
    feature_channels: int | None = None


def collate(
    examples: Sequence[Example],
    loss_mode: LossMode,
    pixels: NDArray[np.uint8] | None = None,
) -> Batch:
    """Pack examples back to back, in the given order.

    `pixels`: the frames [F, H, W, 3] of all examples without features, in the same order, not
    copied; by default a copy of the frames that the examples hold.

    Raises ValueError if an example has nothing supervised, or some have pixels and some features.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    lengths = np.array([len(example.ids_T) for example in examples], dtype=np.int64)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    ids_T = np.concatenate([example.ids_T for example in examples])
    labels_T = np.concatenate([example.labels_T for example in examples])
    weights_T = np.zeros(len(ids_T), dtype=np.float32)
    task_T = np.zeros(len(ids_T), dtype=np.int64)
    normaliser = 0.0
    for example, start, end in zip(examples, borders[:-1], borders[1:], strict=True):
        task_T[start:end] = _TASK_INDEX[example.task]
        supervised_T = _supervised(example)
        if not example.filler:
            weights_T[start:end], total = token_weights(supervised_T, loss_mode)
            normaliser += total
    # Nothing predicts the first token of a segment; `_supervised` asserts that it has no label.
    rows = np.flatnonzero(labels_T[1:] != IGNORED)
    frames, features = _visuals(examples, pixels)
    samples = [example for example in examples if not example.filler]
    return Batch(
        ids_T=torch.from_numpy(ids_T),
        labels_T=torch.from_numpy(labels_T),
        position_ids_T=torch.from_numpy(np.arange(len(ids_T)) - np.repeat(borders[:-1], lengths)),
        weights_T=torch.from_numpy(weights_T),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        pixels=None if frames is None else torch.from_numpy(frames),
        features=None if features is None else torch.from_numpy(features),
        num_images=sum(example.num_frames for example in examples),
        supervised_rows=torch.from_numpy(rows),
        targets=torch.from_numpy(labels_T[rows + 1]),
        row_weights=torch.from_numpy(weights_T[rows + 1]),
        task_of_row=torch.from_numpy(task_T[rows]),
        positions=tuple(example.position for example in samples),
        tasks=tuple(example.task for example in samples),
        keys=tuple(example.key for example in samples),
        cut_turns=tuple(example.cut_turns for example in samples),
        quarantine=tuple(damage for example in samples for damage in example.quarantine),
        normaliser=normaliser,
    )


def pack(examples: Iterable[Example], pack_tokens: int) -> list[list[Example]]:
    """Divide examples into packs of at most `pack_tokens` tokens, first fit decreasing.

    Deterministic: examples of equal length are taken by position. Packs are sorted by position.
    Raises ValueError if an example is longer than a pack.
    """
    packs: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: (-len(example.ids_T), example.position)):
        length = len(example.ids_T)
        if length > pack_tokens:
            raise ValueError(
                f"data.pack_tokens must be at least as long as the longest sample, but record "
                f"{example.key} (task {example.task}) has {length} tokens and data.pack_tokens is "
                f"{pack_tokens}; raise it, or lower data.max_tokens"
            )
        index = next((n for n, free in enumerate(room) if length <= free), len(packs))
        if index == len(packs):
            packs.append([])
            room.append(pack_tokens)
        packs[index].append(example)
        room[index] -= length
    return [sorted(group, key=lambda example: example.position) for group in packs]


def plan_packs(
    examples: Iterable[Example], pack_tokens: int, frame_shape: FrameShape
) -> list[list[Example]]:
    """The packs of one rank's share of a step; none for an empty share. A pure function.

    A pack of text alone gets a filler with one frame (beyond `pack_tokens`): vision tower and
    projector must run in every pack, or ranks would wait for each other in different collectives.
    """
    return [
        group
        if any(example.num_frames for example in group)
        else [*group, zero_example(frame_shape)]
        for group in pack(examples, pack_tokens)
    ]


def zero_example(shape: FrameShape) -> Example:
    """A filler: the context tokens of one grey frame, nothing supervised."""
    ids_T = np.full(shape.tokens_per_frame, shape.image_context_id, dtype=np.int64)
    channels = shape.feature_channels
    return Example(
        position=-1,
        task=TASKS[0],
        key="",
        ids_T=ids_T,
        labels_T=np.full_like(ids_T, IGNORED),
        pixels_F=blank_pixels(1, shape.image_size) if channels is None else None,
        features=None
        if channels is None
        else np.zeros((1, shape.tokens_per_frame, channels), dtype=np.float32),
        view="blank",
        num_frames=1,
        filler=True,
    )


def zero_batch(shape: FrameShape) -> Batch:
    """A pack of weight 0 that runs the whole graph, for a rank with fewer packs than others."""
    return collate([zero_example(shape)], "token")


def _supervised(example: Example) -> NDArray[np.bool_]:
    """Which tokens are supervised; at least one, except in a filler."""
    labels_T = example.labels_T
    assert labels_T.shape == example.ids_T.shape and labels_T[0] == IGNORED
    supervised_T: NDArray[np.bool_] = labels_T != IGNORED
    if not example.filler and not supervised_T.any():
        raise ValueError(
            f"record {example.key}, task {example.task}: nothing is supervised; training batches "
            "take examples of encode_sample, not of encode_query"
        )
    return supervised_T


def _visuals(
    examples: Sequence[Example], pixels: NDArray[np.uint8] | None
) -> tuple[NDArray[np.uint8] | None, NDArray[Any] | None]:
    """All frames in the order of their context tokens: (pixels, features), one of them or none."""
    visual = [example for example in examples if example.num_frames]
    features = [example.features for example in visual if example.features is not None]
    if features and len(features) < len(visual):
        raise ValueError(
            "a batch has either pixels or cached features, but these examples have both; cache the "
            "features of all records or of none"
        )
    if features:
        return None, np.concatenate(features)
    if pixels is None and visual:
        frames = [example.pixels_F for example in visual if example.pixels_F is not None]
        pixels = np.concatenate(frames)
    assert (0 if pixels is None else len(pixels)) == sum(example.num_frames for example in visual)
    return pixels, None


def _fields(batch: Batch) -> dict[str, Any]:
    """The fields by name, not copied (`dataclasses.asdict` would copy)."""
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def _rebuild(fields: dict[str, Any]) -> Batch:
    """The inverse of `Batch.__reduce__`."""
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            fields[name] = torch.from_numpy(value)
    return Batch(**fields)
