"""Triton: residual add + RMSNorm + S in one pass over the tokens, and its backward.

Legend: T tokens, D hidden, R ranks (padded to a tile).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emoverse.kernels.adapter_types import LoraInput, NormOutput
from emoverse.kernels.triton_ops.common import dropout_arguments, dropped, padded_rank, upcast
from emoverse.kernels.triton_ops.lora import FREE, NORMED, through_a, weight_gradient

BLOCK_T, BLOCK_D = 16, 128


@triton.jit(do_not_specialize=FREE)
def norm_kernel(
    x, update, weight, a, residual, y, rstd, s, T, eps,
    seed, stream_id, threshold, scale,
    D: tl.constexpr, R: tl.constexpr, UPDATE: tl.constexpr, DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_T tokens; R 0 means no adapters."""
    row = tl.program_id(0) * BLOCK_T
    rows, ranks = row + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    starts = rows[:, None].to(tl.int64) * D
    squares = tl.zeros([BLOCK_T], tl.float32)
    for column in range(0, D, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)[None, :]
        inside = (rows[:, None] < T) & (columns < D)
        tile = tl.load(x + starts + columns, inside, 0.0).to(tl.float32)
        if UPDATE:
            tile += tl.load(update + starts + columns, inside, 0.0).to(tl.float32)
            tile = tile.to(x.dtype.element_ty).to(tl.float32)
            tl.store(residual + starts + columns, tile, inside)
        squares += tl.sum(tile * tile, 1)
    inverse = tl.rsqrt(squares / D + eps)
    tl.store(rstd + rows, inverse, rows < T)
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for column in range(0, D, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside = (rows[:, None] < T) & (columns[None, :] < D)
        # Read again where it came from: what this program has just stored, other threads may not
        # see yet.
        tile = tl.load(x + starts + columns[None, :], inside, 0.0).to(tl.float32)
        if UPDATE:
            tile += tl.load(update + starts + columns[None, :], inside, 0.0).to(tl.float32)
            tile = tile.to(x.dtype.element_ty).to(tl.float32)
        tile = (tile * inverse[:, None]).to(x.dtype.element_ty).to(tl.float32)
        tile = tile * tl.load(weight + columns, columns < D, 0.0).to(tl.float32)[None, :]
        out = tile.to(x.dtype.element_ty)
        tl.store(y + starts + columns[None, :], out, inside)
        if R > 0:
            if DROPOUT:
                kept = dropped(
                    out.to(tl.float32), seed, stream_id, row, column, threshold,
                    BLOCK_T, BLOCK_D,
                )  # fmt: skip
                out = kept.to(x.dtype.element_ty)
            a_inside = (ranks[:, None] < R) & (columns[None, :] < D)
            a_tile = tl.load(a + ranks[:, None] * D + columns[None, :], a_inside, 0.0)
            if UPCAST:
                out, a_tile = out.to(tl.float32), a_tile.to(tl.float32)
            total += tl.dot(out, tl.trans(a_tile), input_precision="ieee")
    if R > 0:
        inside = (rows[:, None] < T) & (ranks[None, :] < R)
        tl.store(s + rows[:, None] * R + ranks[None, :], total * scale, inside)


@triton.jit(do_not_specialize=FREE)
def norm_backward_kernel(
    grad_y, grad_residual, residual, rstd, weight, a, grad_s, out, T,
    seed, stream_id, threshold, scale,
    D: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Two passes over the row: the mean along the normed direction, then the gradient."""
    row = tl.program_id(0) * BLOCK_T
    rows = row + tl.arange(0, BLOCK_T)
    starts = rows[:, None].to(tl.int64) * D
    inverse = tl.load(rstd + rows, rows < T, 0.0)[:, None]
    along = tl.zeros([BLOCK_T], tl.float32)
    for column in range(0, D, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside = (rows[:, None] < T) & (columns[None, :] < D)
        grad = normed_gradient(
            grad_y, weight, a, grad_s, T, seed, stream_id, threshold, scale,
            row, column, inside, D, R, DROPOUT, UPCAST, BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        value = tl.load(residual + starts + columns[None, :], inside, 0.0).to(tl.float32)
        along += tl.sum(grad * value * inverse, 1)
    mean = (along / D)[:, None]
    for column in range(0, D, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside = (rows[:, None] < T) & (columns[None, :] < D)
        grad = normed_gradient(
            grad_y, weight, a, grad_s, T, seed, stream_id, threshold, scale,
            row, column, inside, D, R, DROPOUT, UPCAST, BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        offsets = starts + columns[None, :]
        value = tl.load(residual + offsets, inside, 0.0).to(tl.float32)
        passed = tl.load(grad_residual + offsets, inside, 0.0).to(tl.float32)
        tl.store(out + offsets, (grad - value * inverse * mean) * inverse + passed, inside)


@triton.jit
def normed_gradient(
    grad_y, weight, a, grad_s, T, seed, stream_id, threshold, scale,
    row, column, inside, D: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradient of the normed values, before the weight: a tile, fp32."""
    rows, columns = row + tl.arange(0, BLOCK_T), column + tl.arange(0, BLOCK_D)
    pointers = grad_y + rows[:, None].to(tl.int64) * D + columns[None, :]
    grad = tl.load(pointers, inside, 0.0).to(tl.float32)
    if R > 0:
        through = through_a(grad_s, a, rows, columns, T, D, R, BLOCK_R, UPCAST) * scale
        if DROPOUT:
            through = dropped(through, seed, stream_id, row, column, threshold, BLOCK_T, BLOCK_D)
        grad += through
    return grad * tl.load(weight + columns, columns < D, 0.0).to(tl.float32)[None, :]


def add_norm_lora(
    x_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float, lora: LoraInput | None
) -> NormOutput:
    """See norm.py."""
    x_TD = x_TD.contiguous()
    tokens, width = x_TD.shape
    y_TD = torch.empty_like(x_TD)
    residual_TD = x_TD if update_TD is None else torch.empty_like(x_TD)
    rstd_T = x_TD.new_empty(tokens, dtype=torch.float32)
    rank = 0 if lora is None else lora.a_RK.shape[0]
    s_TR = None if lora is None else x_TD.new_empty(tokens, rank)
    unused = x_TD
    norm_kernel[(triton.cdiv(tokens, BLOCK_T),)](
        x_TD,
        unused if update_TD is None else update_TD.contiguous(),
        weight_D,
        unused if lora is None else lora.a_RK.contiguous(),
        *(residual_TD, y_TD, rstd_T),
        unused if s_TR is None else s_TR,
        *(tokens, eps),
        scale=1.0 if lora is None else lora.kept_scale,
        UPDATE=update_TD is not None,
        **dropout_arguments(None if lora is None else lora.dropout),
        **_sizes(x_TD, width, rank),
    )
    return NormOutput(residual_TD, y_TD, rstd_T, s_TR)


def add_norm_lora_backward(
    grad_y_TD: Tensor,
    grad_residual_TD: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    lora: LoraInput | None,
    grad_s_TR: Tensor | None,
) -> Tensor:
    """See norm.py."""
    residual_TD, rstd_T, weight_D = saved
    residual_TD, grad_y_TD, grad_residual_TD = (
        x.contiguous() for x in (residual_TD, grad_y_TD, grad_residual_TD)
    )
    tokens, width = residual_TD.shape
    out_TD = torch.empty_like(residual_TD)
    rank = 0 if lora is None else lora.a_RK.shape[0]
    unused = residual_TD
    norm_backward_kernel[(triton.cdiv(tokens, BLOCK_T),)](
        *(grad_y_TD, grad_residual_TD, residual_TD, rstd_T, weight_D),
        unused if lora is None else lora.a_RK.contiguous(),
        unused if grad_s_TR is None else grad_s_TR.contiguous(),
        *(out_TD, tokens),
        scale=1.0 if lora is None else lora.kept_scale,
        **dropout_arguments(None if lora is None else lora.dropout),
        **_sizes(residual_TD, width, rank),
    )
    return out_TD


def norm_lora_grad_a(
    saved: tuple[Tensor, Tensor, Tensor], lora: LoraInput, grad_s_TR: Tensor
) -> Tensor:
    """See norm.py."""
    residual_TD, rstd_T, weight_D = saved
    return weight_gradient(
        residual_TD, lora, grad_s_TR, form=NORMED, rstd_T=rstd_T, weight_D=weight_D
    )


def _sizes(x: Tensor, width: int, rank: int) -> dict[str, int | bool]:
    return {
        "D": width,
        "R": rank,
        "UPCAST": upcast(x),
        "BLOCK_T": BLOCK_T,
        "BLOCK_D": BLOCK_D,
        "BLOCK_R": padded_rank(rank),
    }
