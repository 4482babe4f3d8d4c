"""The nano base trained with everything on and with everything off: one loss curve."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emoverse.kernels.attention import attention_backend, configure_attention
from emoverse.kernels.backend import configure_kernels, has_triton
from emoverse.models.emoverse import build_model

# Relative difference of every loss of the curve: rounding of fp32, grown by the updates.
BOUND = 1e-5
STEPS = {"eager": 16, "triton": 4}  # the interpreter is slow
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def restore() -> Iterator[None]:
    yield
    configure_attention("auto")
    configure_kernels("auto")


def batch(model: Any, step: int) -> Any:
    """Two segments, the first with a frame's features."""
    architecture = model.architecture
    generator = torch.Generator().manual_seed(step)
    per_frame, lengths = architecture.visual_tokens_per_frame, [27, 12]
    ids_T = torch.randint(3, 300, (sum(lengths),), generator=generator)
    ids_T[2 : 2 + per_frame] = model.image_token_id
    features = torch.randn(1, per_frame, architecture.feature_channels, generator=generator)
    rows = torch.tensor([22, 23, 24, 25, 30, 37])
    tensors = {
        "ids_T": ids_T,
        "position_ids_T": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([0, 27, 39], dtype=torch.int32),
        "features": features,
        "supervised_rows": rows,
        "targets": ids_T[rows + 1],
        "row_weights": torch.full((len(rows),), 1 / 6),
        "task_of_row": torch.zeros(len(rows), dtype=torch.long),
    }
    on_device = {name: value.to(DEVICE) for name, value in tensors.items()}
    return SimpleNamespace(max_seqlen=27, pixels=None, **on_device)


def train(lean: str, attention: str, kernels: str, steps: int) -> list[float]:
    lora = SimpleNamespace(preset="paper", r=8, alpha=32, dropout=0.0, targets=())
    settings = SimpleNamespace(lora=lora, projector="full", attention=attention, lean=lean)
    configure_kernels(kernels)
    model = build_model("nano", settings, device=DEVICE, seed=1).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for step in range(steps):
        loss = model(batch(model, step % 2)).loss_sum
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.usefixtures("restore")
@pytest.mark.parametrize("kernels", ["eager", pytest.param("triton", marks=pytest.mark.aot)])
def test_one_loss_curve(kernels: str) -> None:
    if kernels == "triton" and not has_triton():
        pytest.skip("triton is not installed")
    off = train("off", "sdpa", "eager", STEPS[kernels])
    on = train("on", "triton" if kernels == "triton" else "auto", kernels, STEPS[kernels])
    backend = attention_backend(DEVICE.type, torch.float32)
    assert backend == ("triton" if kernels == "triton" else "sdpa")
    assert off[-2] < off[0] and off[-1] < off[1]
    assert on == pytest.approx(off, rel=BOUND)
