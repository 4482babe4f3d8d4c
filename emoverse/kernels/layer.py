"""A lean decoder layer in two autograd functions, one before and one after attention.

In:  the residual stream, frozen norms and linears, adapters. Out: q, k, v; then the next residual.
Kept per token, in bytes of bf16 for hidden size h and MLP width f: residual before (2 h), rotated
q, k and v (6 h without grouped heads), attention's result (2 h), residual between (2 h), gate and
up (4 f): 12 h + 4 f. Norm outputs, SwiGLU and dropout masks are computed again.
Legend: T tokens, D hidden, N query heads, H head dim, W width of q, k and v together.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emoverse.kernels.adapter_types import Linears, LoraInput
from emoverse.kernels.dropout import Dropout
from emoverse.kernels.lora import (
    input_gradient,
    lora_input,
    project,
    project_backward,
    split_grad_a,
    unpack,
    weight_gradient,
)
from emoverse.kernels.norm import add_norm_lora, add_norm_lora_backward, norm_lora_grad_a
from emoverse.kernels.rope import rope_merge, rope_split_
from emoverse.kernels.swiglu import swiglu_lora, swiglu_lora_backward, swiglu_lora_grad_a


class LayerSettings(NamedTuple):
    """Sizes and adapter settings of a layer: what is not a tensor."""

    heads: int
    kv_heads: int
    eps: float  # of both norms
    scale: float  # of the adapters
    p: float  # their dropout
    seed: int  # of this layer in this forward

    def dropout(self, stream: int) -> Dropout | None:
        """The mask on the inputs of one group of linears."""
        return Dropout(self.p, self.seed, stream) if self.p > 0 else None


QKV, OUT, GATE_UP, DOWN = range(4)  # streams of random bits inside a layer


class Rotary(NamedTuple):
    """Per token, as transformers' rotary modules make them: T, H."""

    cos_TH: Tensor
    sin_TH: Tensor


def before_attention(
    residual_TD: Tensor,
    norm_D: Tensor,
    rotary: Rotary,
    qkv: Linears,
    settings: LayerSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated q (T, N, H), k, v, and the residual, unchanged.

    The residual passes through, so that its gradient arrives here and the norm's backward adds it
    without another pass over memory.
    """
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _BeforeAttention.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        *(residual_TD, norm_D, *rotary, settings, len(qkv.weights)),
        *(*qkv.weights, *qkv.a, *qkv.b),
    )
    return outputs


def after_attention(
    attention_TD: Tensor,
    residual_TD: Tensor,
    norm_D: Tensor,
    groups: tuple[Linears, Linears, Linears],
    settings: LayerSettings,
) -> Tensor:
    """The next residual stream: T, D. `groups`: output projection, gate and up, down."""
    tensors = [tensor for g in groups for tensor in (*g.weights, *g.a, *g.b)]
    counts = tuple(len(group.weights) for group in groups)
    next_TD: Tensor = _AfterAttention.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        *(attention_TD, residual_TD, norm_D, settings, counts), *tensors
    )
    return next_TD


class _BeforeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual_TD: Tensor,
        norm_D: Tensor,
        cos_TH: Tensor,
        sin_TH: Tensor,
        settings: LayerSettings,
        count: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        linears = unpack(tensors, count)
        lora = linears.lora_input(settings.scale, settings.dropout(QKV))
        norm = add_norm_lora(residual_TD, None, norm_D, settings.eps, lora)
        qkv_TW = project(norm.y_TD, norm.s_TR, linears)
        q, k, v = rope_split_(qkv_TW, cos_TH, sin_TH, settings.heads, settings.kv_heads)
        ctx.save_for_backward(
            *(residual_TD, norm.rstd_T, norm_D, cos_TH, sin_TH, norm.s_TR), *tensors
        )
        ctx.settings = settings, count
        return q, k, v, residual_TD

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grad_residual_TD: Tensor
    ) -> tuple[Tensor | None, ...]:
        settings, count = ctx.settings
        residual_TD, rstd_T, norm_D, cos_TH, sin_TH, s_TR, *tensors = ctx.saved_tensors
        saved, linears = (residual_TD, rstd_T, norm_D), unpack(tensors, count)
        lora = linears.lora_input(settings.scale, settings.dropout(QKV))
        grad_qkv = rope_merge((grad_q, grad_k, grad_v), cos_TH, sin_TH)
        grad_y, grad_s, grad_b = project_backward(grad_qkv, s_TR, linears)
        grad_a = None
        if lora is not None and grad_s is not None:
            grad_a = norm_lora_grad_a(saved, lora, grad_s)
        grad = add_norm_lora_backward(grad_y, grad_residual_TD, saved, lora, grad_s)
        unused = [None] * (5 + count)
        return (grad, *unused, *split_grad_a(grad_a, linears), *grad_b)


class _AfterAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attention_TD: Tensor,
        residual_TD: Tensor,
        norm_D: Tensor,
        settings: LayerSettings,
        counts: tuple[int, int, int],
        *tensors: Tensor | None,
    ) -> Tensor:
        out, gate_up, down = _unpack_groups(tensors, counts)
        lora_out, lora_gate_up, lora_down = _inputs((out, gate_up, down), settings)
        s_out = None if lora_out is None else lora_input(attention_TD, lora_out)
        update = project(attention_TD, s_out, out)
        middle = add_norm_lora(residual_TD, update, norm_D, settings.eps, lora_gate_up)
        gate_up_TF2 = project(middle.y_TD, middle.s_TR, gate_up)
        act_TF, s_down = swiglu_lora(gate_up_TF2, lora_down)
        result_TD = project(act_TF, s_down, down).add_(middle.residual_TD)
        ctx.save_for_backward(
            *(attention_TD, middle.residual_TD, middle.rstd_T, norm_D, gate_up_TF2),
            *(s_out, middle.s_TR, s_down),
            *tensors,
        )
        ctx.settings = settings, counts
        return result_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        settings, counts = ctx.settings
        attention_TD, middle_TD, rstd_T, norm_D, gate_up_TF2, *rest = ctx.saved_tensors
        s_out, s_gate_up, s_down = rest[:3]
        saved = middle_TD, rstd_T, norm_D
        out, gate_up, down = groups = _unpack_groups(rest[3:], counts)
        lora_out, lora_gate_up, lora_down = _inputs(groups, settings)
        grad_a: list[Tensor | None] = [None, None, None]

        grad_act, grad_s, grad_b_down = project_backward(grad_TD, s_down, down)
        if lora_down is not None and grad_s is not None:
            grad_a[2] = swiglu_lora_grad_a(gate_up_TF2, lora_down, grad_s)
        grad_gate_up = swiglu_lora_backward(grad_act, gate_up_TF2, lora_down, grad_s)

        grad_y, grad_s, grad_b_gate_up = project_backward(grad_gate_up, s_gate_up, gate_up)
        if lora_gate_up is not None and grad_s is not None:
            grad_a[1] = norm_lora_grad_a(saved, lora_gate_up, grad_s)
        grad_middle = add_norm_lora_backward(grad_y, grad_TD, saved, lora_gate_up, grad_s)

        grad_attention, grad_s, grad_b_out = project_backward(grad_middle, s_out, out)
        if lora_out is not None and grad_s is not None:
            grad_a[0] = weight_gradient(attention_TD, lora_out, grad_s)
            grad_attention = input_gradient(grad_attention, lora_out, grad_s)

        grads: list[Tensor | None] = []
        grad_bs = (grad_b_out, grad_b_gate_up, grad_b_down)
        for group, a, b in zip(groups, grad_a, grad_bs, strict=True):
            grads += [None] * len(group.weights) + split_grad_a(a, group) + b
        return (grad_attention, grad_middle, None, None, None, *grads)


def _unpack_groups(
    tensors: Sequence[Tensor | None], counts: tuple[int, int, int]
) -> tuple[Linears, ...]:
    groups, start = [], 0
    for count in counts:
        groups.append(unpack(tensors[start : start + 3 * count], count))
        start += 3 * count
    return tuple(groups)


def _inputs(groups: tuple[Linears, ...], settings: LayerSettings) -> list[LoraInput | None]:
    streams = (OUT, GATE_UP, DOWN)
    return [
        group.lora_input(settings.scale, settings.dropout(stream))
        for group, stream in zip(groups, streams, strict=True)
    ]
