"""Rotary positions on the packed result of the qkv projection, in place, and the backward.

In:  q, k and v of all heads side by side; cos and sin per token, both halves alike, as
transformers' rotary modules make them. Out: q, k, v as views of the same memory.
Legend: T tokens, N query heads, K key/value heads, H head dim, W = (N + 2 K) H.
"""

import torch
from torch import Tensor

from emoverse.kernels.adapter_types import wide
from emoverse.kernels.backend import use_triton


def rope_split_(
    qkv_TW: Tensor, cos_TH: Tensor, sin_TH: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates q and k inside `qkv_TW`; returns q (T, N, H), k and v (T, K, H), all views."""
    tokens, head_dim = cos_TH.shape
    assert qkv_TW.shape == (tokens, (heads + 2 * kv_heads) * head_dim), qkv_TW.shape
    if use_triton(qkv_TW):
        from emoverse.kernels.triton_ops import rope as triton_rope

        triton_rope.rotate_(qkv_TW, cos_TH, sin_TH, heads + kv_heads)
    else:
        _rotate(qkv_TW.view(tokens, -1, head_dim)[:, : heads + kv_heads], cos_TH, sin_TH, 1)
    q, k, v = qkv_TW.view(tokens, -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    return q, k, v


def rope_merge(grads: tuple[Tensor, Tensor, Tensor], cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Gradient of the projection's result, T, W, from those of q, k and v."""
    if use_triton(grads[0]):
        from emoverse.kernels.triton_ops import rope as triton_rope

        return triton_rope.rope_merge(grads, cos_TH, sin_TH)
    grad_TNH = torch.cat(grads, dim=1)
    rotated = grads[0].shape[1] + grads[1].shape[1]
    _rotate(grad_TNH[:, :rotated], cos_TH, sin_TH, -1)
    return grad_TNH.flatten(1)


def _rotate(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, direction: int) -> None:
    """(a, b) -> (a cos - b sin, b cos + a sin) on the halves of every head; -1 is the inverse."""
    half = cos_TH.shape[1] // 2
    cos = wide(cos_TH[:, None, :half])
    sin = wide(sin_TH[:, None, :half]) * direction
    a, b = wide(x_TNH[..., :half]), wide(x_TNH[..., half:])
    x_TNH[..., :half], x_TNH[..., half:] = a * cos - b * sin, b * cos + a * sin
