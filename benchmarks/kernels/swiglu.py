"""SwiGLU, forward and backward: ours, which keeps gate and up only, transformers' and Liger.

In:  --tokens, --repeats. Out: milliseconds, the ratio to Phi3MLP's product without linears, and on
a GPU the share of a plain copy's bandwidth.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
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

from emoverse.kernels.backend import kernel_backend
from emoverse.kernels.swiglu import swiglu_lora, swiglu_lora_backward


def main() -> int:
    on_gpu = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 256)
    parser.add_argument("--repeats", type=int, default=50 if on_gpu else 5)
    options = parser.parse_args()
    rows, bandwidth = [], copy_bandwidth()
    for size in ("4b", "8b"):
        width = SIZES[size][1]
        gate_up = torch.randn(options.tokens, 2 * width, device=DEVICE, dtype=torch.bfloat16)
        grad = torch.randn(options.tokens, width, device=DEVICE, dtype=torch.bfloat16)

        def theirs(gate_up=gate_up, grad=grad) -> None:
            x = gate_up.detach().requires_grad_()
            gate, up = x.chunk(2, dim=-1)
            torch.autograd.grad(up * F.silu(gate), x, grad)

        def ours(gate_up=gate_up, grad=grad) -> None:
            swiglu_lora(gate_up, None)
            swiglu_lora_backward(grad, gate_up, None, None)

        calls: dict[str, Callable[[], object]] = {"transformers": theirs, "ours": ours}
        if (function := liger("LigerSiLUMulFunction")) is not None:

            def ligers(gate_up=gate_up, grad=grad, function=function) -> None:
                x = gate_up.detach().requires_grad_()
                torch.autograd.grad(function.apply(*x.chunk(2, dim=-1)), x, grad)

            calls["Liger"] = ligers
        # Forward: gate and up in, one out. Backward: these and a gradient in, two out.
        rows += compare_to_transformers(
            *(size, calls),
            repeats=options.repeats,
            moved=8 * grad.nbytes,
            bandwidth=bandwidth,
        )
    figures = {"machine": machine(), "tokens": options.tokens}
    figures["kernels"] = kernel_backend(DEVICE.type)
    report(figures, rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
