"""LoRA linears, forward and backward: what adapters cost over the frozen linear.

In:  --tokens, --repeats, --sizes. Out: for each linear milliseconds of the frozen one with the
gradient of its input (the floor), of PEFT with bf16 and fp32 adapters, and of ours, at dropout 0
and 0.05; on a GPU also what a row stride of K + 16 and K + 64 costs the frozen product, which
decides whether adapters should ride inside the weight's buffer.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_tools import ALPHA, DEVICE, SIZES, arguments, machine, medians, report
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from emoverse.kernels.dropout import Dropout
from emoverse.kernels.lora import Linears, lora_linears

RANK = 8


def shapes(size: str) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of the fused linears."""
    hidden, mlp, heads, kv_heads, _, _ = SIZES[size]
    head_dim = hidden // heads
    return {
        "qkv": (hidden, (heads + 2 * kv_heads) * head_dim),
        "o": (hidden, hidden),
        "gate_up": (hidden, 2 * mlp),
        "down": (mlp, hidden),
    }


def with_peft(linear: nn.Linear, p: float, dtype: torch.dtype) -> nn.Module:
    """PEFT's layer around the linear, adapters in `dtype`."""
    holder = nn.ModuleDict({"linear": nn.Linear(1, 1, bias=False)})
    holder["linear"] = linear
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=p, target_modules=["linear"])
    inject_adapter_in_model(settings, holder)
    for name, value in holder.named_parameters():
        if "lora_" in name:
            value.data = value.data.to(DEVICE, dtype)
    return holder["linear"].train()


def backward_of(
    call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, trained: list[Tensor]
) -> Callable[[], object]:
    def run() -> object:
        a = x.detach().requires_grad_()
        return torch.autograd.grad(call(a), [a, *trained], grad)

    return run


def contest(inputs: int, outputs: int, tokens: int, p: float, repeats: int) -> dict[str, float]:
    """Seconds of each contestant on one linear."""
    half = {"device": DEVICE, "dtype": torch.bfloat16}
    linear = nn.Linear(inputs, outputs, bias=False, **half).requires_grad_(False)
    x, grad = torch.randn(tokens, inputs, **half), torch.randn(tokens, outputs, **half)
    a = (torch.randn(RANK, inputs, **half) * 0.02).requires_grad_()
    b = (torch.randn(outputs, RANK, **half) * 0.02).requires_grad_()
    dropout = Dropout(p, 12345678901234, 0) if p else None
    calls: dict[str, Callable[[], Any]] = {"frozen": backward_of(linear, x, grad, [])}
    for name, dtype in (("PEFT bf16", torch.bfloat16), ("PEFT fp32", torch.float32)):
        plain = nn.Linear(inputs, outputs, bias=False, device="meta")
        plain.weight = linear.weight
        module = with_peft(plain, p, dtype)
        trained = [v for n, v in module.named_parameters() if "lora_" in n]
        calls[name] = backward_of(module, x, grad, trained)
    linears = Linears((linear.weight,), (a,), (b,))
    calls["ours"] = backward_of(
        lambda x: lora_linears(x, linears, scale=ALPHA / RANK, dropout=dropout), x, grad, [a, b]
    )
    return medians(calls, repeats=repeats)


def strides(inputs: int, outputs: int, tokens: int, repeats: int) -> dict[str, float]:
    """The frozen product with padded rows, over the same without; above 1 is slower."""
    half = {"device": DEVICE, "dtype": torch.bfloat16}
    x = torch.randn(tokens, inputs, **half)
    calls: dict[str, Callable[[], Any]] = {}
    for pad in (0, 16, 64):
        weight = torch.randn(outputs, inputs + pad, **half)[:, :inputs]
        calls[f"K + {pad}"] = lambda weight=weight: torch.mm(x, weight.t())
    seconds = medians(calls, repeats=repeats)
    return {name: value / seconds["K + 0"] for name, value in seconds.items()}


def main() -> int:
    on_gpu = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 128)
    parser.add_argument("--repeats", type=int, default=30 if on_gpu else 3)
    parser.add_argument("--sizes", nargs="+", default=["4b", "8b"] if on_gpu else ["4b"])
    options = parser.parse_args()
    rows, totals = [], {}
    for size in options.sizes:
        for p in (0.0, 0.05):
            sums: dict[str, float] = {}
            for name, (inputs, outputs) in shapes(size).items():
                found = contest(inputs, outputs, options.tokens, p, options.repeats)
                for who, value in found.items():
                    sums[who] = sums.get(who, 0.0) + value
                row = {"size": size, "linear": name, "dropout": p}
                rows.append(row | {f"{who} ms": 1e3 * value for who, value in found.items()})
            for who, value in sums.items():
                totals[f"{size}, dropout {p}: {who} over frozen"] = value / sums["frozen"]
        if on_gpu:
            for name, (inputs, outputs) in shapes(size).items():
                slow = strides(inputs, outputs, options.tokens, options.repeats)
                totals[f"{size} {name}: time by row stride"] = slow
    figures = {"machine": machine(), "tokens": options.tokens} | totals
    report(figures, rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
