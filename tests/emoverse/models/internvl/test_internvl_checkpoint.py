"""Import and export of the released layout: exact, strict, refusing the rest."""

import json
import math
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
from emoverse.models.internvl.native_config import native_config
from emoverse.models.internvl.tensor_names import tensor_names


@pytest.fixture
def folder(tmp_path: Path, config_json: dict[str, Any]) -> Path:
    """An exported random model in fp32."""
    export_checkpoint(build_native(config_json, seed=1), config_json, tmp_path / "base", None)
    return tmp_path / "base"


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


def test_table_is_the_native_model(config_json: dict[str, Any]) -> None:
    model = build_native(config_json)
    architecture = Architecture.from_config_json(config_json)
    natives = [name for entry in tensor_names(architecture) for name in entry.native]
    assert len(natives) == len(set(natives))
    assert set(natives) == set(states(model))
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


def test_native_settings(config_json: dict[str, Any]) -> None:
    model = build_native(config_json)
    text, vision = model.config.text_config, model.config.vision_config
    assert model.config.tie_word_embeddings is False and text.tie_word_embeddings is False
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    assert text.use_cache is False and text.rms_norm_eps == 1e-5
    assert vision.attention_bias and vision.use_mean_pooling and vision.layer_norm_eps == 1e-6
    assert model.model.multi_modal_projector.layer_norm.eps == 1e-5
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1, 2, 2)
    assert model.config.image_token_id == 96


def test_rope_of_the_released_models(make_tiny: Callable[..., dict[str, Any]]) -> None:
    """Longrope multiplies cos and sin by sqrt(1 + ln 32 / ln 4096), also for short samples."""
    su = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = make_tiny("phi3", rope_scaling=su, max_positions=131072)
    config["llm_config"]["original_max_position_embeddings"] = 4096
    rotary = build_native(config).model.language_model.rotary_emb
    assert rotary.rope_type == "longrope"
    assert rotary.attention_scaling == pytest.approx(1.190238, abs=1e-6)
    assert rotary.attention_scaling == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    dynamic = {"type": "dynamic", "factor": 2.0}
    config = make_tiny("internlm2", rope_scaling=dynamic, rope_theta=1e6)
    assert build_native(config).model.language_model.rotary_emb.rope_type == "dynamic"
    config["llm_config"]["rope_scaling"]["type"] = "yarn"
    with pytest.raises(ValueError, match=r"rope_scaling.type .* be one of su, longrope, dynamic"):
        native_config(config, 5)


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


def test_refuses_pickles_and_gaps(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model.bin\)"):
        import_checkpoint(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        import_checkpoint(folder)


def test_refuses_a_torn_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        import_checkpoint(folder)


def test_refuses_a_wrong_index(tmp_path: Path, config_json: dict[str, Any]) -> None:
    model = build_native(config_json)
    export_checkpoint(model, config_json, tmp_path, None, shard_bytes=60_000)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name = index["weight_map"].pop("mlp1.0.weight")
    index_path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="0 missing, 1 unlisted"):
        import_checkpoint(tmp_path)
    index["weight_map"]["mlp1.0.weight"] = name
    # The same tensor once more, in a shard that the index does not name for it.
    other = next(file for file in index["weight_map"].values() if file != name)
    index_path.write_text(json.dumps(index))
    twice = load_file(tmp_path / other)
    save_file(twice | {"mlp1.0.weight": torch.zeros(128)}, tmp_path / other)
    with pytest.raises(ValueError, match=rf"{other} does not hold .* 0 missing, 1 unlisted"):
        import_checkpoint(tmp_path)
    save_file(twice, tmp_path / other)
    import_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="listed in the index but missing"):
        import_checkpoint(tmp_path)


def test_image_token_from_the_tokenizer(folder: Path, config_json: dict[str, Any]) -> None:
    plain = {key: value for key, value in config_json.items() if key != "img_context_token_id"}
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"id of <IMG_CONTEXT> is in neither"):
        import_checkpoint(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 95}))
    assert import_checkpoint(folder)[0].config.image_token_id == 95
    table = {"94": {"content": "<IMG_CONTEXT>"}, "93": {"content": "<img>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": table}))
    assert import_checkpoint(folder)[0].config.image_token_id == 94


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


def test_the_released_8b_config_is_understood() -> None:
    """With what the file of the hub says beside the sizes; the id of <IMG_CONTEXT> is not in it."""
    vision = {
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": 448,
        "initializer_factor": 1.0,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b",
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
        "use_flash_attn": True,
    }
    llm = {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "flash_attention_2",
        "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForCausalLM"},
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "internlm2",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 92553,
    }
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "llm_config": llm,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": vision,
    }
    assert Architecture.from_config_json(config) == REGISTRY["internvl2-8b"]
    native = native_config(config, 92546)
    text = native.text_config
    assert text.rope_parameters == {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    assert (text.rms_norm_eps, text.max_position_embeddings) == (1e-5, 32768)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1, 2, 2)
    assert native.image_seq_length == 256 and native.vision_feature_select_strategy == "default"
    assert native.vision_feature_layer == -1
