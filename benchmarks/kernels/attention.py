"""Attention over packed segments, forward and backward: each backend, and the dense mask.

In:  --tokens, --repeats. Out: milliseconds by shape of the pack, and the ratio to SDPA with a dense
block mask. On a CPU only SDPA by segments and the dense mask run.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_tools import DEVICE, arguments, machine, medians, report
from torch import Tensor

from emoverse.kernels.attention import configure_attention, varlen_attention


def packs(tokens: int) -> dict[str, list[int]]:
    """Segment lengths: equal ones, real samples, short ones, one."""
    real = [2198 * tokens // 8192] * 3
    return {
        "4 equal": [tokens // 4] * 4,
        "3 real + rest": [*real, tokens - sum(real)],
        "16 short": [tokens // 16] * 16,
        "1": [tokens],
    }


def available() -> list[str]:
    """The settings that can be had here; on a CPU only SDPA."""
    settings = ["sdpa"]
    for setting in ("torch", "triton", "flash") if DEVICE.type == "cuda" else ():
        try:
            configure_attention(setting)
        except ValueError:  # the package is not installed
            continue
        settings.append(setting)
    return settings


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One call with a T x T mask."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def main() -> int:
    on_gpu = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 512)
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5)
    options = parser.parse_args()
    settings = available()
    rows = []
    for heads, kv_heads, head_dim in ((32, 32, 96), (32, 8, 128)):
        for name, lengths in packs(options.tokens).items():
            half = {"device": DEVICE, "dtype": torch.bfloat16}
            inputs = [
                torch.randn(options.tokens, n, head_dim, **half).requires_grad_()
                for n in (heads, kv_heads, kv_heads)
            ]
            grad = torch.randn(options.tokens, heads, head_dim, **half)
            borders = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
            of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            mask = (of[:, None] == of[None, :]).tril().to(DEVICE)

            def packed(setting: str, inputs=inputs, borders=borders, lengths=lengths) -> Tensor:
                configure_attention(setting)
                longest, scale = max(lengths), inputs[0].shape[-1] ** -0.5
                return varlen_attention(*inputs, borders, longest, causal=True, scale=scale)

            forwards: dict[str, Callable[[], Tensor]] = {
                setting: (lambda setting=setting, packed=packed: packed(setting))
                for setting in settings
            }
            forwards["dense mask"] = lambda inputs=inputs, mask=mask: dense(*inputs, mask)
            calls: dict[str, Callable[[], Any]] = {
                who: (
                    lambda forward=forward, inputs=inputs, grad=grad: torch.autograd.grad(
                        forward(), inputs, grad
                    )
                )
                for who, forward in forwards.items()
            }
            seconds = medians(calls, repeats=options.repeats)
            rows += [
                {
                    "heads": f"{heads}/{kv_heads} x {head_dim}",
                    "segments": name,
                    "backend": who,
                    "ms": 1e3 * value,
                    "times dense mask": seconds["dense mask"] / value,
                }
                for who, value in seconds.items()
            ]
    report({"machine": machine(), "tokens": options.tokens}, rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
