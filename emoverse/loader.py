"""Steps to batches, ahead of time and in other processes.

In: `data_shards.stream.StepStream`, which gives a step's samples of this rank. Out: for every step
the list of this rank's packs, in order. An item is a pure function of its step, so workers hold no
state: to resume is to start at another step, with any number of workers.
"""

from __future__ import annotations

import dataclasses
import pickle
import signal
import traceback
from collections.abc import Iterator
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from data_shards.stream import Sample
from emoverse.collate import Batch, FrameShape, LossMode, make_batches, zero_batch
from emoverse.encode import EncodeOptions, encode_sample
from emoverse.stop import STOP_SIGNALS
from emoverse.tokenizer import Tokenizer


class Steps(Protocol):
    """What the loader needs of `data_shards.stream.StepStream`."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> list[Sample]: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoaderOptions:
    """workers: processes of this rank that read, decode and encode; 0 does it in this process.
    prefetch: steps that every worker prepares ahead. pack_tokens: most tokens of a pack.
    pin_memory: page-locked tensors, for copies to a GPU that do not block.
    """

    pack_tokens: int
    loss_mode: LossMode = "sample"
    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    """An error on its way out of a worker; torch would bury its message in a traceback."""

    error: Exception
    where: str


class _StepBatches(Dataset[list[Batch] | _Failure]):
    """step -> packs, or what went wrong."""

    def __init__(self, loader: StepLoader) -> None:
        self._loader = loader

    def __getitem__(self, step: int) -> list[Batch] | _Failure:
        try:
            return self._loader.batches(step)
        except Exception as error:
            where = f"In the data worker, at step {step}:\n{traceback.format_exc()}"
            return _Failure(error=_portable(error), where=where)


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

    def batches(self, step: int) -> list[Batch]:
        """The packs of one step, made here and now; empty if this rank has no share in it."""
        samples = self._steps[step]
        return make_batches(
            [encode_sample(sample, self._tokenizer, self._encode) for sample in samples],
            pack_tokens=self._options.pack_tokens,
            loss_mode=self._options.loss_mode,
            frame_shape=self._frame_shape,
        )

    def zero_batch(self) -> Batch:
        """The pack of weight 0 for a rank that has fewer packs than the others."""
        return zero_batch(self._frame_shape)

    def iterate(self, start: int, stop: int | None = None) -> Iterator[list[Batch]]:
        """The packs of the steps `start` .. `stop - 1`, by default up to the last one.

        Raises what reading and encoding raise; out of a worker, with its traceback as a note.
        """
        stop = len(self) if stop is None else stop
        if self._options.workers == 0:
            for step in range(start, stop):
                yield self.batches(step)
            return
        for item in self._data_loader(start, stop):
            if isinstance(item, _Failure):
                item.error.add_note(item.where)
                raise item.error
            yield item

    def _data_loader(self, start: int, stop: int) -> DataLoader[list[Batch] | _Failure]:
        return DataLoader(
            _StepBatches(self),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self._options.workers,
            prefetch_factor=self._options.prefetch,
            pin_memory=self._options.pin_memory,
            worker_init_fn=_ignore_signals,
            # Its own generator: the default one would draw from the generator of the training.
            generator=torch.Generator().manual_seed(0),
            # Forked workers share the index, the tokenizer and cached features with this process.
            multiprocessing_context="fork",
        )


def _portable(error: Exception) -> Exception:
    """The error if it survives pickling, else one with the same message."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception as reason:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        return kind(f"{error} ({type(error).__name__} could not be pickled: {reason})")
    assert isinstance(copy, Exception)
    return copy


def _ignore_signals(worker: int) -> None:
    """The training process decides about stopping; schedulers signal its children as well."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
