"""SwiGLU + S: forward, the recomputing backward and the gradient of A against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emoverse.kernels import reference
from emoverse.kernels.adapter_types import LoraInput
from emoverse.kernels.dropout import Dropout
from emoverse.kernels.swiglu import swiglu_lora, swiglu_lora_backward, swiglu_lora_grad_a


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("tokens", "width", "rank"), [(1, 8, 4), (37, 72, 8), (18, 136, 16)])
def test_against_the_truth(
    values: Any,
    dropout: Dropout | None,
    keep_factors: Callable[..., Any],
    assert_close: Callable[..., None],
    tokens: int,
    width: int,
    rank: int,
) -> None:
    gate_up, gate_up64 = values.gapped(tokens, 2 * width)
    a, a64 = values.make(rank, width, scale=0.1)
    grad, grad64 = values.make(tokens, width)
    grad_s, grad_s64 = values.make(tokens, rank)
    act64 = reference.swiglu(gate_up64)
    s64 = 4.0 * (act64 * keep_factors(dropout, tokens, width)) @ a64.T
    total = (act64 * grad64).sum() + (s64 * grad_s64).sum()
    wanted, wanted_a = torch.autograd.grad(total, (gate_up64, a64))

    lora = LoraInput(a, 4.0, dropout)
    act, s = swiglu_lora(gate_up, lora)
    assert_close(act, act64)
    assert_close(s, s64, 2)
    assert_close(swiglu_lora_grad_a(gate_up, lora, grad_s), wanted_a, 2)
    assert_close(swiglu_lora_backward(grad, gate_up, lora, grad_s), wanted, 2)


@pytest.mark.usefixtures("backend")
def test_without_adapter(values: Any, assert_close: Callable[..., None]) -> None:
    (gate_up, gate_up64), (grad, grad64) = values.make(21, 96), values.make(21, 48)
    act64 = reference.swiglu(gate_up64)
    (wanted,) = torch.autograd.grad((act64 * grad64).sum(), gate_up64)
    act, s = swiglu_lora(gate_up, None)
    assert s is None
    assert_close(act, act64)
    assert_close(swiglu_lora_backward(grad, gate_up, None, None), wanted)


# The interpreter computes exp(88) and more in numpy, which says so.
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.usefixtures("backend")
def test_large_gates_stay_finite(values: Any) -> None:
    gate_up, _ = values.make(4, 32, scale=60.0)
    act, _ = swiglu_lora(gate_up, None)
    assert act.isfinite().all()
    assert swiglu_lora_backward(torch.ones_like(act), gate_up, None, None).isfinite().all()
