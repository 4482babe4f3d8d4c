"""Every mistake that an importer can make is made on purpose, and the parity test must see it.

A mistake changes the imported model or the folder; "seen" means that logits at real positions move
further from the original than the parity tests allow. `where`: on which side of the rope switch.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emoverse.models.internvl2 import import_checkpoint

TOLERANCE = 5e-5
BOTH = ("short", "long")


@dataclass(frozen=True)
class Mistake:
    name: str
    change: Callable[[Any], object]  # in place, on the native model
    families: tuple[str, ...] = ("phi3", "internlm2")
    where: tuple[str, ...] = BOTH


def set_eps(modules: str, kind: str, eps: float) -> Callable[[Any], object]:
    def change(native: Any) -> None:
        found = [m for m in native.get_submodule(modules).modules() if kind in type(m).__name__]
        assert found
        for module in found:
            assert hasattr(module, "variance_epsilon" if kind == "RMSNorm" else "eps")
            setattr(module, "variance_epsilon" if kind == "RMSNorm" else "eps", eps)

    return change


def tanh_gelu(modules: str) -> Callable[[Any], object]:
    def change(native: Any) -> None:
        found = [
            (owner, name)
            for owner in native.get_submodule(modules).modules()
            for name, child in owner.named_children()
            if "GELU" in type(child).__name__
        ]
        assert found
        for owner, name in found:
            setattr(owner, name, nn.GELU(approximate="tanh"))

    return change


def shuffle_v1(native: Any) -> None:
    right = native.model.pixel_shuffle
    native.model.pixel_shuffle = lambda x, scale_factor: right(x, scale_factor).transpose(1, 2)


def unshuffle(native: Any) -> None:
    def shuffle(x_NHWC: Tensor, scale_factor: float) -> Tensor:
        return nn.functional.pixel_unshuffle(x_NHWC.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)

    native.model.pixel_shuffle = shuffle


def set_parameters(pattern: str, value: Callable[[Tensor], Tensor]) -> Callable[[Any], object]:
    @torch.no_grad()
    def change(native: Any) -> None:
        found = [p for name, p in native.named_parameters() if pattern in name]
        assert found
        for parameter in found:
            parameter.copy_(value(parameter))

    return change


@torch.no_grad()
def swap_gate_and_up(native: Any) -> None:
    for layer in native.model.language_model.layers:
        if hasattr(layer.mlp, "gate_up_proj"):
            weight = layer.mlp.gate_up_proj.weight
            weight.copy_(torch.cat(weight.chunk(2)[::-1]))
        else:
            layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


@torch.no_grad()
def plain_wqkv(native: Any) -> None:
    """The grouped rows read as [q; k; v]."""
    for layer in native.model.language_model.layers:
        parts = [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]
        q, k, v = (part.view(2, -1, 16, 64) for part in parts)
        fused = torch.cat((q, k, v), 1).reshape(-1, 64)
        for part, rows in zip(parts, fused.split([64, 32, 32]), strict=True):
            part.copy_(rows)


def rope(**changes: Any) -> Callable[[Any], object]:
    """Another rope than the file's."""

    def change(native: Any) -> None:
        text = native.config.text_config
        text.rope_parameters = dict(text.rope_parameters) | changes
        language = native.model.language_model
        language.rotary_emb = type(language.rotary_emb)(text)

    return change


def unscaled_rope(native: Any) -> None:
    native.model.language_model.rotary_emb.attention_scaling = 1.0


def short_factors_only(native: Any) -> None:
    factors = native.config.text_config.rope_parameters["short_factor"]
    rope(long_factor=factors)(native)


def tie(native: Any) -> None:
    native.lm_head.weight = native.model.language_model.embed_tokens.weight


TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
LANGUAGE = "model.language_model"
MISTAKES = (
    Mistake("rms norm eps 1e-6", set_eps(LANGUAGE, "RMSNorm", 1e-6)),
    Mistake("tower gelu tanh", tanh_gelu(TOWER)),
    Mistake("projector gelu tanh", tanh_gelu(PROJECTOR)),
    Mistake("projector norm eps 1e-6", set_eps(PROJECTOR, "LayerNorm", 1e-6)),
    Mistake("tower norm eps 1e-5", set_eps(TOWER, "LayerNorm", 1e-5)),
    Mistake("pixel shuffle v1", shuffle_v1),
    Mistake("pixel_unshuffle order", unshuffle),
    Mistake("layer scale dropped", set_parameters("lambda_", torch.ones_like)),
    Mistake("tower biases dropped", set_parameters("attention.q_proj.bias", torch.zeros_like)),
    Mistake("class token dropped", set_parameters("cls_token", torch.zeros_like)),
    Mistake("head tied", tie),
    Mistake("gate and up swapped", swap_gate_and_up),
    Mistake("wqkv as [q; k; v]", plain_wqkv, families=("internlm2",)),
    Mistake("rope scaling dropped", rope(rope_type="default"), families=("phi3",)),
    Mistake(
        *("rope scaling dropped", rope(rope_type="default")),
        families=("internlm2",),
        where=("long",),
    ),
    Mistake("short factors only", short_factors_only, families=("phi3",), where=("long",)),
    Mistake("rope factor 1.0", unscaled_rope, families=("phi3",)),
    Mistake("rope theta 1e4", rope(rope_theta=1e4), families=("internlm2",)),
    Mistake("linear rope", rope(rope_type="linear"), families=("internlm2",)),
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: one.name.replace(" ", "-"))
def test_a_mistake_is_seen(
    mistake: Mistake, folder_of: Callable[[str], Path], original: ModuleType
) -> None:
    for family in mistake.families:
        folder = folder_of(family)
        reference = original.Original(family, original.random_weights(family))
        for name, case in original.CASES.items():
            native, _ = import_checkpoint(folder)
            with torch.no_grad():
                theirs = reference.logits(case.ids, case.lengths, case.pixels)
                assert original.distance(case, original.native_logits(native, case), theirs) < (
                    TOLERANCE
                )
                mistake.change(native)
                moved = original.distance(case, original.native_logits(native, case), theirs)
            if name in mistake.where:
                assert moved > TOLERANCE, f"{family}, {name}: moved by {moved:.1e} only"
            else:
                # Stated, so that nobody trusts the other side alone.
                assert moved < TOLERANCE, f"{family}, {name}: is visible after all"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config.qkv_bias": False}, r"qkv_bias must be True, found False"),
        ({"ps_version": "v1"}, r"ps_version must be 'v2'"),
        ({"llm_config.tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"force_image_size": 112}, r"force_image_size must be .* \(56\), found 112"),
        ({"llm_config.rms_norm_eps": None}, r"rms_norm_eps is missing .* decides numbers"),
        ({"vision_config.layer_norm_eps": None}, "layer_norm_eps is missing"),
        ({"llm_config.rope_theta": None}, "rope_theta is missing"),
        ({"llm_config.rope_scaling.type": "yarn"}, "must be su, longrope or dynamic"),
        ({"llm_config.rope_scaling.long_factor": [1.0]}, "list of 8 factors, .* found 1 values"),
        ({"llm_config.rope_scaling.short_factor": None}, "short_factor must be a list"),
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
