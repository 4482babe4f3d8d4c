"""Lean layers train what transformers + PEFT train: values, gradients, files, generation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from emoverse.kernels import attention
from emoverse.kernels import layer as layer_functions
from emoverse.kernels.backend import configure_kernels, has_triton, is_interpreted
from emoverse.models.adapters import load_adapter, merge_adapters, save_adapter
from emoverse.models.emoverse import EmoVerse, compose
from emoverse.models.internvl.checkpoint import build_native
from emoverse.models.lean_layers import is_lean

Make = Callable[..., Any]


def twins(config_json: dict[str, Any], make_settings: Make, **changes: Any) -> list[EmoVerse]:
    """The same random model, lean and plain."""
    dtype = changes.pop("dtype", torch.float32)
    models = []
    for lean in ("on", "off"):
        settings = make_settings(**changes)
        settings.lean = lean
        native = build_native(config_json, seed=3)
        for value in native.parameters():  # the rotary tables stay fp32, as in a loaded model
            value.data = value.data.to(dtype)
        model = compose(native, config_json, settings, seed=4).train()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for value in model.parameters():
                noise = torch.randn(value.shape, generator=generator) * 0.08
                value.add_(noise.to(dtype))
        assert is_lean(model.native.model.language_model) == (lean == "on")
        models.append(model)
    return models


def run(model: EmoVerse, batch: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(batch).loss_sum
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    """Each tensor within `bound` of its norm."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = float((found[name] - value).norm() / value.norm())
        assert error < bound, (name, error)


@pytest.mark.parametrize("r", [4, 8, 16])
def test_equals_transformers_and_peft(
    config_json: dict[str, Any], make_settings: Make, make_batch: Make, samples: list[Any], r: int
) -> None:
    lean, plain = twins(config_json, make_settings, r=r, dtype=torch.float64)
    batch = make_batch(samples)
    loss, grads = run(lean, batch)
    expected, wanted = run(plain, batch)
    # Loss, cos and sin are fp32 on both sides, and transformers' norms compute in fp32.
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same(grads, wanted, 1e-5)


@pytest.mark.parametrize("target", ["attention", "mlp", "nothing of qkv"])
def test_layers_without_adapters(
    family: str,
    config_json: dict[str, Any],
    make_settings: Make,
    make_batch: Make,
    samples: list[Any],
    target: str,
) -> None:
    fused = family == "phi3"
    names = {
        "attention": ("qkv_proj",) if fused else ("q_proj", "v_proj"),
        "mlp": ("gate_up_proj",) if fused else ("up_proj",),
        "nothing of qkv": ("o_proj", "down_proj"),
    }[target]
    lean, plain = twins(config_json, make_settings, preset="custom", targets=names)
    batch = make_batch(samples)
    loss, grads = run(lean, batch)
    expected, wanted = run(plain, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same(grads, wanted, 1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.008)])
def test_half_precision_is_no_worse_than_transformers(
    config_json: dict[str, Any],
    make_settings: Make,
    make_batch: Make,
    samples: list[Any],
    dtype: torch.dtype,
    bound: float,
) -> None:
    """Error against float64 of all adapter gradients together, the mean over three batches."""
    exact = twins(config_json, make_settings, dtype=torch.float64)[1]
    halves = twins(config_json, make_settings, dtype=dtype)
    errors = [0.0, 0.0]
    for part in (samples, samples[:3], samples[2:]):
        batch = make_batch(part)
        wanted = {n: g for n, g in run(exact, batch)[1].items() if ".lora_" in n}
        right = torch.cat([g.flatten() for g in wanted.values()])
        for place, model in enumerate(halves):
            grads = run(model, batch)[1]
            found = torch.cat([grads[name].double().flatten() for name in wanted])
            errors[place] += float((found - right).norm() / right.norm()) / 3
    lean, plain = errors
    assert lean < 1.4 * plain and lean < bound, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_losses_add_up(
    config_json: dict[str, Any],
    make_settings: Make,
    make_batch: Make,
    samples: list[Any],
    dtype: torch.dtype,
) -> None:
    """Loss scaling, as fp16 needs it, and accumulation over two packs: the sum of the gradients."""
    lean, _ = twins(config_json, make_settings, dtype=dtype)
    batches = [make_batch(samples[:3]), make_batch(samples[3:])]
    first, second = (run(lean, batch)[1] for batch in batches)
    lean.zero_grad()
    for batch in batches:
        (lean(batch).loss_sum * 256).backward()
    found = {n: p.grad / 256 for n, p in lean.named_parameters() if p.grad is not None}
    assert_same(found, {name: grad + second[name] for name, grad in first.items()}, 0.02)


def test_what_runs_is_said(config_json: dict[str, Any], make_settings: Make) -> None:
    lean, plain = twins(config_json, make_settings)
    assert lean.implementations == "attention sdpa, lean layers, kernels eager"
    assert plain.implementations == "attention sdpa, transformers' layers, kernels eager"


def test_names_are_those_of_the_plain_model(
    config_json: dict[str, Any], make_settings: Make
) -> None:
    lean, plain = twins(config_json, make_settings)
    assert list(lean.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in lean.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_dropout_is_replayed(
    config_json: dict[str, Any], make_settings: Make, make_batch: Make, samples: list[Any]
) -> None:
    """The same seed gives the same gradient, and the gradient is that of the loss with its mask."""
    lean, _ = twins(config_json, make_settings, dropout=0.3, dtype=torch.float64)
    batch = make_batch(samples)

    def seeded(seed: int) -> tuple[float, dict[str, Tensor]]:
        torch.manual_seed(seed)
        return run(lean, batch)

    loss, grads = seeded(1)
    again, same = seeded(1)
    other, _ = seeded(2)
    assert loss == again and loss != other
    assert all(torch.equal(grads[name], same[name]) for name in grads)
    layers = lean.native.model.language_model.layers
    names = [n for n, _ in layers[0].named_parameters() if ".lora_A." in n]
    for name in names:
        value = layers[0].get_parameter(name)
        full = next(key for key in grads if key.endswith(f"layers.0.{name}"))
        direction = grads[full] / grads[full].norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                value.add_(direction, alpha=sign * 1e-3)
                torch.manual_seed(1)
                ends.append(float(lean(batch).loss_sum))
                value.sub_(direction, alpha=sign * 1e-3)
        slope = (ends[0] - ends[1]) / 2e-3
        assert slope == pytest.approx(float(grads[full].norm()), rel=1e-2, abs=1e-3)


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@pytest.mark.skipif(not is_interpreted(), reason="this model is on the CPU")
def test_triton_layers_equal_those_in_plain_torch(
    config_json: dict[str, Any], make_settings: Make, make_batch: Make, samples: list[Any]
) -> None:
    """With dropout: the masks are the same bits."""
    lean, _ = twins(config_json, make_settings, dropout=0.1)
    batch = make_batch(samples[:2])
    found = []
    try:
        for backend in ("eager", "triton"):
            configure_kernels(backend)
            torch.manual_seed(3)
            found.append(run(lean, batch))
    finally:
        configure_kernels("auto")
    (loss, grads), (other, same) = found
    assert other == pytest.approx(loss, rel=1e-6)
    assert_same(same, grads, 1e-5)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_a_layer_never_waits_for_the_device(
    config_json: dict[str, Any],
    make_settings: Make,
    monkeypatch: pytest.MonkeyPatch,
    kernels: str,
) -> None:
    """Tensors on meta have no values: host code that reads one, as .item() does, would raise."""
    if kernels == "triton" and not (has_triton() and is_interpreted()):
        pytest.skip("counts launches of Triton's interpreter")
    lean, _ = twins(config_json, make_settings, dropout=0.1)
    layer = lean.native.model.language_model.layers[0].to("meta")
    config, tokens = layer.self_attn.config, 9
    head_dim = config.hidden_size // config.num_attention_heads
    monkeypatch.setattr(attention, "attention_backend", lambda *_: "torch_varlen")
    launched: list[str] = []
    if kernels == "triton":
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(
            GridExecutor, "__call__", lambda self, *args, **kw: launched.append(self.fn.__name__)
        )
        configure_kernels("triton")
    try:
        x = torch.empty(1, tokens, config.hidden_size, device="meta", requires_grad=True)
        angles = torch.empty(1, tokens, head_dim, device="meta")
        borders = torch.empty(3, dtype=torch.int32, device="meta")
        out = layer(x, position_embeddings=(angles, angles), cu_seq_lens_q=borders, max_length_q=5)
        out.sum().backward()
    finally:
        configure_kernels("auto")
    assert x.grad is not None and out.shape == x.shape
    assert (len(launched) > 0) == (kernels == "triton")


def test_dropout_ends_with_training(
    config_json: dict[str, Any], make_settings: Make, make_batch: Make, samples: list[Any]
) -> None:
    lean, plain = (model.eval() for model in twins(config_json, make_settings, dropout=0.5))
    batch = make_batch(samples)
    losses = [float(model(batch).loss_sum.detach()) for model in (lean, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_nothing(
    config_json: dict[str, Any],
    make_settings: Make,
    make_batch: Make,
    samples: list[Any],
    dropout: float,
) -> None:
    lean, _ = twins(config_json, make_settings, dropout=dropout)
    batch = make_batch(samples)
    torch.manual_seed(0)
    loss, grads = run(lean, batch)
    for module in lean.native.model.language_model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = lambda function, *args, **kwargs: (
                torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
            )
    torch.manual_seed(0)
    checkpointed, same = run(lean, batch)
    assert checkpointed == loss
    assert all(torch.equal(grads[name], same[name]) for name in grads)


def test_adapter_files_and_merge(
    config_json: dict[str, Any],
    make_settings: Make,
    make_batch: Make,
    samples: list[Any],
    tmp_path: Any,
) -> None:
    """Files of a lean model load into a plain one; merged, both answer alike."""
    lean, plain = twins(config_json, make_settings)
    with torch.no_grad():
        for name, value in lean.named_parameters():
            if ".lora_" in name:
                value.mul_(1.5)
    save_adapter(lean.native, tmp_path, base="tiny")
    load_adapter(plain.native, tmp_path)
    batch = make_batch(samples)
    with torch.no_grad():
        adapted = [float(model(batch).loss_sum) for model in (lean, plain)]
        for model in (lean, plain):
            merge_adapters(model.native)
        merged = [float(model(batch).loss_sum) for model in (lean, plain)]
    assert adapted[0] == pytest.approx(adapted[1], rel=1e-5)
    assert merged == pytest.approx([adapted[0]] * 2, rel=1e-4)


def test_generation_takes_transformers_path(
    config_json: dict[str, Any],
    make_settings: Make,
    samples: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lean, plain = (model.eval() for model in twins(config_json, make_settings))
    monkeypatch.setattr(layer_functions._BeforeAttention, "forward", None)
    items = [(sample.ids, sample.pixels if len(sample.pixels) else None) for sample in samples]
    answers = []
    for model in (lean, plain):
        inputs = model.prepare_generation(items)
        answers.append(model.native.generate(**inputs, max_new_tokens=6, do_sample=False))
    assert torch.equal(*answers)


def test_second_derivatives_are_refused(
    config_json: dict[str, Any], make_settings: Make, make_batch: Make, samples: list[Any]
) -> None:
    lean, _ = twins(config_json, make_settings)
    value = next(p for n, p in lean.named_parameters() if ".lora_A." in n)
    loss = lean(make_batch(samples)).loss_sum
    (grad,) = torch.autograd.grad(loss, value, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_lean_layers_cannot_train(make_tiny: Make, make_settings: Make) -> None:
    def build(lean: str, train: str = "lora", **llm: Any) -> EmoVerse:
        config = make_tiny("phi3")
        settings = make_settings()
        settings.lean = lean
        native = build_native(config, seed=3)
        for key, value in llm.items():
            setattr(native.config.text_config, key, value)
        return compose(native, config, settings, train=train)

    with pytest.raises(ValueError, match=r"model\.lean must be one of auto, on, off, found 'yes'"):
        build("yes")
    with pytest.raises(ValueError, match=r"model\.lean is on, but the activation is gelu; set"):
        build("on", hidden_act="gelu")
    with pytest.raises(ValueError, match=r"the model has dropout of its own \(\[0\.1, 0\.0\]\)"):
        build("on", attention_dropout=0.1)
    assert not is_lean(build("auto", hidden_act="gelu").native.model.language_model)
    assert is_lean(build("auto").native.model.language_model)
    assert not is_lean(build("auto", train="all").native.model.language_model)
