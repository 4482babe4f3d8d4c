"""SwiGLU, forward and backward: ours, which keeps gate and up only, against transformers' own.

In:  --tokens, --repeats. Out: milliseconds and the ratio to Phi3MLP's product without linears.
"""

import sys

import torch
import torch.nn.functional as F
from bench_tools import DEVICE, SIZES, arguments, machine, medians, report

from emoverse.kernels.backend import kernel_backend
from emoverse.kernels.swiglu import swiglu_lora, swiglu_lora_backward


def main() -> int:
    on_gpu = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 256)
    parser.add_argument("--repeats", type=int, default=50 if on_gpu else 5)
    options = parser.parse_args()
    rows = []
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

        seconds = medians({"transformers": theirs, "ours": ours}, repeats=options.repeats)
        rows += [
            {
                "size": size,
                "who": who,
                "ms": 1e3 * value,
                "times transformers": seconds["transformers"] / value,
            }
            for who, value in seconds.items()
        ]
    figures = {"machine": machine(), "tokens": options.tokens}
    figures["kernels"] = kernel_backend(DEVICE.type)
    report(figures, rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
