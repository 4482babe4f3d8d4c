"""A small tokenizer, pipelines over any stream of samples, and batches as comparable values."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from emoverse.data.collate import Batch, FrameShape
from emoverse.data.encode import EncodeOptions
from emoverse.data.pipeline import BatchPipeline, SampleStream
from emoverse.data.tokenizer import Tokenizer
from emoverse.nano.train_tokenizer import train_tokenizer

SIZE, TOKENS = 4, 2  # pixels of a frame's side, visual tokens per frame


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["I won! Positive."] * 9, tmp_path_factory.mktemp("t"), vocab_size=310)


@pytest.fixture
def pipeline_of(small_tokenizer: Tokenizer) -> Callable[..., BatchPipeline]:
    def build(stream: SampleStream, pack_tokens: int = 600) -> BatchPipeline:
        return BatchPipeline(
            stream=stream,
            tokenizer=small_tokenizer,
            encode=EncodeOptions(template="phi3-chat", tokens_per_frame=TOKENS, image_size=SIZE),
            frame_shape=FrameShape(
                image_context_id=small_tokenizer.image_context_id,
                tokens_per_frame=TOKENS,
                image_size=SIZE,
            ),
            pack_tokens=pack_tokens,
        )

    return build


@pytest.fixture
def plain() -> Callable[[list[Batch]], list[dict[str, Any]]]:
    """Batches as comparable values."""

    def of(packs: list[Batch]) -> list[dict[str, Any]]:
        return [
            {
                field.name: value.tolist() if isinstance(value, torch.Tensor) else value
                for field in dataclasses.fields(batch)
                for value in [getattr(batch, field.name)]
            }
            for batch in packs
        ]

    return of
