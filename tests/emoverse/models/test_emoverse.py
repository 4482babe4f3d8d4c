"""The forward: packed equals separate, equals transformers' own, and trains only what it should."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_shards.tasks import TASKS
from emoverse.models.adapters import trainable_names
from emoverse.models.emoverse import IMAGENET_MEAN, IMAGENET_STD, EmoVerse, compose
from emoverse.models.internvl.checkpoint import build_native

Make = Callable[..., Any]


def gradients(model: EmoVerse) -> dict[str, Tensor]:
    return {
        name: value.grad.clone()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def run(model: EmoVerse, batches: list[Any]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        output = model(batch)
        output.loss_sum.backward()
        total += float(output.loss_sum.detach())
    return total, gradients(model)


@pytest.mark.parametrize("train", ["lora", "all"])
def test_packed_equals_separate(
    make_model: Make, make_batch: Make, samples: list[Any], train: str
) -> None:
    model = make_model(train).train()
    together, grad_together = run(model, [make_batch(samples)])
    alone, grad_alone = run(model, [make_batch([sample]) for sample in samples])
    assert together == pytest.approx(alone, rel=1e-5)
    assert grad_together.keys() == grad_alone.keys()
    assert grad_together.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, value in grad_together.items():
        torch.testing.assert_close(value, grad_alone[name], atol=1e-5, rtol=1e-4, msg=name)


def test_recomputing_activations_changes_nothing(
    make_model: Make, make_batch: Make, samples: list[Any]
) -> None:
    """The same masks of dropout, the same loss, the same gradients; fewer kept tensors."""
    found, kept = [], []
    for recompute in (False, True):
        model = make_model(dropout=0.2).train()
        if recompute:
            model.recompute_activations()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(make_batch(samples))
        kept.append(sum(sizes))
        output.loss_sum.backward()
        found.append((float(output.loss_sum.detach()), gradients(model)))
    assert kept[1] < 0.6 * kept[0]
    (loss, plain), (other, again) = found
    assert loss == other
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-6, msg=name)


def test_sliding_window_of_the_released_phi3(
    make_tiny: Make, make_settings: Make, make_batch: Make, samples: list[Any]
) -> None:
    """Wider than any sample it changes nothing; narrower is refused, never cut silently."""
    losses = []
    for window in (None, 100, 20):
        config = make_tiny("phi3")
        config["llm_config"]["sliding_window"] = window
        model = compose(build_native(config, seed=3), config, make_settings())
        if window == 20:
            with pytest.raises(ValueError, match=r"35 tokens .* sliding_window is 20"):
                model(make_batch(samples))
        else:
            losses.append(float(model(make_batch(samples)).loss_sum.detach()))
    assert losses[0] == losses[1]


def test_order_of_segments_is_free(make_model: Make, make_batch: Make, samples: list[Any]) -> None:
    model = make_model()
    forward, _ = run(model, [make_batch(samples)])
    backward, _ = run(model, [make_batch(samples[::-1])])
    assert forward == pytest.approx(backward, rel=1e-5)


def test_equals_transformers_own_forward(
    make_model: Make, make_batch: Make, make_sample: Make
) -> None:
    """One sample through the native class with its own SDPA, splice, head and loss."""
    sample = make_sample(7, words=12, frames=2, supervised=4, task=1)
    model = make_model()
    ours = model(make_batch([sample])).loss_sum
    native = model.native
    native.set_attn_implementation("sdpa")
    labels = torch.full_like(sample.ids, -100)
    labels[-4:] = sample.ids[-4:]
    pixels = sample.pixels.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    theirs = native(
        input_ids=sample.ids[None],
        pixel_values=(pixels - mean) / std,
        attention_mask=torch.ones_like(sample.ids)[None],
        labels=labels[None],
    ).loss
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_sums_by_task(make_model: Make, make_batch: Make, samples: list[Any]) -> None:
    model = make_model()
    output = model(make_batch(samples))
    assert output.task_tokens.tolist() == [3, 6, 2, 0, 4]
    torch.testing.assert_close(output.task_weight, torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(output.task_loss.sum(), output.loss_sum.detach())
    assert len(output.task_loss) == len(TASKS)
    only = model(make_batch([samples[2]])).task_loss
    torch.testing.assert_close(only[4], output.task_loss[4], atol=1e-5, rtol=1e-5)


def test_weights_scale_the_loss(make_model: Make, make_batch: Make, samples: list[Any]) -> None:
    model = make_model()
    unit = model(make_batch(samples, weight=lambda sample: 1.0)).loss_sum
    double = model(make_batch(samples, weight=lambda sample: 2.0)).loss_sum
    torch.testing.assert_close(2 * unit, double)


def test_only_the_trainable_set_changes(
    make_model: Make, make_batch: Make, make_settings: Make, samples: list[Any]
) -> None:
    """Vision tower and base stay bit for bit the same through an optimiser step."""
    model = make_model().train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    groups = model.trainable_groups()
    params = [value for part in groups.values() for _, value in part]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    model(make_batch(samples)).loss_sum.backward()
    optimizer.step()
    changed = {
        name.removeprefix("native.")
        for name, value in model.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert changed == trainable_names(model.architecture, make_settings().lora, "full")
    assert set(groups) == {"lora", "projector"}
    named = {name for part in groups.values() for name, _ in part}
    assert {f"native.{name}" for name in changed} == named


@pytest.mark.promise(2)
@pytest.mark.parametrize(
    ("train", "parts"),
    [("lora", {"projector"}), ("all", {"projector", "vision"})],
)
def test_text_only_batch_has_the_same_graph(
    make_model: Make, make_batch: Make, samples: list[Any], train: str, parts: set[str]
) -> None:
    """Zero gradients, not absent ones: ranks must agree on what they reduce."""
    model = make_model(train).train()
    _, found = run(model, [make_batch([samples[2]])])
    groups = model.trainable_groups()
    assert found.keys() == {name for part in groups.values() for name, _ in part}
    for part in parts:
        assert all(not found[name].any() for name, _ in groups[part])
    language = "lora" if train == "lora" else "llm"
    assert any(found[name].any() for name, _ in groups[language])


def test_nothing_supervised_gives_zero_and_a_graph(
    make_model: Make, make_batch: Make, make_sample: Make
) -> None:
    model = make_model().train()
    loss, found = run(
        model, [make_batch([make_sample(1, words=9, frames=1, supervised=0, task=0)])]
    )
    assert loss == 0.0
    assert len(found) == sum(len(part) for part in model.trainable_groups().values())
    assert not any(value.any() for value in found.values())


def test_pretraining_reaches_the_vision_tower(
    make_model: Make, make_batch: Make, samples: list[Any]
) -> None:
    model = make_model("all").train()
    _, found = run(model, [make_batch(samples)])
    groups = model.trainable_groups()
    assert set(groups) == {"vision", "projector", "llm"}
    for name, _ in groups["vision"]:
        # A key bias moves all scores of a query alike: its gradient is zero up to rounding.
        assert found[name].abs().max() > 0 or name.endswith("k_proj.bias"), name


def test_nothing_to_train(make_model: Make, make_batch: Make, samples: list[Any]) -> None:
    model = make_model("none")
    assert model.trainable_groups() == {}
    assert not model(make_batch(samples)).loss_sum.requires_grad


def test_unknown_train_mode(make_model: Make) -> None:
    with pytest.raises(ValueError, match=r"train must be lora .* all or none, found 'head'"):
        make_model("head")


def test_frozen_tower_stays_in_eval_mode(make_model: Make) -> None:
    model = make_model().train()
    assert model.native.model.language_model.training
    assert not model.native.model.vision_tower.training
    assert make_model("all").train().native.model.vision_tower.training


def test_features_instead_of_pixels(make_model: Make, make_batch: Make, samples: list[Any]) -> None:
    model = make_model()
    batch = make_batch(samples)
    live = model(batch).loss_sum
    features = model.vision_features(batch.pixels)
    assert not features.requires_grad and features.shape == (6, 4, 128)
    batch.features, batch.pixels = features, None
    assert torch.equal(model(batch).loss_sum, live)
    # Computed clip by clip, as the cache does.
    clips = [sample.pixels for sample in samples if len(sample.pixels)]
    batch.features = torch.cat([model.vision_features(clip) for clip in clips])
    torch.testing.assert_close(batch.features, features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(batch).loss_sum, live, atol=1e-5, rtol=1e-5)


def test_pixel_shuffle_order(make_model: Make) -> None:
    """ps_version v2: a visual token joins a 2 x 2 square of patches, row by row."""
    model = make_model()
    pixels = torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    values = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    patches = model.native.model.vision_tower(values).last_hidden_state[0, 1:].view(4, 4, 32)
    tokens = model.vision_features(pixels)[0]
    for row in range(2):
        for column in range(2):
            square = patches[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(tokens[2 * row + column], square.reshape(-1))


def test_wrong_number_of_context_tokens(
    make_model: Make, make_batch: Make, samples: list[Any]
) -> None:
    model = make_model()
    batch = make_batch(samples)
    batch.pixels = batch.pixels[:-1]
    with pytest.raises(ValueError, match=r"24 image context tokens .* 5 frames give 20 visual"):
        model(batch)
    batch.pixels = None
    with pytest.raises(ValueError, match="but 0 frames give 0 visual tokens; write exactly 4"):
        model(batch)


def test_wrong_frames_and_features(make_model: Make) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"uint8 of shape F, 56, 56, 3, found .*\(1, 64, 64, 3\)"):
        model.vision_features(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"found torch.float32"):
        model.vision_features(torch.zeros(1, 56, 56, 3))
    with pytest.raises(ValueError, match=r"shape F, 4, 128, found \(1, 4, 64\); they belong to"):
        model.embed(torch.full((4,), 96), torch.zeros(1, 4, 64))


def prompts(samples: list[Any]) -> list[tuple[Any, Any]]:
    items: list[tuple[Any, Any]] = []
    for sample in samples:
        visual = sample.pixels.numpy() if len(sample.pixels) else None
        items.append((sample.ids.numpy(), visual))
    return items


def greedy(model: EmoVerse, inputs: dict[str, Tensor], count: int) -> Tensor:
    ids: Tensor = model.native.generate(
        **inputs,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        use_cache=True,
        pad_token_id=2,
    )
    return ids


def test_generation_is_independent_of_the_batch(
    make_model: Make, make_batch: Make, samples: list[Any]
) -> None:
    """Left-padded with a cache = each alone = argmax of the packed forward, token by token."""
    model = make_model()
    items = prompts(samples)
    inputs = model.prepare_generation(items)
    longest = max(len(ids) for ids, _ in items)
    assert inputs["attention_mask"].sum(1).tolist() == [len(ids) for ids, _ in items]
    assert inputs["inputs_embeds"].shape == (5, longest, 64)
    together = greedy(model, inputs, 6)
    alone = torch.cat([greedy(model, model.prepare_generation([item]), 6) for item in items])
    assert torch.equal(together, alone)
    for sample, answer in zip(samples, together, strict=True):
        for token in answer.tolist():
            with torch.no_grad():
                hidden = model.hidden_states(make_batch([sample]))
                logits = model.native.lm_head(hidden[-1])
            # The end token is forbidden by min_new_tokens.
            assert int(logits.index_fill(0, torch.tensor([2]), -1e9).argmax()) == token
            sample.ids = torch.cat((sample.ids, torch.tensor([token])))


def test_generation_from_features(make_model: Make, samples: list[Any]) -> None:
    model = make_model()
    items = prompts(samples)
    live = model.prepare_generation(items)["inputs_embeds"]
    features = [
        (ids, None if visual is None else model.vision_features(torch.from_numpy(visual)).numpy())
        for ids, visual in items
    ]
    cached = model.prepare_generation(features)["inputs_embeds"]
    torch.testing.assert_close(cached, live, atol=1e-5, rtol=1e-5)


def test_read_only_frames(make_model: Make) -> None:
    """Decoders hand over read-only arrays; neither a warning nor a crash."""
    frames = np.zeros((1, 56, 56, 3), dtype=np.uint8)
    frames.setflags(write=False)
    make_model().prepare_generation([([96] * 4, frames)])


def test_native_packing_and_padding_are_safe(make_model: Make, samples: list[Any]) -> None:
    """Calls that bypass EmoVerse.forward get masks: by restarting positions or by padding."""
    model = make_model()
    first, second = samples[2].ids, samples[2].ids.flip(0)
    language = model.native.model.language_model
    with torch.no_grad():
        alone = [language(input_ids=ids[None]).last_hidden_state[0] for ids in (first, second)]
        positions = torch.arange(len(first)).repeat(2)[None]
        both = language(input_ids=torch.cat((first, second))[None], position_ids=positions)
        torch.testing.assert_close(
            both.last_hidden_state[0], torch.cat(alone), atol=1e-5, rtol=1e-5
        )
        padded = torch.cat((torch.full((3,), 5), first))[None]
        mask = torch.cat((torch.zeros(3), torch.ones(len(first))))[None].long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = language(input_ids=padded, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(left.last_hidden_state[0, 3:], alone[0], atol=1e-5, rtol=1e-5)


def test_bf16(
    config_json: dict[str, Any], make_settings: Make, make_batch: Make, samples: list[Any]
) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        native = build_native(config_json, seed=3, dtype=dtype)
        model = compose(native, config_json, make_settings()).train()
        output = model(make_batch(samples))
        output.loss_sum.backward()
        assert output.loss_sum.dtype == torch.float32
        assert {value.dtype for value in model.parameters()} == {dtype}
        losses.append(float(output.loss_sum.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
