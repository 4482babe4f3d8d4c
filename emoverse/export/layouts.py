"""A trained state written as a folder that others read: released layout, transformers', or PEFT's.

In:  a checked base folder and the adapters to merge into it. Out: a folder, written shard by shard,
so that an 8B model is exported with one shard in memory. Sums are in fp32 and rounded once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, InternVLForConditionalGeneration

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
    """The released layout: the same names, order and config.json; `dtype` None keeps the stored."""
    check_adapters(adapters, released.shapes)
    copy_small_files(released.folder, folder)
    writer = ShardWriter(folder)
    for name, tensor in released.weights.tensors():
        entry = released.names[name]
        parts = split_rows(tensor, entry, released.architecture)
        changed = [merged(n, part, adapters) for n, part in zip(entry.native, parts, strict=True)]
        if all(new is old for new, old in zip(changed, parts, strict=True)):
            result = tensor
        else:
            result = join_rows([part.float() for part in changed], entry, released.architecture)
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
    words = [3 + 7 * place % (min(vocab, model.image_token_id) - 3) for place in range(24)]
    assert model.image_token_id not in words and len(words) == PROBE_TOKENS
    inputs = model.prepare_generation([(words[:4] + context + words[4:], ramp)])
    logits: Tensor = model.native(**inputs).logits[0]
    return logits.float()


@torch.no_grad()
def apart(
    released: Released, below: Sequence[Adapter], own: Adapter, dtype: torch.dtype
) -> EmoVerse:
    """Base and adapters apart, by hooks on plain layers: W x + scale B (A x), nothing merged."""
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
    """An exported folder, loaded as its readers will."""
    if layout == TRANSFORMERS:
        native = InternVLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    elif layout == INTERNVL2:
        native, _ = import_checkpoint(folder, dtype)
    else:
        native, _ = import_checkpoint(released.folder, dtype)
        put_on(native, folder)
    return compose(native.eval(), released.config_json, None, train="none")


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """How far two sets of logits are apart, and how often they choose another token."""
    difference = ours - theirs
    return {
        "max_abs": float(difference.abs().max()),
        "relative_rms": float(difference.square().mean().sqrt() / theirs.square().mean().sqrt()),
        "same_choice": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "rows": len(ours),
    }
