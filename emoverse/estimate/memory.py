"""Estimate of the GPU memory of a config, the cards it fits on, and what to change. No torch.

In:  the sizes of the model, what is trained, the settings that decide memory.
Out: `MemoryEstimate`, bytes by part on one GPU at the peak of a step; and a section of `plan`.
Formulas count the tensors that autograd keeps (HF layers under PEFT). test_memory.py compares them
with measured peaks of small models on the CPU; on GPUs they are not yet measured.
Letters: e bytes per element, h hidden, f MLP width, q and k widths of all query and key heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from emoverse.config.deepspeed_settings import MAX_BUCKET
from emoverse.config.schema import Config
from emoverse.models.architecture import (
    Architecture,
    LoraSettings,
    load_architecture,
    lora_linears,
    parameter_counts,
)

GIB = 2**30
# Memory that the driver reports for each card, in GiB.
CARDS = {"RTX 3090": 24, "A100-40": 40, "A100-80": 80, "H100": 80, "H200": 139}
# CUDA context, workspaces of libraries, and fragmentation of the allocator: an assumption.
WORKSPACE = int(1.5 * GIB)
MAX_LOGITS = 2**26  # elements, as emoverse/loss.py bounds a chunk
PREFETCH = 50_000_000  # elements that ZeRO-3 fetches ahead, DeepSpeed's default
TAG_TOKENS, TEXT_TOKENS = 7, 150  # of a frame's tags, and of a question with its words


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The settings that decide memory, besides the sizes of the model."""

    precision: str
    zero_stage: int
    world_size: int
    recompute: bool
    pack_tokens: int
    frames: int  # in one pack
    rows: int  # supervised tokens in one pack
    dropout: float
    offload: str = "off"  # what is kept in host memory: off, optimizer, all
    lean: bool = False  # the project's own decoder layers, which keep fewer activations
    sample_tokens: int = 0  # tokens of a sample with a full clip

    @property
    def bytes_per_element(self) -> int:
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on one GPU, by part."""

    weights: int
    gathered: int  # weights of other ranks that ZeRO-3 holds at the same time
    gradients: int
    optimizer: int
    activations: int
    logits: int
    vision: int  # of the frozen tower's forward pass, freed before the language model runs
    workspace: int
    host: int  # in host memory instead, per GPU

    @property
    def states(self) -> int:
        """What is allocated between steps too: all but activations."""
        return self.weights + self.gathered + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """At the peak. The tower has finished before logits and the backward pass exist."""
        constant = self.states + self.workspace
        return constant + max(self.activations + self.logits, self.vision)


def gpu_memory(
    architecture: Architecture,
    lora: LoraSettings,
    projector: str,
    setup: Setup,
    *,
    workspace: int = WORKSPACE,
) -> MemoryEstimate:
    """The bytes of each part on the GPU of one rank."""
    counts = parameter_counts(architecture, lora, projector)
    e, trained = setup.bytes_per_element, counts["trainable"]
    shards = setup.world_size
    parameters = counts["total"] + counts["lora_llm"] + counts["lora_projector"]
    bucket = min(MAX_BUCKET, trained)
    gathered, weights = 0, e * parameters
    if setup.zero_stage == 3:
        weights //= shards
        gathered = e * (_largest_module(architecture) + min(PREFETCH, parameters))
    share = trained // shards if setup.zero_stage >= 2 else trained
    gradients = (4 if setup.zero_stage else e) * share
    gradients += e * trained if setup.zero_stage < 2 else e * bucket
    # Two moments, and under ZeRO fp32 master weights.
    optimizer = 12 * trained // shards if setup.zero_stage else 8 * trained
    host = 0
    if setup.offload != "off":  # with the fp32 gradients, which ZeRO-3 keeps on the host
        host, optimizer = optimizer + 4 * trained // shards, 0
        gradients = e * bucket if setup.zero_stage == 3 else gradients
    if setup.offload == "all":  # except adapters, which are too small to be transferred
        host, weights = host + weights, e * trained
    return MemoryEstimate(
        weights=weights,
        gathered=gathered,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activations(architecture, lora, projector, setup),
        # Logits, their fp32 copy, its log-softmax and the gradients of both.
        logits=_live_rows(architecture, setup) * architecture.llm.vocab * (2 * e + 12),
        vision=_vision(architecture, setup),
        workspace=workspace,
        host=host,
    )


def layer_bytes(architecture: Architecture, lora: LoraSettings, setup: Setup) -> int:
    """Bytes per token that one decoder layer with adapters keeps for its backward pass."""
    llm, e = architecture.llm, setup.bytes_per_element
    h, f = llm.hidden, llm.mlp
    q, k = llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim
    if setup.lean:  # both residuals, q, k, v, attention output, gate, up; masks are regenerated
        return e * (2 * h + 2 * q + 2 * k + 2 * f)
    norms = 2 * 4 * h  # their inputs in fp32
    attention = e * (q + 2 * k + q)  # q, k, v as they enter, and the output
    mlp = e * 4 * f  # gate, up, silu(gate), the product
    if llm.family == "phi3":
        attention += e * (2 * q + k)  # the fused rows are kept in addition to rotated copies
    inputs = {name: sizes[0] for name, sizes in llm.linears().items()}
    adapted = lora_linears(architecture, lora.preset, lora.targets)
    kept = 0
    # q, k, v share an input, so do gate, up; the inputs of o and down are counted above.
    if any(name in adapted for name in ("qkv_proj", "q_proj", "k_proj", "v_proj")):
        kept += e * h
    if any(name in adapted for name in ("gate_up_proj", "gate_proj", "up_proj")):
        kept += e * h
    if setup.dropout > 0:
        # Every adapter keeps its own mask and its own masked input instead of the shared one.
        kept = sum(2 * e * inputs[name] for name in adapted)
        kept -= sum(e * inputs[name] for name in adapted if name in ("o_proj", "down_proj"))
    return norms + attention + mlp + kept + len(adapted) * lora.r * e


def _live_rows(architecture: Architecture, setup: Setup) -> int:
    """Supervised rows whose logits exist at the same time: the head works in chunks."""
    return min(setup.rows, max(1, MAX_LOGITS // architecture.llm.vocab))


def _activations(
    architecture: Architecture, lora: LoraSettings, projector: str, setup: Setup
) -> int:
    """Bytes kept from the forward to the backward pass."""
    llm, e, tokens = architecture.llm, setup.bytes_per_element, setup.pack_tokens
    layer = tokens * layer_bytes(architecture, lora, setup)
    layers = llm.layers * layer
    if setup.recompute:  # the input of each layer, and one layer in full
        layers = llm.layers * tokens * e * llm.hidden + layer
    # Gradients inside one layer's backward pass: of its widest tensors.
    backward = tokens * e * (2 * llm.hidden + 3 * llm.mlp)
    if setup.lean:  # recomputed in fp32 by its backward pass; fitted to the eager path on the CPU
        backward += 32 * tokens * (llm.hidden + llm.mlp)
    ends = tokens * (3 * e * llm.hidden + 4 * llm.hidden)
    visual = setup.frames * architecture.visual_tokens_per_frame
    kept = architecture.feature_channels * 3 + llm.hidden * 3 if projector != "frozen" else 0
    return layers + backward + ends + visual * e * (kept + architecture.feature_channels)


def _vision(architecture: Architecture, setup: Setup) -> int:
    """The tower without gradients: pixels in fp32 and bf16, and the tensors of its widest layer."""
    sizes, e = architecture.vision, setup.bytes_per_element
    rows = setup.frames * (sizes.patches + 1)
    pixels = setup.frames * 3 * sizes.image_size**2 * (1 + 3 * 4 + e)
    return pixels + rows * e * (3 * sizes.hidden + 2 * sizes.mlp)


def _largest_module(architecture: Architecture) -> int:
    """Elements of the largest module that ZeRO-3 gathers as a whole."""
    llm = architecture.llm
    linears = [inputs * outputs for inputs, outputs in llm.linears().values()]
    return max(llm.vocab * llm.hidden, *linears)


# Plan ------------------------------------------------------------------------------------------


def setup_of(config: Config, architecture: Architecture) -> Setup:
    """The memory settings of a config, for the largest samples with the longest answers."""
    data, model = config.data, config.model
    visual = architecture.visual_tokens_per_frame
    sample = data.most_frames * (visual + TAG_TOKENS) + TEXT_TOKENS
    answers = max(
        float(
            sum(rate * config.evaluation.max_new_tokens[task] for task, rate in stage.rates.items())
        )
        for stage in config.stages.values()
    )
    samples = max(1, data.pack_tokens // sample)
    return Setup(
        precision=model.precision,
        zero_stage=config.train.zero_stage,
        world_size=config.train.processes,
        recompute=config.train.recompute,
        pack_tokens=data.pack_tokens,
        frames=samples * data.most_frames,
        rows=round(samples * answers),
        offload=config.train.offload,
        dropout=model.lora.dropout,
        lean=model.lean != "off",
        sample_tokens=sample,
    )


def estimate_memory(config: Config, world_size: int) -> MemoryEstimate:
    """The memory of each of `world_size` GPUs for a config."""
    architecture, model = load_architecture(config.model.base), config.model
    setup = replace(setup_of(config, architecture), world_size=world_size)
    return gpu_memory(architecture, model.lora, model.projector, setup)


def changes(config: Config, setup: Setup) -> Iterator[tuple[dict[str, Any], Setup]]:
    """Settings to try instead, cheapest first: overrides, and the setup that they result in."""
    smaller = max(config.data.max_tokens, 1)
    packs = [setup.pack_tokens] + ([smaller] if smaller < setup.pack_tokens else [])
    for world, stage, offload in _divisions(setup):
        for recompute in (False, True) if not setup.recompute else (True,):
            for pack in packs:
                scale = pack / setup.pack_tokens
                other = replace(
                    setup,
                    world_size=world,
                    zero_stage=stage,
                    offload=offload,
                    recompute=recompute,
                    pack_tokens=pack,
                    frames=max(config.data.most_frames, round(setup.frames * scale)),
                    rows=max(1, round(setup.rows * scale)),
                )
                yield _overrides(setup, other), other


def _divisions(setup: Setup) -> Iterator[tuple[int, int, str]]:
    """(GPUs, ZeRO stage, offload) to try: with the given number of GPUs, then with more."""
    own, stage = setup.world_size, setup.zero_stage
    yield own, stage, setup.offload
    if setup.offload == "off" and stage >= 2:
        yield own, stage, "optimizer"
    if own > 1:
        yield own, 3, setup.offload
    yield own, 3, "all"
    for more in (2, 4, 8):  # more GPUs help only where they share the weights
        if more > own:
            yield more, 3, setup.offload


def _overrides(before: Setup, after: Setup) -> dict[str, Any]:
    knobs = {
        "data.pack_tokens": "pack_tokens",
        "train.recompute": "recompute",
        "train.zero_stage": "zero_stage",
        "train.offload": "offload",
        "train.processes": "world_size",
    }
    return {
        knob: getattr(after, name)
        for knob, name in knobs.items()
        if getattr(after, name) != getattr(before, name)
    }


def memory_report(config: Config, architecture: Architecture) -> dict[str, Any]:
    """The section `memory` of the report of `plan`: bytes by part, and whether each card fits."""
    setup, model = setup_of(config, architecture), config.model

    def total(other: Setup) -> int:
        return gpu_memory(architecture, model.lora, model.projector, other).total

    estimate = gpu_memory(architecture, model.lora, model.projector, setup)
    cards = {}
    for card, size in CARDS.items():
        fits = estimate.total <= size * GIB
        change: dict[str, Any] | None = {}
        if not fits:
            fitting = (
                overrides
                for overrides, other in changes(config, setup)
                if total(other) <= size * GIB
            )
            change = next(fitting, None)
        cards[card] = {"gib": size, "fits": fits, "change": change}
    grid = {
        f"zero{stage}{'_recompute' if recompute else ''}": total(
            replace(setup, zero_stage=stage, recompute=recompute, offload="off")
        )
        for stage in (1, 2, 3)
        for recompute in (False, True)
    }
    parts = {field.name: getattr(estimate, field.name) for field in fields(estimate)}
    host = parts.pop("host")
    return {"parts": parts, "total": estimate.total, "host": host, "cards": cards, "totals": grid}


def memory_text(report: Mapping[str, Any]) -> list[str]:
    """The lines of the section `memory` for a terminal."""
    parts = ", ".join(
        f"{name} {_gib(size)}" for name, size in report["parts"].items() if size >= GIB // 100
    )
    lines = [f"memory per GPU, estimated: {_gib(report['total'])} GiB ({parts})"]
    if report["host"]:
        lines.append(f"  in host memory, per GPU: {_gib(report['host'])} GiB")
    grid = report["totals"].items()
    lines.append(
        "  total with other settings: " + ", ".join(f"{name} {_gib(size)}" for name, size in grid)
    )
    for card, verdict in report["cards"].items():
        name = f"  {card:<9}{verdict['gib']:>4} GiB"
        if verdict["fits"]:
            lines.append(f"{name}  fits")
        elif verdict["change"] is None:
            lines.append(f"{name}  does not fit; use fewer frames or a smaller base")
        else:
            lines.append(f"{name}  does not fit; fits with {_assignments(verdict['change'])}")
    return lines


def _assignments(change: Mapping[str, Any]) -> str:
    values: Sequence[str] = [f"{knob}={str(value).lower()}" for knob, value in change.items()]
    return " ".join(values)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
