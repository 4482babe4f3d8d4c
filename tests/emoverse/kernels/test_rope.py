"""Rotary positions in place and back, against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emoverse.kernels import reference
from emoverse.kernels.rope import rope_merge, rope_split_


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"),
    [(1, 1, 1, 8), (23, 4, 4, 96), (7, 12, 3, 16), (5, 9, 1, 64)],
)
def test_against_the_truth(
    values: Any,
    assert_close: Callable[..., None],
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    width = (heads + 2 * kv_heads) * head_dim
    packed, packed64 = values.make(tokens, width)
    angles = torch.arange(tokens)[:, None] / 10.0 ** torch.linspace(0, 3, head_dim // 2)
    cos, sin = ((f(angles).repeat(1, 2) * 1.19).to(packed) for f in (torch.cos, torch.sin))
    sizes = (heads, kv_heads, kv_heads)
    parts64 = packed64.view(tokens, -1, head_dim).split(sizes, dim=1)
    turned64 = [reference.rope(x, cos.double(), sin.double()) for x in parts64[:2]]
    grads = [values.make(tokens, n, head_dim) for n in sizes]
    total = sum((x * g[1]).sum() for x, g in zip((*turned64, parts64[2]), grads, strict=True))
    (wanted,) = torch.autograd.grad(total, packed64)

    work = packed.clone()
    q, k, v = rope_split_(work, cos, sin, heads, kv_heads)
    assert q.data_ptr() == work.data_ptr()
    assert_close(q, turned64[0])
    assert_close(k, turned64[1])
    assert torch.equal(v, packed.view(tokens, -1, head_dim)[:, heads + kv_heads :])
    # Gradients of attention may come transposed.
    strided = tuple(g[0].transpose(0, 1).contiguous().transpose(0, 1) for g in grads)
    assert_close(rope_merge(strided, cos, sin), wanted)
