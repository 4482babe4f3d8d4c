"""What the Triton kernels share: replayed dropout, launch helpers, the interpreter's limits.

Kernels load, compute in fp32 and cast when they store; only products of matrices see half
precision. In the interpreter bf16 arithmetic is silently wrong, so there products use fp32 too.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emoverse.kernels.dropout import ROUNDS, Dropout

# Fuse multiply and add. Set explicitly, because Triton's default is about to change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Read at import, as triton.jit itself does.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALLEST_DOT = 16  # tensor cores take no narrower tiles; ranks are padded to it
PHILOX_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def keep_tile(
    seed, stream_id, row, column, threshold, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Which elements of a tile are kept; `column` is a multiple of 8. See dropout.py."""
    groups: tl.constexpr = BLOCK_K // 8
    zero = tl.zeros([BLOCK_T, groups], tl.int32)
    rows = zero + (row + tl.arange(0, BLOCK_T))[:, None]
    columns = zero + (column // 8 + tl.arange(0, groups))[None, :]
    a, b, c, d = tl.philox(seed, rows, columns, zero + stream_id, zero, PHILOX_ROUNDS)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    halves = tl.interleave(words & 0xFFFF, words >> 16)
    return halves.to(tl.int32) >= threshold


@triton.jit
def dropped(
    x,
    seed,
    stream_id,
    row,
    column,
    threshold,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The kept values of a tile, the others 0; their scale is part of the adapters'."""
    keep = keep_tile(seed, stream_id, row, column, threshold, BLOCK_T, BLOCK_K)
    return tl.where(keep, x, 0.0)


def dropout_arguments(dropout: Dropout | None) -> dict[str, Any]:
    """The arguments of every kernel that replays a mask."""
    if dropout is None or dropout.threshold == 0:
        return {"seed": 0, "stream_id": 0, "threshold": 0, "DROPOUT": False}
    return {
        "seed": dropout.seed,
        "stream_id": dropout.stream,
        "threshold": dropout.threshold,
        "DROPOUT": True,
    }


def padded_rank(rank: int) -> int:
    """Columns of a tile that holds S."""
    tile: int = max(SMALLEST_DOT, triton.next_power_of_2(rank))
    return tile


def upcast(x: Tensor) -> bool:
    """Must tiles be fp32 in products of matrices?"""
    return INTERPRETED and x.dtype == torch.bfloat16
