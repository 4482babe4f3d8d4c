"""Sizes read from the released layout, closed-form counts, refusals."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emoverse.models.architecture import (
    REGISTRY,
    Architecture,
    base_folder,
    load_architecture,
    lora_linears,
    parameter_counts,
    read_config_json,
)
from emoverse.models.internvl.released_config import new_config
from emoverse.models.internvl.tensor_names import tensor_names


def product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


@pytest.mark.parametrize(
    ("name", "vit", "projector", "llm", "total", "tensors"),
    [
        ("internvl2-4b", 304_012_288, 22_034_432, 3_820_809_216, 4_146_855_936, 541),
        ("internvl2-8b", 304_012_288, 33_570_816, 7_737_782_272, 8_075_365_376, 573),
    ],
)
def test_published_sizes(
    name: str,
    vit: int,
    projector: int,
    llm: int,
    total: int,
    tensors: int,
    make_settings: Callable[..., Any],
) -> None:
    counts = parameter_counts(REGISTRY[name], make_settings().lora, "full")
    assert (counts["vit"], counts["projector"], counts["llm"]) == (vit, projector, llm)
    assert counts["total"] == total
    table = tensor_names(REGISTRY[name])
    assert len(table) == tensors
    assert sum(product(entry.shape) for entry in table) == total


@pytest.mark.parametrize(
    ("name", "preset", "projector", "trainable"),
    [
        ("internvl2-4b", "paper", "full", 34_617_344),
        ("internvl2-4b", "paper", "frozen", 12_582_912),
        ("internvl2-4b", "authors", "lora", 12_689_408),
        ("internvl2-8b", "paper", "full", 54_542_336),
        ("internvl2-8b", "paper", "frozen", 20_971_520),
        ("internvl2-8b", "authors", "lora", 21_102_592),
    ],
)
def test_published_lora_counts(
    name: str, preset: str, projector: str, trainable: int, make_settings: Callable[..., Any]
) -> None:
    lora = make_settings(preset, projector).lora
    assert parameter_counts(REGISTRY[name], lora, projector)["trainable"] == trainable


def test_attention_only_is_a_custom_choice(make_settings: Callable[..., Any]) -> None:
    small = make_settings("custom", targets=["o_proj", "qkv_proj"]).lora
    counts = parameter_counts(REGISTRY["internvl2-4b"], small, "frozen")
    assert counts["trainable"] == counts["lora_llm"] == 4_718_592
    large = make_settings("custom", targets=["q_proj", "k_proj", "v_proj", "o_proj"]).lora
    assert parameter_counts(REGISTRY["internvl2-8b"], large, "frozen")["trainable"] == 6_815_744


def test_no_adapters() -> None:
    counts = parameter_counts(REGISTRY["internvl2-4b"], None, "full")
    assert counts["lora_llm"] == counts["lora_projector"] == 0
    assert counts["trainable"] == counts["projector"]


def test_tokens_per_frame(make_tiny: Callable[..., dict[str, Any]]) -> None:
    assert REGISTRY["internvl2-4b"].visual_tokens_per_frame == 256
    assert REGISTRY["internvl2-4b"].feature_channels == 4096
    nano = Architecture.from_config_json(make_tiny("phi3", image_size=112))
    assert nano.visual_tokens_per_frame == 16


def test_lora_refusals() -> None:
    architecture = REGISTRY["internvl2-4b"]
    with pytest.raises(ValueError, match=r"phi3 backbone \(qkv_proj.*found \['q_proj'\]"):
        lora_linears(architecture, "custom", ["q_proj"])
    with pytest.raises(ValueError, match="must name linears"):
        lora_linears(architecture, "custom")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "architectures", ["LlavaModel"], "architectures.0. must be 'InternVLChatModel'"),
        (None, "ps_version", "v1", "ps_version must be 'v2', found 'v1'"),
        (None, "select_layer", -4, "select_layer must be -1, found -4"),
        (None, "vision_config", None, "vision_config must be a section"),
        ("vision_config", "qk_normalization", True, "qk_normalization must be False"),
        ("vision_config", "norm_type", "rms_norm", "norm_type must be 'layer_norm'"),
        ("vision_config", "image_size", 60, "image_size must be a multiple of patch_size"),
        ("vision_config", "hidden_size", 33, "vision_config.hidden_size must be a multiple"),
        ("llm_config", "architectures", ["Qwen2ForCausalLM"], "Phi3ForCausalLM, InternLM2For"),
        ("llm_config", "hidden_size", 66, "llm_config.hidden_size must be a multiple"),
        ("llm_config", "num_key_value_heads", 3, "multiple of num_key_value_heads"),
        ("llm_config", "vocab_size", "97", "vocab_size must be a positive integer, found '97'"),
        ("llm_config", "tie_word_embeddings", True, "tie_word_embeddings must be False"),
    ],
)
def test_refuses_what_it_cannot_reproduce(
    section: str | None,
    key: str,
    value: object,
    message: str,
    make_tiny: Callable[..., dict[str, Any]],
) -> None:
    config = make_tiny("phi3")
    (config if section is None else config[section])[key] = value
    config["force_image_size"] = (config["vision_config"] or {}).get("image_size")
    with pytest.raises(ValueError, match=message) as caught:
        Architecture.from_config_json(config, origin="some/config.json")
    assert "some/config.json" in str(caught.value)
    assert "InternVL2-4B" in str(caught.value)


def test_all_problems_at_once(make_tiny: Callable[..., dict[str, Any]]) -> None:
    config = make_tiny("phi3")
    config["ps_version"] = "v1"
    config["llm_config"]["vocab_size"] = -1
    with pytest.raises(ValueError, match=r"(?s)ps_version.*vocab_size"):
        Architecture.from_config_json(config)


def test_unknown_family() -> None:
    with pytest.raises(ValueError, match="family must be phi3 or internlm2, found 'bert'"):
        new_config(
            **dict.fromkeys(("vision_hidden", "vision_layers", "vision_heads", "vision_mlp"), 8),
            **dict.fromkeys(("image_size", "hidden", "layers", "heads", "mlp", "vocab"), 28),
            **dict.fromkeys(("bos_id", "eos_id", "pad_id", "img_context_id"), 1),
            family="bert",
        )


def test_folders(tmp_path: Path, make_tiny: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(FileNotFoundError, match=r"'internvl2-8b', a name that only `plan` can use"):
        base_folder("internvl2-8b")
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist.*internvl2-4b"):
        load_architecture(tmp_path)
    with pytest.raises(FileNotFoundError, match="released layout"):
        read_config_json(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON.*copy the file again"):
        load_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="one JSON object, found list"):
        load_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make_tiny("phi3")))
    assert load_architecture(tmp_path).llm.vocab == 97
    assert load_architecture("internvl2-4b") is REGISTRY["internvl2-4b"]


def test_free_of_torch() -> None:
    code = (
        "import sys, emoverse.models.architecture, emoverse.models.internvl.tensor_names;"
        "heavy = {'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules); assert not heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
