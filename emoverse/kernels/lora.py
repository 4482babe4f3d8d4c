"""Linear layers with low-rank adapters in addmm form: Y = X W^T + S B^T, S = scale * drop(X) A^T.

In:  an input, frozen weights that read it, their adapters, and a dropout that is replayed.
Out: the outputs side by side. Kept for backward: the input once, S (R values per token) and the
parameters; no mask, no dropped copy, no result of B. The frozen weights get no gradient.
models/adapters.py reads W, A and B from PEFT's layers, models/lean_layers.py calls layer.py, and
layer.py calls the functions here.
Legend: T tokens, K input features, N output features, R ranks of all adapters on this input.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emoverse.kernels.adapter_types import Linears, LoraInput, scaled_mm
from emoverse.kernels.backend import use_triton
from emoverse.kernels.dropout import Dropout

# The three products of an adapter's A with its input --------------------------------------------


def lora_input(x_TK: Tensor, lora: LoraInput) -> Tensor:
    """S: T, R."""
    if use_triton(x_TK):
        from emoverse.kernels.triton_ops import lora as triton_lora

        return triton_lora.lora_input(x_TK, lora)
    return scaled_mm(lora.drop(x_TK), lora.a_RK.t(), lora.kept_scale)


def input_gradient(grad_x_TK: Tensor, lora: LoraInput, grad_s_TR: Tensor) -> Tensor:
    """Adds what comes back through A, behind the same mask, to `grad_x_TK` in place."""
    if use_triton(grad_x_TK):
        from emoverse.kernels.triton_ops import lora as triton_lora

        return triton_lora.input_gradient(grad_x_TK, lora, grad_s_TR)
    if not lora.drops:
        return grad_x_TK.addmm_(grad_s_TR, lora.a_RK, alpha=lora.scale)
    through_TK = scaled_mm(grad_s_TR, lora.a_RK, lora.kept_scale)
    return grad_x_TK.addcmul_(through_TK, lora.keep(through_TK))


def weight_gradient(x_TK: Tensor, lora: LoraInput, grad_s_TR: Tensor) -> Tensor:
    """Gradient of A: R, K."""
    if use_triton(x_TK):
        from emoverse.kernels.triton_ops import lora as triton_lora

        return triton_lora.weight_gradient(x_TK, lora, grad_s_TR)
    return scaled_mm(grad_s_TR.t(), lora.drop(x_TK), lora.kept_scale)


# The large products --------------------------------------------------------------------------


def project(x_TK: Tensor, s_TR: Tensor | None, linears: Linears) -> Tensor:
    """Outputs of all layers side by side: T, sum of N."""
    sizes = [weight.shape[0] for weight in linears.weights]
    if len(sizes) == 1:
        y_TN = torch.mm(x_TK, linears.weights[0].t())
    else:
        y_TN = x_TK.new_empty(x_TK.shape[0], sum(sizes))
        for y, weight in zip(y_TN.split(sizes, dim=1), linears.weights, strict=True):
            torch.mm(x_TK, weight.t(), out=y)
    if s_TR is not None:
        columns = s_TR.split(linears.ranks, dim=1)
        for y, s, b in zip(y_TN.split(sizes, dim=1), columns, linears.b, strict=True):
            if b is not None:
                y.addmm_(s, b.t())
    return y_TN


def project_backward(
    grad_TN: Tensor, s_TR: Tensor | None, linears: Linears
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Gradient of x through the frozen weights alone, gradient of S, gradient of each B."""
    grads = grad_TN.split([weight.shape[0] for weight in linears.weights], dim=1)
    grad_x_TK = torch.mm(grads[0], linears.weights[0])
    for grad, weight in zip(grads[1:], linears.weights[1:], strict=True):
        grad_x_TK.addmm_(grad, weight)
    if s_TR is None:
        return grad_x_TK, None, [None] * len(grads)
    columns = s_TR.split(linears.ranks, dim=1)
    grad_b = [
        None if b is None else torch.mm(grad.t(), s)
        for grad, s, b in zip(grads, columns, linears.b, strict=True)
    ]
    if len(grads) == 1:
        assert linears.b[0] is not None
        return grad_x_TK, torch.mm(grads[0], linears.b[0]), grad_b
    grad_s_TR = torch.empty_like(s_TR)
    columns = grad_s_TR.split(linears.ranks, dim=1)
    for grad_s, grad, b in zip(columns, grads, linears.b, strict=True):
        if b is not None:
            torch.mm(grad, b, out=grad_s)
    return grad_x_TK, grad_s_TR, grad_b


def split_grad_a(grad_a_RK: Tensor | None, linears: Linears) -> list[Tensor | None]:
    """The stacked gradient of A, layer by layer."""
    if grad_a_RK is None:
        return [None] * len(linears.a)
    rows = grad_a_RK.split(linears.ranks)
    return [None if a is None else grad_a for a, grad_a in zip(linears.a, rows, strict=True)]


# As a function with gradients -----------------------------------------------------------------


def lora_linears(
    x_TK: Tensor,
    linears: Linears,
    *,
    scale: float,
    dropout: Dropout | None = None,
    bias_N: Tensor | None = None,
) -> Tensor:
    """Linear layers with adapters on one input, for example q, k and v, or gate and up.

    Args:
        bias_N: frozen biases of all layers side by side.
    Returns:
        All outputs side by side: T, sum of N. Gradients reach x, A and B.
    """
    y_TN: Tensor = _LoraLinears.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        *(x_TK, bias_N, scale, dropout, len(linears.weights)),
        *(*linears.weights, *linears.a, *linears.b),
    )
    return y_TN


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        bias_N: Tensor | None,
        scale: float,
        dropout: Dropout | None,
        count: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        linears = unpack(tensors, count)
        lora = linears.lora_input(scale, dropout)
        s_TR = None if lora is None else lora_input(x_TK, lora)
        y_TN = project(x_TK, s_TR, linears)
        if bias_N is not None:
            y_TN.add_(bias_N)
        ctx.save_for_backward(x_TK, s_TR, *tensors)
        ctx.settings = scale, dropout, count
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        scale, dropout, count = ctx.settings
        x_TK, s_TR, *tensors = ctx.saved_tensors
        linears = unpack(tensors, count)
        grad_x_TK, grad_s_TR, grad_b = project_backward(grad_TN, s_TR, linears)
        lora, grad_a = linears.lora_input(scale, dropout), None
        if lora is not None and grad_s_TR is not None:
            grad_a = weight_gradient(x_TK, lora, grad_s_TR)
            grad_x_TK = input_gradient(grad_x_TK, lora, grad_s_TR)
        unused = [None] * (4 + count)
        return (grad_x_TK, *unused, *split_grad_a(grad_a, linears), *grad_b)


def unpack(tensors: Sequence[Tensor | None], count: int) -> Linears:
    """Weights, then all A, then all B, as autograd functions take and save them."""
    weights, a, b = (tuple(tensors[i * count : (i + 1) * count]) for i in range(3))
    assert all(weight is not None for weight in weights)
    return Linears(weights, a, b)  # type: ignore[arg-type]
