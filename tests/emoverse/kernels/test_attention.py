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


def check(lengths: list[int], heads: int, kv_heads: int, causal: bool, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    inputs = [
        torch.randn(tokens, n, 16, generator=generator).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]
    out = varlen_attention(*inputs, borders(lengths), max(lengths), causal=causal, scale=0.3)
    expected = reference.attention(*inputs, lengths, causal=causal, scale=0.3)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


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


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
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
def test_triton_against_the_truth(
    dtype: torch.dtype,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    causal: bool,
) -> None:
    configure_attention("triton")
    generator = torch.Generator().manual_seed(1)
    packed = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, generator=generator)
    packed = packed.to(DEVICE, dtype)
    exact = packed.double()
    sizes = (heads, kv_heads, kv_heads)
    inputs64 = [x.contiguous().requires_grad_() for x in exact.split(sizes, dim=1)]
    inputs = [x.detach().requires_grad_() for x in packed.split(sizes, dim=1)]
    cu_seqlens = borders(lengths).to(DEVICE)
    out = varlen_attention(*inputs, cu_seqlens, max(lengths), causal=causal, scale=0.1)
    expected = reference.attention(*inputs64, lengths, causal=causal, scale=0.1)
    upstream = torch.randn(out.shape, generator=generator).to(DEVICE, dtype)
    found = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs64, upstream.double())
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for left, right in zip((out, *found), (expected, *wanted), strict=True):
        # A query that sees one key has no gradient: a difference of terms as large as upstream.
        size = right.norm().clamp_min(float(upstream.norm()))
        assert float(((left.double() - right).norm() / size).detach()) < bound


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
    def chosen(setting: str, *, flash: bool, torch_varlen: bool, triton: bool) -> str:
        monkeypatch.setattr(attention, "_has_flash_attn", lambda: flash)
        monkeypatch.setattr(attention, "_has_torch_varlen", lambda: torch_varlen)
        monkeypatch.setattr(attention, "has_triton", lambda: triton)
        configure_attention(setting)
        assert attention_backend("cuda", torch.float32) in ("sdpa", setting)
        assert attention_backend("cpu", torch.bfloat16) in ("sdpa", setting)
        return attention_backend("cuda", torch.bfloat16)

    assert chosen("auto", flash=True, torch_varlen=True, triton=True) == "flash_attn"
    assert chosen("auto", flash=False, torch_varlen=True, triton=True) == "torch_varlen"
    assert chosen("auto", flash=False, torch_varlen=False, triton=True) == "triton"
    assert chosen("auto", flash=False, torch_varlen=False, triton=False) == "sdpa"
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
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: False)
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
    package.__dict__["flash_attn_varlen_func"] = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "attention_backend", lambda *_: "flash_attn")
    q, k, v = (torch.randn(5, 2, 8) for _ in range(3))
    cu = borders([2, 3])
    assert varlen_attention(q, k, v, cu, 3, causal=True, scale=0.25) is q
    assert seen["args"] == (q, k, v, cu, cu, 3, 3)
    assert seen["kwargs"] == {"causal": True, "softmax_scale": 0.25}


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
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cuda_backends_agree(kv_heads: int) -> None:
    lengths = [100, 7, 64, 129]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(300, n, 96, generator=generator) for n in (4, kv_heads, kv_heads)]
    expected = reference.attention(*inputs, lengths, causal=True, scale=0.1)
    on_gpu = [x.cuda().bfloat16() for x in inputs]
    out = varlen_attention(*on_gpu, borders(lengths).cuda(), 129, causal=True, scale=0.1)
    torch.testing.assert_close(out.float().cpu(), expected, atol=3e-2, rtol=3e-2)
