"""Steps to batches, ahead of time and in other processes.

In: `data_shards.stream.StepStream`, which gives a step's samples of this rank. Out: for every step
the list of this rank's packs, in order. An item is a pure function of its step, so workers hold no
state: to resume is to start at another step, with any number of workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_shards.stream import Sample
from emoverse.data.collate import Batch, FrameShape, make_batches, zero_batch
from emoverse.data.encode import EncodeOptions, Example, encode_sample
from emoverse.data.shared_memory import Desk
from emoverse.data.tokenizer import Tokenizer
from emoverse.data.workers import PoolOptions, WorkerPool
from emoverse.loss import LossMode


class Steps(Protocol):
    """What the loader needs of `data_shards.stream.StepStream`."""

    watch: Callable[[str], object]  # told which record is worked on

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> list[Sample]: ...

    def read(self, step: int) -> list[Sample]: ...

    def decode(self, sample: Sample, out: NDArray[np.uint8] | None = None) -> Sample: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoaderOptions:
    """pack_tokens: most tokens of a pack. pool: the processes of this rank that read, decode and
    encode; with 0 workers this process does it.
    """

    pack_tokens: int
    loss_mode: LossMode = "sample"
    pool: PoolOptions = dataclasses.field(default_factory=lambda: PoolOptions(workers=0))


class StepLoader:
    """The packs of this rank, step by step."""

    def __init__(
        self,
        steps: Steps,
        tokenizer: Tokenizer,
        encode: EncodeOptions,
        options: LoaderOptions,
        *,
        frame_shape: FrameShape,
    ) -> None:
        self._steps = steps
        self._tokenizer = tokenizer
        self._encode = encode
        self._options = options
        self._frame_shape = frame_shape

    def __len__(self) -> int:
        """Number of steps of the stage."""
        return len(self._steps)

    def batches(self, step: int, desk: Desk | None = None) -> list[Batch]:
        """The packs of one step, made here and now; empty if this rank has no share in it.

        With a `desk` the frames lie in its shared memory. Lengths are known before pictures are, so
        samples are packed first and each frame is decoded to its place in its batch.
        """
        if desk is not None:
            self._steps.watch = desk.ring.say
        try:
            return self._pack(self._steps.read(step), desk)
        except _Damaged:
            # Substitutes have other lengths: pack again, when every sample is known to be whole.
            return self._pack(self._steps[step], desk)

    def _pack(self, samples: Sequence[Sample], desk: Desk | None) -> list[Batch]:
        """The packs of some samples; raises _Damaged at the first waiting one of damaged media."""
        if desk is not None:
            desk.clear()
        frames = _Frames(self._steps, samples, self._frame_shape.image_size, desk)
        return make_batches(
            [encode_sample(sample, self._tokenizer, self._encode) for sample in samples],
            pack_tokens=self._options.pack_tokens,
            loss_mode=self._options.loss_mode,
            frame_shape=self._frame_shape,
            pixels=frames.of,
        )

    def zero_batch(self) -> Batch:
        """The pack of weight 0 for a rank that has fewer packs than the others."""
        return zero_batch(self._frame_shape)

    def iterate(self, start: int, stop: int | None = None) -> Iterator[list[Batch]]:
        """The packs of the steps `start` .. `stop - 1`, by default up to the last one.

        Raises what reading and encoding raise; out of a worker, with its traceback as a note, and
        WorkerDied. A step's frames are the worker's again when its batches are gone.
        """
        stop = len(self) if stop is None else stop
        if self._options.pool.workers == 0:
            for step in range(start, stop):
                yield self.batches(step)
            return
        yield from WorkerPool(self.batches, range(start, stop), self._options.pool)


class _Damaged(Exception):
    """The media of a sample are damaged; another one stands at its position."""


class _Frames:
    """The frames of a step's packs: decoded to where they stay, or copied if they are there."""

    def __init__(
        self, steps: Steps, samples: Sequence[Sample], image_size: int, desk: Desk | None
    ) -> None:
        self._steps = steps
        self._samples = {sample.position: sample for sample in samples}
        self._image_size = image_size
        self._desk = desk

    def of(self, examples: Sequence[Example]) -> NDArray[np.uint8]:
        """uint8 [F, size, size, 3]; raises _Damaged at the first sample of damaged media."""
        size, start = self._image_size, 0
        num_frames = sum(example.num_frames for example in examples)
        shape = (num_frames, size, size, 3)
        pixels = np.empty(shape, np.uint8) if self._desk is None else self._desk.allocate(shape)
        for example in examples:
            place = pixels[start : start + example.num_frames]
            start += example.num_frames
            if example.pixels_F is not None:
                place[:] = example.pixels_F
                continue
            waiting = self._samples[example.position]
            if self._steps.decode(waiting, place).replaced > waiting.replaced:
                raise _Damaged
        return pixels
