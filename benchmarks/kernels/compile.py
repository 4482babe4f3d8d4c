"""Compiles every Triton kernel ahead of time for A100, RTX 3090 and H100/H200. Needs no GPU.

In:  --arch 80 86 90, --json. Out: registers, spilled bytes, shared memory and WGMMA instructions
of each kernel in bf16, at the sizes of a decoder layer of EmoVerse-4B with adapters of rank 8, of
EmoVerse-8B with rank 16 (48 ranks for q, k and v together), and of the vision tower's attention.
The host code of training runs as on a GPU, on a few tokens in CPU memory, and each launch goes
through Triton's own path up to the binary: what is compiled is what will be launched.
A kernel that spills or needs more shared memory than a block may have ends the command with 1.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# The interpreter's stand-ins for kernels cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from emoverse.kernels.adapter_types import Linears
from emoverse.kernels.backend import configure_kernels
from emoverse.kernels.layer import LayerSettings, Rotary, after_attention, before_attention
from emoverse.kernels.triton_ops.attention import triton_varlen

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}  # bytes a block may have
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Hidden, MLP, query heads, key/value heads, fused projections, rank of the adapters.
LAYERS = {"4b": (3072, 8192, 32, 32, True, 8), "8b": (4096, 14336, 32, 8, False, 16)}
CASES = (*LAYERS, "vision")
TOKENS = 32


class Device:
    """What Triton asks a driver before it compiles; the device index selects the architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiled_only(arch: int) -> Iterator[dict[str, Any]]:
    """Inside, kernels are compiled for `arch` and not run; by name, each variant once."""
    kernels: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[name_of(self, kernel)] = kernel
        return kernel

    JITFunction.run = compile_only
    driver.set_active(Device(arch))
    configure_kernels("triton")
    try:
        yield kernels
    finally:
        JITFunction.run = launch
        configure_kernels("auto")


def name_of(function: Any, kernel: Any) -> str:
    """The kernel and the sizes that distinguish its variants."""
    kind = function.fn.__name__.removesuffix("_kernel")
    if function.module.endswith("triton_ops.attention"):
        kind = f"attention_{kind}"
    values = {function.arg_names[position[0]]: v for position, v in kernel.src.constants.items()}
    shown = ("K", "D", "F", "R", "HEADS", "H", "FORM", "UPDATE", "SIGN")
    return " ".join([kind, *(f"{key}={values[key]}" for key in shown if key in values)])


def run_layer(name: str) -> None:
    """Forward and backward of a lean layer with dropout; values mean nothing."""
    hidden, mlp, heads, kv_heads, fused, rank = LAYERS[name]
    head_dim = hidden // heads
    settings = LayerSettings(heads, kv_heads, 1e-5, 4.0, 0.05, 2**61 + 1)

    def weights(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def linears(inputs: int, *outputs: int) -> Linears:
        sizes = (sum(outputs),) if fused else outputs
        return Linears(
            tuple(weights(n, inputs) for n in sizes),
            tuple(weights(rank, inputs).requires_grad_() for _ in sizes),
            tuple(weights(n, rank).requires_grad_() for n in sizes),
        )

    x_TD = weights(TOKENS, hidden).requires_grad_()
    cos = weights(TOKENS, head_dim)
    qkv = linears(hidden, heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    q, k, v, residual = before_attention(x_TD, weights(hidden), Rotary(cos, cos), qkv, settings)
    borders = torch.tensor([0, 20, TOKENS], dtype=torch.int32)
    out = triton_varlen(q, k, v, borders, 20, causal=True, scale=0.1)
    rest = linears(hidden, hidden), linears(hidden, mlp, mlp), linears(mlp, hidden)
    after_attention(out.flatten(1), residual, weights(hidden), rest, settings).sum().backward()


def run_vision() -> None:
    """Attention of the vision tower: no grouped heads, every token sees every other."""
    qkv = [torch.zeros(TOKENS, 16, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    borders = torch.tensor([0, TOKENS], dtype=torch.int32)
    triton_varlen(*qkv, borders, TOKENS, causal=False, scale=0.1).sum().backward()


def compile_case(job: tuple[str, int]) -> list[dict[str, Any]]:
    """All kernels of one case for one architecture."""
    case, arch = job
    with compiled_only(arch) as kernels:
        run_vision() if case == "vision" else run_layer(case)
    return [row_of(f"{name} ({case})", arch, kernel) for name, kernel in kernels.items()]


def row_of(name: str, arch: int, kernel: Any) -> dict[str, Any]:
    """What the binary needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(NVIDIA / "cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    return {
        "kernel": name,
        "arch": arch,
        "registers": numbers["REG"],
        "spilled_bytes": numbers["STACK"] + numbers["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        "shared_limit": SHARED_LIMIT[arch],
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
    }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel."""
    problems = []
    if row["spilled_bytes"]:
        problems.append(f"spills {row['spilled_bytes']} bytes")
    if row["shared_bytes"] > row["shared_limit"]:
        problems.append(f"needs {row['shared_bytes']} bytes of shared memory")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 86, 90])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    jobs = [(case, arch) for case in CASES for arch in options.arch]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        rows = [row for rows_of_job in pool.map(compile_case, jobs) for row in rows_of_job]
    if options.json:
        print(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1))
    else:
        print("| kernel | sm | registers | spilled B | shared KiB | wgmma |")
        print("|---|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['kernel']} | {row['arch']} | {row['registers']} | {row['spilled_bytes']} "
                f"| {row['shared_bytes'] / 1024:.1f} | {row['wgmma']} |"
            )
    wrong = [f"{row['kernel']} sm_{row['arch']}: {fault}" for row in rows for fault in faults(row)]
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
