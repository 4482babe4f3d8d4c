"""The arguments and results of the engine, importable without deepspeed.

In: packs, and placeholders of weights that are still to be read. Out: the result of a step, the
trained state, or `BadNumbers`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class BadNumbers(RuntimeError):
    """A step that must not be used, on every rank; weights and moments are those before it."""

    def __init__(self, reason: str, result: "StepResult", rank_loss: list[float]) -> None:
        super().__init__(reason)
        self.result = result  # of the forward and backward passes
        self.rank_loss = rank_loss  # sum of weighted cross entropies of each rank's own packs


class Packs(Protocol):
    """A packed batch as the engine sees it."""

    def to(self, device: torch.device) -> "Packs": ...


class Placeholders(Protocol):
    """Parameters without memory, and their values, in the same order on every rank."""

    def values(self) -> Iterator[tuple[nn.Parameter, Tensor]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One optimiser step over all ranks. Lists are per task, in the canonical order."""

    loss: float  # sum of weighted cross entropies / normaliser
    task_loss: list[float]  # sum of weighted cross entropies
    task_weight: list[float]  # sum of token weights
    task_tokens: list[int]  # supervised tokens
    grad_norm: float  # before clipping
    forward_s: float  # of this rank: its forward passes


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedState:
    """All that training changes: fp32 CPU tensors by parameter name, full shapes.

    `params` are the master weights; `exp_avg` and `exp_avg_sq` AdamW's moments after `updates`
    optimiser steps. On ranks other than 0 the mappings of an exported state are empty.
    """

    params: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    updates: int


def check_finite(loss: float, grad_norm: float) -> str | None:
    """The reason to skip a step whose numbers are not finite, else None."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"{name} is not finite: {value}"
    return None
