"""A trained state written for other software: released layout, transformers' layout, or PEFT's.

In:  a checked base folder and the adapters to merge into it. Out: a folder, written shard by shard,
so that an 8B model is exported with one shard in memory. Sums are computed in fp32 and rounded
once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, InternVLForConditionalGeneration, PreTrainedConfig

from emoverse.models.adapters import put_on
from emoverse.models.emoverse import EmoVerse, compose
from emoverse.models.internvl.checkpoint import (
    Released,
    copy_small_files,
    import_checkpoint,
    join_rows,
    split_rows,
)
from emoverse.models.internvl.released_files import ShardWriter
from emoverse.models.merge import LORA_A, LORA_B, Adapter, check_adapters, merged

INTERNVL2, TRANSFORMERS, ADAPTER = "internvl2", "transformers", "adapter"
LAYOUTS = (INTERNVL2, TRANSFORMERS, ADAPTER)
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "added_tokens.json")
PROBE_TOKENS = 24


def write_internvl2(
    released: Released, adapters: Sequence[Adapter], folder: Path, dtype: torch.dtype | None = None
) -> None:
    """The released layout: the same names, order and config.json; `dtype` None keeps theirs."""
    check_adapters(adapters, released.shapes)
    copy_small_files(released.folder, folder)
    writer = ShardWriter(folder)
    for name, tensor in released.weights.tensors():
        entry = released.names[name]
        rows = split_rows(tensor, entry, released.architecture)
        changed = [merged(n, block, adapters) for n, block in zip(entry.native, rows, strict=True)]
        if all(new is old for new, old in zip(changed, rows, strict=True)):
            result = tensor
        else:
            result = join_rows([block.float() for block in changed], entry, released.architecture)
        writer.add(name, result.to(dtype or tensor.dtype, copy=True).contiguous())
    writer.close()


def write_transformers(
    released: Released,
    adapters: Sequence[Adapter],
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    stop_ids: Sequence[int],
) -> None:
    """transformers' own classes: InternVLForConditionalGeneration.from_pretrained reads it."""
    check_adapters(adapters, released.shapes)
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder)
    stored: set[torch.dtype] = set()
    for name, tensor in released.tensors(dtype, adapters=adapters):
        writer.add(name, tensor)
        stored.add(tensor.dtype)
    writer.close()
    config = released.config
    config.architectures = [InternVLForConditionalGeneration.__name__]
    config.dtype = stored.pop() if len(stored) == 1 else torch.float32
    config.save_pretrained(folder)
    text = config.text_config
    assert isinstance(text, PreTrainedConfig)
    GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=list(stop_ids),
        pad_token_id=text.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)
    for file in TOKENIZER_FILES:
        if (released.folder / file).is_file():
            (folder / file).write_bytes((released.folder / file).read_bytes())


@torch.no_grad()
def probe_logits(model: EmoVerse) -> Tensor:
    """Logits of one fixed sample with one frame: T, V in fp32."""
    size, vocab = model.architecture.vision.image_size, model.architecture.llm.vocab
    ramp = np.linspace(0, 255, size * size * 3).astype(np.uint8).reshape(1, size, size, 3)
    context = [model.image_token_id] * model.architecture.visual_tokens_per_frame
    text = [3 + 7 * i % (min(vocab, model.image_token_id) - 3) for i in range(PROBE_TOKENS)]
    assert model.image_token_id not in text
    inputs = model.prepare_generation([(text[:4] + context + text[4:], ramp)])
    logits: Tensor = model.native(**inputs).logits[0]
    return logits.float()


@torch.no_grad()
def load_unmerged(
    released: Released, below: Sequence[Adapter], own: Adapter, dtype: torch.dtype
) -> EmoVerse:
    """The base with `own` unmerged, by hooks on plain layers: W x + scale B (A x)."""
    native, config_json = import_checkpoint(released.folder, dtype, adapters=below)
    for name, value in own.tensors.items():
        if name.endswith(LORA_A):
            module = name.removesuffix(LORA_A)
            a_RI, b_OR = (own.tensors[module + end].to(dtype) for end in (LORA_A, LORA_B))
            native.get_submodule(module).register_forward_hook(_adding(a_RI, b_OR, own.scale))
        elif not name.endswith(LORA_B):
            native.get_parameter(name).copy_(value)
    return compose(native, config_json, None, train="none")


def _adding(a_RI: Tensor, b_OR: Tensor, scale: float) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + scale * (inputs[0] @ a_RI.T) @ b_OR.T

    return hook


def load_exported(folder: Path, layout: str, released: Released, dtype: torch.dtype) -> EmoVerse:
    """An exported folder, loaded as users of that layout do."""
    if layout == TRANSFORMERS:
        native = InternVLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    elif layout == INTERNVL2:
        native, _ = import_checkpoint(folder, dtype)
    else:
        native, _ = import_checkpoint(released.folder, dtype)
        put_on(native, folder)
    native.eval()
    return compose(native, released.config_json, None, train="none")


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Differences of two sets of logits, and how often they predict the same next token."""
    difference = ours - theirs
    return {
        "max_abs": float(difference.abs().max()),
        "relative_rms": float(difference.square().mean().sqrt() / theirs.square().mean().sqrt()),
        "same_choice": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "rows": len(ours),
    }
