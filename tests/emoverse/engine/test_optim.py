"""The optimiser: the schedule's corners, and who decays."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from emoverse.engine.optim import (
    build_optimizer,
    lr_factor,
    parameter_groups,
    set_learning_rate,
    warmup_steps,
)

OPTIM = SimpleNamespace(
    lr_lora=1e-3, lr_projector=2e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8
)


def test_schedule_of_ten_steps() -> None:
    factors = [lr_factor(step, num_steps=10, warmup=3, min_ratio=0.1) for step in range(10)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[3] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 8)))
    assert factors[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))


@given(
    num_steps=st.integers(1, 500),
    share=st.floats(0, 0.99),
    min_ratio=st.floats(0, 1),
)
def test_every_step_learns_and_stays_below_the_peak(
    num_steps: int, share: float, min_ratio: float
) -> None:
    warmup = warmup_steps(share, num_steps)
    factors = [
        lr_factor(step, num_steps=num_steps, warmup=warmup, min_ratio=min_ratio)
        for step in range(num_steps)
    ]
    assert all(0 < factor <= 1 + 1e-12 for factor in factors)
    assert max(factors) == pytest.approx(1)
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert min(factors[warmup:], default=1.0) >= min_ratio


def test_warmup_is_rounded_up() -> None:
    assert [warmup_steps(share, 30) for share in (0.0, 0.01, 0.05, 0.99)] == [0, 1, 2, 30]


def parts() -> dict[str, list[tuple[str, nn.Parameter]]]:
    projector = nn.Linear(2, 3)
    return {
        "projector": list(projector.named_parameters()),
        "lora": [("a", nn.Parameter(torch.ones(2, 2)))],
    }


def test_groups_have_their_rates_and_vectors_do_not_decay() -> None:
    groups = parameter_groups(parts(), OPTIM)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("lora", 1e-3, 0.1),
        ("projector", 2e-4, 0.1),
        ("projector_vectors", 2e-4, 0.0),
    ]
    optimizer = build_optimizer(groups, OPTIM)
    set_learning_rate(optimizer.param_groups, 0.5)
    set_learning_rate(optimizer.param_groups, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [2.5e-4, 5e-5, 5e-5]


def test_the_optimizer_has_the_settings_of_the_stage() -> None:
    """All of them: torch's defaults stand in silently for what is not passed on."""
    unusual = SimpleNamespace(**{**vars(OPTIM), "betas": [0.7, 0.8], "eps": 1e-3})
    for group in build_optimizer(parameter_groups(parts(), unusual), unusual).param_groups:
        assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-3)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing is trainable.*model.projector: full"):
        parameter_groups({}, OPTIM)


def test_a_part_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parts \['vision'\] have no learning rate"):
        parameter_groups({"vision": [("v", nn.Parameter(torch.ones(1)))]}, OPTIM)
