"""Attention over packed segments by torch's SDPA: the backend of CPUs, the last resort of GPUs.

Segments of similar length are padded side by side and go through one call per group.
Legend: T packed tokens, N query heads, K key/value heads, H head dim, G segments of one group,
L padded length of a group, S slots (all groups' G * L).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A segment joins a group while it is at least this share of the group's longest: at most about a
# third of the padded work is wasted, and a packed batch needs two or three calls.
SIMILAR = 0.75


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layout:
    """The slot of each packed token when segments of similar length are padded side by side."""

    groups: tuple[tuple[int, int], ...]  # (G, L), longest first
    tokens_S: Tensor  # packed token that fills each slot; padding repeats token 0
    slots_T: Tensor  # slot of each packed token
    padding: Tensor  # the slots that are padding
    masks: tuple[Tensor | None, ...]  # per group G,1,1,L: True = real key; None without padding


@functools.lru_cache(maxsize=16)
def layout_of(lengths: tuple[int, ...], device: torch.device) -> Layout:
    """Group the segments by length. Asked once per layer for the same batch, hence the cache."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    # Stable: equal lengths keep their order, so equal segments need no gathering at all.
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for segment in order:
        if groups and lengths[segment] >= SIMILAR * lengths[groups[-1][0]]:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    tokens: list[Tensor] = []
    real: list[Tensor] = []
    shapes: list[tuple[int, int]] = []
    masks: list[Tensor | None] = []
    for members in groups:
        longest = lengths[members[0]]
        steps_L = torch.arange(longest)
        first_G = torch.tensor([starts[i] for i in members])
        length_G = torch.tensor([lengths[i] for i in members])
        real_GL = steps_L < length_G[:, None]
        tokens.append(torch.where(real_GL, first_G[:, None] + steps_L, 0).flatten())
        real.append(real_GL.flatten())
        shapes.append((len(members), longest))
        padded = not bool(real_GL.all())
        masks.append(real_GL[:, None, None, :].to(device) if padded else None)
    tokens_S, real_S = torch.cat(tokens), torch.cat(real)
    slots_T = torch.empty(starts[-1], dtype=torch.long)
    slots_T[tokens_S[real_S]] = real_S.nonzero().squeeze(1)
    return Layout(
        groups=tuple(shapes),
        tokens_S=tokens_S.to(device),
        slots_T=slots_T.to(device),
        padding=(~real_S).nonzero().squeeze(1).to(device),
        masks=tuple(masks),
    )


class _Pad(torch.autograd.Function):
    """Packed -> padded slots. Both directions are gathers: fast, and the same sums every time."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x_T.index_select(0, layout.tokens_S)

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None]:
        # Padding slots get no gradient: nothing real attends to them or reads their output.
        return grad_S.index_select(0, ctx.layout.slots_T), None


class _Unpad(torch.autograd.Function):
    """Padded slots -> packed."""

    @staticmethod
    def forward(ctx: Any, x_S: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x_S.index_select(0, layout.slots_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        grad_S = grad_T.index_select(0, ctx.layout.tokens_S)
        return grad_S.index_fill_(0, ctx.layout.padding, 0.0), None


def sdpa_varlen(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    lengths: tuple[int, ...],
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """One SDPA call per group of similar lengths.

    Causal groups need no mask: padding comes after every real query of its segment.
    """
    repeat = q_TNH.shape[1] // k_TKH.shape[1]
    if repeat > 1:
        # The fused CPU kernel wants equal head counts; enable_gqa would take the slow one.
        k_TKH, v_TKH = (x.repeat_interleave(repeat, dim=1) for x in (k_TKH, v_TKH))
    layout = layout_of(lengths, q_TNH.device)
    packed = (q_TNH, k_TKH, v_TKH)
    uniform = len(layout.groups) == 1 and layout.padding.numel() == 0
    slotted = packed if uniform else tuple(_pad(x, layout) for x in packed)
    sizes = [segments * length for segments, length in layout.groups]
    outputs = [
        _sdpa_group(group, shape, None if causal else mask, causal=causal, scale=scale)
        for group, shape, mask in zip(
            zip(*(x.split(sizes) for x in slotted), strict=True),
            layout.groups,
            layout.masks,
            strict=True,
        )
    ]
    out_S = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if uniform:
        return out_S
    out_T: Tensor = _Unpad.apply(out_S, layout)  # type: ignore[no-untyped-call]  # untyped in torch
    return out_T


def _pad(x_T: Tensor, layout: Layout) -> Tensor:
    slots: Tensor = _Pad.apply(x_T, layout)  # type: ignore[no-untyped-call]  # untyped in torch
    return slots


def _sdpa_group(
    group: Sequence[Tensor],
    shape: tuple[int, int],
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """Attention of one group: its q, k and v, each G * L, N, H; the result has the same shape."""
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in group)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)
