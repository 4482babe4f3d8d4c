"""Rotary positions + split, forward and backward: ours in place against transformers' and Liger.

In:  --tokens, --repeats. Out: milliseconds, the ratio to apply_rotary_pos_emb on split heads, and
on a GPU the share of a plain copy's bandwidth.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from bench_tools import (
    DEVICE,
    SIZES,
    arguments,
    compare_to_transformers,
    copy_bandwidth,
    liger,
    machine,
    report,
)
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from emoverse.kernels.backend import kernel_backend
from emoverse.kernels.rope import rope_merge, rope_split_


def main() -> int:
    on_gpu = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 256)
    parser.add_argument("--repeats", type=int, default=50 if on_gpu else 5)
    options = parser.parse_args()
    tokens, rows, bandwidth = options.tokens, [], copy_bandwidth()
    for size in ("4b", "8b"):
        hidden, _, heads, kv_heads, _, _ = SIZES[size]
        head_dim = hidden // heads
        sizes = (heads, kv_heads, kv_heads)
        half = {"device": DEVICE, "dtype": torch.bfloat16}
        qkv = torch.randn(tokens, sum(sizes) * head_dim, **half)
        angles = torch.rand(tokens, head_dim // 2, device=DEVICE).repeat(1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        grads = tuple(torch.randn(tokens, n, head_dim, **half) for n in sizes)

        def theirs(
            turn=apply_rotary_pos_emb, qkv=qkv, cos=cos, sin=sin, grads=grads, sizes=sizes,
            h=head_dim,
        ) -> None:  # fmt: skip
            x = qkv.detach().requires_grad_()
            q, k, v = x.view(1, tokens, -1, h).transpose(1, 2).split(sizes, dim=1)
            q, k = turn(q, k, cos[None], sin[None])
            back = tuple(g.transpose(0, 1)[None] for g in grads)
            torch.autograd.grad((q, k, v), x, back)

        def ours(qkv=qkv, cos=cos, sin=sin, grads=grads, sizes=sizes) -> None:
            rope_split_(qkv, cos, sin, sizes[0], sizes[1])
            rope_merge(grads, cos, sin)

        calls: dict[str, Callable[[], object]] = {"transformers": theirs, "ours": ours}
        if (turn := liger("liger_rotary_pos_emb")) is not None:
            calls["Liger"] = partial(theirs, turn)
        # Forward: q and k in and out. Backward: q, k and v in and out.
        heads_moved = 2 * (heads + kv_heads) + 2 * sum(sizes)
        rows += compare_to_transformers(
            *(size, calls),
            repeats=options.repeats,
            moved=heads_moved * tokens * head_dim * qkv.element_size(),
            bandwidth=bandwidth,
        )
    figures = {"machine": machine(), "tokens": tokens, "kernels": kernel_backend(DEVICE.type)}
    report(figures, rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
