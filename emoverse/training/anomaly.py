"""Anomaly checks for debugging: find the first module with a value that is not finite.

In: a model. Out: `NotFinite`, which names the module and whether its output or the gradient of its
output was not finite. The anomaly mode of autograd runs as well and names the operation behind a
NaN. Every check waits for the device, so training becomes slow.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class NotFinite(RuntimeError):
    """The output of a module, or its gradient, is not finite."""


@contextlib.contextmanager
def anomaly_checks(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Check every forward and backward pass of `model` inside the block, if `on`.

    Inner modules end before the modules that contain them, so the first error is the most precise.
    """
    with contextlib.ExitStack() as stack:
        if on:
            stack.enter_context(torch.autograd.set_detect_anomaly(True))
            for name, module in model.named_modules():
                handle = module.register_forward_hook(partial(_check_output, name or "the model"))
                stack.callback(handle.remove)
        yield


def _check_output(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    for tensor in _tensors(output):
        _require_finite(tensor, f"the output of {name}")
        if tensor.requires_grad:
            hook = partial(_check_gradient, name)
            tensor.register_hook(hook)


def _check_gradient(name: str, gradient: Tensor) -> None:
    _require_finite(gradient, f"the gradient of the output of {name}")


def _require_finite(tensor: Tensor, what: str) -> None:
    bad = tensor.numel() - int(torch.isfinite(tensor.detach()).sum())
    if bad:
        raise NotFinite(
            f"{what} is not finite in {bad:,} of {tensor.numel():,} values; train.detect_anomaly "
            "ends the run here; without it the step is skipped and its samples are listed"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors in what a module returned."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
