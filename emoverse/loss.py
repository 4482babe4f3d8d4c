"""The training loss on one page: from the weight of a token to the number that is minimised.

    loss of a step = sum over all supervised tokens of (weight * cross entropy) / normaliser

1. `token_weights`: the weight of each supervised token of a sample, by `train.loss`. The data
   workers call it (data/collate.py), so the weights travel with the batch.
2. `supervised_cross_entropy`: the cross entropy of each supervised token; logits exist only there.
3. `weighted_loss`: weight * cross entropy, summed over one pack and by task (models/emoverse.py).
4. `rank_normaliser`, `gradient_scale`, `mean_loss`: the division by the sum of the weights of all
   packs of all ranks (training/train.py, engine/deepspeed_engine.py).

The loss therefore depends neither on packing, nor on the number of ranks, nor on accumulation.
Shapes: T packed tokens, D hidden size, R supervised rows, V vocabulary size.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from emoverse.engine import distributed

# 1. Weights ------------------------------------------------------------------------------------

LossMode = Literal["sample", "token", "square"]
# Weight of each of the n supervised tokens of a sample.
TOKEN_WEIGHT: dict[LossMode, Callable[[int], float]] = {
    "sample": lambda n: 1 / n,
    "token": lambda n: 1.0,
    "square": lambda n: 1 / math.sqrt(n),
}


def token_weights(
    supervised_T: NDArray[np.bool_], loss_mode: LossMode
) -> tuple[NDArray[np.float32], float]:
    """Weights of the tokens of one sample, 0 where not supervised, and their exact sum.

    At least one token must be supervised.
    """
    num_supervised = int(np.count_nonzero(supervised_T))
    weight = TOKEN_WEIGHT[loss_mode](num_supervised)
    return np.where(supervised_T, weight, 0.0).astype(np.float32), weight * num_supervised


# 2. Cross entropy ------------------------------------------------------------------------------

# Most logits that exist at the same time: 256 MB of fp32.
MAX_LOGITS = 1 << 26


def supervised_cross_entropy(
    hidden_TD: Tensor,
    rows_R: Tensor,
    targets_R: Tensor,
    lm_head: nn.Module,
    *,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Cross entropy of each supervised row in fp32: R, differentiable.

    A few percent of the tokens are supervised. Logits of the others are never computed, and those
    of the supervised ones are computed chunk by chunk.

    Args:
        rows_R: positions whose next token is supervised; may be empty, the graph stays connected.
        targets_R: the ids of those next tokens.
        lm_head: D -> V, with a `weight` V, D.
        max_logits: logits that may exist at the same time; decides the rows of a chunk.
    """
    weight = lm_head.weight
    assert isinstance(weight, Tensor)
    # ZeRO-3 partitions the weight and keeps its full shape in `ds_shape`.
    partitioned = hasattr(weight, "ds_id")
    vocabulary_size: int = getattr(weight, "ds_shape", weight.shape)[0]
    chunk = max(1, max_logits // vocabulary_size)
    rows_RD = hidden_TD.index_select(0, rows_R)
    plain = type(lm_head) is nn.Linear and lm_head.bias is None
    if plain and not weight.requires_grad and not partitioned:
        losses_R: Tensor = _FrozenHeadCrossEntropy.apply(rows_RD, targets_R, weight, chunk)  # type: ignore[no-untyped-call]  # untyped in torch
        return losses_R
    num_chunks = max(1, -(-rows_RD.shape[0] // chunk))
    if partitioned:
        # Each call gathers the weight from all ranks, so all ranks make equally many calls, some
        # of them without rows.
        num_chunks = distributed.largest(num_chunks, rows_RD.device)
    if num_chunks == 1:
        return _head_cross_entropy(rows_RD, targets_R, lm_head)
    # A trained head, or one that ZeRO-3 gathers in module hooks: called as a module, and again in
    # backward, so that only one chunk of logits is kept.
    chunks = (slice(start, start + chunk) for start in range(0, num_chunks * chunk, chunk))
    return torch.cat(
        [
            checkpoint(_head_cross_entropy, rows_RD[c], targets_R[c], lm_head, use_reentrant=False)
            for c in chunks
        ]
    )


def _head_cross_entropy(rows_RD: Tensor, targets_R: Tensor, lm_head: nn.Module) -> Tensor:
    return F.cross_entropy(lm_head(rows_RD).float(), targets_R, reduction="none")


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """The gradient is computed in forward, from the logits of a chunk; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, targets_R: Tensor, weight_VD: Tensor, chunk: int
    ) -> Tensor:
        losses_R = rows_RD.new_empty(rows_RD.shape[0], dtype=torch.float32)
        grad_RD = torch.empty_like(rows_RD) if ctx.needs_input_grad[0] else None
        for start in range(0, rows_RD.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = torch.mm(rows_RD[rows], weight_VD.t()).float()
            targets = targets_R[rows].unsqueeze(1)
            log_sum = logits.logsumexp(-1, keepdim=True)
            losses_R[rows] = (log_sum - logits.gather(1, targets)).squeeze(1)
            if grad_RD is not None:
                # d loss / d logits = softmax - one at the target; overwrites the logits.
                probabilities = logits.sub_(log_sum).exp_()
                probabilities.scatter_add_(1, targets, torch.full_like(log_sum, -1.0))
                torch.mm(probabilities.to(weight_VD.dtype), weight_VD, out=grad_RD[rows])
        ctx.save_for_backward(grad_RD)
        return losses_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_RD,) = ctx.saved_tensors
        # Not in place: a second backward through the same graph must read the same values.
        return grad_RD * grad_R.unsqueeze(1).to(grad_RD.dtype), None, None, None


# 3. One pack -----------------------------------------------------------------------------------


class StepOutput(NamedTuple):
    """The loss of one pack. A tuple, because DeepSpeed looks for tensors in tuples only."""

    loss_sum: Tensor  # sum of weight * cross entropy, fp32, differentiable
    task_loss: Tensor  # the same by task, detached, in the order of TASKS
    task_weight: Tensor  # sum of weights by task
    task_tokens: Tensor  # supervised tokens by task


def weighted_loss(
    losses_R: Tensor, weights_R: Tensor, task_of_row: Tensor, num_tasks: int
) -> StepOutput:
    """weight * cross entropy of the supervised rows, summed and by task."""
    weighted_R = losses_R * weights_R
    return StepOutput(
        loss_sum=weighted_R.sum(),
        task_loss=sums_by_task(weighted_R, task_of_row, num_tasks),
        task_weight=sums_by_task(weights_R, task_of_row, num_tasks),
        task_tokens=sums_by_task(torch.ones_like(losses_R), task_of_row, num_tasks),
    )


def sums_by_task(values_R: Tensor, task_of_row: Tensor, num_tasks: int) -> Tensor:
    """Sum of the values of each task, in fp32, without gradient."""
    sums = torch.zeros(num_tasks, device=values_R.device, dtype=torch.float32)
    return sums.index_add_(0, task_of_row, values_R.detach().float())


# 4. One step -----------------------------------------------------------------------------------


class Weighted(Protocol):
    """A pack that carries the sum of the weights of its samples."""

    @property
    def normaliser(self) -> float: ...


def rank_normaliser(packs: Iterable[Weighted]) -> float:
    """Sum of the weights of one rank's samples; the step's normaliser sums it over all ranks."""
    return sum(pack.normaliser for pack in packs)


def gradient_scale(normaliser: float, world_size: int) -> float:
    """Factor of each pack's loss_sum before backward: ZeRO averages over ranks, we want the sum."""
    return world_size / normaliser


def mean_loss(task_loss: Sequence[float], normaliser: float) -> float:
    """Loss of a step from the sums by task of all ranks."""
    return sum(task_loss) / normaliser
