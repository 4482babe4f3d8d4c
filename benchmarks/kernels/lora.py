"""LoRA linears, forward and backward: what adapters cost over the frozen linears.

In:  --tokens, --repeats, --sizes. Out: for the linears of each input (4b has fused ones, 8b reads
one input with three or two) milliseconds of the frozen ones with the gradient of their input (the
floor), of PEFT with bf16 and fp32 adapters, and of ours, at dropout 0 and 0.05; on a GPU also what
rows of K + 16 and K + 64 cost the frozen products, forward and backward, against rows of K: that
decides whether adapters should ride inside the weight's buffer.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_tools import ALPHA, DEVICE, SIZES, arguments, machine, medians, report
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from emoverse.kernels.adapter_types import Linears
from emoverse.kernels.dropout import Dropout
from emoverse.kernels.lora import lora_linears

RANK = 8
PADS = (0, 16, 64)  # elements behind each row of K
HALF: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}


def shapes(size: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name -> in, out of each linear that reads this input."""
    hidden, mlp, heads, kv_heads, _, _ = SIZES[size]
    head_dim = hidden // heads
    groups = {
        "qkv": (hidden, (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)),
        "o": (hidden, (hidden,)),
        "gate_up": (hidden, (mlp, mlp)),
        "down": (mlp, (hidden,)),
    }
    if size.startswith("8b"):
        return groups
    return {name: (inputs, (sum(outputs),)) for name, (inputs, outputs) in groups.items()}


def with_peft(weight: Tensor, p: float, dtype: torch.dtype) -> nn.Module:
    """PEFT's layer around a frozen weight, adapters in `dtype`."""
    holder = nn.ModuleDict({"linear": nn.Linear(*weight.shape[::-1], bias=False, device="meta")})
    holder["linear"].weight = nn.Parameter(weight, requires_grad=False)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=p, target_modules=["linear"])
    inject_adapter_in_model(settings, holder)
    for name, value in holder.named_parameters():
        if "lora_" in name:
            # PEFT makes them beside the weight; B of zeros costs as much as any.
            value.data = value.data.to(DEVICE, dtype)
    return holder["linear"].train()


def backward_of(
    call: Callable[[Tensor], list[Tensor]], x: Tensor, grad: Tensor, trained: list[Tensor]
) -> Callable[[], object]:
    """Forward and backward; outputs side by side have the gradient `grad`."""

    def run() -> object:
        a = x.detach().requires_grad_()
        outputs = call(a)
        grads = grad.split([output.shape[1] for output in outputs], dim=1)
        return torch.autograd.grad(outputs, [a, *trained], grads)

    return run


def contest(
    inputs: int, outputs: tuple[int, ...], tokens: int, p: float, repeats: int
) -> dict[str, float]:
    """Seconds of each contestant on the linears of one input."""
    weights = tuple(torch.randn(n, inputs, **HALF) for n in outputs)
    x, grad = torch.randn(tokens, inputs, **HALF), torch.randn(tokens, sum(outputs), **HALF)
    a = tuple((torch.randn(RANK, inputs, **HALF) * 0.02).requires_grad_() for _ in outputs)
    b = tuple((torch.randn(n, RANK, **HALF) * 0.02).requires_grad_() for n in outputs)
    dropout = Dropout(p, 12345678901234, 0) if p else None
    calls: dict[str, Callable[[], Any]] = {
        "frozen": backward_of(lambda x: [x @ w.t() for w in weights], x, grad, [])
    }
    for name, dtype in (("PEFT bf16", torch.bfloat16), ("PEFT fp32", torch.float32)):
        modules = [with_peft(weight, p, dtype) for weight in weights]
        trained = [v for m in modules for n, v in m.named_parameters() if "lora_" in n]
        calls[name] = backward_of(
            lambda x, modules=modules: [module(x) for module in modules], x, grad, trained
        )
    linears = Linears(weights, a, b)
    calls["ours"] = backward_of(
        lambda x: [lora_linears(x, linears, scale=ALPHA / RANK, dropout=dropout)],
        *(x, grad, [*a, *b]),
    )
    return medians(calls, repeats=repeats)


def strides(inputs: int, outputs: int, tokens: int, repeats: int) -> dict[str, float]:
    """The frozen products with padded rows of every operand, over the same without."""
    calls: dict[str, Callable[[], Any]] = {}
    for pad in PADS:
        x = torch.randn(tokens, inputs + pad, **HALF)[:, :inputs]
        weight = torch.randn(outputs, inputs + pad, **HALF)[:, :inputs]
        grad = torch.randn(tokens, outputs + pad, **HALF)[:, :outputs]
        calls[f"forward, K + {pad}"] = lambda x=x, weight=weight: torch.mm(x, weight.t())
        calls[f"backward, K + {pad}"] = lambda grad=grad, weight=weight: torch.mm(grad, weight)
    seconds = medians(calls, repeats=repeats)
    floors = {way: seconds[f"{way}, K + 0"] for way in ("forward", "backward")}
    return {name: value / floors[name.partition(",")[0]] for name, value in seconds.items()}


def main() -> int:
    on_gpu = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 128)
    parser.add_argument("--repeats", type=int, default=30 if on_gpu else 3)
    parser.add_argument("--sizes", nargs="+", default=["4b", "8b"] if on_gpu else ["4b/8", "8b/8"])
    parser.add_argument("--strides", action="store_true", default=on_gpu, help="also on a CPU")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    totals: dict[str, Any] = {}
    for size in options.sizes:
        for p in (0.0, 0.05):
            sums: dict[str, float] = {}
            for name, (inputs, outputs) in shapes(size).items():
                seconds = contest(inputs, outputs, options.tokens, p, options.repeats)
                for who, value in seconds.items():
                    sums[who] = sums.get(who, 0.0) + value
                row = {"size": size, "linears": name, "dropout": p}
                rows.append(row | {f"{who} ms": 1e3 * value for who, value in seconds.items()})
            for who, value in sums.items():
                totals[f"{size}, dropout {p}: {who} over frozen"] = value / sums["frozen"]
        if options.strides:
            for name, (inputs, outputs) in shapes(size).items():
                slow = strides(inputs, sum(outputs), options.tokens, options.repeats)
                totals[f"{size} {name}: time by row stride"] = slow
    figures = {"machine": machine(), "tokens": options.tokens} | totals
    report(figures, rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
