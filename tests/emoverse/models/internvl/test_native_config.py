"""Settings that would give other results than the released models are refused; the others kept."""

import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from emoverse.models.architecture import REGISTRY, Architecture
from emoverse.models.internvl.checkpoint import build_native, import_checkpoint
from emoverse.models.internvl.native_config import native_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config.qkv_bias": False}, r"qkv_bias must be True, found False"),
        ({"ps_version": "v1"}, r"ps_version must be 'v2'"),
        ({"llm_config.tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"force_image_size": 112}, r"force_image_size must be .* \(56\), found 112"),
        ({"llm_config.rms_norm_eps": None}, r"rms_norm_eps is missing .* changes the results"),
        ({"vision_config.layer_norm_eps": None}, "layer_norm_eps is missing"),
        ({"llm_config.rope_theta": None}, "rope_theta is missing"),
        (
            {"llm_config.rope_scaling.type": "yarn"},
            "must be one of su, longrope, dynamic, found 'yarn'",
        ),
        ({"llm_config.rope_scaling.long_factor": [1.0]}, "list of 8 factors .* found 1 values"),
        ({"llm_config.rope_scaling.short_factor": None}, "short_factor .* must be a list"),
        ({"llm_config.rope_scaling.rope_type": "default"}, "found 'default' and 'su'"),
        ({"llm_config.rope_scaling.long_mscale": 1.1}, "long_factor, .* only, found 'long_mscale'"),
        ({"llm_config.rope_scaling": None}, "must define how 24 positions become 768, found None"),
        ({"llm_config.rms_norm_eps": 1.0}, "rms_norm_eps in config.json must be below 1"),
        ({"llm_config.pad_token_id": 97}, "pad_token_id .* must be an integer from 0 to 96, found"),
        ({"llm_config.attention_bias": True}, "attention_bias must be False"),
        ({"llm_config.partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ({"img_context_token_id": 97}, r"must be below llm_config.vocab_size \(97\), found 97"),
    ],
)
def test_settings_that_would_change_numbers_are_refused(
    change: dict[str, Any], message: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("phi3")
    config = json.loads((folder / "config.json").read_text())
    for path, value in change.items():
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder)


def every_key(section: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in section.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from every_key(value, (*before, key))


@pytest.mark.parametrize("family", ["phi3", "internlm2"])
def test_a_config_with_a_hole_is_never_guessed(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    """Every key in turn is taken away or spoilt: an error that names it, or the same model."""
    whole = json.loads((folder_of(family) / "config.json").read_text())
    expected = native_config(whole, 96).to_dict()
    refused = 0
    for path in every_key(whole):
        for value in ("gone", None, "x", [1], -1, {"a": 1}):
            spoilt = deepcopy(whole)
            section = spoilt
            for name in path[:-1]:
                section = section[name]
            section[path[-1]] = value
            if value == "gone":
                del section[path[-1]]
            if path[-1] == "rope_scaling" and value is None and family == "internlm2":
                continue  # explicitly plain rope
            try:
                found = native_config(spoilt, 96).to_dict()
            except ValueError as error:
                assert path[-1] in str(error) and "config.json" in str(error), (path, value, error)
                refused += 1
            else:
                assert found == expected, (path, value)
    assert refused > 150


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
