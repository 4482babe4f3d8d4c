"""The config of `emoverse pretrain`: shape, data and schedule of the nano base. No torch.

In: YAML and overrides, read by `config.load_model` as every config is. Out: a PretrainConfig.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from data_shards.world.scene import IMAGE_SIZE
from emoverse.config.schema import Section

Positive = Annotated[int, Field(ge=1)]


def _check_heads(heads: int, info: ValidationInfo) -> int:
    hidden = info.data.get("hidden")
    if hidden is not None and hidden % heads:
        raise ValueError(f"must divide hidden, which is {hidden}; change one of them")
    return heads


class VisionShape(Section):
    """The vision tower, InternViT's architecture at any size."""

    hidden: Positive = Field(description="Width of the tower.")
    layers: Positive = Field(description="Number of transformer layers.")
    heads: Positive = Field(description="Attention heads per layer.")
    mlp: Positive = Field(description="Width of the feed-forward layers.")
    image_size: Positive = Field(description="Side of a frame in pixels, as rendered.")

    _heads = field_validator("heads")(_check_heads)

    @field_validator("image_size")
    @classmethod
    def _check_image_size(cls, image_size: int) -> int:
        if image_size != IMAGE_SIZE:
            raise ValueError(f"must be {IMAGE_SIZE}, the size of the generic pairs' frames")
        return image_size


class LanguageShape(Section):
    """The language model, Phi-3's or InternLM2.5's architecture at any size."""

    family: Literal["phi3", "internlm2"] = Field(description="Which of the two backbones.")
    hidden: Positive = Field(description="Width of the model.")
    layers: Positive = Field(description="Number of decoder layers.")
    heads: Positive = Field(description="Attention heads per layer.")
    mlp: Positive = Field(description="Width of the feed-forward layers.")
    vocab: Positive = Field(description="Embedding rows: pieces, chat tokens and image tokens.")
    max_positions: Positive = Field(description="Longest sample in tokens.")

    _heads = field_validator("heads")(_check_heads)


class Phase(Section):
    """One phase of pretraining."""

    steps: Positive = Field(description="Optimiser steps.")
    batch: Positive = Field(description="Pictures or pairs per optimiser step over all processes.")
    lr: float = Field(gt=0, description="Peak learning rate, reached after the warm-up.")
    warmup: Positive = Field(description="Warm-up steps from zero to the peak.")


class Gates(Section):
    """Minimum quality of the finished base on held-out identities and dialogues."""

    probe_accuracy: float = Field(
        ge=0, le=1, description="Linear probe of the frozen tower for the face's emotion: accuracy."
    )
    caption_margin: float = Field(
        ge=-1, le=1, description="Sign F1 of captions above the best constant caption's."
    )
    dialogue_accuracy: float = Field(
        ge=0,
        le=1,
        description="Exact answers to who speaks in a turn, what it says, who names an event.",
    )
    samples: Positive = Field(description="Held-out pictures, clips and dialogues per gate.")


class PretrainConfig(Section):
    """Everything that makes a nano base: the same file gives the same weights on one machine."""

    seed: int = Field(
        ge=0,
        description="Seed of tokenizer texts, pictures and pairs; the first weights are fixed.",
    )
    out: Annotated[Path, Field(strict=False)] = Field(
        description="Folder of the finished base; relative to the working directory."
    )
    processes: Positive = Field(description="Local processes; the pairs of a step depend on it.")
    tokenizer_texts: Positive = Field(description="Texts of the world the tokenizer is trained on.")
    vision: VisionShape = Field(description="Shape of the vision tower.")
    llm: LanguageShape = Field(description="Shape of the language model.")
    look: Phase = Field(
        description="First phase: the tower alone learns to name visible signs from all its tokens."
    )
    basics: Phase = Field(
        description="Second phase: all parts, on captions of single faces and word lists to repeat."
    )
    align: Phase = Field(
        description="Third phase: tower, projector and language model on generic pairs."
    )
    talk: Phase = Field(
        description="Fourth phase: all parts, mostly on dialogues, from the stored third phase."
    )
    weight_decay: float = Field(ge=0, description="AdamW weight decay of matrices.")
    clip: float = Field(gt=0, description="Largest gradient norm.")
    gates: Gates = Field(description="Minimum quality of the finished base.")

    @field_validator("look", "basics", "align", "talk")
    @classmethod
    def _check_batch(cls, phase: Phase, info: ValidationInfo) -> Phase:
        processes = info.data.get("processes")
        if processes is not None and phase.batch % processes:
            raise ValueError(f"batch must be a multiple of processes, which is {processes}")
        return phase
