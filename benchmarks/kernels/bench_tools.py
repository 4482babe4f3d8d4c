"""What the kernel benchmarks share: the machine in words, fair timing, models of one kind.

Medians of interleaved repetitions, so that a change of clock or load meets every contestant alike;
on a CPU of its CPU time.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from emoverse.kernels import attention
from emoverse.models.lean_layers import make_lean

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALPHA, DROPOUT = 32, 0.05
# Hidden, MLP, query heads, key/value heads, layers, vocabulary of the two language models; both an
# eighth as wide, with heads as wide as theirs; and a tiny one whose proportions are those of 4b.
SIZES = {
    "4b": (3072, 8192, 32, 32, 32, 32020),
    "8b": (4096, 14336, 32, 8, 32, 92553),
    "4b/8": (384, 1024, 4, 4, 2, 500),
    "8b/8": (512, 1792, 4, 1, 2, 500),
    "tiny": (192, 512, 2, 2, 2, 500),
}
# Dense bf16 peaks by name of the device; what MFU is a share of.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "3090": 71e12}
CACHE_BYTES = 256 << 20  # more than any L2
HOLD_CYCLES = 4_000_000  # about 2 ms: longer than it takes to launch what is timed


def machine() -> str:
    """For the head of a table."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}"


def cpu_name() -> str:
    """As the kernel calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of this GPU; None if it is not in the table."""
    if DEVICE.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def waited_s(call: Callable[[], object]) -> float:
    """Seconds that the caller waits for the GPU; on a CPU its own, so that other jobs do not count.

    OMP_NUM_THREADS=1 keeps the waiting of idle threads out of the latter.
    """
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    synchronise()
    begin = clock()
    call()
    synchronise()
    return clock() - begin


def device_s(call: Callable[[], object]) -> float:
    """Seconds that the GPU works, launches left out: they are queued while it is held busy.

    Its L2 cache is filled with something else before. On a CPU the same as waited_s.
    """
    if DEVICE.type != "cuda":
        return waited_s(call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(CACHE_BYTES, dtype=torch.int8, device=DEVICE).zero_()
    torch.cuda._sleep(HOLD_CYCLES)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def medians(
    contestants: dict[str, Callable[[], object]],
    *,
    repeats: int,
    warmups: int = 2,
    clock: Callable[[Callable[[], object]], float] = device_s,
    budget_s: float = math.inf,
) -> dict[str, float]:
    """Median seconds of a call, by name; the contestants take turns.

    Args:
        budget_s: no new turn is begun after so long, once each contestant has been measured.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for turn in range(warmups + repeats):
        if turn > warmups and time.perf_counter() - begin > budget_s:
            break
        for name, call in contestants.items():
            seconds = clock(call)
            if turn >= warmups:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth() -> float | None:
    """Bytes per second of a large copy on the GPU, read and written; None on a CPU."""
    if DEVICE.type != "cuda":
        return None
    source = torch.empty(1 << 28, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    seconds = medians({"copy": lambda: target.copy_(source)}, repeats=10)["copy"]
    return 2 * source.nbytes / seconds


def liger(name: str) -> Any:
    """A class or function of Liger, by its name; None without the package or a GPU."""
    if DEVICE.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return None
    part = "ops" if name.endswith("Function") else "transformers"
    return getattr(importlib.import_module(f"liger_kernel.{part}"), name)


def compare_to_transformers(
    size: str,
    calls: dict[str, Callable[[], object]],
    *,
    repeats: int,
    moved: int,
    bandwidth: float | None,
) -> list[dict[str, Any]]:
    """Rows of a memory-bound operation.

    Args:
        calls: by contestant, transformers first.
        moved: bytes that ours must read and write at least.
        bandwidth: of a plain copy, bytes per second.
    """
    seconds = medians(calls, repeats=repeats)
    return [
        {
            "size": size,
            "who": who,
            "ms": 1e3 * value,
            "times transformers": seconds["transformers"] / value,
            "of copy bandwidth": moved / value / bandwidth if bandwidth else None,
        }
        for who, value in seconds.items()
    ]


def peer(
    size: str, *, layers: int, dtype: torch.dtype, rank: int = 8, p: float = DROPOUT, seed: int = 0
) -> nn.Module:
    """transformers + PEFT on all linears, bf16 adapters, random weights, frozen head."""
    hidden, mlp, heads, kv_heads, _, vocabulary = SIZES[size]
    common: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            if size.startswith("8b"):
                model: nn.Module = LlamaForCausalLM(LlamaConfig(**common))
            else:
                model = Phi3ForCausalLM(Phi3Config(**common))
            settings = LoraConfig(
                r=rank, lora_alpha=ALPHA, lora_dropout=p, target_modules=r".*layers.*_proj"
            )
            get_peft_model(model, settings, autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B." in name:  # zeros would hide gradients of A
                value.normal_(std=0.02)
    return model.train()


def lean(model: nn.Module) -> nn.Module:
    """The same model with lean layers and our attention."""
    model.set_attn_implementation(attention.NAME)
    make_lean(model.model, "on")
    return model


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    return parser


def report(figures: dict[str, Any], rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """`figures` once, `rows` as a table; or both as JSON."""
    if as_json:
        print(json.dumps(figures | {"rows": rows}, indent=1))
        return
    for name, value in figures.items():
        print(f"{name}: {value}")
    if rows:
        print("| " + " | ".join(rows[0]) + " |")
        print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(_cell(value) for value in row.values()) + " |")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "not measured" if value is None else str(value)
