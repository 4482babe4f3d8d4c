"""Import and export of the released layout: exact, strict, refusing the rest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from emoverse.models.adapters import attach_lora, trainable_names
from emoverse.models.architecture import REGISTRY, Architecture, parameter_counts
from emoverse.models.internvl.checkpoint import build_native, export_checkpoint, import_checkpoint


def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact(
    tmp_path: Path, config_json: dict[str, Any], shard_bytes: int, dtype: torch.dtype
) -> None:
    model = build_native(config_json, seed=1, dtype=dtype)
    export_checkpoint(model, config_json, tmp_path / "a", None, shard_bytes=shard_bytes)
    assert (tmp_path / "a" / "model.safetensors").exists() == (shard_bytes == 10**9)
    again, read = import_checkpoint(tmp_path / "a")
    assert read == config_json
    assert states(again).keys() == states(model).keys()
    for name, value in states(model).items():
        assert value.dtype == states(again)[name].dtype
        assert torch.equal(value, states(again)[name]), name
    export_checkpoint(again, read, tmp_path / "b", None)
    released: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "a").glob("*.safetensors"):
        released |= load_file(path)
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == released.keys()
    assert all(torch.equal(written[name], released[name]) for name in released)


def test_same_logits_after_import(folder: Path, config_json: dict[str, Any]) -> None:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        first = build_native(config_json, seed=1)(input_ids=ids).logits
        second = import_checkpoint(folder)[0](input_ids=ids).logits
    assert torch.equal(first, second)


def test_rotary_frequencies_stay_fp32(folder: Path, config_json: dict[str, Any]) -> None:
    exact = build_native(config_json).model.language_model.rotary_emb.inv_freq
    imported, _ = import_checkpoint(folder, torch.bfloat16)
    for model in (imported, build_native(config_json, dtype=torch.bfloat16)):
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(model.model.language_model.rotary_emb.inv_freq, exact)
        assert exact.dtype == torch.float32


def test_seed_decides_the_weights(config_json: dict[str, Any]) -> None:
    before = torch.random.get_rng_state()
    one, two, three = (build_native(config_json, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, three.lm_head.weight)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_refuses_missing_unexpected_misshapen(folder: Path) -> None:
    def damage(state: dict[str, torch.Tensor]) -> None:
        state["mlp1.9.weight"] = torch.zeros(2)
        state["mlp1.1.bias"] = torch.zeros(3)
        del state["vision_model.encoder.layers.1.ls2"]

    edit(folder, damage)
    with pytest.raises(ValueError, match=r"do not fit its config.json") as caught:
        import_checkpoint(folder)
    message = str(caught.value)
    assert "missing tensor vision_model.encoder.layers.1.ls2" in message
    assert "unexpected tensor mlp1.9.weight (2,)" in message
    assert "mlp1.1.bias must have shape (64,), found (3,)" in message


def test_shows_the_first_problems_only(folder: Path) -> None:
    edit(folder, lambda state: [state.pop(name) for name in list(state)[:30]])
    with pytest.raises(ValueError, match=r"and 10 more\n"):
        import_checkpoint(folder)


def test_export_copies_small_files_and_drops_stale_weights(
    folder: Path, tmp_path: Path, config_json: dict[str, Any]
) -> None:
    (folder / "tokenizer.model").write_bytes(b"pieces")
    target = tmp_path / "out"
    target.mkdir()
    save_file({"x": torch.zeros(1)}, target / "model-00001-of-00002.safetensors")
    model, _ = import_checkpoint(folder)
    export_checkpoint(model, config_json, target, copy_from=folder)
    names = sorted(path.name for path in target.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.model"]
    stored = load_file(target / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


def test_export_refuses_adapters(
    tmp_path: Path, config_json: dict[str, Any], make_settings: Callable[..., Any]
) -> None:
    model = build_native(config_json)
    architecture = Architecture.from_config_json(config_json)
    attach_lora(model, architecture, make_settings().lora, "full")
    with pytest.raises(ValueError, match="merge the adapters first"):
        export_checkpoint(model, config_json, tmp_path)


@pytest.mark.parametrize(
    ("name", "preset", "projector", "trainable", "modules"),
    [
        ("internvl2-4b", "paper", "full", 34_617_344, 128),
        ("internvl2-4b", "authors", "lora", 12_689_408, 130),
        ("internvl2-8b", "paper", "full", 54_542_336, 224),
        ("internvl2-8b", "authors", "lora", 21_102_592, 226),
    ],
)
def test_full_size_models_without_memory(
    name: str,
    preset: str,
    projector: str,
    trainable: int,
    modules: int,
    make_tiny: Callable[..., dict[str, Any]],
    make_settings: Callable[..., Any],
) -> None:
    """The native classes at full size have exactly the counted parameters and trained names."""
    sizes = REGISTRY[name]
    vision, llm = sizes.vision, sizes.llm
    config = make_tiny(
        llm.family,
        vision_hidden=vision.hidden,
        vision_layers=vision.layers,
        vision_heads=vision.heads,
        vision_mlp=vision.mlp,
        image_size=vision.image_size,
        hidden=llm.hidden,
        layers=llm.layers,
        heads=llm.heads,
        kv_heads=llm.kv_heads,
        mlp=llm.mlp,
        vocab=llm.vocab,
    )
    assert Architecture.from_config_json(config) == sizes
    with torch.device("meta"):
        model = build_native(config)
        total = sum(value.numel() for value in model.parameters())
        assert len(model.state_dict()) == (637 if name == "internvl2-4b" else 733)
        # Plain names would put adapters into the vision tower of the 8B as well.
        linears = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
        plain = [path for path in linears if path.rpartition(".")[2] in llm.linears()]
        inside = sum("vision_tower" in path for path in plain)
        assert (len(plain), inside) == ((128, 0) if name == "internvl2-4b" else (296, 72))
        lora = make_settings(preset, projector).lora
        attach_lora(model, sizes, lora, projector)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    counts = parameter_counts(sizes, lora, projector)
    assert total == counts["total"]
    assert trained.keys() == trainable_names(sizes, lora, projector)
    assert sum(value.numel() for value in trained.values()) == counts["trainable"]
    assert counts["trainable"] == trainable
    assert not any("vision_tower" in name for name in trained)
    assert sum(".lora_A." in name for name in trained) == modules
    assert len(trained) == 2 * modules + (6 if projector == "full" else 0)
