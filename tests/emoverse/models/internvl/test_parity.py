"""The imported model equals the released modules' mathematics (original.py) to 5e-5 in fp32."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from emoverse.models.adapters import merge_adapters
from emoverse.models.architecture import Architecture
from emoverse.models.emoverse import EmoVerse, compose
from emoverse.models.internvl.checkpoint import import_checkpoint, join_rows
from emoverse.models.internvl.tensor_names import tensor_names

Make = Callable[..., Any]
TOLERANCE = 5e-5
LENGTHS = ("short", "long")


@pytest.fixture
def folder(folder_of: Make, family: str) -> Path:
    found: Path = folder_of(family)
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", LENGTHS)
def test_features_logits_loss_and_gradients(
    folder: Path, family: str, name: str, attention: str, original: ModuleType
) -> None:
    case, native = original.CASES[name], import_checkpoint(folder)[0]
    native.set_attn_implementation(attention)
    weights = {key: w.requires_grad_(True) for key, w in original.random_weights(family).items()}
    reference = original.Original(family, weights)
    features = native.model.get_image_features(pixel_values=case.pixels).pooler_output
    torch.testing.assert_close(features, reference.features(case.pixels), atol=TOLERANCE, rtol=0)
    tower = native.model.vision_tower(pixel_values=case.pixels).last_hidden_state
    torch.testing.assert_close(tower, reference.tower(case.pixels), atol=TOLERANCE, rtol=0)
    theirs = reference.logits(case.ids, case.lengths, case.pixels)
    assert 0.8 < float(theirs.detach().std()) < 2.0
    ours = original.native_logits(native, case)
    assert original.distance(case, ours, theirs) < TOLERANCE
    own_loss, their_loss = case.loss(ours), case.loss(theirs)
    torch.testing.assert_close(own_loss, their_loss, atol=TOLERANCE, rtol=0)
    own_loss.backward()
    their_loss.backward()
    parameters = dict(native.named_parameters())
    architecture = Architecture.from_config_json(json.loads((folder / "config.json").read_text()))
    for entry in tensor_names(architecture):
        gradient = join_rows([parameters[n].grad for n in entry.native], entry, architecture)
        expected = weights[entry.released].grad
        # Those of the patch kernel sum over all patches and reach 10.
        atol = TOLERANCE * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(
            gradient, expected, atol=atol, rtol=0, msg=lambda m, n=entry.released: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", LENGTHS)
def test_packed_with_adapters_and_merged(
    folder: Path, family: str, name: str, make_settings: Make, original: ModuleType
) -> None:
    """EmoVerse's own packed forward with non-zero adapters equals the original on W + 4 B A."""
    case, config_json = original.CASES[name], json.loads((folder / "config.json").read_text())
    native, _ = import_checkpoint(folder)
    model = compose(native, config_json, make_settings("authors", "lora"), seed=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    packed = packed_logits(model, case)
    merge_adapters(native)
    changed = dict(native.named_parameters())
    weights = original.random_weights(family)
    touched = 0
    for entry in tensor_names(model.architecture):
        parts = [changed[n].detach() for n in entry.native]
        merged = join_rows(parts, entry, model.architecture)
        touched += not torch.equal(merged, weights[entry.released])
        weights[entry.released] = merged
    assert touched == 2 + (8 if family == "phi3" else 10)
    with torch.no_grad():
        theirs = original.Original(family, weights).logits(case.ids, case.lengths, case.pixels)
        for row, logits in enumerate(packed):
            torch.testing.assert_close(
                logits, theirs[row, : case.lengths[row]], atol=TOLERANCE, rtol=0
            )
        assert original.distance(case, original.native_logits(native, case), theirs) < TOLERANCE


def packed_logits(model: EmoVerse, case: Any) -> list[Tensor]:
    """Logits of each sample from one packed forward."""
    ends = torch.tensor([0, *case.lengths]).cumsum(0)
    batch: Any = SimpleNamespace(
        ids_T=torch.cat(case.rows),
        position_ids_T=torch.cat([torch.arange(length) for length in case.lengths]),
        cu_seqlens=ends.to(torch.int32),
        max_seqlen=max(case.lengths),
        pixels=case.frames,
        features=None,
    )
    with torch.no_grad():
        hidden = model.hidden_states(batch)
        return list(model.native.lm_head(hidden).split(case.lengths))


@pytest.mark.parametrize("name", LENGTHS)
def test_greedy_answers(folder: Path, family: str, name: str, original: ModuleType) -> None:
    """transformers' generate with left padding, against one token after the other by hand."""
    case = original.CASES[name]
    reference = original.Original(family, original.random_weights(family))
    native, config_json = import_checkpoint(folder)
    model = compose(native, config_json, None, train="none")
    frames = iter(case.frames.split([2, 1, 0]))
    items = [(row, next(frames)) for row in case.rows]
    items = [(row, part if len(part) else None) for row, part in items]
    # One by one: the longest sample of a batch decides the rope of all of them.
    for row, part in items:
        inputs = model.prepare_generation([(row, part)])
        ids = model.native.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=original.PAD
        )[0]
        text = row
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (original.MEAN, original.STD))
        shown = torch.zeros(0, 56, 56, 3, dtype=torch.uint8) if part is None else part
        pixels = (shown.permute(0, 3, 1, 2).float() / 255 - mean) / std
        for token in ids.tolist():
            with torch.no_grad():
                last = reference.logits(text[None], [len(text)], pixels)[0, -1]
            assert int(last.index_fill(0, torch.tensor([original.PAD]), -1e9).argmax()) == token
            text = torch.cat((text, torch.tensor([token])))
