"""Adapters: where they sit, what trains, files that PEFT reads."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from emoverse.models.adapters import (
    adapter_pattern,
    attach_lora,
    is_lora,
    load_adapter,
    merge_adapters,
    save_adapter,
    trainable_names,
)
from emoverse.models.architecture import Architecture, parameter_counts
from emoverse.models.internvl.checkpoint import build_native, export_checkpoint, import_checkpoint

Make = Callable[..., Any]


@pytest.fixture
def adapted(config_json: dict[str, Any], make_settings: Make) -> Make:
    """A model with adapters; `fill` gives the trained parameters random values."""

    def make(preset: str = "paper", projector: str = "full", fill: int = 0, **lora: Any) -> Any:
        native = build_native(config_json, seed=1)
        architecture = Architecture.from_config_json(config_json)
        attach_lora(native, architecture, make_settings(preset, **lora).lora, projector, seed=9)
        if fill:
            generator = torch.Generator().manual_seed(fill)
            with torch.no_grad():
                for value in native.parameters():
                    if value.requires_grad:
                        value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        return native

    return make


def logits(native: Any, config_json: dict[str, Any]) -> torch.Tensor:
    ids = torch.tensor([[5, 96, 96, 96, 96, 17, 33, 41]])
    pixels = torch.linspace(-1, 1, 3 * 56 * 56).view(1, 3, 56, 56)
    with torch.no_grad():
        result: torch.Tensor = native(input_ids=ids, pixel_values=pixels).logits
    return result


@pytest.mark.parametrize(
    ("preset", "projector", "targets"),
    [
        ("paper", "full", ()),
        ("paper", "frozen", ()),
        ("paper", "lora", ()),
        ("authors", "lora", ()),
        ("custom", "full", ("o_proj", "down_proj")),
    ],
)
def test_trainable_set(
    adapted: Make,
    config_json: dict[str, Any],
    make_settings: Make,
    preset: str,
    projector: str,
    targets: tuple[str, ...],
) -> None:
    native = adapted(preset, projector, targets=targets)
    architecture = Architecture.from_config_json(config_json)
    lora = make_settings(preset, targets=targets).lora
    trained = {name: value for name, value in native.named_parameters() if value.requires_grad}
    assert trained.keys() == trainable_names(architecture, lora, projector)
    counts = parameter_counts(architecture, lora, projector)
    assert sum(value.numel() for value in trained.values()) == counts["trainable"]
    adapters = sum(value.numel() for name, value in trained.items() if is_lora(name))
    assert adapters == counts["lora_llm"] + counts["lora_projector"]
    everything = [name for name, _ in native.named_parameters()]
    assert not any(is_lora(name) for name in everything if "vision_tower" in name)
    assert not any("lora" in name for name in everything if "lm_head" in name or "embed" in name)


def test_names_are_those_of_one_decoder_layer(adapted: Make, family: str) -> None:
    found = {
        re.sub(r"\d+", "N", name.rpartition(".lora_A")[0])
        for name, _ in adapted().named_parameters()
        if ".lora_A." in name
    }
    layer = "model.language_model.layers.N"
    phi3 = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    llama = {f"self_attn.{x}_proj" for x in "qkvo"} | {
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    }
    assert found == {f"{layer}.{name}" for name in (phi3 if family == "phi3" else llama)}


def test_pattern_is_anchored(config_json: dict[str, Any], make_settings: Make) -> None:
    """A vision tower's q_proj, and a dot that is only a dot."""
    architecture = Architecture.from_config_json(config_json)
    pattern = re.compile(adapter_pattern(architecture, make_settings().lora, "lora"))
    inside = "model.language_model.layers.0.self_attn.o_proj"
    assert pattern.fullmatch(inside)
    assert pattern.fullmatch("model.multi_modal_projector.linear_2")
    for outside in (
        "model.vision_tower.encoder.layer.0.attention.q_proj",
        "lm_head",
        "model.multi_modal_projector.layer_norm",
        inside.replace("model.language", "modelXlanguage"),
        "vision." + inside,
    ):
        assert not pattern.fullmatch(outside), outside


def test_start_is_the_base(adapted: Make, config_json: dict[str, Any]) -> None:
    base = logits(build_native(config_json, seed=1), config_json)
    assert torch.equal(logits(adapted(), config_json), base)


def test_seed(adapted: Make) -> None:
    before = torch.random.get_rng_state()
    one, two = adapted(), adapted()
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, left), (_, right) in zip(
        one.named_parameters(), two.named_parameters(), strict=True
    ):
        assert torch.equal(left, right), name


def test_adapters_take_the_base_dtype(config_json: dict[str, Any], make_settings: Make) -> None:
    native = build_native(config_json, dtype=torch.bfloat16)
    attach_lora(native, Architecture.from_config_json(config_json), make_settings().lora, "full")
    assert {value.dtype for value in native.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("preset", "projector"), [("paper", "full"), ("authors", "lora"), ("paper", "frozen")]
)
def test_peft_reads_the_folder(
    adapted: Make, config_json: dict[str, Any], tmp_path: Path, preset: str, projector: str
) -> None:
    native = adapted(preset, projector, fill=2)
    expected = logits(native, config_json)
    save_adapter(native, tmp_path, base="nano")
    fresh = build_native(config_json, seed=1)
    assert not torch.allclose(logits(fresh, config_json), expected, atol=1e-3)
    through_peft = PeftModel.from_pretrained(fresh, str(tmp_path))
    torch.testing.assert_close(logits(through_peft, config_json), expected, atol=1e-6, rtol=0)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == 8 and written["lora_alpha"] == 32
    assert written["base_model_name_or_path"] == "nano"
    assert written["modules_to_save"] == (
        ["multi_modal_projector"] if projector == "full" else None
    )
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all(name.startswith("base_model.model.model.") for name in names)


def test_save_and_load(adapted: Make, config_json: dict[str, Any], tmp_path: Path) -> None:
    native = adapted(fill=3)
    save_adapter(native, tmp_path, base="nano")
    other = adapted()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other, config_json), logits(native, config_json))


def test_the_seed_is_that_of_the_run_and_nothing_else_draws_from_it(
    config_json: dict[str, Any], make_settings: Make
) -> None:
    """Two seeds give two adapters, and the generator of the training is left as it was."""
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        native = build_native(config_json, seed=1)
        architecture = Architecture.from_config_json(config_json)
        torch.random.set_rng_state(before)
        attach_lora(native, architecture, make_settings().lora, "frozen", seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        drawn.append({n: p for n, p in native.named_parameters() if ".lora_A." in n})
    assert drawn[0] and not any(torch.equal(p, drawn[1][n]) for n, p in drawn[0].items())


def test_save_given_values(adapted: Make, tmp_path: Path) -> None:
    native = adapted(fill=3)
    values = {n: torch.zeros_like(p) for n, p in native.named_parameters() if p.requires_grad}
    save_adapter(native, tmp_path, base="nano", tensors=values)
    assert not any(v.any() for v in load_file(tmp_path / "adapter_model.safetensors").values())
    values.popitem()
    with pytest.raises(ValueError, match="1 trained tensors have no value"):
        save_adapter(native, tmp_path, base="nano", tensors=values)


def test_load_refusals(
    adapted: Make, config_json: dict[str, Any], tmp_path: Path, make_tiny: Make, make_settings: Make
) -> None:
    with pytest.raises(FileNotFoundError, match="folder with a saved adapter"):
        load_adapter(adapted(), tmp_path)
    save_adapter(adapted(), tmp_path, base="nano")
    with pytest.raises(ValueError, match=r"has r 8, the config asks for 4; set model.lora"):
        load_adapter(adapted(r=4), tmp_path)
    strong = make_settings()
    strong.lora.alpha = 64  # the shapes fit, the scale would be another
    native = build_native(config_json, seed=1)
    attach_lora(native, Architecture.from_config_json(config_json), strong.lora, "full")
    with pytest.raises(ValueError, match=r"has lora_alpha 32, the config asks for 64"):
        load_adapter(native, tmp_path)
    with pytest.raises(ValueError, match="other layers than the config trains"):
        load_adapter(adapted(projector="frozen"), tmp_path)
    wide = make_tiny("phi3" if "Phi3" in str(config_json) else "internlm2", mlp=96)
    native = build_native(wide)
    attach_lora(native, Architecture.from_config_json(wide), make_settings().lora, "full")
    with pytest.raises(ValueError, match="belongs to another base model"):
        load_adapter(native, tmp_path)
    with pytest.raises(ValueError, match="no adapters; attach_lora comes first"):
        save_adapter(build_native(config_json), tmp_path, base="nano")


def test_merge_and_export(adapted: Make, config_json: dict[str, Any], tmp_path: Path) -> None:
    native = adapted("authors", "lora", fill=4)
    expected = logits(native, config_json)
    merge_adapters(native)
    torch.testing.assert_close(logits(native, config_json), expected, atol=1e-5, rtol=1e-5)
    export_checkpoint(native, config_json, tmp_path, None)
    again, _ = import_checkpoint(tmp_path)
    assert torch.equal(logits(again, config_json), logits(native, config_json))
