"""The language-model head and loss at supervised positions only. Exact, plain torch.

A few percent of the tokens are supervised; logits of the others are never computed.
Legend: T packed tokens, D hidden, R supervised rows, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised_cross_entropy(
    hidden_TD: Tensor,
    rows_R: Tensor,
    targets_R: Tensor,
    lm_head: Callable[[Tensor], Tensor],
) -> Tensor:
    """Cross entropy of each supervised row in fp32.

    Args:
        rows_R: positions whose next token is supervised; may be empty, and the graph stays whole.
        targets_R: the ids of those next tokens.
        lm_head: D -> V. Called as a module, because ZeRO-3 gathers weights in module hooks.
    Returns:
        R, differentiable.
    """
    logits_RV = lm_head(hidden_TD.index_select(0, rows_R)).float()
    return F.cross_entropy(logits_RV, targets_R, reduction="none")


def sums_by_group(values_R: Tensor, group_R: Tensor, num_groups: int) -> Tensor:
    """Sum of the values of each group, in fp32, without gradient."""
    sums = torch.zeros(num_groups, device=values_R.device, dtype=torch.float32)
    return sums.index_add_(0, group_R, values_R.detach().float())
