"""Residual add + RMSNorm + S: forward, backward and the gradient of A against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emoverse.kernels import reference
from emoverse.kernels.adapter_types import LoraInput
from emoverse.kernels.dropout import Dropout
from emoverse.kernels.norm import add_norm_lora, add_norm_lora_backward, norm_lora_grad_a

EPS = 1e-5


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("tokens", "width", "rank"), [(1, 8, 4), (37, 72, 8), (18, 264, 24)])
def test_against_the_truth(
    values: Any,
    dropout: Dropout | None,
    keep_factors: Callable[..., Any],
    assert_close: Callable[..., None],
    tokens: int,
    width: int,
    rank: int,
) -> None:
    (x, x64), (update, update64) = values.gapped(tokens, width), values.make(tokens, width)
    weight, weight64 = values.make(width, scale=0.2, offset=1.0)
    a, a64 = values.make(rank, width, scale=0.1)
    grad_y, grad_y64 = values.make(tokens, width)
    grad_r, grad_r64 = values.make(tokens, width)
    grad_s, grad_s64 = values.make(tokens, rank)
    residual64 = x64 + update64
    y64 = reference.rms_norm(residual64, weight64, EPS)
    s64 = 4.0 * (y64 * keep_factors(dropout, tokens, width)) @ a64.T
    total = (y64 * grad_y64).sum() + (residual64 * grad_r64).sum() + (s64 * grad_s64).sum()
    wanted_x, wanted_a = torch.autograd.grad(total, (x64, a64))

    lora = LoraInput(a, 4.0, dropout)
    out = add_norm_lora(x, update, weight, EPS, lora)
    assert_close(out.residual_TD, residual64)
    assert_close(out.y_TD, y64)
    assert_close(out.s_TR, s64, 2)
    saved = out.residual_TD, out.rstd_T, weight
    assert_close(norm_lora_grad_a(saved, lora, grad_s), wanted_a, 2)
    assert_close(add_norm_lora_backward(grad_y, grad_r, saved, lora, grad_s), wanted_x, 2)


@pytest.mark.usefixtures("backend")
def test_neither_update_nor_adapters(values: Any, assert_close: Callable[..., None]) -> None:
    (x, x64), (weight, weight64) = values.make(19, 48), values.make(48, offset=1.0)
    (grad_y, grad_y64), (grad_r, grad_r64) = values.make(19, 48), values.make(19, 48)
    y64 = reference.rms_norm(x64, weight64, EPS)
    (wanted,) = torch.autograd.grad((y64 * grad_y64 + x64 * grad_r64).sum(), x64)
    out = add_norm_lora(x, None, weight, EPS, None)
    assert out.s_TR is None and torch.equal(out.residual_TD, x)
    assert_close(out.y_TD, y64)
    saved = out.residual_TD, out.rstd_T, weight
    assert_close(add_norm_lora_backward(grad_y, grad_r, saved, None, None), wanted, 2)


@pytest.mark.usefixtures("backend")
def test_the_same_bits_every_time(values: Any) -> None:
    x, weight = values.make(40, 64)[0], values.make(64)[0]
    lora = LoraInput(values.make(8, 64)[0], 2.0, Dropout(0.1, 5, 0))
    grad_s = values.make(40, 8)[0]
    out = add_norm_lora(x, None, weight, EPS, lora)
    saved = out.residual_TD, out.rstd_T, weight
    first, second = (norm_lora_grad_a(saved, lora, grad_s) for _ in range(2))
    assert torch.equal(first, second)
