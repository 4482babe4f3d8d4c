"""Attention over packed segments: one function, several backends, no mask of T x T.

In:  queries, keys, values of packed tokens and the boundaries of the segments (cu_seqlens).
Out: the same values as attention run on every segment alone, forward and backward.
Registered in transformers as "emoverse_varlen", so the native classes call it, language model and
vision tower alike; generation, which pads and masks instead of packing, takes transformers' SDPA.
Legend: B rows of a dense batch, T packed tokens, N query heads, K key/value heads, H head dim.
"""

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from emoverse.kernels.attention_sdpa import sdpa_varlen
from emoverse.kernels.backend import has_triton, is_interpreted

NAME = "emoverse_varlen"
SETTINGS = ("auto", "flash", "torch", "triton", "sdpa")

# Before 2.13 torch grouped heads without an argument.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
_setting = "auto"


def configure_attention(setting: str) -> None:
    """Choose the backend for this process (model.attention in the config).

    auto takes the first that works: the flash-attn package, torch's own varlen attention, Triton,
    SDPA by segments.

    Raises:
        ValueError: unknown setting; flash or triton without the package.
    """
    global _setting
    if setting not in SETTINGS:
        raise ValueError(f"model.attention must be one of {', '.join(SETTINGS)}, found {setting!r}")
    if setting == "flash" and _flash_attn() is None:
        raise ValueError(
            "model.attention is flash but flash_attn.flash_attn_varlen_func cannot be imported "
            "(the package flash-attn is missing, or was built for another torch); "
            "install emoverse[flash-attn] or set model.attention: auto"
        )
    if setting == "triton" and not has_triton():
        raise ValueError(
            "model.attention is triton but the package triton is not installed; "
            "pip install triton, or set model.attention: auto"
        )
    _setting = setting
    attention_backend.cache_clear()


@functools.cache
def attention_backend(device_type: str, dtype: torch.dtype) -> str:
    """Backend of tensors of this device and type: flash_attn, torch_varlen, triton or sdpa.

    Decided once per setting. The other kernels take only half precision on CUDA, so everything else
    runs on `sdpa`, whatever is set; `triton` set by name also runs in its interpreter.
    """
    if _setting == "triton" and (device_type == "cuda" or is_interpreted()):
        return "triton"
    half_on_cuda = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if _setting == "sdpa" or not half_on_cuda:
        return "sdpa"
    if _setting == "flash" or (_setting == "auto" and _is_ampere() and _flash_attn() is not None):
        return "flash_attn"
    if _setting == "torch" or (_is_ampere() and torch.backends.cuda.is_flash_attention_available()):
        return "torch_varlen"
    return "triton" if has_triton() else "sdpa"


@functools.cache
def _flash_attn() -> Callable[..., Tensor] | None:
    """The function of the optional package; None where it is missing or does not load.

    A folder of that name is not enough: that of FlashAttention-4 lacks this function, and a wheel
    for another torch fails when it is imported.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    function: Callable[..., Tensor] = flash_attn_varlen_func
    return function


@functools.cache
def _is_ampere() -> bool:
    """FlashAttention-2 is built for compute capability 8.0 and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


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
    """Attention inside each segment of a packed row of tokens. No synchronisation with the host.

    Args:
        cu_seqlens: int32, number of segments + 1 boundaries from 0 to T.
        max_seqlen: length of the longest segment.
    Returns:
        T, N, H.
    """
    backend = attention_backend(q_TNH.device.type, q_TNH.dtype)
    if backend == "flash_attn":
        flash_attn_varlen_func = _flash_attn()
        assert flash_attn_varlen_func is not None
        return flash_attn_varlen_func(
            *(q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
            causal=causal,
            softmax_scale=scale,
        )
    if backend == "torch_varlen":
        packed = varlen_attn(
            *(q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
            scale=scale,
            window_size=(-1, 0) if causal else (-1, -1),
            **(_GROUPED if q_TNH.shape[1] != k_TKH.shape[1] else {}),
        )
        assert isinstance(packed, Tensor)
        return packed
    if backend == "triton":
        # Triton is missing on many machines without a GPU: loaded only where it runs.
        from emoverse.kernels.triton_ops.attention import triton_varlen

        return triton_varlen(
            *(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen), causal=causal, scale=scale
        )
    lengths = _lengths_of(cu_seqlens)
    assert sum(lengths) == q_TNH.shape[0], (lengths, q_TNH.shape)
    return sdpa_varlen(q_TNH, k_TKH, v_TKH, lengths, causal=causal, scale=scale)


_last_lengths: tuple[weakref.ref[Tensor], tuple[int, ...]] | None = None


def _lengths_of(cu_seqlens: Tensor) -> tuple[int, ...]:
    """Segment lengths as Python numbers; read once per batch, not once per layer."""
    global _last_lengths
    if _last_lengths is None or _last_lengths[0]() is not cu_seqlens:
        bounds = cu_seqlens.tolist()
        assert bounds[0] == 0, bounds
        lengths = tuple(end - start for start, end in itertools.pairwise(bounds))
        _last_lengths = (weakref.ref(cu_seqlens), lengths)
    return _last_lengths[1]


@functools.lru_cache(maxsize=16)
def _equal_borders(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)


def dense_attention(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, scale: float) -> Tensor:
    """Full attention inside each row of a batch without padding, as the vision tower needs it.

    Returns:
        B, T, N, H.
    """
    rows, _, length, _ = q_BNTH.shape
    if attention_backend(q_BNTH.device.type, q_BNTH.dtype) == "sdpa":
        out = torch.nn.functional.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, scale=scale)
        return out.transpose(1, 2)
    q_TNH, k_TKH, v_TKH = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNTH, k_BKTH, v_BKTH))
    borders = _equal_borders(rows, length, q_BNTH.device)
    out_TNH = varlen_attention(q_TNH, k_TKH, v_TKH, borders, length, causal=False, scale=scale)
    out_BTNH: Tensor = out_TNH.unflatten(0, (rows, length))
    return out_BTNH


def check_window(max_seqlen: int, sliding_window: int | None) -> None:
    """Raises ValueError: a segment longer than the model's sliding window, which is not applied."""
    if sliding_window is not None and max_seqlen > sliding_window:
        raise ValueError(
            f"a sample has {max_seqlen} tokens but the model's sliding_window is "
            f"{sliding_window}; set data.max_tokens to at most {sliding_window}"
        )


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True))
    if cu_seq_lens_q is None and attention_mask is None and not causal and dropout == 0.0:
        return dense_attention(query, key, value, scale), None
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
    check_window(max_length_q, sliding_window)
    q_TNH, k_TKH, v_TKH = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out_TNH = varlen_attention(
        *(q_TNH, k_TKH, v_TKH, cu_seq_lens_q, max_length_q),
        causal=causal,
        scale=scale,
    )
    return out_TNH.unsqueeze(0), None


AttentionInterface.register(NAME, _transformers_attention)
# Without a mask function of the same name transformers passes no mask and padding is attended to.
AttentionMaskInterface.register(NAME, sdpa_mask)
