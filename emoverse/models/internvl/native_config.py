"""config.json of the released layout as the configs of transformers' own classes.

Every value is read from the file; a setting that is missing or unknown is an error, since a default
that is nearly right changes the logits by so little that nobody notices.
"""

import json
from collections.abc import ItemsView, Mapping
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
        layer_norm_eps=_epsilon(vision, "layer_norm_eps", "vision_config"),
        # Of new models only; a checkpoint holds the scales.
        layer_scale_init_value=_number(
            {"initializer_factor": 1.0, **vision}, "initializer_factor", "vision_config"
        ),
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
        "rms_norm_eps": _epsilon(llm, "rms_norm_eps"),
        "max_position_embeddings": _integer(llm, "max_position_embeddings"),
        "rope_parameters": _rope_parameters(llm, architecture.llm.head_dim),
        **{f"{name}_token_id": _token_id(llm, name) for name in ("bos", "eos", "pad")},
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        # A default cache switches off the packing of sequences; generate() turns it on by itself.
        "use_cache": False,
    }
    if architecture.llm.family == "phi3":
        known = {"original_max_position_embeddings": llm["max_position_embeddings"], **llm}
        original = _integer(known, "original_max_position_embeddings")
        window = None if llm.get("sliding_window") is None else _integer(llm, "sliding_window")
        text_config: Phi3Config | LlamaConfig = Phi3Config(
            **shared,
            original_max_position_embeddings=original,
            sliding_window=window,
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


# Keys of each kind of rope scaling; another key would change values in an unknown way.
_ROPE_KEYS = {
    "su": {"type", "rope_type", "short_factor", "long_factor"},
    "longrope": {"type", "rope_type", "short_factor", "long_factor"},
    "dynamic": {"type", "rope_type", "factor"},
}


def _rope_parameters(llm: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """rope_theta and rope_scaling of the released layout as transformers' rope_parameters."""
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _number(llm, "rope_theta"),
    }
    scaling = _rope_scaling(llm)
    if scaling is None:
        return parameters
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind == "dynamic":
        factor = _number(scaling, "factor", "llm_config.rope_scaling")
        return parameters | {"rope_type": "dynamic", "factor": factor}
    return parameters | {
        "rope_type": "longrope",
        "short_factor": _factors(scaling, "short_factor", head_dim // 2),
        "long_factor": _factors(scaling, "long_factor", head_dim // 2),
        "original_max_position_embeddings": _integer(llm, "original_max_position_embeddings"),
    }


def _rope_scaling(llm: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section rope_scaling, with a kind and keys that are understood; None for plain rope."""
    if "rope_scaling" not in llm:
        raise _unusable("rope_scaling", "be present, null for plain rope", "nothing")
    scaling = llm["rope_scaling"]
    if scaling is None:
        longest = _integer(llm, "max_position_embeddings")
        original = llm.get("original_max_position_embeddings", longest)
        if original != longest:
            rule = f"define how {original} positions become {longest}"
            raise _unusable("rope_scaling", rule, scaling)
        return None
    if not isinstance(scaling, dict):
        raise _unusable("rope_scaling", "be null or a section", scaling)
    kinds = {str(scaling[key]) for key in ("type", "rope_type") if key in scaling}
    known = _ROPE_KEYS.get(next(iter(kinds)), set()) if len(kinds) == 1 else set()
    if not known:
        actual = " and ".join(sorted(map(repr, kinds))) or None
        rule = f"be one of {', '.join(_ROPE_KEYS)}"
        raise _unusable("rope_scaling.type", rule, actual, as_text=True)
    unknown = sorted(scaling.keys() - known)
    if unknown:
        raise _unusable("rope_scaling", f"hold {', '.join(sorted(known))} only", unknown[0])
    return scaling


def _factors(scaling: Mapping[str, Any], key: str, count: int) -> list[float]:
    value = scaling.get(key)
    if not isinstance(value, list) or len(value) != count or not all(map(_is_positive, value)):
        actual = f"{len(value)} values" if isinstance(value, list) else repr(value)
        rule = f"be a list of {count} factors above 0, one per pair of channels of a head"
        raise _unusable(f"rope_scaling.{key}", rule, actual, as_text=True)
    return [float(factor) for factor in value]


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _needed(section: Mapping[str, Any], key: str, name: str = "llm_config") -> Any:
    """A setting that has no safe default."""
    if section.get(key) is None:
        raise ValueError(
            f"{name}.{key} is missing in config.json and changes the results; use the config.json "
            "of the released model"
        )
    return section[key]


def _number(section: Mapping[str, Any], key: str, name: str = "llm_config") -> float:
    value = _needed(section, key, name)
    if not _is_positive(value):
        raise _unusable(key, "be a number above 0", value, name)
    return float(value)


def _epsilon(section: Mapping[str, Any], key: str, name: str = "llm_config") -> float:
    value = _number(section, key, name)
    if value >= 1:
        raise _unusable(key, "be below 1", value, name)
    return value


def _integer(section: Mapping[str, Any], key: str, name: str = "llm_config") -> int:
    value = _needed(section, key, name)
    if not _is_positive(value) or not isinstance(value, int):
        raise _unusable(key, "be a positive integer", value, name)
    return value


def _token_id(llm: Mapping[str, Any], name: str) -> int:
    """Id of a token that is set explicitly: defaults may lie beyond a small vocabulary."""
    value, vocab = _needed(llm, f"{name}_token_id"), llm["vocab_size"]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab:
        raise _unusable(f"{name}_token_id", f"be an integer from 0 to {vocab - 1}", value)
    return value


def _unusable(
    key: str, rule: str, actual: object, name: str = "llm_config", *, as_text: bool = False
) -> ValueError:
    """`as_text`: `actual` is already a description and is not quoted."""
    return ValueError(
        f"{name}.{key} in config.json must {rule}, found {actual if as_text else repr(actual)}; "
        "use the config.json of the released model"
    )


def image_token_id(config_json: Mapping[str, Any], folder: Path | None) -> int:
    """Id of <IMG_CONTEXT>: config.json's img_context_token_id, else the tokenizer's files.

    Raises:
        ValueError: none of the files has it.
    """
    value = config_json.get("img_context_token_id")
    if isinstance(value, int):
        return value
    if folder is not None:
        for token_id, token in _rows(folder / "tokenizer_config.json", "added_tokens_decoder"):
            if isinstance(token, dict) and token.get("content") == IMG_CONTEXT:
                return int(token_id)
        for content, token_id in _rows(folder / "added_tokens.json"):
            if content == IMG_CONTEXT:
                return int(token_id)
    raise ValueError(
        f"the id of {IMG_CONTEXT} is in neither config.json (img_context_token_id) nor "
        f"tokenizer_config.json nor added_tokens.json of {folder}; copy the tokenizer files "
        "next to the weights"
    )


def _rows(path: Path, key: str | None = None) -> ItemsView[str, Any]:
    """The rows of a tokenizer's JSON file, or of one section in it; none without the file."""
    if not path.is_file():
        return {}.items()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows: ItemsView[str, Any] = (content if key is None else content.get(key, {})).items()
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a tokenizer's JSON file ({error}); copy it again"
        ) from error
    return rows
