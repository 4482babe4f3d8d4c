"""Weights and normaliser; the cross entropy at supervised rows equals that of all logits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emoverse.kernels import reference
from emoverse.loss import (
    LossMode,
    gradient_scale,
    mean_loss,
    rank_normaliser,
    sums_by_task,
    supervised_cross_entropy,
    token_weights,
)


@pytest.mark.parametrize(("mode", "weight"), [("sample", 0.25), ("token", 1.0), ("square", 0.5)])
def test_token_weights(mode: LossMode, weight: float) -> None:
    supervised_T = np.array([False, True, True, False, True, True])
    weights_T, total = token_weights(supervised_T, mode)
    assert weights_T.dtype == np.float32
    assert weights_T.tolist() == [0.0, weight, weight, 0.0, weight, weight]
    assert total == 4 * weight


def test_the_mean_over_ranks_is_the_loss_of_the_step() -> None:
    """Two ranks with other weights: the mean of the scaled sums is the sum over the normaliser."""
    loss_sums, ranks = (6.0, 2.0), ((1.0, 2.0), (1.0,))
    packs = [[SimpleNamespace(normaliser=weight) for weight in weights] for weights in ranks]
    normaliser = sum(map(rank_normaliser, packs))
    scaled = [loss * gradient_scale(normaliser, len(ranks)) for loss in loss_sums]
    assert sum(scaled) / len(ranks) == mean_loss(loss_sums, normaliser) == 2.0


def test_equals_the_full_head() -> None:
    torch.manual_seed(0)
    hidden_TD = torch.randn(23, 12, dtype=torch.float64, requires_grad=True)
    # The function's logits are fp32; a float64 copy of the same weights bounds the difference.
    lm_head = nn.Linear(12, 31, bias=False).double()
    labels = torch.full((23,), -100)
    labels[[4, 5, 11, 22]] = torch.tensor([1, 30, 7, 7])
    weights = torch.rand(23)
    full = F.cross_entropy(lm_head(hidden_TD)[:-1], labels[1:], reduction="none")
    expected = (full * weights[1:]).sum()
    wanted = torch.autograd.grad(expected, (hidden_TD, lm_head.weight))
    rows = (labels[1:] != -100).nonzero().squeeze(1)
    losses = supervised_cross_entropy(hidden_TD, rows, labels[rows + 1], lm_head)
    assert losses.dtype == torch.float32
    ours = (losses * weights[rows + 1]).sum()
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-6)
    found = torch.autograd.grad(ours, (hidden_TD, lm_head.weight))
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_logits", [31, 70, 10_000])
def test_chunks_of_a_frozen_head(dtype: torch.dtype, max_logits: int) -> None:
    """Rows one by one, in twos and all at once; the gradient is weighted afterwards."""
    torch.manual_seed(0)
    exact_TD = torch.randn(23, 12, dtype=torch.float64).to(dtype).double().requires_grad_()
    hidden_TD = exact_TD.detach().to(dtype).requires_grad_()
    lm_head = nn.Linear(12, 31, bias=False).to(dtype).requires_grad_(False)
    labels = torch.full((23,), -100)
    labels[[4, 5, 11, 12, 22]] = torch.tensor([1, 30, 7, 7, 0])
    weights = torch.rand(22)
    expected = reference.cross_entropy(exact_TD, labels, lm_head.weight.double()) * weights
    (wanted,) = torch.autograd.grad(expected.sum(), exact_TD)
    rows = (labels[1:] != -100).nonzero().squeeze(1)
    losses = supervised_cross_entropy(
        hidden_TD, rows, labels[rows + 1], lm_head, max_logits=max_logits
    )
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(losses.double(), expected[rows] / weights[rows], atol=0, rtol=bound)
    (found,) = torch.autograd.grad((losses * weights[rows]).sum(), hidden_TD)
    assert found.dtype == dtype
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < bound


def test_chunks_of_a_trained_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of one chunk at a time, made again in backward."""
    torch.manual_seed(0)
    lm_head = nn.Linear(8, 20, bias=False)
    hidden_TD = torch.randn(9, 8, requires_grad=True)
    rows, targets = torch.arange(9), torch.randint(20, (9,))
    calls: list[int] = []
    lm_head.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    grads = []
    for max_logits in (1000, 60):
        loss = supervised_cross_entropy(hidden_TD, rows, targets, lm_head, max_logits=max_logits)
        grads.append(torch.autograd.grad(loss.sum(), (hidden_TD, lm_head.weight)))
    assert calls == [9, 3, 3, 3, 3, 3, 3]
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_no_rows_keep_the_graph(trained: bool) -> None:
    hidden_TD = torch.randn(5, 4, requires_grad=True)
    lm_head = nn.Linear(4, 7, bias=False).requires_grad_(trained)
    none = torch.zeros(0, dtype=torch.long)
    loss = supervised_cross_entropy(hidden_TD, none, none, lm_head).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert hidden_TD.grad is not None and not hidden_TD.grad.any()
    if trained:
        assert lm_head.weight.grad is not None and not lm_head.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_by_task(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=dtype, requires_grad=True)
    sums = sums_by_task(values, torch.tensor([0, 2, 2, 0]), 4)
    assert sums.dtype == torch.float32 and not sums.requires_grad
    assert sums.tolist() == [9.0, 0.0, 6.0, 0.0]
