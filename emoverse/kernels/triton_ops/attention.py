"""Triton: attention over packed segments, forward and backward. The fallback of GPUs.

Online softmax; backward in two kernels (queries; keys and values), each sum in one program and in
one order, so the same inputs give the same bits. Grouped heads are summed inside a program.
Legend: T packed tokens, N query heads, K key/value heads, H head dim (padded to a power of two),
M queries of a tile, C keys of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from emoverse.kernels.triton_ops.common import upcast

LOG2_E = 1.4426950408889634
BLOCK_M, BLOCK_C = 64, 64  # forward
SMALL_M, SMALL_C = 32, 64  # backward keeps more tiles at a time


def num_warps(head_dim: int) -> int:
    """Enough threads to hold the tiles of wide heads in registers."""
    return 4 if head_dim <= 64 else 8


@triton.jit
def load_tile(base, rows, stride, lanes, inside_rows, H: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of one head: tile, H padded with zeros."""
    inside = inside_rows[:, None] & (lanes[None, :] < H)
    tile = tl.load(base + rows[:, None].to(tl.int64) * stride + lanes[None, :], inside, 0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def visible(queries, keys, length, CAUSAL: tl.constexpr):
    """Which (query, key) of a tile may meet."""
    allowed = (queries[:, None] < length) & (keys[None, :] < length)
    if CAUSAL:
        allowed = allowed & (keys[None, :] <= queries[:, None])
    return allowed


@triton.jit
def forward_kernel(
    q, k, v, out, lse, borders, q_token, q_head, k_token, k_head, v_token, v_head, scale_log2, T,
    N: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries, head and segment."""
    segment, head = tl.program_id(1), tl.program_id(2)
    start = tl.load(borders + segment)
    length = tl.load(borders + segment + 1) - start
    first = tl.program_id(0) * BLOCK_M
    if first < length:
        queries, lanes = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
        q_tile = load_tile(
            q + head * q_head, start + queries, q_token, lanes, queries < length, H, UPCAST
        )
        highest = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        last = length
        if CAUSAL:
            last = tl.minimum(length, first + BLOCK_M)
        for block in range(0, last, BLOCK_C):
            keys = block + tl.arange(0, BLOCK_C)
            inside = keys < length
            k_tile = load_tile(
                k + head // GROUP * k_head, start + keys, k_token, lanes, inside, H, UPCAST
            )
            v_tile = load_tile(
                v + head // GROUP * v_head, start + keys, v_token, lanes, inside, H, UPCAST
            )
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
            scores = tl.where(visible(queries, keys, length, CAUSAL), scores, -1e30)
            new = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - new[:, None])
            shrink = tl.exp2(highest - new)
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None]
            mixed += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
            highest = new
        inside = (queries[:, None] < length) & (lanes[None, :] < H)
        offsets = ((start + queries)[:, None].to(tl.int64) * N + head) * H + lanes[None, :]
        tl.store(out + offsets, mixed / total[:, None], inside)
        tl.store(lse + head * T + start + queries, highest + tl.log2(total), queries < length)


@triton.jit
def query_gradient_kernel(
    q, k, v, grad, lse, delta, out, borders,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, scale_log2, T,
    N: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries, head and segment."""
    segment, head = tl.program_id(1), tl.program_id(2)
    start = tl.load(borders + segment)
    length = tl.load(borders + segment + 1) - start
    first = tl.program_id(0) * BLOCK_M
    if first < length:
        queries, lanes = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
        real = queries < length
        q_tile = load_tile(q + head * q_head, start + queries, q_token, lanes, real, H, UPCAST)
        g_tile = load_tile(grad + head * H, start + queries, N * H, lanes, real, H, UPCAST)
        row_lse = tl.load(lse + head * T + start + queries, real, 0.0)
        row_delta = tl.load(delta + head * T + start + queries, real, 0.0)
        total = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        last = length
        if CAUSAL:
            last = tl.minimum(length, first + BLOCK_M)
        for block in range(0, last, BLOCK_C):
            keys = block + tl.arange(0, BLOCK_C)
            inside = keys < length
            k_tile = load_tile(
                k + head // GROUP * k_head, start + keys, k_token, lanes, inside, H, UPCAST
            )
            v_tile = load_tile(
                v + head // GROUP * v_head, start + keys, v_token, lanes, inside, H, UPCAST
            )
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
            weights = tl.exp2(scores - row_lse[:, None])
            weights = tl.where(visible(queries, keys, length, CAUSAL), weights, 0.0)
            back = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
            back = weights * (back - row_delta[:, None])
            total += tl.dot(back.to(k_tile.dtype), k_tile, input_precision="ieee")
        inside = real[:, None] & (lanes[None, :] < H)
        offsets = ((start + queries)[:, None].to(tl.int64) * N + head) * H + lanes[None, :]
        tl.store(out + offsets, total * scale, inside)


@triton.jit
def key_value_gradient_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, borders,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, scale_log2, T,
    N: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys, key/value head and segment; sums over the heads of a group."""
    segment, kv_head = tl.program_id(1), tl.program_id(2)
    start = tl.load(borders + segment)
    length = tl.load(borders + segment + 1) - start
    first = tl.program_id(0) * BLOCK_C
    if first < length:
        keys, lanes = first + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
        inside = keys < length
        k_tile = load_tile(k + kv_head * k_head, start + keys, k_token, lanes, inside, H, UPCAST)
        v_tile = load_tile(v + kv_head * v_head, start + keys, v_token, lanes, inside, H, UPCAST)
        total_k = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
        total_v = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
        begin = 0
        if CAUSAL:
            begin = first // BLOCK_M * BLOCK_M
        for member in range(0, GROUP):
            head = kv_head * GROUP + member
            for block in range(begin, length, BLOCK_M):
                queries = block + tl.arange(0, BLOCK_M)
                real = queries < length
                q_tile = load_tile(
                    q + head * q_head, start + queries, q_token, lanes, real, H, UPCAST
                )
                g_tile = load_tile(grad + head * H, start + queries, N * H, lanes, real, H, UPCAST)
                row_lse = tl.load(lse + head * T + start + queries, real, 0.0)
                row_delta = tl.load(delta + head * T + start + queries, real, 0.0)
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
                weights = tl.exp2(scores - row_lse[:, None])
                weights = tl.where(visible(queries, keys, length, CAUSAL), weights, 0.0)
                total_v += tl.dot(
                    tl.trans(weights.to(g_tile.dtype)), g_tile, input_precision="ieee"
                )
                back = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
                back = weights * (back - row_delta[:, None])
                total_k += tl.dot(tl.trans(back.to(q_tile.dtype)), q_tile, input_precision="ieee")
        kv_heads: tl.constexpr = N // GROUP
        offsets = ((start + keys)[:, None].to(tl.int64) * kv_heads + kv_head) * H + lanes[None, :]
        stored = inside[:, None] & (lanes[None, :] < H)
        tl.store(grad_k + offsets, total_k * scale, stored)
        tl.store(grad_v + offsets, total_v, stored)


def triton_varlen(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """As attention.varlen_attention."""
    inputs = (x if x.stride(2) == 1 else x.contiguous() for x in (q_TNH, k_TKH, v_TKH))
    out: Tensor = _Varlen.apply(*inputs, cu_seqlens, max_seqlen, causal, scale)
    return out


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, causal: bool,
        scale: float,
    ) -> Tensor:  # fmt: skip
        tokens, heads, head_dim = q.shape
        out = q.new_empty(tokens, heads, head_dim)
        lse = q.new_empty(heads, tokens, dtype=torch.float32)
        grid = (triton.cdiv(longest, BLOCK_M), len(borders) - 1, heads)
        forward_kernel[grid](
            *(q, k, v, out, lse, borders, *_strides(q, k, v), scale * LOG2_E, tokens),
            **_sizes(q, k, causal),
            BLOCK_M=BLOCK_M,
            BLOCK_C=BLOCK_C,
        )
        ctx.save_for_backward(q, k, v, out, lse, borders)
        ctx.settings = longest, causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, borders = ctx.saved_tensors
        longest, causal, scale = ctx.settings
        grad = grad.contiguous()
        delta = (grad.float() * out.float()).sum(-1).t().contiguous()
        grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
        factors = (scale, scale * LOG2_E, q.shape[0])
        segments = len(borders) - 1
        sizes = _sizes(q, k, causal) | {"BLOCK_M": SMALL_M, "BLOCK_C": SMALL_C}
        query_gradient_kernel[(triton.cdiv(longest, SMALL_M), segments, q.shape[1])](
            *(q, k, v, grad, lse, delta, grad_q, borders, *_strides(q, k, v), *factors), **sizes
        )
        key_value_gradient_kernel[(triton.cdiv(longest, SMALL_C), segments, k.shape[1])](
            *(q, k, v, grad, lse, delta, grad_k, grad_v, borders),
            *(*_strides(q, k, v), *factors),
            **sizes,
        )
        return grad_q, grad_k, grad_v, None, None, None, None


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in (q, k, v) for stride in x.stride()[:2])


def _sizes(q: Tensor, k: Tensor, causal: bool) -> dict[str, Any]:
    return {
        "N": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "H": q.shape[2],
        "CAUSAL": causal,
        "UPCAST": upcast(q),
        "BLOCK_H": max(16, triton.next_power_of_2(q.shape[2])),
        "num_warps": num_warps(q.shape[2]),
    }
