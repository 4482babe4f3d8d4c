"""Triton: the products of an adapter's A with a masked input, and the gradient of A.

The gradient of A reads its input in one of three forms (as it is; residual to be normed; gate and
up to be activated), so that the norm's and SwiGLU's results are never written again in backward.
Legend: T tokens, K input features, R ranks (padded to a tile).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emoverse.kernels.adapter_types import LoraInput, scaled_mm
from emoverse.kernels.triton_ops.common import dropout_arguments, dropped, padded_rank, upcast

PLAIN, NORMED, ACTIVATED = 0, 1, 2
_NORMED, _ACTIVATED = tl.constexpr(NORMED), tl.constexpr(ACTIVATED)
BLOCK_T, BLOCK_K = 32, 128
GRADIENT_BLOCK_T = 16  # of both gradients, which hold more for a tile
BLOCK_SUM = 1024
MAX_CHUNKS = 32  # of tokens, each with its own partial sums: no atomics, the same sums every time
FREE = ["seed", "stream_id", "threshold", "T"]  # values that must not make new kernels


@triton.jit(do_not_specialize=FREE)
def lora_input_kernel(
    x, a, s, T, seed, stream_id, threshold, scale,
    K: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s = scale * drop(x) a^T. One program per BLOCK_T tokens."""
    row = tl.program_id(0) * BLOCK_T
    rows, ranks = row + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for column in range(0, K, BLOCK_K):
        columns = column + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < T) & (columns[None, :] < K)
        tile = tl.load(x + rows[:, None].to(tl.int64) * K + columns[None, :], inside, 0.0)
        a_inside = (ranks[:, None] < R) & (columns[None, :] < K)
        a_tile = tl.load(a + ranks[:, None] * K + columns[None, :], a_inside, 0.0)
        if DROPOUT:
            kept = dropped(
                tile.to(tl.float32), seed, stream_id, row, column, threshold,
                BLOCK_T, BLOCK_K,
            )  # fmt: skip
            tile = kept.to(a_tile.dtype)
        if UPCAST:
            tile, a_tile = tile.to(tl.float32), a_tile.to(tl.float32)
        total += tl.dot(tile, tl.trans(a_tile), input_precision="ieee")
    inside = (rows[:, None] < T) & (ranks[None, :] < R)
    tl.store(s + rows[:, None] * R + ranks[None, :], total * scale, inside)


@triton.jit(do_not_specialize=FREE)
def input_gradient_kernel(
    grad_x, a, grad_s, T, seed, stream_id, threshold, scale,
    K: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """grad_x += scale * drop(grad_s a), in place. One program per tile."""
    row, column = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_K
    rows, columns = row + tl.arange(0, BLOCK_T), column + tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < T) & (columns[None, :] < K)
    pointers = grad_x + rows[:, None].to(tl.int64) * K + columns[None, :]
    through = through_a(grad_s, a, rows, columns, T, K, R, BLOCK_R, UPCAST) * scale
    if DROPOUT:
        through = dropped(through, seed, stream_id, row, column, threshold, BLOCK_T, BLOCK_K)
    tl.store(pointers, tl.load(pointers, inside, 0.0).to(tl.float32) + through, inside)


@triton.jit
def through_a(
    grad_s, a, rows, columns, T, K, R: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr
):
    """A tile of grad_s a, fp32."""
    ranks = tl.arange(0, BLOCK_R)
    s_inside = (rows[:, None] < T) & (ranks[None, :] < R)
    s_tile = tl.load(grad_s + rows[:, None] * R + ranks[None, :], s_inside, 0.0)
    a_inside = (ranks[:, None] < R) & (columns[None, :] < K)
    a_tile = tl.load(a + ranks[:, None] * K + columns[None, :], a_inside, 0.0)
    if UPCAST:
        s_tile, a_tile = s_tile.to(tl.float32), a_tile.to(tl.float32)
    return tl.dot(s_tile, a_tile, input_precision="ieee")


@triton.jit(do_not_specialize=[*FREE, "chunk_tokens"])
def weight_gradient_kernel(
    x, rstd, weight, grad_s, partial, T, chunk_tokens,
    seed, stream_id, threshold, scale,
    K: tl.constexpr, R: tl.constexpr, FORM: tl.constexpr, DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial[chunk] = scale * grad_s^T drop(input). One program per chunk and column block."""
    column, chunk = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    columns, ranks = column + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    first = chunk * chunk_tokens
    last = tl.minimum(first + chunk_tokens, T)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for row in range(first, last, BLOCK_T):
        rows = row + tl.arange(0, BLOCK_T)
        inside = (rows[:, None] < last) & (columns[None, :] < K)
        long_rows = rows[:, None].to(tl.int64)
        if FORM == _ACTIVATED:
            gate = tl.load(x + long_rows * (2 * K) + columns[None, :], inside, 0.0).to(tl.float32)
            up = tl.load(x + long_rows * (2 * K) + K + columns[None, :], inside, 0.0).to(tl.float32)
            tile = gate * tl.sigmoid(gate) * up
        else:
            tile = tl.load(x + long_rows * K + columns[None, :], inside, 0.0).to(tl.float32)
        if FORM == _NORMED:
            inverse = tl.load(rstd + rows, rows < last, 0.0)
            normed = (tile * inverse[:, None]).to(x.dtype.element_ty).to(tl.float32)
            tile = normed * tl.load(weight + columns, columns < K, 0.0).to(tl.float32)[None, :]
        tile = tile.to(x.dtype.element_ty)
        if DROPOUT:
            kept = dropped(
                tile.to(tl.float32), seed, stream_id, row, column, threshold,
                BLOCK_T, BLOCK_K,
            )  # fmt: skip
            tile = kept.to(x.dtype.element_ty)
        s_inside = (rows[:, None] < last) & (ranks[None, :] < R)
        s_tile = tl.load(grad_s + rows[:, None] * R + ranks[None, :], s_inside, 0.0)
        if UPCAST:
            tile, s_tile = tile.to(tl.float32), s_tile.to(tl.float32)
        total += tl.dot(tl.trans(s_tile), tile, input_precision="ieee")
    inside = (ranks[:, None] < R) & (columns[None, :] < K)
    pointers = partial + chunk * R * K + ranks[:, None] * K + columns[None, :]
    tl.store(pointers, total * scale, inside)


@triton.jit(do_not_specialize=["chunks"])
def sum_kernel(partial, out, chunks, size, BLOCK: tl.constexpr):
    """out = sum of partial over the chunks, in their order, cast once."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(0, chunks):
        total += tl.load(partial + chunk * size + offsets, offsets < size, 0.0)
    tl.store(out + offsets, total, offsets < size)


def lora_input(x_TK: Tensor, lora: LoraInput) -> Tensor:
    """See lora.py."""
    if not lora.drops:
        return scaled_mm(x_TK, lora.a_RK.t(), lora.kept_scale)
    x_TK, a_RK = x_TK.contiguous(), lora.a_RK.contiguous()
    (tokens, width), rank = x_TK.shape, a_RK.shape[0]
    s_TR = x_TK.new_empty(tokens, rank)
    lora_input_kernel[(triton.cdiv(tokens, BLOCK_T),)](
        *(x_TK, a_RK, s_TR, tokens),
        scale=lora.kept_scale,
        **dropout_arguments(lora.dropout),
        **_sizes(x_TK, width, rank),
    )
    return s_TR


def input_gradient(grad_x_TK: Tensor, lora: LoraInput, grad_s_TR: Tensor) -> Tensor:
    """See lora.py."""
    if not lora.drops:
        return grad_x_TK.addmm_(grad_s_TR, lora.a_RK, alpha=lora.kept_scale)
    grad_x_TK, a_RK, grad_s_TR = (x.contiguous() for x in (grad_x_TK, lora.a_RK, grad_s_TR))
    (tokens, width), rank = grad_x_TK.shape, a_RK.shape[0]
    grid = (triton.cdiv(tokens, GRADIENT_BLOCK_T), triton.cdiv(width, BLOCK_K))
    input_gradient_kernel[grid](
        *(grad_x_TK, a_RK, grad_s_TR, tokens),
        scale=lora.kept_scale,
        **dropout_arguments(lora.dropout),
        **(_sizes(grad_x_TK, width, rank) | {"BLOCK_T": GRADIENT_BLOCK_T}),
    )
    return grad_x_TK


def weight_gradient(
    x_TK: Tensor,
    lora: LoraInput,
    grad_s_TR: Tensor,
    *,
    form: int = PLAIN,
    rstd_T: Tensor | None = None,
    weight_D: Tensor | None = None,
) -> Tensor:
    """See lora.py; `form` is what x_TK holds."""
    if form == PLAIN and not lora.drops:
        return scaled_mm(grad_s_TR.t(), x_TK, lora.kept_scale)
    x_TK, grad_s_TR = x_TK.contiguous(), grad_s_TR.contiguous()
    tokens, (rank, width) = x_TK.shape[0], lora.a_RK.shape
    tiles = triton.cdiv(tokens, GRADIENT_BLOCK_T)
    chunk_tokens = triton.cdiv(tiles, MAX_CHUNKS) * GRADIENT_BLOCK_T
    chunks = triton.cdiv(tokens, chunk_tokens)
    partial = x_TK.new_empty(chunks, rank, width, dtype=torch.float32)
    unused = grad_s_TR
    weight_gradient_kernel[(triton.cdiv(width, BLOCK_K), chunks)](
        x_TK,
        unused if rstd_T is None else rstd_T,
        unused if weight_D is None else weight_D,
        *(grad_s_TR, partial, tokens, chunk_tokens),
        scale=lora.kept_scale,
        FORM=form,
        **dropout_arguments(lora.dropout),
        **(_sizes(x_TK, width, rank) | {"BLOCK_T": GRADIENT_BLOCK_T}),
    )
    grad_a_RK = torch.empty_like(lora.a_RK, memory_format=torch.contiguous_format)
    size = rank * width
    sum_kernel[(triton.cdiv(size, BLOCK_SUM),)](partial, grad_a_RK, chunks, size, BLOCK=BLOCK_SUM)
    return grad_a_RK


def _sizes(x: Tensor, width: int, rank: int) -> dict[str, int | bool]:
    return {
        "K": width,
        "R": rank,
        "UPCAST": upcast(x),
        "BLOCK_T": BLOCK_T,
        "BLOCK_K": BLOCK_K,
        "BLOCK_R": padded_rank(rank),
    }
