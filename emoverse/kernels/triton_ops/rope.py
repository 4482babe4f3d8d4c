"""Triton: rotary positions on packed q, k and v in place, and the backward that joins gradients.

Legend: T tokens, N query heads, K key/value heads, H head dim.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 32  # heads of a program, of one token or of several


@triton.jit(do_not_specialize=["T"])
def rope_kernel(
    source, target, cos, sin, T, source_token, source_head, target_token, target_head,
    HEADS: tl.constexpr, H: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """target = source rotated by SIGN times its angle, 0 copies; BLOCK_N heads, token by token."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    token, head = row // HEADS, row % HEADS
    half: tl.constexpr = H // 2
    lanes = tl.arange(0, BLOCK_H)[None, :]
    inside = (token < T) & (lanes < half)
    pointers = source + token * source_token + head * source_head + lanes
    a = tl.load(pointers, inside, 0.0)
    b = tl.load(pointers + half, inside, 0.0)
    if SIGN != 0:
        c = tl.load(cos + token * H + lanes, inside, 0.0).to(tl.float32)
        s = tl.load(sin + token * H + lanes, inside, 0.0).to(tl.float32) * SIGN
        left, right = a.to(tl.float32), b.to(tl.float32)
        a = (left * c - right * s).to(target.dtype.element_ty)
        b = (right * c + left * s).to(target.dtype.element_ty)
    pointers = target + token * target_token + head * target_head + lanes
    tl.store(pointers, a, inside)
    tl.store(pointers + half, b, inside)


def rotate_(qkv_TW: Tensor, cos_TH: Tensor, sin_TH: Tensor, heads: int) -> None:
    """Rotates the first `heads` heads of each token in place."""
    assert qkv_TW.is_contiguous()
    heads_TNH = qkv_TW.unflatten(1, (-1, cos_TH.shape[1]))[:, :heads]
    _launch(heads_TNH, heads_TNH, cos_TH, sin_TH, 1)


def rope_merge(grads: tuple[Tensor, Tensor, Tensor], cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Gradients of q and k rotated back, then those of v: T, (N + 2 K) H."""
    sizes = [grad.shape[1] for grad in grads]
    out_TNH = grads[0].new_empty(grads[0].shape[0], sum(sizes), grads[0].shape[2])
    for grad, out, sign in zip(grads, out_TNH.split(sizes, dim=1), (-1, -1, 0), strict=True):
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        _launch(grad, out, cos_TH, sin_TH, sign)
    return out_TNH.flatten(1)


def _launch(source: Tensor, target: Tensor, cos_TH: Tensor, sin_TH: Tensor, sign: int) -> None:
    tokens, heads, head_dim = source.shape
    rope_kernel[(triton.cdiv(tokens * heads, BLOCK_N),)](
        *(source, target, cos_TH.contiguous(), sin_TH.contiguous(), tokens),
        *(source.stride(0), source.stride(1), target.stride(0), target.stride(1)),
        HEADS=heads,
        H=head_dim,
        SIGN=sign,
        BLOCK_N=BLOCK_N,
        BLOCK_H=triton.next_power_of_2(head_dim // 2),
    )
