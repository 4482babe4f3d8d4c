"""Anomaly checks: they name the module of a bad value, and change nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emoverse.config.schema import Config
from emoverse.training import train as train_file
from emoverse.training.anomaly import NotFinite, anomaly_checks
from emoverse.training.stage_build import StageSetup


class Root(nn.Module):
    """The square root of the input: its slope at 0 is infinite."""

    def forward(self, values: Tensor) -> dict[str, list[Tensor]]:
        return {"roots": [values.sqrt()], "count": [torch.tensor(len(values))]}


class Toy(nn.Module):
    """A linear layer, then a root of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        self.root = Root()

    def forward(self, values: Tensor) -> Tensor:
        return self.root(self.linear(values))["roots"][0].sum()


def toy(weight: float) -> Toy:
    model = Toy()
    nn.init.constant_(model.linear.weight, weight)
    return model


def test_the_narrowest_module_of_an_output_is_named() -> None:
    model = toy(-1.0)
    with (
        anomaly_checks(model, on=True),
        pytest.raises(NotFinite, match=r"the output of root is not finite in 1 of 3 values; train"),
    ):
        model(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-2.0, 1.0]]))


def test_a_gradient_that_is_infinite_is_named() -> None:
    model = toy(0.0)
    with anomaly_checks(model, on=True):
        loss = model(torch.ones(3, 2))
        assert loss == 0
        with pytest.raises(NotFinite, match="the gradient of the output of linear is not finite"):
            loss.backward()


def test_nothing_is_checked_unless_asked_for_or_afterwards() -> None:
    model = toy(-1.0)
    for on in (False, True):
        with anomaly_checks(model, on=on):
            assert torch.is_anomaly_enabled() == on
        assert not torch.isfinite(model(torch.ones(1, 2)))
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize(
    "knobs", [(), ("train.offload=optimizer",), ("train.zero_stage=3", "train.offload=all")]
)
def test_a_training_with_checks_is_the_same(
    train: Callable[..., list[Any]], tiny_config: Callable[..., Config], knobs: tuple[str, ...]
) -> None:
    plain = tiny_config(*knobs, run="plain")
    checked = tiny_config(*knobs, "train.detect_anomaly=true", run="checked")
    for config in (plain, checked):
        assert train(config) == ["done", "done"]
    first, second = (
        next(config.run.run_dir.glob("stage1/checkpoints/*6/trained.safetensors")).read_bytes()
        for config in (plain, checked)
    )
    assert first == second


def test_a_bad_weight_is_found_in_its_layer(
    train: Callable[..., list[Any]],
    tiny_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = train_file.set_up_stage

    def poisoned(*args: Any, **more: Any) -> StageSetup:
        setup = original(*args, **more)
        names = dict(setup.model.named_parameters())
        name = next(n for n in names if "layers.1." in n and "down_proj" in n and "lora" not in n)
        names[name].data[0, 0] = float("inf")
        return setup

    monkeypatch.setattr(train_file, "set_up_stage", poisoned)
    config = tiny_config("train.detect_anomaly=true")
    with pytest.raises(pytest.fail.Exception, match=r"the output of [\w.]*layers\.1[\w.]* is not"):
        train(config, world_size=1)
