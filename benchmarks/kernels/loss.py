"""The head and its loss, forward and backward: supervised rows in chunks, all logits, Liger.

In:  --tokens, --repeats. Out: milliseconds, the ratio to all logits, and on a GPU the peak memory,
at 2, 5, 20 and 100 % supervised rows.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_tools import DEVICE, SIZES, arguments, liger, machine, medians, report
from torch import nn

from emoverse.loss import supervised_cross_entropy


def peak_gib(call: Callable[[], Any]) -> float | None:
    """Above what is allocated before the call."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> int:
    on_gpu = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 128)
    parser.add_argument("--repeats", type=int, default=10 if on_gpu else 3)
    parser.add_argument("--sizes", nargs="+", default=["4b", "8b"] if on_gpu else ["4b"])
    options = parser.parse_args()
    tokens, rows = options.tokens, []
    for size in options.sizes:
        hidden, vocabulary = SIZES[size][0], SIZES[size][5]
        half = {"device": DEVICE, "dtype": torch.bfloat16}
        head = nn.Linear(hidden, vocabulary, bias=False, **half).requires_grad_(False)
        x = torch.randn(tokens, hidden, **half).requires_grad_()
        for share in (0.02, 0.05, 0.2, 1.0):
            count = max(1, int(share * tokens))
            rows_R = torch.randperm(tokens, device=DEVICE)[:count].sort().values
            targets = torch.randint(vocabulary, (count,), device=DEVICE)
            labels = torch.full((tokens,), -100, device=DEVICE)
            labels[rows_R] = targets

            def everything(x=x, labels=labels, head=head) -> object:
                loss = F.cross_entropy(head(x).float(), labels, reduction="sum")
                return torch.autograd.grad(loss, x)

            def ours(x=x, rows_R=rows_R, targets=targets, head=head) -> object:
                loss = supervised_cross_entropy(x, rows_R, targets, head).sum()
                return torch.autograd.grad(loss, x)

            calls = {"all logits": everything, "supervised rows": ours}
            if (make := liger("LigerFusedLinearCrossEntropyLoss")) is not None:
                fused = make(reduction="sum")

                def ligers(x=x, labels=labels, head=head, fused=fused) -> object:
                    return torch.autograd.grad(fused(head.weight, x, labels), x)

                calls["Liger, fused"] = ligers
            seconds = medians(calls, repeats=options.repeats)
            rows += [
                {
                    "size": size,
                    "supervised": f"{share:.0%}",
                    "who": who,
                    "ms": 1e3 * value,
                    "times all logits": seconds["all logits"] / value,
                    "peak GiB": peak_gib(calls[who]),
                }
                for who, value in seconds.items()
            ]
    report({"machine": machine(), "tokens": tokens}, rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
