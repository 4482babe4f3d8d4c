"""What a decoder layer keeps for backward, and how many operations it dispatches.

Bytes per token and layer are counted with saved-tensor hooks (storages once, without parameters),
operations over forward + backward, for lean layers and for transformers + PEFT (bf16 adapters,
dropout 0.05). Views and allocations are no operations; a Triton kernel is one. Figures of a layer
are the difference between a model of two layers and a model of one.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_tools import DEVICE, arguments, lean, machine, peer, report
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from emoverse.kernels.backend import configure_kernels, has_triton

ALLOCATIONS = ("empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "detach")


class Count(TorchDispatchMode):
    """Counts what is dispatched; views and allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not view and name not in ALLOCATIONS:
            self.operations += 1
        return function(*args, **(kwargs or {}))


def count_launches(count: Count) -> Callable[[], None]:
    """Counts each Triton launch as one operation; returns what ends that."""
    if not has_triton():
        return lambda: None
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    kinds = [(GridExecutor, "__call__"), (JITFunction, "run")]
    plain = [getattr(kind, name) for kind, name in kinds]

    def wrap(call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            count.operations += 1
            with _disable_current_modes():  # what the interpreter does inside is no launch
                return call(*args, **kwargs)

        return counted

    for (kind, name), call in zip(kinds, plain, strict=True):
        setattr(kind, name, wrap(call))

    def restore() -> None:
        for (kind, name), call in zip(kinds, plain, strict=True):
            setattr(kind, name, call)

    return restore


def measure(model: nn.Module, tokens: int) -> tuple[int, int]:
    """Bytes kept between forward and backward; operations of both."""
    generator = torch.Generator().manual_seed(1)
    width = model.config.hidden_size
    embeddings_1TD = torch.randn(1, tokens, width, generator=generator)
    embeddings_1TD = embeddings_1TD.to(DEVICE, torch.bfloat16).requires_grad_()
    positions = torch.arange(tokens, device=DEVICE)[None]
    borders = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    count = Count()
    restore = count_launches(count)
    try:
        with count, torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            hidden = model.model(
                inputs_embeds=embeddings_1TD,
                position_ids=positions,
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE)
                if model.lean
                else None,
                **({"cu_seq_lens_q": borders, "max_length_q": tokens} if model.lean else {}),
            ).last_hidden_state
            held = sum(kept.values())
            hidden.sum().backward()
    finally:
        restore()
    return held, count.operations


def per_layer(size: str, kind: str, tokens: int) -> tuple[float, int]:
    """Bytes per token, and operations, of one layer."""
    measured = []
    for layers in (1, 2):
        model = peer(size, layers=layers, dtype=torch.bfloat16)
        model.lean = kind != "peer"
        if model.lean:
            lean(model)
        configure_kernels("triton" if kind == "lean, Triton" else "eager")
        measured.append(measure(model, tokens))
        configure_kernels("auto")
        del model
    (one_bytes, one_operations), (two_bytes, two_operations) = measured
    return (two_bytes - one_bytes) / tokens, two_operations - one_operations


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["4b/8", "8b/8"])
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    kinds = ["peer", "lean, eager"] + (["lean, Triton"] if has_triton() else [])
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        measured = {kind: per_layer(size, kind, options.tokens) for kind in kinds}
        peer_bytes, peer_operations = measured["peer"]
        rows += [
            {
                "size": size,
                "layers": kind,
                "bytes per token": held,
                "of the peer's": held / peer_bytes,
                "operations": operations,
                "of the peer's operations": operations / peer_operations,
            }
            for kind, (held, operations) in measured.items()
        ]
    ours = [row for row in rows if row["layers"] == kinds[-1]]
    figures = {
        "machine": machine(),
        "tokens": options.tokens,
        "ratio": max(row["of the peer's"] for row in ours),
        "operations_ratio": max(row["of the peer's operations"] for row in ours),
        "kernels": kinds[-1],
    }
    report(figures, rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
