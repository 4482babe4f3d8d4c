"""One training step of the language model: our layers against transformers + PEFT, lever by lever.

In:  --sizes tiny 4b 8b, --tokens, --repeats. Out: a table: seconds, tokens/s, ratio to transformers
+ PEFT with activation checkpointing, peak memory and, on a GPU, MFU. All contestants run in this
process, in turns, on one model, the same packed tokens, bf16, dropout 0.05 and 5 % supervised rows.

Attention is the same for all: torch's own varlen attention (FlashAttention-2 inside) on a GPU, SDPA
by segments on a CPU. FLOP rule of MFU, per token: 4 x linear weights (a frozen base has no weight
gradient), 4 x head, all rows counted, 3 x causal attention forward; adapters are not counted.
The vision tower is not part of the step.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))
from bench_tools import (
    ALPHA,
    DEVICE,
    DROPOUT,
    SIZES,
    arguments,
    lean,
    machine,
    medians,
    peak_flops,
    peer,
    report,
)

from emoverse.kernels import attention
from emoverse.kernels.backend import configure_kernels, has_triton
from emoverse.kernels.dropout import Dropout, draw_seed
from emoverse.kernels.head import supervised_cross_entropy
from emoverse.kernels.lora import Linears, lora_linears

# A real sample: 8 frames of 256 tokens and about 150 tokens of text.
SAMPLE = 2198
SUPERVISED = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a contestant takes the step; the plain one is transformers + PEFT as they come."""

    checkpointing: bool = False
    lean: bool = False
    triton: bool = False  # kernels of the lean layers; without, plain torch
    rows_head: bool = False  # logits at supervised rows only, in chunks
    lora_functions: bool = False  # adapters of the plain layers in addmm form
    liger: bool = False


BASELINE = Way(checkpointing=True)
LADDER = {
    "transformers + PEFT, checkpointing": BASELINE,
    "transformers + PEFT": Way(),
    "Liger + PEFT": Way(liger=True),
    "baseline + supervised rows": replace(BASELINE, rows_head=True),
    "baseline + LoRA functions": replace(BASELINE, lora_functions=True),
    "lean layers in plain torch": Way(lean=True),
    "lean layers, Triton": Way(lean=True, triton=True),
    "lean layers, Triton, supervised rows": Way(lean=True, triton=True, rows_head=True),
    "the last, checkpointing": Way(lean=True, triton=True, rows_head=True, checkpointing=True),
}
PEERS = tuple(LADDER)[:3]
OURS = "lean layers, Triton, supervised rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A packed batch."""

    embeddings_1TD: Tensor
    positions_1T: Tensor
    borders: Tensor
    longest: int
    rows_R: Tensor
    targets_R: Tensor


def make_inputs(size: str, tokens: int) -> Inputs:
    """Segments of a real sample's length and a shorter last one; random values."""
    sample = min(SAMPLE, -(-tokens // 3))
    lengths = [sample] * (tokens // sample)
    if tokens % sample:
        lengths.append(tokens % sample)
    generator = torch.Generator().manual_seed(0)
    hidden, vocabulary = SIZES[size][0], SIZES[size][5]
    rows = torch.randperm(tokens, generator=generator)[: max(1, int(tokens * SUPERVISED))]
    positions = torch.cat([torch.arange(length) for length in lengths])
    embeddings = torch.randn(1, tokens, hidden, generator=generator)
    return Inputs(
        embeddings_1TD=embeddings.to(DEVICE, torch.bfloat16).requires_grad_(),
        positions_1T=positions[None].to(DEVICE),
        borders=torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32),
        longest=max(lengths),
        rows_R=rows.sort().values.to(DEVICE),
        targets_R=torch.randint(vocabulary, rows.shape, generator=generator).to(DEVICE),
    )


class Contest:
    """One model that can be switched between ways."""

    def __init__(self, size: str, layers: int, tokens: int) -> None:
        self.model = peer(size, layers=layers, dtype=torch.bfloat16)
        self.model.set_attn_implementation(attention.NAME)
        self.plain_layers = list(self.model.model.layers)
        lean(self.model)
        self.lean_layers = list(self.model.model.layers)
        self.adapters = [m for m in self.model.modules() if hasattr(m, "lora_A")]
        self.inputs = make_inputs(size, tokens)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def switch(self, way: Way) -> None:
        """Arranges the model for a way."""
        layers = self.lean_layers if way.lean else self.plain_layers
        for number, layer in enumerate(layers):
            self.model.model.layers[number] = layer
            layer.gradient_checkpointing = way.checkpointing
            layer._gradient_checkpointing_func = _checkpoint
        configure_kernels("triton" if way.triton else "eager")
        for adapter in self.adapters:
            if way.lora_functions:
                adapter.forward = _addmm_forward(adapter)
            else:
                adapter.__dict__.pop("forward", None)

    def step(self, way: Way) -> float:
        """Forward, backward, update; returns the loss."""
        self.switch(way)
        inputs = self.inputs
        hidden = self.model.model(
            inputs_embeds=inputs.embeddings_1TD,
            position_ids=inputs.positions_1T,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE),
            use_cache=False,
            cu_seq_lens_q=inputs.borders,
            max_length_q=inputs.longest,
        ).last_hidden_state.squeeze(0)
        if way.rows_head:
            losses = supervised_cross_entropy(
                hidden, inputs.rows_R, inputs.targets_R, self.model.lm_head
            )
        else:
            logits = self.model.lm_head(hidden).float()
            labels = torch.full_like(inputs.positions_1T[0], -100)
            labels[inputs.rows_R] = inputs.targets_R
            losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        loss = losses.sum() / len(inputs.rows_R)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        inputs.embeddings_1TD.grad = None
        return loss.detach().item()


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


def _addmm_forward(adapter: nn.Module) -> Callable[[Tensor], Tensor]:
    """PEFT's layer with our function inside: this lever alone."""

    def forward(x: Tensor) -> Tensor:
        linears = Linears(
            (adapter.get_base_layer().weight,),
            (adapter.lora_A["default"].weight,),
            (adapter.lora_B["default"].weight,),
        )
        dropout = Dropout(DROPOUT, draw_seed(), 0)
        y = lora_linears(x.flatten(0, -2), linears, scale=ALPHA / 8, dropout=dropout)
        return y.unflatten(0, x.shape[:-1])

    return forward


def model_flops(size: str, layers: int, inputs: Inputs) -> float:
    """Of one step, by the rule in the header."""
    hidden, mlp, heads, kv_heads, _, vocabulary = SIZES[size]
    head_dim = hidden // heads
    linear = hidden * (2 * heads + 2 * kv_heads) * head_dim + 3 * hidden * mlp
    tokens = inputs.embeddings_1TD.shape[1]
    lengths = inputs.borders.diff().double()
    # Causal: half of the T x T pairs; two products of 2 H FLOPs for each pair and head.
    attention_forward = float((lengths * lengths).sum()) / 2 * 4 * heads * head_dim
    return 4.0 * tokens * (layers * linear + vocabulary * hidden) + 3 * layers * attention_forward


def apply_liger(model: nn.Module) -> bool:
    """Patches the model's classes, if the package is there and there is a GPU."""
    if DEVICE.type != "cuda":
        return False
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        return False
    _apply_liger_kernel_to_instance(model=model)
    return True


def peak_of(contest: Contest, way: Way) -> float | None:
    """GiB at the highest point of a step; None where it does not fit. CPUs do not tell: 0."""
    if DEVICE.type != "cuda":
        contest.step(way)
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        contest.step(way)
    except torch.cuda.OutOfMemoryError:
        contest.optimizer.zero_grad()
        return None
    return torch.cuda.max_memory_allocated() / 2**30


def run(size: str, layers: int, tokens: int, repeats: int, triton: bool) -> list[dict[str, Any]]:
    """Rows of the table of one size."""
    contest = Contest(size, layers, tokens)
    ways = {n: w for n, w in LADDER.items() if not w.liger}
    if not triton:
        ways = {n: replace(w, triton=False) for n, w in ways.items() if "Triton" not in n}
        ways[OURS] = Way(lean=True, rows_head=True)
    peaks = {name: peak_of(contest, way) for name, way in ways.items()}
    calls = {
        name: (lambda way=way: contest.step(way))
        for name, way in ways.items()
        if peaks[name] is not None
    }
    seconds = medians(calls, repeats=repeats)
    # Liger patches classes for good, so it comes last, in turns with the plain peer of before.
    if apply_liger(contest.model):
        name = "Liger + PEFT"
        peaks[name] = peak_of(contest, Way())
        if peaks[name] is not None:
            seconds |= medians({name: lambda: contest.step(Way())}, repeats=repeats)
    flops, peak = model_flops(size, layers, contest.inputs), peak_flops()
    base = seconds[next(iter(LADDER))]
    return [
        {
            "size": size,
            "way": name if triton or name != OURS else "lean layers, supervised rows",
            "seconds": seconds.get(name),
            "tokens/s": tokens / seconds[name] if name in seconds else None,
            "times baseline": base / seconds[name] if name in seconds else None,
            "peak GiB": peaks.get(name) or None,
            "MFU": flops / seconds[name] / peak if peak and name in seconds else None,
        }
        for name in LADDER
        if name in ways or name in peaks
    ]


def main() -> int:
    on_gpu = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["4b", "8b"] if on_gpu else ["tiny"])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 384)
    parser.add_argument("--layers", type=int, help="default: the model's own number")
    parser.add_argument("--repeats", type=int, default=10 if on_gpu else 5)
    options = parser.parse_args()
    attention.configure_attention("torch" if on_gpu else "auto")
    rows = [
        row
        for size in options.sizes
        for row in run(
            *(size, options.layers or SIZES[size][4], options.tokens, options.repeats),
            triton=on_gpu and has_triton(),
        )
    ]
    ours = [row for row in rows if row["way"].endswith("supervised rows") and "lean" in row["way"]]
    figures: dict[str, Any] = {
        "machine": machine(),
        "tokens": options.tokens,
        "attention": attention.attention_backend(DEVICE.type, torch.bfloat16),
    }
    for row in ours:
        peers = [r for r in rows if r["size"] == row["size"] and r["way"] in PEERS]
        best = min(r["seconds"] for r in peers if r["seconds"] is not None)
        figures[f"times baseline, {row['size']}"] = row["times baseline"]
        figures[f"times best peer, {row['size']}"] = best / row["seconds"]
    report(figures, rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
