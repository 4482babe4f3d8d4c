"""Packed attention equals attention of each segment alone, forward and backward."""

import itertools
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emoverse.kernels import attention, reference
from emoverse.kernels.attention import (
    attention_backend,
    configure_attention,
    varlen_attention,
)
from emoverse.kernels.attention_sdpa import layout_of
from emoverse.kernels.backend import has_triton

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


# Relative to the norm of the float64 reference; half precision rounds the weights and the output.
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def check(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    causal: bool,
    *,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> None:
    """Output and the three gradients of the backend in force; q, k and v share a memory."""
    generator = torch.Generator().manual_seed(1)
    packed = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, generator=generator)
    packed = packed.to(device, dtype)
    sizes, scale = (heads, kv_heads, kv_heads), 0.1
    inputs = [x.detach().requires_grad_() for x in packed.split(sizes, dim=1)]
    inputs64 = [x.double().requires_grad_() for x in packed.split(sizes, dim=1)]
    out = varlen_attention(
        *(*inputs, borders(lengths).to(device), max(lengths)), causal=causal, scale=scale
    )
    expected = reference.attention(*inputs64, lengths, causal=causal, scale=scale)
    upstream = torch.randn(out.shape, generator=generator).to(device, dtype)
    found = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs64, upstream.double())
    for left, right in zip((out, *found), (expected, *wanted), strict=True):
        # A query that sees one key has no gradient: a difference of terms as large as upstream.
        size = right.norm().clamp_min(float(upstream.norm()))
        assert float(((left.double() - right).norm() / size).detach()) < BOUNDS[dtype]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "lengths",
    [[1], [6], [5, 5, 5], [7, 1, 30, 28, 3, 9], [100, 99, 12, 11, 77, 5], [1, 1, 64]],
    ids=str,
)
def test_equals_each_segment_alone(lengths: list[int], kv_heads: int, causal: bool) -> None:
    check(lengths, 4, kv_heads, causal)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    causal=st.booleans(),
    kv_heads=st.sampled_from([1, 2]),
)
def test_any_lengths(lengths: list[int], causal: bool, kv_heads: int) -> None:
    check(lengths, 2, kv_heads, causal)


@pytest.mark.parametrize("setting", ["sdpa", "triton"])
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim", "causal"),
    [
        ([1], 1, 1, 96, True),
        ([70, 1, 33], 2, 2, 96, True),
        ([5, 66], 4, 1, 64, False),
        ([40, 0, 2], 2, 1, 128, True),
    ],
    ids=str,
)
@pytest.mark.usefixtures("restore_setting")
def test_against_the_truth_in_every_type(
    setting: str,
    dtype: torch.dtype,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    causal: bool,
) -> None:
    """The heads of Phi-3, of the vision tower and of InternLM2.5, one-token segments."""
    if setting == "triton" and not has_triton():
        pytest.skip("triton is not installed")
    configure_attention(setting)
    check(lengths, heads, kv_heads, causal, head_dim=head_dim, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 96), (8, 2, 128), (2, 2, 64)], ids=str
)
def test_torch_varlen_gets_its_arguments(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, head_dim: int
) -> None:
    """torch's own operator on tensors without values: it takes ours, and nothing reads a value."""
    monkeypatch.setattr(attention, "attention_backend", lambda *_: "torch_varlen")
    packed = torch.empty(*(50, heads + 2 * kv_heads, head_dim), dtype=torch.bfloat16, device="meta")
    inputs = [x.requires_grad_() for x in packed.split((heads, kv_heads, kv_heads), dim=1)]
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    out = varlen_attention(*inputs, cu, 20, causal=True, scale=0.1)
    assert out.shape == (50, heads, head_dim)
    grads = torch.autograd.grad(out, inputs, torch.empty_like(out))
    assert [g.shape for g in grads] == [x.shape for x in inputs]


def test_empty_segments_are_allowed() -> None:
    q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
    with_gap = varlen_attention(q, k, v, borders([3, 0, 4]), 4, causal=True, scale=0.3)
    without = varlen_attention(q, k, v, borders([3, 4]), 4, causal=True, scale=0.3)
    assert torch.equal(with_gap, without)


def test_no_contamination_at_all() -> None:
    """Changing one segment leaves the bits of the others alone."""
    q, k, v = (torch.randn(60, 2, 8) for _ in range(3))
    lengths = [20, 25, 15]
    before = varlen_attention(q, k, v, borders(lengths), 25, causal=True, scale=0.3)
    k, v = k.clone(), v.clone()
    k[20:45], v[20:45] = 100.0, -100.0
    after = varlen_attention(q, k, v, borders(lengths), 25, causal=True, scale=0.3)
    assert torch.equal(before[:20], after[:20])
    assert torch.equal(before[45:], after[45:])
    assert not torch.equal(before[20:45], after[20:45])


def test_groups_bound_the_padding() -> None:
    lengths = tuple([130, 128, 125, 120, 60, 58, 55, 300, 290, 9])
    layout = layout_of(lengths, CPU)
    assert layout.groups == ((2, 300), (4, 130), (3, 60), (1, 9))
    slots = sum(segments * length for segments, length in layout.groups)
    assert slots - layout.padding.numel() == sum(lengths)
    assert sorted(layout.slots_T.tolist()) == sorted(set(layout.slots_T.tolist()))


def test_equal_lengths_are_not_gathered() -> None:
    layout = layout_of((8, 8, 8), CPU)
    assert layout.padding.numel() == 0 and layout.groups == ((3, 8),)
    assert torch.equal(layout.tokens_S, torch.arange(24))


@pytest.fixture
def restore_setting() -> Iterator[None]:
    yield
    configure_attention("auto")


@pytest.mark.usefixtures("restore_setting")
def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(
        setting: str, *, flash: bool, torch_varlen: bool, triton: bool, ampere: bool = True
    ) -> str:
        monkeypatch.setattr(attention, "_flash_attn", lambda: varlen_attention if flash else None)
        monkeypatch.setattr(attention, "_is_ampere", lambda: ampere)
        monkeypatch.setattr(
            torch.backends.cuda, "is_flash_attention_available", lambda: torch_varlen
        )
        monkeypatch.setattr(attention, "has_triton", lambda: triton)
        configure_attention(setting)
        assert attention_backend("cuda", torch.float32) in ("sdpa", setting)
        assert attention_backend("cpu", torch.bfloat16) in ("sdpa", setting)
        return attention_backend("cuda", torch.bfloat16)

    assert chosen("auto", flash=True, torch_varlen=True, triton=True) == "flash_attn"
    assert chosen("auto", flash=False, torch_varlen=True, triton=True) == "torch_varlen"
    assert chosen("auto", flash=False, torch_varlen=False, triton=True) == "triton"
    assert chosen("auto", flash=False, torch_varlen=False, triton=False) == "sdpa"
    # FlashAttention-2 does not run on older cards.
    assert chosen("auto", flash=True, torch_varlen=True, triton=True, ampere=False) == "triton"
    assert chosen("flash", flash=True, torch_varlen=True, triton=True) == "flash_attn"
    assert chosen("torch", flash=True, torch_varlen=True, triton=True) == "torch_varlen"
    assert chosen("triton", flash=True, torch_varlen=True, triton=True) == "triton"
    assert chosen("sdpa", flash=True, torch_varlen=True, triton=True) == "sdpa"


@pytest.mark.usefixtures("restore_setting")
def test_wrong_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"model.attention must be one of auto, flash, torch, triton, sdpa"
    ):
        configure_attention("eager")
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    with pytest.raises(ValueError, match=r"install emoverse\[flash-attn\] or set"):
        configure_attention("flash")
    monkeypatch.setattr(attention, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"triton is not installed; pip install triton, or set"):
        configure_attention("triton")


def test_flash_attn_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optional package's signature: the same tensors, boundaries twice, softmax_scale."""
    seen: dict[str, object] = {}

    def flash_attn_varlen_func(*args: object, **kwargs: object) -> object:
        seen["args"], seen["kwargs"] = args, kwargs
        return args[0]

    package = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    attention._flash_attn.cache_clear()
    assert attention._flash_attn() is None  # a folder of that name, as FlashAttention-4 makes
    package.__dict__["flash_attn_varlen_func"] = flash_attn_varlen_func
    attention._flash_attn.cache_clear()
    monkeypatch.setattr(attention, "attention_backend", lambda *_: "flash_attn")
    q, k, v = (torch.randn(5, 2, 8) for _ in range(3))
    cu = borders([2, 3])
    assert varlen_attention(q, k, v, cu, 3, causal=True, scale=0.25) is q
    assert seen["args"] == (q, k, v, cu, cu, 3, 3)
    assert seen["kwargs"] == {"causal": True, "softmax_scale": 0.25}
    attention._flash_attn.cache_clear()


def test_sliding_window_shorter_than_a_sample() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    with pytest.raises(ValueError, match=r"9 tokens .* sliding_window is 4; set data.max_tokens"):
        attention._transformers_attention(
            *(SimpleNamespace(is_causal=True), q, k, v, None),
            scaling=0.3,
            sliding_window=4,
            cu_seq_lens_q=borders([9]),
            max_length_q=9,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("setting", ["torch", "triton", "sdpa", "flash"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "causal"),
    [(4, 4, 96, True), (8, 2, 128, True), (2, 2, 64, False)],
    ids=str,
)
@pytest.mark.usefixtures("restore_setting")
def test_cuda_backends_agree(
    setting: str, heads: int, kv_heads: int, head_dim: int, causal: bool
) -> None:
    if setting == "flash" and attention._flash_attn() is None:
        pytest.skip("flash-attn is not installed")
    configure_attention(setting)
    sizes = {"head_dim": head_dim, "dtype": torch.bfloat16, "device": DEVICE}
    check([100, 7, 64, 1, 129], heads, kv_heads, causal, **sizes)
