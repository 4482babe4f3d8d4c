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
from torch import Tensor, nn

from emoverse.export.layouts import write_internvl2
from emoverse.models import emoverse
from emoverse.models.emoverse import compose
from emoverse.models.internvl import checkpoint
from emoverse.models.internvl.checkpoint import import_checkpoint, open_checkpoint

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
def interleaved_tower(native: Any) -> None:
    """The tower's rows q | k | v read head by head."""
    for layer in native.model.vision_tower.encoder.layer:
        parts = [getattr(layer.attention, f"{name}_proj").weight for name in "qkv"]
        by_head = torch.cat(parts).view(2, 3, 16, 32)
        for place, part in enumerate(parts):
            part.copy_(by_head[:, place].reshape(32, 32))


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
    Mistake("tower rows interleaved", interleaved_tower),
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
    ("field", "value", "apart"),
    [("attention_bias", False, 3 * 2), ("use_mean_pooling", False, 2)],
)
def test_another_tower_does_not_load(
    field: str,
    value: bool,
    apart: int,
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Biases of two layers would be left over, a last norm would lack numbers: names, both ways."""
    right = checkpoint.native_config

    def wrong(*arguments: Any) -> Any:
        config = right(*arguments)
        setattr(config.vision_config, field, value)
        return config

    released = open_checkpoint(folder_of("phi3"))
    with torch.device("meta"):
        native = checkpoint.InternVLForConditionalGeneration(wrong(released.config_json, 96))
    assert len(set(native.state_dict()) ^ set(released.shapes)) == apart
    monkeypatch.setattr(checkpoint, "native_config", wrong)
    with pytest.raises(AssertionError):
        import_checkpoint(released.folder)


@pytest.mark.parametrize("constant", ["IMAGENET_MEAN", "IMAGENET_STD"])
def test_other_colours_are_seen(
    constant: str,
    folder_of: Callable[[str], Path],
    original: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CLIP's mean or standard deviation, the defaults of transformers' processors."""
    native, config_json = import_checkpoint(folder_of("phi3"))
    model = compose(native, config_json, None, train="none")
    case = original.CASES["short"]
    reference = original.Original("phi3", original.random_weights("phi3"))
    expected = reference.features(case.pixels)
    projector = native.model.multi_modal_projector
    with torch.no_grad():
        right = projector(model.vision_features(case.frames))
        torch.testing.assert_close(right, expected, atol=TOLERANCE, rtol=0)
        clip = {
            "IMAGENET_MEAN": (0.48145466, 0.4578275, 0.40821073),
            "IMAGENET_STD": (0.26862954, 0.26130258, 0.27577711),
        }
        monkeypatch.setattr(emoverse, constant, clip[constant])
        wrong = projector(model.vision_features(case.frames))
    assert float((wrong - expected).abs().max()) > TOLERANCE


@pytest.mark.parametrize("family", ["phi3", "internlm2"])
def test_bf16_is_as_far_as_it_should_be(
    family: str, folder_of: Callable[[str], Path], original: ModuleType
) -> None:
    """Measured elsewhere: 1.9 % of the logits for Phi-3 and 1.0 % for InternLM2."""
    reference = original.Original(family, original.random_weights(family))
    for case in original.CASES.values():
        native, _ = import_checkpoint(folder_of(family), torch.bfloat16)
        with torch.no_grad():
            theirs = reference.logits(case.ids, case.lengths, case.pixels)
            ours = original.native_logits(native, case).float()
        real = case.mask.bool()
        apart = (ours - theirs)[real].square().mean().sqrt() / theirs[real].square().mean().sqrt()
        assert 1e-3 < float(apart) < 0.03
        assert abs(float(case.loss(ours) - case.loss(theirs))) < 0.02


def test_a_cast_rotary_table_is_not_used(folder_of: Callable[[str], Path]) -> None:
    """The logits hardly show it, so forward and generation look at the table itself."""
    native, config_json = import_checkpoint(folder_of("internlm2"), torch.bfloat16)
    model = compose(native, config_json, None, train="none")
    model.prepare_generation([([5, 6], None)])
    model.bfloat16()  # what a careless cast does
    with pytest.raises(AssertionError, match=r"rotary table cast to torch.bfloat16"):
        model.prepare_generation([([5, 6], None)])
    with pytest.raises(AssertionError, match=r"rotary table cast to torch.bfloat16"):
        model._decode(torch.zeros(2, 64, dtype=torch.bfloat16), None)  # type: ignore[arg-type]


def test_remote_code_is_left_alone(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Released folders bring their own code, which gives NaN under transformers 5."""
    folder = folder_of("internlm2")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    config["llm_config"]["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm2.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("modeling_internvl_chat.py", "modeling_internlm2.py"):
        (folder / name).write_text("raise SystemExit('remote code was run')\n")
    native, _ = import_checkpoint(folder)
    assert type(native).__module__.startswith("transformers.")
    write_internvl2(open_checkpoint(folder), [], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (tmp_path / "out" / "modeling_internlm2.py").is_file()
