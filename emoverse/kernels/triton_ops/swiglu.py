"""Triton: SwiGLU with S in one pass over the tokens, and a backward that recomputes both.

Legend: T tokens, F MLP width, R ranks (padded to a tile).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emoverse.kernels.adapter_types import LoraInput
from emoverse.kernels.triton_ops.common import dropout_arguments, dropped, padded_rank, upcast
from emoverse.kernels.triton_ops.lora import ACTIVATED, FREE, through_a, weight_gradient

BLOCK_T, BLOCK_F = 16, 128


@triton.jit(do_not_specialize=FREE)
def swiglu_kernel(
    gate_up, a, act, s, T, seed, stream_id, threshold, scale,
    F: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_T tokens; R 0 means no adapter."""
    row = tl.program_id(0) * BLOCK_T
    rows, ranks = row + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    starts = rows[:, None].to(tl.int64) * F
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for column in range(0, F, BLOCK_F):
        columns = column + tl.arange(0, BLOCK_F)
        inside = (rows[:, None] < T) & (columns[None, :] < F)
        gate = tl.load(gate_up + 2 * starts + columns[None, :], inside, 0.0).to(tl.float32)
        up = tl.load(gate_up + 2 * starts + F + columns[None, :], inside, 0.0).to(tl.float32)
        out = (gate * tl.sigmoid(gate) * up).to(act.dtype.element_ty)
        tl.store(act + starts + columns[None, :], out, inside)
        if R > 0:
            if DROPOUT:
                kept = dropped(
                    out.to(tl.float32), seed, stream_id, row, column, threshold,
                    BLOCK_T, BLOCK_F,
                )  # fmt: skip
                out = kept.to(act.dtype.element_ty)
            a_inside = (ranks[:, None] < R) & (columns[None, :] < F)
            a_tile = tl.load(a + ranks[:, None] * F + columns[None, :], a_inside, 0.0)
            if UPCAST:
                out, a_tile = out.to(tl.float32), a_tile.to(tl.float32)
            total += tl.dot(out, tl.trans(a_tile), input_precision="ieee")
    if R > 0:
        inside = (rows[:, None] < T) & (ranks[None, :] < R)
        tl.store(s + rows[:, None] * R + ranks[None, :], total * scale, inside)


@triton.jit(do_not_specialize=FREE)
def swiglu_backward_kernel(
    grad_act, gate_up, a, grad_s, out, T, seed, stream_id, threshold, scale,
    F: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per tile."""
    row, column = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_F
    rows, columns = row + tl.arange(0, BLOCK_T), column + tl.arange(0, BLOCK_F)
    starts = rows[:, None].to(tl.int64) * F
    inside = (rows[:, None] < T) & (columns[None, :] < F)
    grad = tl.load(grad_act + starts + columns[None, :], inside, 0.0).to(tl.float32)
    if R > 0:
        through = through_a(grad_s, a, rows, columns, T, F, R, BLOCK_R, UPCAST) * scale
        if DROPOUT:
            through = dropped(through, seed, stream_id, row, column, threshold, BLOCK_T, BLOCK_F)
        grad += through
    offsets = 2 * starts + columns[None, :]
    gate = tl.load(gate_up + offsets, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + offsets + F, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(out + offsets, grad * up * (sigmoid + silu * (1.0 - sigmoid)), inside)
    tl.store(out + offsets + F, grad * silu, inside)


def swiglu_lora(gate_up_TF2: Tensor, lora: LoraInput | None) -> tuple[Tensor, Tensor | None]:
    """See swiglu.py."""
    gate_up_TF2 = gate_up_TF2.contiguous()
    tokens, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    act_TF = gate_up_TF2.new_empty(tokens, width)
    rank = 0 if lora is None else lora.a_RK.shape[0]
    s_TR = None if lora is None else act_TF.new_empty(tokens, rank)
    unused = gate_up_TF2
    swiglu_kernel[(triton.cdiv(tokens, BLOCK_T),)](
        gate_up_TF2,
        unused if lora is None else lora.a_RK.contiguous(),
        act_TF,
        unused if s_TR is None else s_TR,
        tokens,
        scale=1.0 if lora is None else lora.kept_scale,
        **dropout_arguments(None if lora is None else lora.dropout),
        **_sizes(gate_up_TF2, width, rank),
    )
    return act_TF, s_TR


def swiglu_lora_backward(
    grad_act_TF: Tensor, gate_up_TF2: Tensor, lora: LoraInput | None, grad_s_TR: Tensor | None
) -> Tensor:
    """See swiglu.py."""
    grad_act_TF, gate_up_TF2 = grad_act_TF.contiguous(), gate_up_TF2.contiguous()
    tokens, width = grad_act_TF.shape
    out_TF2 = torch.empty_like(gate_up_TF2)
    rank = 0 if lora is None else lora.a_RK.shape[0]
    unused = gate_up_TF2
    grid = (triton.cdiv(tokens, BLOCK_T), triton.cdiv(width, BLOCK_F))
    swiglu_backward_kernel[grid](
        *(grad_act_TF, gate_up_TF2),
        unused if lora is None else lora.a_RK.contiguous(),
        unused if grad_s_TR is None else grad_s_TR.contiguous(),
        *(out_TF2, tokens),
        scale=1.0 if lora is None else lora.kept_scale,
        **dropout_arguments(None if lora is None else lora.dropout),
        **_sizes(gate_up_TF2, width, rank),
    )
    return out_TF2


def swiglu_lora_grad_a(gate_up_TF2: Tensor, lora: LoraInput, grad_s_TR: Tensor) -> Tensor:
    """See swiglu.py."""
    return weight_gradient(gate_up_TF2, lora, grad_s_TR, form=ACTIVATED)


def _sizes(x: Tensor, width: int, rank: int) -> dict[str, int | bool]:
    return {
        "F": width,
        "R": rank,
        "UPCAST": upcast(x),
        "BLOCK_T": BLOCK_T,
        "BLOCK_F": BLOCK_F,
        "BLOCK_R": padded_rank(rank),
    }
