"""Reference implementations: every operation of this package in a few lines of plain torch.

Slow, differentiable by autograd, computed in the type of the inputs. Tests compare forward and
backward of every implementation with these, mostly in float64.
Legend: T tokens, N heads, K key/value heads or input features, H head dim, D hidden size, R rank,
V vocabulary size, F MLP width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 0xFFFFFFFF


def attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    lengths: Sequence[int],
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """Softmax attention, segment by segment; query head n reads key/value head n // (N / K)."""
    repeat = q_TNH.shape[1] // k_TKH.shape[1]
    outputs = []
    for q, k, v in zip(*(x.split(list(lengths)) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k) * scale
        if causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        outputs.append(torch.einsum("nqk,knh->qnh", scores.softmax(-1), v))
    return torch.cat(outputs)


def cross_entropy(hidden_TD: Tensor, labels_T: Tensor, weight_VD: Tensor) -> Tensor:
    """Loss of row t for the label of row t + 1, from all logits; 0 where the label is -100."""
    logits_TV = hidden_TD[:-1] @ weight_VD.T
    return F.cross_entropy(logits_TV, labels_T[1:], reduction="none", ignore_index=-100)


def lora_linear(
    x_TK: Tensor, weight_NK: Tensor, a_RK: Tensor, b_NR: Tensor, scale: float, keep_TK: Tensor
) -> Tensor:
    """x W^T + scale (drop(x) A^T) B^T; `keep_TK` holds 0 or 1 / (1 - p)."""
    return x_TK @ weight_NK.T + scale * ((x_TK * keep_TK) @ a_RK.T) @ b_NR.T


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / root of the mean square."""
    return weight_D * x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)


def rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotates the halves (a, b) of every head to (a cos - b sin, b cos + a sin)."""
    a, b = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos_TH[:, None] + torch.cat((-b, a), dim=-1) * sin_TH[:, None]


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """silu(gate) * up, gate and up side by side."""
    gate, up = gate_up_TF2.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def philox_16_bits(seed: int, stream: int, row: int, column: int, rounds: int = 7) -> int:
    """The 16 random bits of one element of a dropout mask (see dropout.py), in Python integers."""
    c = [row, column // 8, stream, 0]
    k = [seed & WORD, seed >> 32]
    for _ in range(rounds):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [right >> 32 ^ c[1] ^ k[0], right & WORD, left >> 32 ^ c[3] ^ k[1], left & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    word = c[column % 8 // 2]
    return word >> 16 if column % 2 else word & 0xFFFF
