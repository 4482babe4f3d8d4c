"""Generation: the training forward's own answers, whatever else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.stream import Sample, ViewOptions, decode_view, view_of
from data_shards.tasks import Task
from emoverse.config.schema import Config
from emoverse.data.encode import EncodeOptions, Example, encode_query
from emoverse.data.tokenizer import Tokenizer
from emoverse.inference.generate import Answered, generate_answers, read_answer
from emoverse.models.emoverse import EmoVerse, build_model

MakeConfig = Callable[..., Config]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def tokenizer(tiny_inputs: Any) -> Tokenizer:
    return Tokenizer.load(tiny_inputs.base)


@pytest.fixture
def model(tiny_config: MakeConfig) -> EmoVerse:
    """A tiny model whose answers differ from clip to clip and end at different lengths."""
    config = tiny_config()
    found = build_model(config.model.base, config.model, train="none")
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for value in found.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.25)
    return found


@pytest.fixture(scope="module")
def examples(tiny_inputs: Any, tokenizer: Tokenizer) -> list[Example]:
    """Queries of several tasks and lengths, with frames, one frame, features and none."""
    index = ShardIndex.load(tiny_inputs.shards)
    reader = ShardReader(tiny_inputs.shards, index)
    view = ViewOptions(num_frames=2, image_size=56)
    options = EncodeOptions(
        template="phi3-chat", tokens_per_frame=4, image_size=56, frames_per_clip=2
    )
    found = []
    for slot, task in enumerate((Task.MSA, Task.ECPE, Task.FER, Task.ERI, Task.ECPE, Task.ER)):
        record = reader.read(0, slot)
        kind = view_of(record, task, view)
        frames = decode_view(record, kind, view)
        sample = Sample(position=0, task=task, record=record, view=kind, frames=frames)
        found.append(encode_query(sample, tokenizer, options))
    return found


def test_a_batch_answers_as_every_query_alone(
    model: EmoVerse, tokenizer: Tokenizer, examples: list[Example]
) -> None:
    assert len({len(example.ids_T) for example in examples}) > 3
    together = generate_answers(model, tokenizer, examples, max_new_tokens=NEW_TOKENS)
    alone = [
        generate_answers(model, tokenizer, [example], max_new_tokens=NEW_TOKENS)[0]
        for example in examples
    ]
    assert together == alone
    assert together[::-1] == generate_answers(
        model, tokenizer, examples[::-1], max_new_tokens=NEW_TOKENS
    )
    assert len({answer.text for answer in together}) > 2


def test_answers_are_those_of_the_training_forward(
    model: EmoVerse, tokenizer: Tokenizer, examples: list[Example]
) -> None:
    """Greedy, one token after the other, through the packed layers that training uses."""
    answers = generate_answers(model, tokenizer, examples, max_new_tokens=NEW_TOKENS)
    for example, answer in zip(examples[:3], answers, strict=False):
        ids = torch.from_numpy(example.ids_T)
        new: list[int] = []
        chances = 1.0
        with torch.no_grad():
            features = model.vision_features(torch.from_numpy(np.array(example.pixels_F)))
            for _ in range(NEW_TOKENS):
                hidden = model.native.model.language_model(
                    inputs_embeds=model.embed(ids, features).unsqueeze(0), use_cache=False
                ).last_hidden_state
                chance_V = model.native.lm_head(hidden[0, -1]).float().softmax(-1)
                new.append(int(chance_V.argmax()))
                chances *= float(chance_V.max())
                ids = torch.cat((ids, torch.tensor(new[-1:])))
                if new[-1] in tokenizer.stop_ids:
                    break
        assert answer == read_answer(new, [0.0] * len(new), tokenizer)
        assert answer.confidence == pytest.approx(chances, rel=1e-2)
        assert 0 < answer.confidence < 1


def test_the_mode_of_the_model_is_left_as_it_was(
    model: EmoVerse, tokenizer: Tokenizer, examples: list[Example]
) -> None:
    model.train()
    generate_answers(model, tokenizer, examples[:1], max_new_tokens=2)
    assert model.training
    assert generate_answers(model, tokenizer, [], max_new_tokens=2) == []


def test_an_answer_ends_at_the_first_end_token(tokenizer: Tokenizer) -> None:
    word, stop = tokenizer.encode("Positive."), tokenizer.stop_ids[0]

    def read(ids: list[int]) -> Answered:
        return read_answer(ids, [math.log(0.5)] * len(ids), tokenizer)

    ended = read([*word, stop, tokenizer.pad_id, *word])
    assert ended == Answered(text="Positive.", finished=True, confidence=0)
    assert ended.confidence == pytest.approx(0.5 ** (len(word) + 1), rel=1e-3)  # and no further
    assert read(word) == Answered(text="Positive.", finished=False, confidence=0)
    assert read([stop]) == Answered(text="", finished=True, confidence=0)
    padding_row = tokenizer.vocab_size + 3
    assert read([*word, padding_row, stop]).text == "Positive."
