"""config.json of the released layout as the configs of transformers' own classes.

Every number is read from the file; a setting that is missing or unknown is an error, since a
default that is nearly right changes the logits by little and is never found again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, Phi3Config

from emoverse.models.architecture import Architecture

IMG_CONTEXT = "<IMG_CONTEXT>"


def native_config(config_json: Mapping[str, Any], image_token_id: int) -> InternVLConfig:
    """Translate a released config.json. Every field that a default would get wrong is set here."""
    architecture = Architecture.from_config_json(config_json)
    if not 0 <= image_token_id < architecture.llm.vocab:
        raise ValueError(
            f"the id of {IMG_CONTEXT} must be below llm_config.vocab_size "
            f"({architecture.llm.vocab}), found {image_token_id}; config.json and tokenizer files "
            "belong to different models"
        )
    vision, llm = config_json["vision_config"], config_json["llm_config"]
    vision_config = InternVLVisionConfig(
        hidden_size=architecture.vision.hidden,
        num_hidden_layers=architecture.vision.layers,
        num_attention_heads=architecture.vision.heads,
        intermediate_size=architecture.vision.mlp,
        image_size=architecture.vision.image_size,
        patch_size=architecture.vision.patch_size,
        hidden_act=vision["hidden_act"],
        norm_type=vision["norm_type"],
        layer_norm_eps=_needed(vision, "layer_norm_eps", "vision_config"),
        layer_scale_init_value=float(vision.get("initializer_factor", 1.0)),
        attention_bias=True,
        use_qk_norm=False,
        use_mean_pooling=True,  # False would add a final LayerNorm that the checkpoints lack
    )
    shared: dict[str, Any] = {
        "hidden_size": architecture.llm.hidden,
        "num_hidden_layers": architecture.llm.layers,
        "num_attention_heads": architecture.llm.heads,
        "num_key_value_heads": architecture.llm.kv_heads,
        "intermediate_size": architecture.llm.mlp,
        "vocab_size": architecture.llm.vocab,
        "rms_norm_eps": _needed(llm, "rms_norm_eps"),
        "max_position_embeddings": _needed(llm, "max_position_embeddings"),
        "rope_parameters": _rope_parameters(llm, architecture.llm.head_dim),
        "bos_token_id": _needed(llm, "bos_token_id"),
        "eos_token_id": _needed(llm, "eos_token_id"),
        "pad_token_id": _needed(llm, "pad_token_id"),
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        # A default cache switches off the packing of sequences; generate() turns it on by itself.
        "use_cache": False,
    }
    if architecture.llm.family == "phi3":
        original = llm.get("original_max_position_embeddings", llm["max_position_embeddings"])
        text_config: Phi3Config | LlamaConfig = Phi3Config(
            **shared,
            original_max_position_embeddings=original,
            sliding_window=llm.get("sliding_window"),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        )
    else:
        text_config = LlamaConfig(**shared, attention_bias=False, mlp_bias=False)
    return InternVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        image_seq_length=architecture.visual_tokens_per_frame,
        downsample_ratio=float(config_json["downsample_ratio"]),
        vision_feature_layer=int(config_json["select_layer"]),
        vision_feature_select_strategy="default",  # drops the class token
        tie_word_embeddings=False,  # the class default True would tie the head to the embedding
    )


def _rope_parameters(llm: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """rope_theta and rope_scaling of the released layout as transformers' rope_parameters."""
    scaling = llm.get("rope_scaling")
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(_needed(llm, "rope_theta")),
    }
    if not scaling:
        return parameters
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind in ("su", "longrope"):
        factors = {}
        for key in ("short_factor", "long_factor"):
            value = scaling.get(key)
            if not isinstance(value, list) or len(value) != head_dim // 2:
                found = f"{len(value)} values" if isinstance(value, list) else repr(value)
                raise ValueError(
                    f"llm_config.rope_scaling.{key} must be a list of {head_dim // 2} factors, one "
                    f"per pair of channels of a head, found {found}; use the config.json of the "
                    "released model"
                )
            factors[key] = [float(factor) for factor in value]
        original = _needed(llm, "original_max_position_embeddings")
        return parameters | {
            "rope_type": "longrope",
            **factors,
            "original_max_position_embeddings": original,
        }
    if kind == "dynamic":
        factor = float(_needed(scaling, "factor", "llm_config.rope_scaling"))
        return parameters | {"rope_type": "dynamic", "factor": factor}
    raise ValueError(
        f"llm_config.rope_scaling.type must be su, longrope or dynamic, found {kind!r}; "
        "use the config.json of the released model"
    )


def _needed(section: Mapping[str, Any], key: str, name: str = "llm_config") -> Any:
    """A setting without which numbers would be guessed."""
    if section.get(key) is None:
        raise ValueError(
            f"{name}.{key} is missing in config.json and decides numbers; use the config.json of "
            "the released model"
        )
    return section[key]


def image_token_id(config_json: Mapping[str, Any], folder: Path | None) -> int:
    """Id of <IMG_CONTEXT>: config.json's img_context_token_id, else the tokenizer's files.

    Raises:
        ValueError: it stands nowhere.
    """
    value = config_json.get("img_context_token_id")
    if isinstance(value, int):
        return value
    if folder is not None:
        path = folder / "tokenizer_config.json"
        if path.is_file():
            table = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
            for number, token in table.items():
                if token.get("content") == IMG_CONTEXT:
                    return int(number)
        path = folder / "added_tokens.json"
        if path.is_file():
            table = json.loads(path.read_text(encoding="utf-8"))
            if IMG_CONTEXT in table:
                return int(table[IMG_CONTEXT])
    raise ValueError(
        f"the id of {IMG_CONTEXT} is in neither config.json (img_context_token_id) nor "
        f"tokenizer_config.json nor added_tokens.json of {folder}; copy the tokenizer files "
        "next to the weights"
    )
