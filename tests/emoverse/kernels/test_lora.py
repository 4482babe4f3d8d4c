"""LoRA functions in addmm form against float64, and what they keep."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from emoverse.kernels import reference
from emoverse.kernels.adapter_types import Linears
from emoverse.kernels.dropout import Dropout
from emoverse.kernels.lora import lora_linears


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("tokens", "outputs", "rank"),
    [(1, (40,), 4), (37, (40,), 16), (37, (48, 16, 16), 8), (5, (24, 24), 8)],
    ids=str,
)
def test_against_the_truth(
    values: Any,
    dropout: Dropout | None,
    keep_factors: Callable[..., Any],
    assert_close: Callable[..., None],
    tokens: int,
    outputs: tuple[int, ...],
    rank: int,
) -> None:
    """One linear, q, k and v with grouped heads, gate and up."""
    x, x64 = values.gapped(tokens, 72)
    weights = [values.make(n, 72, scale=0.1) for n in outputs]
    adapters_a = [values.make(rank, 72, scale=0.1) for _ in outputs]
    adapters_b = [values.make(n, rank, scale=0.1) for n in outputs]
    bias, bias64 = values.make(sum(outputs))
    grad, grad64 = values.make(tokens, sum(outputs))
    keep = keep_factors(dropout, tokens, 72)
    parts = [
        reference.lora_linear(x64, w[1], a[1], b[1], 4.0, keep)
        for w, a, b in zip(weights, adapters_a, adapters_b, strict=True)
    ]
    y64 = torch.cat(parts, dim=1) + bias64
    references = [x64, *(a[1] for a in adapters_a), *(b[1] for b in adapters_b)]
    wanted = torch.autograd.grad((y64 * grad64).sum(), references)

    a, b = ([value[0].requires_grad_() for value in them] for them in (adapters_a, adapters_b))
    linears = Linears(tuple(w[0] for w in weights), tuple(a), tuple(b))
    x = x.detach().requires_grad_()
    y = lora_linears(x, linears, scale=4.0, dropout=dropout, bias_N=bias)
    assert_close(y, y64, 2)
    found = torch.autograd.grad(y, [x, *a, *b], grad)
    for left, right in zip(found, wanted, strict=True):
        assert_close(left, right, 2)


def test_gradients_numerically() -> None:
    """gradcheck in float64, with a mask and with a layer without adapter."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = draw(5, 6), draw(3, 6)
    x, a, b = (draw(*shape).requires_grad_() for shape in ((7, 6), (2, 6), (3, 2)))

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        linears = Linears(weights, (None, a), (None, b))
        return lora_linears(x, linears, scale=0.5, dropout=Dropout(0.3, 9, 0))

    assert torch.autograd.gradcheck(function, (x, a, b))


def test_what_is_kept() -> None:
    """The input once, S, parameters; no mask and no second copy of the input."""
    x = torch.randn(50, 64, requires_grad=True)
    a = [torch.randn(8, 64, requires_grad=True) for _ in range(3)]
    b = [torch.randn(32, 8, requires_grad=True) for _ in range(3)]
    weights = tuple(torch.randn(32, 64) for _ in range(3))
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.numel() * saved.element_size()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        linears = Linears(weights, tuple(a), tuple(b))
        lora_linears(x, linears, scale=1.0, dropout=Dropout(0.1, 1, 0))
    parameters = sum(t.numel() * 4 for t in (*weights, *a, *b))
    assert sum(kept.values()) - parameters == 50 * (64 + 3 * 8) * 4
