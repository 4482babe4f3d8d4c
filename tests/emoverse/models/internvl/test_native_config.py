"""Folders that would give other numbers than the released models: refused, never guessed."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emoverse.models.internvl.checkpoint import import_checkpoint
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
                continue  # plain rope, said in so many words
            try:
                found = native_config(spoilt, 96).to_dict()
            except ValueError as error:
                assert path[-1] in str(error) and "config.json" in str(error), (path, value, error)
                refused += 1
            else:
                assert found == expected, (path, value)
    assert refused > 150


def test_both_kinds_of_weights_at_once_are_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("internlm2")
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds both model.safetensors and .*index.json"):
        import_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not the index of a sharded checkpoint"),
        ("[]", "is not the index of a sharded checkpoint"),
        ('{"weight_map": {}}', "must name files beside it, found none"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "must name files beside it, found"),
    ],
)
def test_a_broken_index_is_refused(
    text: str, message: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("internlm2")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder)


def test_quantised_weights_are_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("phi3")
    state = load_file(folder / "model.safetensors")
    state["mlp1.1.weight"] = state["mlp1.1.weight"].to(torch.int8)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"mlp1.1.weight is stored as I8, but weights must be"):
        import_checkpoint(folder)
