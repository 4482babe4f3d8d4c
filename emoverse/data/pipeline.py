"""From a stage's sampler to its batches: reader, stream, features, encoding and packing, composed.

In: the config, the index, this rank's sampler and the model (for frozen features). Out: a
`StepLoader`. With `model.cache_features` every clip goes through the vision tower once per run
directory; later epochs, stages and the other ranks read the result from one file.
"""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data_shards.plan.sampler import WeightedTaskSampler
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.stream import Sample, StepStream, ViewOptions, view_frames
from emoverse.config.schema import Config
from emoverse.data.collate import FrameShape
from emoverse.data.encode import EncodeOptions, open_tokenizer
from emoverse.data.loader import LoaderOptions, StepLoader
from emoverse.data.workers import PoolOptions
from emoverse.models.emoverse import EmoVerse
from emoverse.models.features import (
    FeatureCache,
    KeyedFeatures,
    blank_feature,
    cache_key,
    compute_features,
    record_ordinals,
)


class FeatureStream:
    """A stream that sends frames through the frozen tower and stores the features, once per view.

    No frames wait in its samples. The encoder then finds the features of every sample of the step,
    so batches never mix features with pixels, damaged records and their substitutes included.
    """

    def __init__(
        self,
        stream: StepStream,
        model: EmoVerse,
        features: KeyedFeatures,
        tower: nn.Module | None,
    ) -> None:
        self._stream, self._model, self._features = stream, model, features
        self._tower = tower
        self.watch = stream.watch

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, step: int) -> list[Sample]:
        samples = self._stream[step]
        for sample in samples:
            if sample.frames is not None:
                ordinal = self._features.ordinals[sample.record.key]
                computed = compute_features(self._model, sample.frames, self._tower)
                self._features.cache.put(ordinal, sample.view, computed)
        return samples

    def read(self, step: int) -> list[Sample]:
        return self[step]

    def decode(self, sample: Sample, out: NDArray[np.uint8] | None = None) -> Sample:
        raise AssertionError(f"{sample.record.key}: the frames were decoded in read()")


def _step_bytes(sampler: WeightedTaskSampler, frames: int, image_size: int) -> int:
    """Most bytes of frames that one step of a rank holds; `frames` of a sample, at most."""
    samples = -(-sampler.global_batch_size // sampler.world_size)
    return samples * frames * image_size**2 * 3


def build_loader(
    config: Config, index: ShardIndex, sampler: WeightedTaskSampler, model: EmoVerse
) -> StepLoader:
    """The loader of this rank.

    Raises:
        ValueError: the shards cannot serve the view; see open_tokenizer.
    """
    data, architecture = config.data, model.architecture
    cached, blank = config.model.cache_features, config.model.blank_frames
    assert not (cached and data.workers), "the config allows cached features without workers only"
    view = ViewOptions(
        num_frames=data.frames_per_clip,
        image_size=architecture.vision.image_size,
        visual=data.visual,
        resize=data.resize,
        peak_tiles=data.peak_tiles,
    )
    features: KeyedFeatures | None = None
    if cached and not blank:
        key = cache_key(model, index, data.frames_per_clip, resize=data.resize)
        cache = FeatureCache(config.run.run_dir / "cache", key)
        features = KeyedFeatures(cache, record_ordinals(index))
    reader = ShardReader(index.folder, index)
    stream = StepStream(
        sampler,
        reader,
        view,
        on_damage=data.on_damage,
        # Grey frames must be as many as the true ones: some views tell it when they are decoded.
        wants_frames=(lambda key, kind: view_frames(kind, view) is None)
        if blank
        else (features.wants_frames if features else None),
    )
    encode = EncodeOptions(
        template=architecture.template,
        tokens_per_frame=architecture.visual_tokens_per_frame,
        image_size=architecture.vision.image_size,
        max_tokens=data.max_tokens,
        frames_per_clip=data.frames_per_clip,
        give_emotion=data.give_emotion,
        blank_frames=blank,
        features=features,
        blank_feature=blank_feature(model) if cached and blank else None,
    )
    # ZeRO-3 will divide the model's own tower among the ranks, which then must run it together; but
    # every rank has other clips to compute. A frozen copy belongs to each rank alone.
    tower = None
    if features is not None and config.train.zero_stage == 3:
        tower = copy.deepcopy(model.native.model.vision_tower)
    tokenizer = open_tokenizer(config.model.base, max_tokens=data.max_tokens)
    return StepLoader(
        FeatureStream(stream, model, features, tower) if features else stream,
        tokenizer,
        encode,
        LoaderOptions(
            pack_tokens=data.pack_tokens,
            loss_mode=config.train.loss,
            pool=PoolOptions(
                workers=data.workers,
                step_bytes=_step_bytes(sampler, data.most_frames, view.image_size),
                pin=torch.cuda.is_available(),
                timeout_s=data.batch_timeout_s,
            ),
        ),
        frame_shape=FrameShape(
            image_context_id=tokenizer.image_context_id,
            tokens_per_frame=architecture.visual_tokens_per_frame,
            image_size=architecture.vision.image_size,
            feature_channels=architecture.feature_channels if cached else None,
        ),
    )
