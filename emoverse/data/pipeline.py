"""One step of the data flow: read -> encode -> pack -> decode into the packs -> batch.

In: the index of a step. Out: this rank's packed batches of that step, a pure function of the step.
Text alone tells how long a sample is, so samples are packed before their frames are decoded, and
every clip is decoded straight into the memory of its batch. A clip that turns out to be damaged is
replaced by the next record of the plan, which has other text: the step is packed once more.
`loader.py` runs this ahead of time in other processes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_shards.stream import Damage, Sample
from emoverse.data.collate import Batch, FrameShape, collate, plan_packs, zero_batch
from emoverse.data.encode import EncodeOptions, Example, encode_sample
from emoverse.data.shared_memory import SlotAllocator
from emoverse.data.tokenizer import Tokenizer
from emoverse.loss import LossMode

Frames = NDArray[np.uint8]  # [F, size, size, 3]


class SampleStream(Protocol):
    """The methods of `data_shards.stream.StepStream` that the pipeline calls."""

    report: Callable[[str], object]

    def __len__(self) -> int: ...

    def read(self, step: int) -> list[Sample]: ...

    def decode(self, sample: Sample, out: Frames | None = None) -> Frames | Damage: ...

    def substitute(self, sample: Sample, damage: Damage) -> Sample: ...

    def complete(self, sample: Sample) -> Sample: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPipeline:
    """From a step to its batches.

    pack_tokens: most tokens of a pack.
    store_features: computes and stores the frozen vision features of a sample with decoded frames,
        where `encode.features` will find them; None where batches carry pixels.
    """

    stream: SampleStream
    tokenizer: Tokenizer
    encode: EncodeOptions
    frame_shape: FrameShape
    pack_tokens: int
    loss_mode: LossMode = "sample"
    store_features: Callable[[Sample], None] | None = None

    def batches(self, step: int, slots: SlotAllocator | None = None) -> list[Batch]:
        """The packs of one step; none if this rank has no share in it.

        With `slots` the frames lie in shared memory, and the record in work is reported there.

        Raises:
            DamagedSample: a record is damaged and may not or cannot be replaced.
            ValueError: a sample does not fit into `data.max_tokens` or `data.pack_tokens`.
        """
        if slots is not None:
            self.stream.report = slots.buffer.report
        samples = self._read(step)
        packs = self._encode_and_pack(samples)
        pixels, decoded = self._decode_into(packs, samples, slots)
        if any(isinstance(frames, Damage) for frames in decoded.values()):
            samples = self._replace_damaged(samples, decoded)
            packs = self._encode_and_pack(samples)
            pixels, _ = self._decode_into(packs, samples, slots)  # copies, all is decoded now
        return [collate(pack, self.loss_mode, pixels[index]) for index, pack in enumerate(packs)]

    def zero_batch(self) -> Batch:
        """The pack of weight 0 for a rank that has fewer packs than the others."""
        return zero_batch(self.frame_shape)

    def _read(self, step: int) -> list[Sample]:
        """The samples of a step; frames are decoded here only where features must be computed."""
        samples = self.stream.read(step)
        if self.store_features is not None:
            samples = [self.stream.complete(sample) for sample in samples]
            for sample in samples:
                self.store_features(sample)
        return samples

    def _encode_and_pack(self, samples: Sequence[Sample]) -> list[list[Example]]:
        examples = [encode_sample(sample, self.tokenizer, self.encode) for sample in samples]
        return plan_packs(examples, self.pack_tokens, self.frame_shape)

    def _decode_into(
        self,
        packs: Sequence[Sequence[Example]],
        samples: Sequence[Sample],
        slots: SlotAllocator | None,
    ) -> tuple[list[Frames | None], dict[int, Frames | Damage]]:
        """The frames of every pack, and what was decoded for each position.

        The frames of a pack are None if it has features instead, and undefined where one of its
        samples is damaged.
        """
        if slots is not None:
            slots.reset()
        undecoded = {sample.position: sample for sample in samples if sample.undecoded}
        decoded: dict[int, Frames | Damage] = {}
        pixels: list[Frames | None] = []
        size = self.frame_shape.image_size
        for pack in packs:
            visual = [one for one in pack if one.num_frames and one.features is None]
            if not visual:
                pixels.append(None)
                continue
            shape = (sum(example.num_frames for example in visual), size, size, 3)
            frames = np.empty(shape, np.uint8) if slots is None else slots.allocate(shape)
            start = 0
            for example in visual:
                out = frames[start : start + example.num_frames]
                start += example.num_frames
                if example.pixels_F is None:
                    sample = undecoded[example.position]
                    decoded[example.position] = self.stream.decode(sample, out)
                else:
                    out[:] = example.pixels_F
            pixels.append(frames)
        return pixels, decoded

    def _replace_damaged(
        self, samples: Sequence[Sample], decoded: dict[int, Frames | Damage]
    ) -> list[Sample]:
        """The samples, all decoded: substitutes for damaged ones, copies of the intact frames.

        Copies, because the memory of the packs is used again.
        """
        complete = []
        for sample in samples:
            frames = decoded.get(sample.position)
            if isinstance(frames, Damage):
                sample = self.stream.complete(self.stream.substitute(sample, frames))
            elif frames is not None:
                sample = dataclasses.replace(sample, frames=frames.copy(), undecoded=0)
            complete.append(sample)
        return complete
