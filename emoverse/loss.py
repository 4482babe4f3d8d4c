"""The language-model head and loss at supervised positions only. Exact, plain torch.

A few percent of the tokens are supervised; logits of the others are never computed, and those of
the supervised ones live chunk by chunk. With a frozen head the gradient is made in the forward,
while a chunk's logits are there, so backward neither stores nor recomputes them.
Legend: T packed tokens, D hidden, R supervised rows, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from emoverse.engine import distributed

# Most logits that exist at a time: 256 MB of fp32.
MAX_LOGITS = 1 << 26


def supervised_cross_entropy(
    hidden_TD: Tensor,
    rows_R: Tensor,
    targets_R: Tensor,
    lm_head: nn.Module,
    *,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Cross entropy of each supervised row in fp32.

    Args:
        rows_R: positions whose next token is supervised; may be empty, and the graph stays whole.
        targets_R: the ids of those next tokens.
        lm_head: D -> V, with a `weight` V, D.
        max_logits: logits that may exist at a time; decides the number of rows of a chunk.
    Returns:
        R, differentiable.
    """
    weight: Tensor = lm_head.weight
    # numel() is 0 while ZeRO-3 has the weight partitioned; the first shape is kept aside there.
    vocabulary = getattr(weight, "ds_shape", weight.shape)[0]
    chunk = max(1, max_logits // vocabulary)
    rows_RD = hidden_TD.index_select(0, rows_R)
    plain = type(lm_head) is nn.Linear and lm_head.bias is None
    if plain and not weight.requires_grad and not hasattr(weight, "ds_id"):
        losses: Tensor = _FrozenHead.apply(rows_RD, targets_R, weight, chunk)
        return losses
    chunks = max(1, -(-rows_RD.shape[0] // chunk))
    if hasattr(weight, "ds_id"):
        # Each call gathers the weight from all ranks: all call equally often, some without rows.
        chunks = distributed.largest(chunks, rows_RD.device)
    if chunks == 1:
        return _losses(rows_RD, targets_R, lm_head)
    # A trained head, or one that ZeRO-3 gathers in module hooks: called as a module, and again in
    # backward, so that no more than one chunk of logits is kept.
    parts = (slice(number * chunk, (number + 1) * chunk) for number in range(chunks))
    return torch.cat(
        [
            checkpoint(_losses, rows_RD[part], targets_R[part], lm_head, use_reentrant=False)
            for part in parts
        ]
    )


def _losses(rows_RD: Tensor, targets_R: Tensor, lm_head: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(lm_head(rows_RD).float(), targets_R, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """Losses by row; the gradient of each row's loss is kept and scaled when backward comes."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, targets_R: Tensor, weight_VD: Tensor, chunk: int
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        losses_R = rows_RD.new_empty(rows_RD.shape[0], dtype=torch.float32)
        grad_RD = torch.empty_like(rows_RD) if needs_grad else None
        for start in range(0, rows_RD.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = torch.mm(rows_RD[part], weight_VD.t()).float()
            targets = targets_R[part].unsqueeze(1)
            log_sum = logits.logsumexp(-1, keepdim=True)
            losses_R[part] = (log_sum - logits.gather(1, targets)).squeeze(1)
            if grad_RD is not None:
                # d loss / d logits = softmax - one at the target, in place of the logits.
                probabilities = logits.sub_(log_sum).exp_()
                probabilities.scatter_add_(1, targets, torch.full_like(log_sum, -1.0))
                torch.mm(probabilities.to(weight_VD.dtype), weight_VD, out=grad_RD[part])
        ctx.save_for_backward(grad_RD)
        return losses_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_RD,) = ctx.saved_tensors
        # Not in place: another backward through the same graph must find the same values.
        return grad_RD * grad_R.unsqueeze(1).to(grad_RD.dtype), None, None, None


def sums_by_group(values_R: Tensor, group_R: Tensor, num_groups: int) -> Tensor:
    """Sum of the values of each group, in fp32, without gradient."""
    sums = torch.zeros(num_groups, device=values_R.device, dtype=torch.float32)
    return sums.index_add_(0, group_R, values_R.detach().float())
