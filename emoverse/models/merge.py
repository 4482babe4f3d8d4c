"""Adapters merged into the weights that they change, in fp32, one tensor at a time.

In:  what a stage has trained, by the names of the native model: LoRA's A and B, and whole tensors
     of a fully trained projector.
Out: the weight W + scale * B A for every tensor of the base that they change.
The importer, the export and the hand-over between stages all merge here, so they agree bit by bit.
Legend: I input features, O output features, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What one stage (or adapter folder) has trained: tensors by native name, and alpha / r."""

    tensors: Mapping[str, Tensor]
    scale: float
    origin: str  # for messages


def check_adapters(adapters: Sequence[Adapter], shapes: Mapping[str, Sequence[int]]) -> None:
    """Every tensor of the adapters must change exactly one base tensor of the given shapes.

    Raises:
        ValueError: names the origin, the tensor and what does not fit.
    """
    for adapter in adapters:
        for name, value in adapter.tensors.items():
            end = next((end for end in (LORA_A, LORA_B) if name.endswith(end)), None)
            base = name if end is None else name.removesuffix(end) + ".weight"
            base_shape, own_shape = tuple(shapes.get(base, ())), tuple(value.shape)
            if end is None:
                fits = base_shape == own_shape
            else:
                module = name.removesuffix(end)
                a_RI, b_OR = (adapter.tensors.get(module + half) for half in (LORA_A, LORA_B))
                fits = (
                    a_RI is not None
                    and b_OR is not None
                    and a_RI.shape[0] == b_OR.shape[1]
                    and base_shape == (b_OR.shape[0], a_RI.shape[1])
                )
            if not fits:
                raise ValueError(
                    f"{adapter.origin}: {name} {own_shape} cannot be merged into {base} "
                    f"{base_shape or '(no such tensor)'} of the base; adapter and base must belong "
                    "together"
                )


def merged(name: str, value: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """The base tensor `value` after all adapters, in turn.

    Returns:
        fp32, or `value` itself if no adapter changes it.
    """
    module = name.removesuffix(".weight")
    result = value
    for adapter in adapters:
        if name in adapter.tensors:
            result = adapter.tensors[name].to(result.device, torch.float32)
        if module + LORA_A in adapter.tensors:
            a_RI, b_OR = (adapter.tensors[module + half] for half in (LORA_A, LORA_B))
            result = result.float() + adapter.scale * delta(a_RI, b_OR).to(result.device)
    return result


def delta(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """B A in fp32: O, I."""
    return b_OR.float() @ a_RI.float()
