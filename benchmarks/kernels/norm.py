"""Residual add + RMSNorm, forward and backward: ours, transformers' in plain torch, Liger.

In:  --tokens, --repeats. Out: milliseconds, the ratio to transformers' Phi3RMSNorm after an add,
and on a GPU the share of a plain copy's bandwidth. No adapters: those are lora.py's subject.
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
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from emoverse.kernels.backend import kernel_backend
from emoverse.kernels.norm import add_norm_lora, add_norm_lora_backward


def main() -> int:
    on_gpu = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 256)
    parser.add_argument("--repeats", type=int, default=50 if on_gpu else 5)
    options = parser.parse_args()
    rows, bandwidth = [], copy_bandwidth()
    for size in ("4b", "8b"):
        width = SIZES[size][0]
        norm = Phi3RMSNorm(width, eps=1e-5).to(DEVICE, torch.bfloat16).requires_grad_(False)
        x, update, grad_y, grad_r = (
            torch.randn(options.tokens, width, device=DEVICE, dtype=torch.bfloat16)
            for _ in range(4)
        )

        def theirs(x=x, update=update, grad_y=grad_y, grad_r=grad_r, norm=norm) -> None:
            a = x.detach().requires_grad_()
            residual = a + update
            torch.autograd.grad((norm(residual), residual), a, (grad_y, grad_r))

        def ours(x=x, update=update, grad_y=grad_y, grad_r=grad_r, norm=norm) -> None:
            # In plain torch the update is overwritten; its values do not matter here.
            out = add_norm_lora(x, update, norm.weight, 1e-5, None)
            saved = out.residual_TD, out.rstd_T, norm.weight
            add_norm_lora_backward(grad_y, grad_r, saved, None, None)

        calls: dict[str, Callable[[], object]] = {"transformers": theirs, "ours": ours}
        if (make := liger("LigerRMSNorm")) is not None:
            other = make(width, eps=1e-5).to(DEVICE, torch.bfloat16).requires_grad_(False)
            calls["Liger"] = partial(theirs, norm=other)
        # Forward: x, update in; residual, y out. Backward: two gradients, residual in; one out.
        rows += compare_to_transformers(
            *(size, calls),
            repeats=options.repeats,
            moved=8 * x.nbytes,
            bandwidth=bandwidth,
        )
    figures = {"machine": machine(), "tokens": options.tokens}
    figures["kernels"] = kernel_backend(DEVICE.type)
    report(figures, rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
