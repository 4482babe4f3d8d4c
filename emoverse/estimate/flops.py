"""FLOPs of a training sample, and GPU hours at an assumed share of a card's peak. No torch.

In:  the sizes of the model, tokens and frames of a sample. Out: FLOPs by part. A multiply-add
counts as two FLOPs; the base is frozen, so its backward pass computes input gradients only.
"""

from dataclasses import dataclass
from typing import Any

from emoverse.config.schema import Config
from emoverse.estimate.memory import setup_of
from emoverse.models.architecture import Architecture, parameter_counts

# Dense bf16 peak of a GPU in FLOP/s, from data sheets: fp32 accumulation, no sparsity.
PEAK_FLOPS = {"3090": 71e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}
SHARE_OF_PEAK = 0.4  # an assumption


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFlops:
    """FLOPs of the forward pass of a sample by part; `lora` counts forward and backward."""

    vision: float
    projector: float
    linears: float
    attention: float
    head: float
    lora: float

    def step(self, *, recompute: bool) -> float:
        """Forward and backward pass of a sample; `recompute` adds one forward pass of the LLM."""
        llm = self.linears + self.attention
        trained = self.vision + 3 * self.projector + 2 * self.head + self.lora
        return trained + 2 * self.linears + 3 * self.attention + (llm if recompute else 0.0)


def sample_flops(
    architecture: Architecture, *, tokens: int, frames: int, rows: int, lora_parameters: int
) -> SampleFlops:
    """FLOPs of a sample of `tokens` tokens, `frames` frames and `rows` supervised tokens."""
    vision, llm = architecture.vision, architecture.llm
    patches, width = vision.patches + 1, vision.hidden
    layer = 2 * patches * (4 * width * width + 2 * width * vision.mlp)
    layer += 4 * patches * patches * width
    stem = 2 * vision.patches * 3 * vision.patch_size**2 * width
    visual = frames * architecture.visual_tokens_per_frame
    projector = sum(i * o for i, o in architecture.projector_linears().values())
    linears = llm.layers * sum(i * o for i, o in llm.linears().values())
    return SampleFlops(
        vision=float(frames * (vision.layers * layer + stem)),
        projector=2.0 * visual * projector,
        linears=2.0 * tokens * linears,
        # Causal: half of the scores are computed.
        attention=2.0 * tokens * tokens * llm.heads * llm.head_dim * llm.layers,
        head=2.0 * rows * llm.vocab * llm.hidden,
        lora=6.0 * tokens * lora_parameters,
    )


def flops_report(config: Config, architecture: Architecture, num_samples: int) -> dict[str, Any]:
    """The section `work` of the report of `plan`: samples with full clips, hours on one GPU."""
    setup = setup_of(config, architecture)
    samples = max(1, setup.frames // config.data.most_frames)
    counts = parameter_counts(architecture, config.model.lora, config.model.projector)
    flops = sample_flops(
        architecture,
        tokens=min(setup.sample_tokens, config.data.max_tokens),
        frames=config.data.most_frames,
        rows=setup.rows // samples,
        lora_parameters=counts["lora_llm"],
    )
    per_sample = flops.step(recompute=config.train.recompute)
    return {
        "flops_per_sample": per_sample,
        "samples": num_samples,
        "share_of_peak": SHARE_OF_PEAK,
        "gpu_hours": {
            card: round(per_sample * num_samples / (peak * SHARE_OF_PEAK) / 3600, 1)
            for card, peak in PEAK_FLOPS.items()
        },
    }


def flops_text(report: dict[str, Any]) -> str:
    """The line of the section `work` for a terminal."""
    hours = ", ".join(f"{card} {value:g} h" for card, value in report["gpu_hours"].items())
    return (
        f"compute: {report['flops_per_sample'] / 1e12:.3g} TFLOP per sample; all stages on one GPU "
        f"at {report['share_of_peak']:.0%} of its bf16 peak: {hours}"
    )
