"""Names and row splits: complete, and those of the released definitions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from emoverse.models.architecture import Architecture, parameter_counts
from emoverse.models.internvl.checkpoint import build_native, export_checkpoint, import_checkpoint
from emoverse.models.internvl.tensor_names import tensor_names


def test_the_names_are_those_of_the_native_model(config_json: dict[str, Any]) -> None:
    model = build_native(config_json)
    architecture = Architecture.from_config_json(config_json)
    natives = [name for entry in tensor_names(architecture) for name in entry.native]
    assert len(natives) == len(set(natives))
    assert set(natives) == set(model.state_dict())
    counts = parameter_counts(architecture, None, "frozen")
    parts = {"vit": "model.vision_tower", "projector": "model.multi_modal_projector"}
    for part, prefix in parts.items():
        module = model.get_submodule(prefix)
        assert counts[part] == sum(value.numel() for value in module.parameters())
    assert counts["total"] == sum(value.numel() for value in model.parameters())


def test_grouped_wqkv(make_tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """InternLM2's definition, written out: per key/value head its queries, its key, its value."""
    config = make_tiny("internlm2")
    export_checkpoint(build_native(config, seed=2), config, tmp_path, None)
    released = load_file(tmp_path / "model.safetensors")
    native, _ = import_checkpoint(tmp_path)
    wqkv = released["language_model.model.layers.1.attention.wqkv.weight"]
    x_D = torch.randn(64, generator=torch.Generator().manual_seed(0))
    fused = (wqkv @ x_D).view(2, 2 + 2, 16)
    attention = native.model.language_model.layers[1].self_attn
    torch.testing.assert_close(attention.q_proj(x_D).view(2, 2, 16), fused[:, :2])
    torch.testing.assert_close(attention.k_proj(x_D).view(2, 16), fused[:, 2])
    torch.testing.assert_close(attention.v_proj(x_D).view(2, 16), fused[:, 3])
