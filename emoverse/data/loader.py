"""The batches of a stage, step by step, prepared ahead of time in data workers.

In: the config, the index, this rank's sampler and the model. Out: `StepLoader`. A step's batches
are a pure function of the step (`pipeline.py`), so workers hold no state: to resume is to start at
another step, with any number of workers.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from data_shards.plan.sampler import WeightedTaskSampler
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.stream import Sample, StepStream, View, ViewOptions, view_frames
from emoverse.config.schema import Config
from emoverse.data.collate import Batch, FrameShape
from emoverse.data.encode import encode_options, open_tokenizer, view_options
from emoverse.data.pipeline import BatchPipeline
from emoverse.data.workers import PoolOptions, WorkerPool
from emoverse.models.emoverse import EmoVerse
from emoverse.models.features import (
    FeatureCache,
    KeyedFeatures,
    blank_feature,
    cache_key,
    compute_features,
    record_ordinals,
)


@dataclass(frozen=True, kw_only=True)
class StepLoader:
    """The packs of this rank, step by step.

    pool: the processes that read, decode and encode; with 0 workers this process does it.
    """

    pipeline: BatchPipeline
    pool: PoolOptions = field(default_factory=lambda: PoolOptions(workers=0))

    def __len__(self) -> int:
        """Number of steps of the stage."""
        return len(self.pipeline.stream)

    def zero_batch(self) -> Batch:
        """The pack of weight 0 for a rank that has fewer packs than the others."""
        return self.pipeline.zero_batch()

    def iterate(self, start: int, stop: int | None = None) -> Iterator[list[Batch]]:
        """The packs of the steps `start` .. `stop - 1`, by default up to the last one.

        The memory of a step's frames is used again when its batches are gone.

        Raises what `BatchPipeline.batches` raises, with the worker's traceback as a note, and
        WorkerDied.
        """
        steps = range(start, len(self) if stop is None else stop)
        if self.pool.workers == 0:
            yield from map(self.pipeline.batches, steps)
        else:
            yield from WorkerPool(self.pipeline.batches, steps, self.pool)


def build_loader(
    config: Config, index: ShardIndex, sampler: WeightedTaskSampler, model: EmoVerse
) -> StepLoader:
    """The loader of this rank.

    With `model.cache_features` every clip goes through the vision tower once per run directory;
    later epochs, stages and the other ranks read the result from one file.

    Raises:
        ValueError: the shards do not fit the view; see open_tokenizer.
    """
    data, architecture = config.data, model.architecture
    cached, blank = config.model.cache_features, config.model.blank_frames
    assert not (cached and data.workers), "the config allows cached features without workers only"
    view = view_options(data, architecture)
    features: KeyedFeatures | None = None
    if cached and not blank:
        key = cache_key(model, index, data.frames_per_clip, resize=data.resize)
        cache = FeatureCache(config.run.run_dir / "cache", key)
        features = KeyedFeatures(cache, record_ordinals(index))
    stream = StepStream(
        sampler,
        ShardReader(index.folder, index),
        view,
        on_damage=data.on_damage,
        wants_frames=_wants_frames(view, features, blank=blank),
    )
    tokenizer = open_tokenizer(config.model.base, max_tokens=data.max_tokens)
    pipeline = BatchPipeline(
        stream=stream,
        tokenizer=tokenizer,
        encode=encode_options(
            data,
            architecture,
            blank_frames=blank,
            features=features,
            blank_feature=blank_feature(model) if cached and blank else None,
        ),
        frame_shape=FrameShape(
            image_context_id=tokenizer.image_context_id,
            tokens_per_frame=architecture.visual_tokens_per_frame,
            image_size=view.image_size,
            feature_channels=architecture.feature_channels if cached else None,
        ),
        pack_tokens=data.pack_tokens,
        loss_mode=config.train.loss,
        store_features=None if features is None else _feature_writer(config, model, features),
    )
    samples_per_rank = -(-sampler.global_batch_size // sampler.world_size)
    pool = PoolOptions(
        workers=data.workers,
        step_bytes=samples_per_rank * data.most_frames * view.image_size**2 * 3,
        pin=torch.cuda.is_available(),
        timeout_s=data.batch_timeout_s,
    )
    return StepLoader(pipeline=pipeline, pool=pool)


def _wants_frames(
    view: ViewOptions, features: KeyedFeatures | None, *, blank: bool
) -> Callable[[str, View], bool] | None:
    """Which (record key, view) the stream decodes; None is every one."""
    if blank:
        # As many grey frames as the true ones: for some views only decoding tells how many.
        return lambda key, kind: view_frames(kind, view) is None
    return None if features is None else features.wants_frames


def _feature_writer(
    config: Config, model: EmoVerse, features: KeyedFeatures
) -> Callable[[Sample], None]:
    """Computes and stores the features of samples that are not in the cache yet."""
    # ZeRO-3 will divide the model's own tower among the ranks, which then must run it together; but
    # every rank has other clips to compute. A frozen copy belongs to each rank alone.
    tower = None
    if config.train.zero_stage == 3:
        tower = copy.deepcopy(model.native.model.vision_tower)

    def store(sample: Sample) -> None:
        if sample.frames is not None:
            ordinal = features.ordinals[sample.record.key]
            computed = compute_features(model, sample.frames, tower)
            features.cache.put(ordinal, sample.view, computed)

    return store
