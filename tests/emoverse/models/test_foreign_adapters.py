"""Adapters of ms-swift and InternVL: fused wqkv becomes three exact parts; the rest is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emoverse.export.layouts import write_internvl2
from emoverse.models.adapters import write_adapter
from emoverse.models.foreign_adapters import plain_name, read_adapter
from emoverse.models.internvl.checkpoint import import_checkpoint, open_checkpoint


def foreign(family: str, folder: Path, prefix: str, original: Any, **settings: Any) -> None:
    """An adapter as ms-swift writes it: fused wqkv, released names."""
    generator = torch.Generator().manual_seed(6)
    state = {}
    for name, shape in original.released_shapes(family).items():
        linear = len(shape) == 2 and ("layers" in name or name.startswith("mlp1"))
        if linear and "vision_model" not in name:
            stem = prefix + name.removesuffix(".weight")
            if prefix.startswith("language_model."):
                if name.startswith("mlp1"):
                    continue
                stem = prefix + name.removesuffix(".weight").removeprefix("language_model.")
            state[f"{stem}.lora_A.weight"] = torch.randn(4, shape[1], generator=generator) * 0.1
            state[f"{stem}.lora_B.weight"] = torch.randn(shape[0], 4, generator=generator) * 0.1
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(written))


@pytest.mark.parametrize("prefix", ["base_model.model.", "language_model.base_model.model."])
def test_adapters_of_the_released_layout(
    folder_of: Callable[[str], Path], family: str, prefix: str, tmp_path: Path, original: Any
) -> None:
    """Merged here, they give the logits of the original on W + 2 B A, wqkv fused and all."""
    base, folder = folder_of(family), tmp_path / "adapter"
    foreign(family, folder, prefix, original)
    released = open_checkpoint(base)
    adapter, settings = read_adapter(folder, released.architecture)
    assert settings["r"] == 4 and adapter.scale == 2.0
    weights = original.random_weights(family)
    stored = load_file(folder / "adapter_model.safetensors")
    for key, a in stored.items():
        if key.endswith(".lora_A.weight"):
            b = stored[key.replace("lora_A", "lora_B")]
            weights[plain_name(key).removesuffix(".lora_A.weight") + ".weight"] += 2 * b @ a
    write_internvl2(released, [adapter], tmp_path / "merged")
    case = original.CASES["short"]
    with torch.no_grad():
        theirs = original.Original(family, weights).logits(case.ids, case.lengths, case.pixels)
        native, _ = import_checkpoint(tmp_path / "merged")
        ours = original.native_logits(native, case)
    assert original.distance(case, ours, theirs) < 5e-5
    # The merged file holds exactly the fused sum.
    written: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        written |= load_file(path)
    for name, value in weights.items():
        torch.testing.assert_close(written[name], value, atol=1e-6, rtol=0, msg=name)


def test_adapters_that_are_not_understood(
    folder_of: Callable[[str], Path], tmp_path: Path, original: Any
) -> None:
    architecture = open_checkpoint(folder_of("internlm2")).architecture
    with pytest.raises(FileNotFoundError, match="folder with a saved adapter"):
        read_adapter(tmp_path, architecture)
    for number, (setting, message) in enumerate(
        [
            ({"use_dora": True}, "use_dora must be None or False, found True"),
            ({"use_rslora": True}, "use_rslora must be None or False"),
            ({"peft_type": "IA3"}, "peft_type must be 'LORA', found 'IA3'"),
            ({"rank_pattern": {"wqkv": 16}}, "rank_pattern must be"),
            ({"r": 0}, "r must be a positive integer, found 0"),
            ({"lora_alpha": "8"}, "lora_alpha must be a positive integer, found '8'"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights must be .*, found 'pissa'"),
            ({"layer_replication": [[0, 2]]}, "layer_replication must be None"),
            ({"alora_invocation_tokens": [7, 8]}, "alora_invocation_tokens must be None, found"),
            ({"arrow_config": {"top_k": 3}}, "arrow_config must be None, found"),
            ({"r": 8}, "has rank 4, but adapter_config.json has r 8; .* different adapters"),
        ]
    ):
        foreign("internlm2", tmp_path / str(number), "base_model.model.", original, **setting)
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path / str(number), architecture)
    foreign("phi3", tmp_path / "phi3", "base_model.model.", original)
    with pytest.raises(ValueError, match=r"which this base does not have; the adapter is another"):
        read_adapter(tmp_path / "phi3", architecture)
    torn = tmp_path / "torn"
    foreign("internlm2", torn, "base_model.model.", original)
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"is not a whole safetensors file .* copy it again"):
        read_adapter(torn, architecture)
    save_file({}, weights)
    with pytest.raises(ValueError, match="holds no tensors"):
        read_adapter(torn, architecture)
    name = "base_model.model.language_model.model.layers.0.attention.wqkv"
    halves = {f"{name}.lora_A.weight": torch.zeros(4, 64)}
    save_file(halves, weights)
    with pytest.raises(ValueError, match=r"cannot be merged into .*q_proj.* must belong together"):
        read_adapter(torn, architecture)
    weights = tmp_path / "phi3" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="pickled weights"):
        read_adapter(tmp_path / "phi3", architecture)


def test_a_fused_adapter_is_exact_and_the_way_back_is_not(
    folder_of: Callable[[str], Path], tmp_path: Path, original: Any
) -> None:
    """q, k and v get the same A and their own rows of B; two different A fit no fused adapter."""
    released = open_checkpoint(folder_of("internlm2"))
    foreign("internlm2", tmp_path / "adapter", "base_model.model.", original)
    adapter, _ = read_adapter(tmp_path / "adapter", released.architecture)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = "base_model.model.language_model.model.layers.1.attention.wqkv"
    a, b = (stored[f"{stem}.lora_{half}.weight"] for half in "AB")
    block = "model.language_model.layers.1.self_attn"
    for name in "qkv":
        assert torch.equal(adapter.tensors[f"{block}.{name}_proj.lora_A.default.weight"], a)
    grouped = b.view(2, 4, 16, 4)  # per key/value head: two queries, a key, a value
    rows = {"q": grouped[:, :2], "k": grouped[:, 2], "v": grouped[:, 3]}
    for name, part in rows.items():
        found = adapter.tensors[f"{block}.{name}_proj.lora_B.default.weight"]
        assert torch.equal(found, part.reshape(-1, 4))
    # A split adapter with an A for each part needs three times the rank as a fused one.
    deltas = [torch.randn(r, 4) @ torch.randn(4, 64) for r in (64, 32, 32)]
    assert torch.linalg.matrix_rank(torch.cat(deltas)) == 12


def test_a_fused_adapter_is_written_as_a_split_one(
    folder_of: Callable[[str], Path], tmp_path: Path, original: Any
) -> None:
    architecture = open_checkpoint(folder_of("internlm2")).architecture
    foreign("internlm2", tmp_path / "adapter", "base_model.model.", original)
    adapter, settings = read_adapter(tmp_path / "adapter", architecture)
    alpha = settings["lora_alpha"]
    write_adapter(adapter.tensors, tmp_path / "split", r=4, alpha=alpha, base="base")
    again, _ = read_adapter(tmp_path / "split", architecture)
    assert again.scale == adapter.scale and again.tensors.keys() == adapter.tensors.keys()
    for name, value in adapter.tensors.items():
        assert torch.equal(again.tensors[name], value)


def test_a_part_of_the_projector_cannot_be_written(tmp_path: Path) -> None:
    """PEFT could not read the folder: it puts the projector back as one."""
    part = {"model.multi_modal_projector.linear_2.bias": torch.zeros(64)}
    with pytest.raises(ValueError, match=r"linear_2.bias is trained but .*layer_norm.bias is not"):
        write_adapter(part, tmp_path / "part", r=4, alpha=8, base="base")
