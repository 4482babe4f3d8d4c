"""Adapters folded into the weights below them, in fp32, one tensor at a time.

In:  what a stage has trained, by the names of the native model: adapters, and whole tensors of a
     fully trained projector.
Out: the weight W + scale * B A for every tensor of the base that they change.
The importer, the export and the hand-over between stages all merge here, so they agree bit by bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """One finished stage (or adapter folder): tensors by native name, and alpha / r."""

    tensors: Mapping[str, Tensor]
    scale: float
    origin: str  # for messages


def check_folds(folds: Sequence[Fold], shapes: Mapping[str, Sequence[int]]) -> None:
    """Every tensor of the folds must change exactly one base tensor of the given shapes.

    Raises:
        ValueError: names the origin, the tensor and what does not fit.
    """
    for fold in folds:
        for name, value in fold.tensors.items():
            end = next((end for end in (LORA_A, LORA_B) if name.endswith(end)), None)
            base = name if end is None else name.removesuffix(end) + ".weight"
            shape, found = tuple(shapes.get(base, ())), tuple(value.shape)
            if end is None:
                fits = shape == found
            else:
                module = name.removesuffix(end)
                a_RI, b_OR = (fold.tensors.get(module + part) for part in (LORA_A, LORA_B))
                fits = (
                    a_RI is not None
                    and b_OR is not None
                    and a_RI.shape[0] == b_OR.shape[1]
                    and shape == (b_OR.shape[0], a_RI.shape[1])
                )
            if not fits:
                raise ValueError(
                    f"{fold.origin}: {name} {found} cannot be merged into {base} "
                    f"{shape or '(no such tensor)'} of the base; adapter and base must belong "
                    "together"
                )


def is_folded(name: str, folds: Sequence[Fold]) -> bool:
    """Does any of the folds change this tensor of the base?"""
    adapter = name.removesuffix(".weight") + LORA_A
    return any(name in fold.tensors or adapter in fold.tensors for fold in folds)


def folded(name: str, value: Tensor, folds: Sequence[Fold]) -> Tensor:
    """`value` with the folds in it, in turn: fp32, or `value` itself if none of them touches it."""
    if not is_folded(name, folds):
        return value
    module = name.removesuffix(".weight")
    result = value.float()
    for fold in folds:
        if name in fold.tensors:
            result = fold.tensors[name].to(result.device, torch.float32)
        if module + LORA_A in fold.tensors:
            a_RI, b_OR = (fold.tensors[module + end] for end in (LORA_A, LORA_B))
            result = result + fold.scale * delta(a_RI, b_OR).to(result.device)
    return result


def delta(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """B A in fp32: [out, in]."""
    return b_OR.float() @ a_RI.float()
