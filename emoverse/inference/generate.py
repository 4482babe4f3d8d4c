"""Held-out entries in, generated and parsed answers out.

`generate_answers` answers one batch greedily with transformers' own `generate` and left padding;
the packed layers and kernels are for training. `Answerer` leads batches of entries through read,
decode, encode (one batch ahead), generate and parse. The answer to a clip does not depend on its
neighbours in the batch, except for floating-point noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Record
from data_shards.stream import (
    Sample,
    ViewOptions,
    decode_view,
    require_view,
    view_frames,
    view_of,
)
from data_shards.tasks import build_query, format_answer
from emoverse.config.schema import Config
from emoverse.data.encode import (
    EncodeOptions,
    Example,
    encode_options,
    encode_query,
    open_tokenizer,
    view_options,
)
from emoverse.data.tokenizer import Tokenizer
from emoverse.engine import distributed
from emoverse.engine.distributed import World
from emoverse.evaluation.parsing import read_text
from emoverse.evaluation.predictions import Prediction
from emoverse.inference.held_out import Entry, reference_row
from emoverse.models.emoverse import EmoVerse
from emoverse.models.features import (
    FeatureCache,
    KeyedFeatures,
    blank_feature,
    cache_key,
    compute_features,
    record_ordinals,
)

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One generated text; `finished` is False when it was cut at the token limit.

    confidence: the product of the probabilities of its tokens, the end token among them.
    """

    text: str
    finished: bool
    confidence: float = field(compare=False)  # floating-point noise must not make answers differ


def generate_answers(
    model: EmoVerse, tokenizer: Tokenizer, examples: Sequence[Example], *, max_new_tokens: int
) -> list[Answered]:
    """Greedy answers to one batch of queries (`encode.encode_query`), in their order.

    Give examples of similar length: every row is padded to the longest. The model is left in the
    mode that it was in. With the weights of ZeRO-3 this is collective: every rank calls it equally
    often, with examples of its own or with none.
    """
    if not examples and not model.partitioned:
        return []
    was_training = model.training
    model.eval()
    try:
        ids_BL, logprobs_BL = _generate(model, tokenizer, examples, max_new_tokens)
    finally:
        model.train(was_training)
    return [
        read_answer(ids, logprobs, tokenizer)
        for ids, logprobs in zip(ids_BL.tolist(), logprobs_BL.tolist(), strict=True)
    ]


class _ChosenLogProbs(LogitsProcessor):
    """Notes the log-probability of the greedy choice at every step; changes nothing.

    Keeping all logits instead would cost B x V x 4 bytes per generated token.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores.float()
        self.steps.append((logits_BV.amax(-1) - logits_BV.logsumexp(-1)).cpu())
        return scores


@torch.inference_mode()
def _generate(
    model: EmoVerse, tokenizer: Tokenizer, examples: Sequence[Example], max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """New ids, int64 [B, L], padded behind their end token, and their log-probabilities [B, L]."""
    chosen = _ChosenLogProbs()
    # A rank without examples still gathers weights with the others.
    items: list[tuple[Any, Any]] = [(example.ids_T, _visual(example)) for example in examples]
    inputs = model.prepare_generation(items or [([tokenizer.stop_ids[0]], None)])
    # transformers types `generate` by protocols that its own classes do not satisfy.
    generate: Callable[..., Tensor] = getattr(model.native, "generate")  # noqa: B009
    ids_BL = generate(
        **inputs,
        max_new_tokens=max_new_tokens if items else 1,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(tokenizer.stop_ids),
        pad_token_id=tokenizer.pad_id,
        logits_processor=LogitsProcessorList([chosen]),
        synced_gpus=model.partitioned,
    )
    count = len(items)
    return ids_BL.cpu()[:count], torch.stack(chosen.steps, dim=1)[:count]


def _visual(example: Example) -> Any:
    return example.pixels_F if example.features is None else example.features


def read_answer(ids: Sequence[int], logprobs: Sequence[float], tokenizer: Tokenizer) -> Answered:
    """The text up to the first end token, and the probability of what was generated up to there.

    Ids beyond the vocabulary (padding rows of the released output heads) are dropped.
    """
    ends = [index for index, token in enumerate(ids) if token in tokenizer.stop_ids]
    kept = ids[: ends[0]] if ends else ids
    counted = logprobs[: ends[0] + 1] if ends else logprobs
    text = tokenizer.decode(token for token in kept if token < tokenizer.vocab_size)
    confidence = float(f"{math.exp(sum(counted)):.4g}")  # what lies below is floating-point noise
    return Answered(text=text.strip(), finished=bool(ends), confidence=confidence)


@contextmanager
def shared_weights(model: EmoVerse, world: World, precision: str) -> Iterator[None]:
    """While the block runs, each rank holds its share of weights that were deferred; collective.

    A model that holds its own weights is left as it is.
    """
    if model.deferred is None:
        yield
        return
    from emoverse.engine.deepspeed_engine import (
        SharedWeights,  # DeepSpeed, which whole models do not need
    )

    shared = SharedWeights(model, world, precision=precision, deferred=model.deferred)
    try:
        yield
    finally:
        shared.close()


class Answerer:
    """Reads entries of one shard folder and generates a model's answers to them.

    cache_dir: folder of frozen vision features with `model.cache_features`, shared by all states
    and processes; the training's own cache folder may be used.
    """

    def __init__(self, config: Config, index: ShardIndex, cache_dir: Path) -> None:
        self.config = config
        self.index = index
        self.reader = ShardReader(index.folder, index)
        self.tokenizer = open_tokenizer(config.model.base, max_tokens=config.data.max_tokens)
        self._cache_dir = cache_dir

    def predict(
        self, model: EmoVerse, batches: Sequence[Sequence[Entry]]
    ) -> Iterator[list[Prediction]]:
        """The answers, batch by batch. Raises DamagedRecord: a held-out clip is never left out."""
        architecture = model.architecture
        blank = self.config.model.blank_frames
        view = view_options(self.config.data, architecture)
        require_view(self.index, view)
        features = None
        if self.config.model.cache_features and not blank:
            key = cache_key(model, self.index, view.num_frames, resize=view.resize)
            features = KeyedFeatures(
                FeatureCache(self._cache_dir, key), record_ordinals(self.index)
            )
        options = encode_options(
            self.config.data,
            architecture,
            blank_frames=blank,
            features=features,
            blank_feature=blank_feature(model) if blank else None,
        )

        # Agreed before the first batch: a rank that has finished must not start a collective while
        # others are inside theirs.
        rounds = len(batches)
        if model.partitioned:
            rounds = distributed.largest(rounds, model.native.lm_head.weight.device)

        def load(batch: Sequence[Entry]) -> list[tuple[Entry, Record, Example]] | Exception:
            try:
                return [self._load(entry, view, options, features) for entry in batch]
            except Exception as error:
                return error

        def stand_by(rounds: int) -> None:
            for _ in range(rounds):
                generate_answers(model, self.tokenizer, [], max_new_tokens=1)

        for done, (batch, loaded) in enumerate(_one_ahead(load, batches)):
            if isinstance(loaded, Exception):
                # Other ranks still gather weights from this one.
                stand_by(rounds - done if model.partitioned else 0)
                raise loaded
            examples = [example for _, _, example in loaded]
            if features is not None:
                examples = [_with_features(model, one, features) for one in examples]
            limit = self.config.evaluation.max_new_tokens[batch[0].task]
            answers = generate_answers(model, self.tokenizer, examples, max_new_tokens=limit)
            yield [
                self._prediction(entry, record, answer)
                for (entry, record, _), answer in zip(loaded, answers, strict=True)
            ]
        stand_by(rounds - len(batches))

    def _load(
        self,
        entry: Entry,
        view: ViewOptions,
        options: EncodeOptions,
        features: KeyedFeatures | None,
    ) -> tuple[Entry, Record, Example]:
        """Read, decode what is not cached, encode."""
        record = self.reader.read(entry.shard, entry.slot)
        kind = view_of(record, entry.task, view)
        frames = None
        if options.blank_frames:
            wanted = view_frames(kind, view) is None  # as many grey frames as there would be tiles
        else:
            wanted = features is None or features.wants_frames(record.key, kind)
        if wanted:
            try:
                frames = decode_view(record, kind, view)
            except ValueError as error:
                raise self.reader.damaged(entry.shard, entry.slot, str(error)) from error
        sample = Sample(position=0, task=entry.task, record=record, view=kind, frames=frames)
        limit = self.config.evaluation.max_new_tokens[entry.task]
        return entry, record, encode_query(sample, self.tokenizer, options, max_new_tokens=limit)

    def _prediction(self, entry: Entry, record: Record, answer: Answered) -> Prediction:
        row, rule = read_text(reference_row(record, entry.task), answer.text)
        return Prediction(
            row=row,
            label=format_answer(entry.task, record.answer(entry.task)),
            rule=rule,
            finished=answer.finished,
            confidence=answer.confidence,
            baseline=None,
            question=build_query(record, entry.task, give_emotion=self.config.data.give_emotion),
            shard=entry.shard,
            slot=entry.slot,
            source=record.source,
        )


def _with_features(model: EmoVerse, example: Example, features: KeyedFeatures) -> Example:
    """The example with the features of its frames, which are stored for the next state."""
    if example.pixels_F is None:
        return example
    computed = compute_features(model, example.pixels_F)
    features.cache.put(features.ordinals[example.key], example.view, computed)
    return replace(example, pixels_F=None, features=computed.float().numpy())


def _one_ahead(load: Callable[[T], U], items: Sequence[T]) -> Iterator[tuple[T, U]]:
    """`load(item)` for every item; one thread reads the next one while this one is answered."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(load, item) for item in items[:1]]
        for index, item in enumerate(items):
            loaded = pending.pop().result()
            if index + 1 < len(items):
                pending.append(pool.submit(load, items[index + 1]))
            yield item, loaded
