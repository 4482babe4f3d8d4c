"""The optimiser of a stage: AdamW parameter groups and the learning rate as a function of the step.

In: the model's trainable parameters by part ("lora", "projector") and the stage's settings.
Out: a torch AdamW, and `lr_factor`, a pure function. The schedule has no state: the learning rate
is computed from the index of the step, so a resumed run cannot drift.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

NamedParameters = Sequence[tuple[str, nn.Parameter]]


class OptimSettings(Protocol):
    """What this file reads of `stages.<name>.optim`; learning rates are peak values."""

    @property
    def lr_lora(self) -> float: ...
    @property
    def lr_projector(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...


def warmup_steps(fraction: float, num_steps: int) -> int:
    """Warm-up steps for a share of the stage, rounded up: any share above 0 warms up."""
    return min(num_steps, math.ceil(fraction * num_steps))


def lr_factor(step: int, *, num_steps: int, warmup: int, min_ratio: float) -> float:
    """Learning rate of 0-based `step` as a share of its peak.

    Linear warm-up from 1/warmup to 1, then a half cosine that would reach `min_ratio` one step
    after the last: the first step and the last one learn too.
    """
    assert 0 <= step < num_steps, f"step {step} is outside the stage's {num_steps} steps"
    if step < warmup:
        return (step + 1) / warmup
    # The peak is the last warm-up step; the decay counts from there, without a plateau.
    peak = max(warmup, 1) - 1
    progress = (step - peak) / (num_steps - peak)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(
    trainable: Mapping[str, NamedParameters], optim: OptimSettings
) -> list[dict[str, Any]]:
    """AdamW groups: LoRA, projector matrices, projector vectors (no weight decay); none is empty.

    Raises:
        ValueError: nothing is trainable, or a part has no learning rate.
    """
    peak = {"lora": optim.lr_lora, "projector": optim.lr_projector}
    unknown = sorted(set(trainable) - set(peak))
    if unknown:
        raise ValueError(f"trainable parts {unknown} have no learning rate; known: {sorted(peak)}")
    groups = []
    for part in peak:
        named = list(trainable.get(part, ()))
        # Weight decay on biases and norm gains only shrinks them towards a wrong value.
        matrices = [p for _, p in named if p.ndim >= 2]
        vectors = [p for _, p in named if p.ndim < 2]
        for name, params, decay in (
            (part, matrices, optim.weight_decay),
            (f"{part}_vectors", vectors, 0.0),
        ):
            if params:
                lr = {"lr": peak[part], "initial_lr": peak[part]}
                groups.append({"name": name, "params": params, "weight_decay": decay, **lr})
    if not groups:
        raise ValueError(
            "nothing is trainable: model.projector is frozen and model.lora has no target; "
            "train the projector (model.projector: full) or give LoRA a preset"
        )
    return groups


def build_optimizer(groups: list[dict[str, Any]], optim: OptimSettings) -> torch.optim.AdamW:
    """Plain torch AdamW: needs no compiled operator, so CPU and GPU runs share one code path."""
    return torch.optim.AdamW(groups, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)


def set_learning_rate(param_groups: Iterable[dict[str, Any]], factor: float) -> None:
    """Sets every group to `factor` times its own peak."""
    for group in param_groups:
        group["lr"] = group["initial_lr"] * factor
