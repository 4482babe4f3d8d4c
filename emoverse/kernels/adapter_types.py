"""What the plain torch and the Triton side of an operation share: its arguments and results.

Legend: T tokens, K input features, N output features, D hidden size, R ranks of all adapters that
read one input.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emoverse.kernels.dropout import Dropout, keep_mask


@dataclass(slots=True)
class LoraInput:
    """The input side of the adapters that share an input; one dropout mask for all of them.

    In plain torch the mask is drawn at its first use and kept as long as this object: during one
    forward or one backward. Triton kernels draw it tile by tile.
    """

    a_RK: Tensor
    scale: float
    dropout: Dropout | None
    _keep_TK: Tensor | None = None

    @property
    def drops(self) -> bool:
        """Does the mask drop anything?"""
        return self.dropout is not None and self.dropout.threshold > 0

    @property
    def kept_scale(self) -> float:
        """The adapters' scale times that of the values which dropout keeps."""
        return self.scale * self.dropout.scale if self.dropout is not None else self.scale

    def keep(self, x_TK: Tensor) -> Tensor:
        """1 or 0 for each element of x, in its type: multiplying by it is much faster than by bool.

        The scale of dropout is part of kept_scale; half precision would round it here.
        """
        assert self.dropout is not None
        if self._keep_TK is None:
            rows, columns = x_TK.shape
            self._keep_TK = keep_mask(self.dropout, rows, columns, x_TK.device).to(x_TK.dtype)
        return self._keep_TK

    def drop(self, x_TK: Tensor) -> Tensor:
        """x with zeros where dropped. Has no gradient of its own: callers replay the mask."""
        return x_TK * self.keep(x_TK) if self.drops else x_TK


class Linears(NamedTuple):
    """Linear layers that share an input; a layer without adapter has None for A and B."""

    weights: tuple[Tensor, ...]  # N, K
    a: tuple[Tensor | None, ...]  # r, K
    b: tuple[Tensor | None, ...]  # N, r

    @property
    def ranks(self) -> tuple[int, ...]:
        """r of each layer; 0 without an adapter."""
        return tuple(0 if a is None else a.shape[0] for a in self.a)

    def lora_input(self, scale: float, dropout: Dropout | None) -> LoraInput | None:
        """All A stacked; None without any adapter."""
        present = [a for a in self.a if a is not None]
        if not present:
            return None
        return LoraInput(present[0] if len(present) == 1 else torch.cat(present), scale, dropout)


class NormOutput(NamedTuple):
    """Results of the norm's forward; `s_TR` is None without adapters."""

    residual_TD: Tensor
    y_TD: Tensor
    rstd_T: Tensor  # fp32 (fp64 for fp64 inputs)
    s_TR: Tensor | None


def wide(x: Tensor) -> Tensor:
    """x in the type to compute in: fp32 for half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def scaled_mm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left right, in one call; with beta 0 the first argument is not read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
