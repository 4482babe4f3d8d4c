"""One training step: our layers against transformers + PEFT, lever by lever.

In:  --sizes tiny 4b 8b, --tokens, --repeats, --budget. Out: a table: seconds (on a CPU of CPU
time), tokens/s, ratio to transformers + PEFT with activation checkpointing, peak memory and, on a
GPU, MFU. All contestants run in this process, in turns, on one model, the same frames and packed
tokens, bf16, dropout 0.05 and 5 % supervised rows. Each step runs the frozen vision tower, the same
for all; the projector is left out. Liger patches what it finds: its turns come after the others'.

Attention is the same for all: torch's own varlen attention (FlashAttention-2 inside) on a GPU, SDPA
by segments on a CPU. FLOP rule of MFU, per token: 4 x linear weights (a frozen base has no weight
gradient), 4 x head, all rows counted, 3 x causal attention forward; the vision tower forward only;
adapters are not counted.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))
from bench_tools import (
    ALPHA,
    DEVICE,
    DROPOUT,
    SIZES,
    arguments,
    lean,
    liger,
    machine,
    medians,
    peak_flops,
    peer,
    report,
    waited_s,
)

from emoverse.kernels import attention
from emoverse.kernels.adapter_types import Linears
from emoverse.kernels.backend import configure_kernels, has_triton
from emoverse.kernels.dropout import Dropout, draw_seed
from emoverse.kernels.lora import lora_linears
from emoverse.loss import supervised_cross_entropy

# A real sample: 8 frames of 256 tokens and about 150 tokens of text.
SAMPLE, FRAMES = 2198, 8
SUPERVISED = 0.05
# Of the vision tower: hidden, MLP, heads, layers, image and patch size in pixels.
TOWER = (1024, 4096, 16, 24, 448, 14)
TINY_TOWER = (64, 256, 1, 2, 56, 14)


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
PEERS = {
    "transformers + PEFT, checkpointing": BASELINE,
    "transformers + PEFT": Way(),
    "Liger + PEFT, checkpointing": Way(liger=True, checkpointing=True),
    "Liger + PEFT": Way(liger=True),
}
OURS = "lean layers, Triton, supervised rows"
LADDER = PEERS | {
    "baseline + supervised rows": replace(BASELINE, rows_head=True),
    "baseline + LoRA functions": replace(BASELINE, lora_functions=True),
    "lean layers in plain torch": Way(lean=True),
    "lean layers, Triton": Way(lean=True, triton=True),
    OURS: Way(lean=True, triton=True, rows_head=True),
    "the last, checkpointing": Way(lean=True, triton=True, rows_head=True, checkpointing=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A packed batch."""

    embeddings_1TD: Tensor
    positions_1T: Tensor
    borders: Tensor
    longest: int
    rows_R: Tensor
    targets_R: Tensor
    pixels_FCHW: Tensor


def tower_of(size: str) -> tuple[int, int, int, int, int, int]:
    """See TOWER."""
    return TINY_TOWER if size == "tiny" else TOWER


def make_tower(size: str) -> nn.Module:
    """The vision tower of InternVL2, random and frozen."""
    hidden, mlp, heads, layers, image, patch = tower_of(size)
    config = InternVLVisionConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        image_size=image,
        patch_size=patch,
        attention_bias=True,
    )
    tower = InternVLVisionModel(config).to(DEVICE, torch.bfloat16).requires_grad_(False).eval()
    tower.set_attn_implementation(attention.NAME)
    return tower


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
    image = tower_of(size)[4]
    frames = max(1, round(FRAMES * tokens / SAMPLE))
    pixels = torch.randn(frames, 3, image, image, generator=generator)
    return Inputs(
        embeddings_1TD=embeddings.to(DEVICE, torch.bfloat16).requires_grad_(),
        positions_1T=positions[None].to(DEVICE),
        borders=torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32),
        longest=max(lengths),
        rows_R=rows.sort().values.to(DEVICE),
        targets_R=torch.randint(vocabulary, rows.shape, generator=generator).to(DEVICE),
        pixels_FCHW=pixels.to(DEVICE, torch.bfloat16),
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
        self.tower = make_tower(size)
        self.inputs = make_inputs(size, tokens)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def switch(self, way: Way) -> None:
        """Arranges the model for a way."""
        layers = self.lean_layers if way.lean else self.plain_layers
        for index, layer in enumerate(layers):
            self.model.model.layers[index] = layer
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
        with torch.no_grad():
            self.tower(pixel_values=inputs.pixels_FCHW)
        hidden = self.model.model(
            inputs_embeds=inputs.embeddings_1TD,
            position_ids=inputs.positions_1T,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE),
            use_cache=False,
            cu_seq_lens_q=inputs.borders,
            max_length_q=inputs.longest,
        ).last_hidden_state.squeeze(0)
        loss = self.loss_sum(hidden, way) / len(inputs.rows_R)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        inputs.embeddings_1TD.grad = None
        return loss.detach().item()

    def loss_sum(self, hidden_TD: Tensor, way: Way) -> Tensor:
        """Cross entropy, summed over the supervised rows."""
        inputs, head = self.inputs, self.model.lm_head
        if way.rows_head:
            return supervised_cross_entropy(hidden_TD, inputs.rows_R, inputs.targets_R, head).sum()
        labels = torch.full_like(inputs.positions_1T[0], -100)
        labels[inputs.rows_R] = inputs.targets_R
        if way.liger:
            fused = liger("LigerFusedLinearCrossEntropyLoss")(reduction="sum")
            loss: Tensor = fused(head.weight, hidden_TD, labels)
            return loss
        return F.cross_entropy(head(hidden_TD).float(), labels, reduction="sum")


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
    llm = 4.0 * tokens * (layers * linear + vocabulary * hidden) + 3 * layers * attention_forward
    return llm + len(inputs.pixels_FCHW) * tower_flops(size)


def tower_flops(size: str) -> float:
    """Of the vision tower's forward of one frame, without the patch embedding."""
    hidden, mlp, _, layers, image, patch = tower_of(size)
    tokens = (image // patch) ** 2 + 1
    weights = 4 * hidden * hidden + 2 * hidden * mlp
    return layers * (2.0 * tokens * weights + 4.0 * tokens * tokens * hidden)


def apply_liger(model: nn.Module) -> bool:
    """Patches the model for good, if the package is there and there is a GPU."""
    patch = liger("_apply_liger_kernel_to_instance")
    if patch is not None:
        patch(model=model)
    return patch is not None


def peak_of(contest: Contest, way: Way) -> float | None:
    """Peak GiB of a step; None where it does not fit, 0 on a CPU, which does not report it."""
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


def timed(
    contest: Contest, ways: dict[str, Way], repeats: int, budget_s: float
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Median seconds of the ways that fit, and the peak of each."""
    peaks = {name: peak_of(contest, way) for name, way in ways.items()}
    calls = {
        name: (lambda way=way: contest.step(way))
        for name, way in ways.items()
        if peaks[name] is not None
    }
    return medians(calls, repeats=repeats, clock=waited_s, budget_s=budget_s), peaks


def run(
    size: str, layers: int, tokens: int, repeats: int, budget_s: float, triton: bool
) -> list[dict[str, Any]]:
    """Rows of the table of one size."""
    contest = Contest(size, layers, tokens)
    ways = {n: w for n, w in LADDER.items() if not w.liger}
    if not triton:
        ways = {n: replace(w, triton=False) for n, w in ways.items() if n != "lean layers, Triton"}
    seconds, peaks = timed(contest, ways, repeats, budget_s)
    modeling = sys.modules[type(contest.model).__module__]
    plain = dict(vars(modeling))
    if apply_liger(contest.model):
        peer_ways = {n: w for n, w in LADDER.items() if w.liger}
        more_seconds, more_peaks = timed(contest, peer_ways, repeats, budget_s)
        seconds, peaks = seconds | more_seconds, peaks | more_peaks
        vars(modeling).update(plain)  # the next model of this family is built without Liger
    flops, peak = model_flops(size, layers, contest.inputs), peak_flops()
    base = seconds.get(next(iter(PEERS)))
    return [
        {
            "size": size,
            "way": name if triton else name.replace("layers, Triton", "layers"),
            "seconds": seconds.get(name),
            "tokens/s": tokens / seconds[name] if name in seconds else None,
            "times baseline": base / seconds[name] if base and name in seconds else None,
            "peak GiB": peaks[name] or None,
            "MFU": flops / seconds[name] / peak if peak and name in seconds else None,
        }
        for name in LADDER
        if name in peaks
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours against the baseline and against the best setting of a peer that fits."""
    figures: dict[str, float] = {}
    ours = [row for row in rows if row["way"].startswith("lean") and "supervised" in row["way"]]
    for row in ours:
        mates = {r["way"]: r["seconds"] for r in rows if r["size"] == row["size"]}
        fitting = [mates[name] for name in PEERS if mates.get(name)]
        if row["seconds"] and fitting:
            figures[f"times baseline, {row['size']}"] = row["times baseline"]
            figures[f"times best peer, {row['size']}"] = min(fitting) / row["seconds"]
    return figures


def main() -> int:
    on_gpu = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["4b", "8b"] if on_gpu else ["tiny"])
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 384)
    parser.add_argument("--layers", type=int, help="default: the model's own number")
    parser.add_argument("--repeats", type=int, default=10 if on_gpu else 5)
    parser.add_argument(
        "--budget",
        type=float,
        default=120,
        help="seconds of measuring per size, about; one turn each is always taken",
    )
    options = parser.parse_args()
    attention.configure_attention("torch" if on_gpu else "auto")
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        layers = options.layers or SIZES[size][4]
        rows += run(
            *(size, layers, options.tokens, options.repeats, options.budget),
            triton=on_gpu and has_triton(),
        )
        print(*rows, sep="\n", file=sys.stderr)  # what is known, should the next size not end
        gc.collect()  # the last model, before the next one comes
    figures: dict[str, Any] = {
        "machine": machine(),
        "tokens": options.tokens,
        "attention": attention.attention_backend(DEVICE.type, torch.bfloat16),
    }
    report(figures | summary(rows), rows, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
