"""The config.json of InternVL2's released layout: read it, check it, write a new one. Torch-free.

Small models are stored like the released ones, so that one importer serves both.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAMILIES = {"Phi3ForCausalLM": "phi3", "InternLM2ForCausalLM": "internlm2"}


def read_config_json(folder: Path) -> dict[str, Any]:
    """The folder's config.json, unchecked. Raises FileNotFoundError, ValueError."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; point to a folder in InternVL2's released layout"
        )
    try:
        config_json = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; copy the file again") from error
    if not isinstance(config_json, dict):
        raise ValueError(f"{path} must hold one JSON object, found {type(config_json).__name__}")
    return config_json


# The same in every vision tower of the released models.
_VISION = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_normalization": False,
}


def new_config(
    *,
    family: str,
    vision_hidden: int,
    vision_layers: int,
    vision_heads: int,
    vision_mlp: int,
    image_size: int,
    hidden: int,
    layers: int,
    heads: int,
    mlp: int,
    vocab: int,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    img_context_id: int,
    kv_heads: int | None = None,
    patch_size: int = 14,
    layer_scale: float = 1.0,
    max_positions: int = 4096,
    rope_theta: float = 10000.0,
    rope_scaling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of a new model in InternVL2's released layout.

    `family` is phi3 (4B) or internlm2 (8B). The id of `<IMG_CONTEXT>` is stored as
    `img_context_token_id`; the released files leave it to the tokenizer. `layer_scale` is
    the initial value of the vision tower's residual scales.
    """
    template = {"phi3": "phi3-chat", "internlm2": "internlm2-chat"}.get(family)
    if template is None:
        raise ValueError(f"family must be phi3 or internlm2, found {family!r}")
    architectures = {short: name for name, short in FAMILIES.items()}
    llm: dict[str, Any] = {
        "architectures": [architectures[family]],
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": max_positions,
        "rope_theta": rope_theta,
        "rope_scaling": None if rope_scaling is None else dict(rope_scaling),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "tie_word_embeddings": False,
        **({"bias": False} if family == "internlm2" else {}),
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": template,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "force_image_size": image_size,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "img_context_token_id": img_context_id,
        "vision_config": {
            "hidden_size": vision_hidden,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "intermediate_size": vision_mlp,
            "image_size": image_size,
            "patch_size": patch_size,
            "initializer_factor": layer_scale,
            **_VISION,
        },
        "llm_config": llm,
        "torch_dtype": "bfloat16",
    }


def first_name(value: object) -> str:
    """The first entry of a list of names; empty without one."""
    return str(value[0]) if isinstance(value, list) and value else ""


def section_of(config_json: Mapping[str, Any], name: str, problems: list[str]) -> Mapping[str, Any]:
    """A section of config.json; {} and a line in `problems` where it is missing."""
    section = config_json.get(name)
    if isinstance(section, dict) and section:
        return section
    problems.append(f"{name} must be a section with the sizes, found {section!r}")
    return {}


def unsupported_settings(config_json: Mapping[str, Any]) -> list[str]:
    """Settings that would silently change the results; all released models agree on them."""
    # `section_of` reports a missing section elsewhere.
    vision, llm = (section_of(config_json, name, []) for name in ("vision_config", "llm_config"))
    settings = [
        ("architectures[0]", first_name(config_json.get("architectures")), "InternVLChatModel"),
        ("ps_version", config_json.get("ps_version"), "v2"),
        ("select_layer", config_json.get("select_layer"), -1),
        ("downsample_ratio", config_json.get("downsample_ratio"), 0.5),
        ("vision_config.qkv_bias", vision.get("qkv_bias"), True),
        ("vision_config.qk_normalization", vision.get("qk_normalization"), False),
        ("vision_config.norm_type", vision.get("norm_type"), "layer_norm"),
        ("vision_config.hidden_act", vision.get("hidden_act"), "gelu"),
        ("llm_config.hidden_act", llm.get("hidden_act", "silu"), "silu"),
        ("llm_config.bias", llm.get("bias", False), False),
        ("llm_config.tie_word_embeddings", llm.get("tie_word_embeddings", False), False),
        ("tie_word_embeddings", config_json.get("tie_word_embeddings", False), False),
        ("llm_config.attention_bias", llm.get("attention_bias", False), False),
        ("llm_config.partial_rotary_factor", llm.get("partial_rotary_factor", 1.0), 1.0),
    ]
    problems = [
        f"{key} must be {expected!r}, found {actual!r}"
        for key, actual, expected in settings
        if actual != expected
    ]
    size, forced = vision.get("image_size"), config_json.get("force_image_size")
    if forced not in (None, size):
        problems.append(
            f"force_image_size must be vision_config.image_size ({size}), found {forced}"
        )
    return problems
