"""Dropout that is replayed, not stored: a mask is a pure function of (seed, stream, row, column).

Random bits: Philox 4x32 with 7 rounds (Salmon et al., SC 2011), counter (row, column // 8, stream,
0), key = the seed. Its four words are cut into eight 16-bit values, low half first; column c has
value c % 8. An element is kept if its value is at least `threshold`. The Triton kernels draw the
same bits, so forward, backward, recomputation, CPU and GPU agree bit for bit.
Legend: T tokens, K input features of a linear layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
LEVELS = 1 << 16
# Counters that a CPU works on at a time, so that the rounds' operands stay in its cache.
CPU_COUNTERS = 1 << 14


class Dropout(NamedTuple):
    """One mask. `p` 0 keeps everything."""

    p: float
    seed: int  # 0 <= seed < 2^63
    stream: int  # distinguishes the masks that share a seed

    @property
    def threshold(self) -> int:
        """Values below are dropped: p in units of 2^-16."""
        return round(self.p * LEVELS)

    @property
    def scale(self) -> float:
        """What kept values are multiplied by: exact for the rounded p."""
        return LEVELS / (LEVELS - self.threshold)


def draw_seed() -> int:
    """A fresh seed from torch's default generator on the CPU; costs no synchronisation.

    Activation checkpointing restores that generator, so a recomputed layer draws its seed again.
    """
    return int(torch.randint(0, 2**62, ()).item())


def keep_mask(dropout: Dropout, rows: int, columns: int, device: torch.device) -> Tensor:
    """True where an element is kept: T, K."""
    groups = -(-columns // 8)
    keep = torch.empty(rows, groups, 8, dtype=torch.bool, device=device)
    block = max(1, CPU_COUNTERS // groups) if device.type == "cpu" else max(1, rows)
    for start in range(0, rows, block):
        keep_block = keep[start : start + block]
        bits = _random_16_bits(dropout, start, len(keep_block), groups, device)
        torch.ge(bits, dropout.threshold, out=keep_block)
    return keep.view(rows, groups * 8)[:, :columns]


def _random_16_bits(
    dropout: Dropout, first_row: int, rows: int, groups: int, device: torch.device
) -> Tensor:
    """Eight values of each counter: rows, groups, 8."""
    shape = (rows, groups)
    c0 = torch.arange(first_row, first_row + rows, device=device).unsqueeze(1).expand(shape)
    c1 = torch.arange(groups, device=device).expand(shape)
    c2 = torch.full(shape, dropout.stream, device=device, dtype=torch.int64)
    c3 = torch.zeros(shape, device=device, dtype=torch.int64)
    key = [dropout.seed & WORD, dropout.seed >> 32 & WORD]
    for _ in range(ROUNDS):
        # int64 holds the bits of a product of two words; only what is multiplied next has to be a
        # clean word, c1 and c3 keep the high half on top.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(key[0]).bitwise_and_(WORD)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(key[1]).bitwise_and_(WORD)
        c1, c3 = product1, product0
        key = [(word + step) & WORD for word, step in zip(key, KEY_STEPS, strict=True)]
    words = torch.empty(rows, groups, 4, dtype=torch.int32, device=device)
    for index, word in enumerate((c0, c1, c2, c3)):
        words[..., index] = word  # the low 32 bits
    # Little-endian: the low half of each word comes first.
    return words.view(torch.uint16).to(torch.int32)
