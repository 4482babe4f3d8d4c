"""Attention over packed segments: one function, several backends, no mask of T x T.

In:  queries, keys, values of packed tokens and the boundaries of the segments (cu_seqlens).
Out: the same values as attention run on every segment alone, forward and backward.
Registered in transformers as "emoverse_varlen", so the native classes call it; generation, which
pads and masks instead of packing, takes transformers' own SDPA path of the same name.
Legend: T packed tokens, N query heads, K key/value heads, H head dim, G segments of one group,
L padded length of a group, S slots (all groups' G * L).
"""

import functools
import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "emoverse_varlen"
SETTINGS = ("auto", "sdpa", "flash")
# A segment joins a group while it is at least this share of the group's longest: at most about a
# third of the padded work is wasted, and a packed batch needs two or three calls.
SIMILAR = 0.75

_setting = "auto"


def configure_attention(setting: str) -> None:
    """Choose the backend for this process: auto, sdpa or flash (model.attention in the config).

    Raises:
        ValueError: unknown setting; flash without the flash-attn package.
    """
    global _setting
    if setting not in SETTINGS:
        raise ValueError(f"model.attention must be one of {', '.join(SETTINGS)}, found {setting!r}")
    if setting == "flash" and not _has_flash_attn():
        raise ValueError(
            "model.attention is flash but the package flash-attn is not installed; "
            "install emoverse[flash-attn] or set model.attention: auto"
        )
    _setting = setting


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend used for tensors of this kind: flash_attn, torch_varlen or sdpa."""
    half_on_cuda = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if _setting == "sdpa" or not half_on_cuda:
        return "sdpa"
    return "flash_attn" if _has_flash_attn() else "torch_varlen"


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def varlen_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """Attention inside each segment of a packed row of tokens.

    Args:
        cu_seqlens: int32, number of segments + 1 boundaries from 0 to T.
        max_seqlen: length of the longest segment.
    Returns:
        T, N, H.
    """
    backend = attention_backend(q_TNH.device, q_TNH.dtype)
    if backend == "flash_attn":
        # An extra that most installations lack: imported only where it is used.
        from flash_attn import flash_attn_varlen_func

        out: Tensor = flash_attn_varlen_func(
            *(q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
            causal=causal,
            softmax_scale=scale,
        )
        return out
    if backend == "torch_varlen":
        packed = varlen_attn(
            *(q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
            scale=scale,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=q_TNH.shape[1] != k_TKH.shape[1],
        )
        assert isinstance(packed, Tensor)
        return packed
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == q_TNH.shape[0], (bounds, q_TNH.shape)
    lengths = tuple(end - start for start, end in itertools.pairwise(bounds))
    return _sdpa_varlen(q_TNH, k_TKH, v_TKH, lengths, causal=causal, scale=scale)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Layout:
    """Where each packed token stands when segments of similar length are padded side by side."""

    groups: tuple[tuple[int, int], ...]  # (G, L), longest first
    tokens_S: Tensor  # packed token that fills each slot; padding repeats token 0
    slots_T: Tensor  # slot of each packed token
    padding: Tensor  # the slots that are padding
    masks: tuple[Tensor | None, ...]  # per group G,1,1,L: True = real key; None without padding


@functools.lru_cache(maxsize=16)
def _layout(lengths: tuple[int, ...], device: torch.device) -> _Layout:
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
    return _Layout(
        groups=tuple(shapes),
        tokens_S=tokens_S.to(device),
        slots_T=slots_T.to(device),
        padding=(~real_S).nonzero().squeeze(1).to(device),
        masks=tuple(masks),
    )


class _Pad(torch.autograd.Function):
    """Packed -> padded slots. Both directions are gathers: fast, and the same sums every time."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, layout: _Layout) -> Tensor:
        ctx.layout = layout
        return x_T.index_select(0, layout.tokens_S)

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None]:
        # Padding slots get no gradient: nothing real attends to them or reads their output.
        return grad_S.index_select(0, ctx.layout.slots_T), None


class _Unpad(torch.autograd.Function):
    """Padded slots -> packed."""

    @staticmethod
    def forward(ctx: Any, x_S: Tensor, layout: _Layout) -> Tensor:
        ctx.layout = layout
        return x_S.index_select(0, layout.slots_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        grad_S = grad_T.index_select(0, ctx.layout.tokens_S)
        return grad_S.index_fill_(0, ctx.layout.padding, 0.0), None


def _sdpa_varlen(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    lengths: tuple[int, ...],
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """One SDPA call per group of similar lengths.

    Causal groups need no mask: padding stands behind every real query of its segment.
    """
    repeat = q_TNH.shape[1] // k_TKH.shape[1]
    if repeat > 1:
        # The fused CPU kernel wants equal head counts; enable_gqa would take the slow one.
        k_TKH, v_TKH = (x.repeat_interleave(repeat, dim=1) for x in (k_TKH, v_TKH))
    layout = _layout(lengths, q_TNH.device)
    packed = (q_TNH, k_TKH, v_TKH)
    uniform = len(layout.groups) == 1 and layout.padding.numel() == 0
    slotted = packed if uniform else tuple(_pad(x, layout) for x in packed)
    sizes = [segments * length for segments, length in layout.groups]
    outputs = [
        _sdpa_group(parts, shape, None if causal else mask, causal=causal, scale=scale)
        for parts, shape, mask in zip(
            zip(*(x.split(sizes) for x in slotted), strict=True),
            layout.groups,
            layout.masks,
            strict=True,
        )
    ]
    out_S = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if uniform:
        return out_S
    out_T: Tensor = _Unpad.apply(out_S, layout)
    return out_T


def _pad(x_T: Tensor, layout: _Layout) -> Tensor:
    slots: Tensor = _Pad.apply(x_T, layout)
    return slots


def _sdpa_group(
    parts: Sequence[Tensor],
    shape: tuple[int, int],
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """G * L, N, H in and out."""
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in parts)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; tensors come as 1 or B, heads, tokens, head dim."""
    if cu_seq_lens_q is None:
        # Plain or padded batches: the mask made by sdpa_mask already holds any sliding window.
        out, _ = sdpa_attention_forward(
            *(module, query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
        return out, None
    assert query.shape[0] == 1 and max_length_q is not None and dropout == 0.0
    if sliding_window is not None and max_length_q > sliding_window:
        raise ValueError(
            f"a sample has {max_length_q} tokens but the model's sliding_window is "
            f"{sliding_window}; set data.max_tokens to at most {sliding_window}"
        )
    q_TNH, k_TKH, v_TKH = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out_TNH = varlen_attention(
        *(q_TNH, k_TKH, v_TKH, cu_seq_lens_q, max_length_q),
        causal=bool(getattr(module, "is_causal", True)),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return out_TNH.unsqueeze(0), None


AttentionInterface.register(NAME, _transformers_attention)
# Without a mask function of the same name transformers passes no mask and padding is attended to.
AttentionMaskInterface.register(NAME, sdpa_mask)
