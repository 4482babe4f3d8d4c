"""Compiles every Triton kernel ahead of time for A100, RTX 3090 and H100/H200. Needs no GPU.

In:  --arch 80 86 90, --json. Out: registers, spilled bytes, shared memory and WGMMA instructions
of each kernel at the sizes of EmoVerse-4B (h 3072, f 8192, heads of 96) and -8B, in bf16.
A kernel that spills or needs more shared memory than a block may have ends the command with 1.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Kernels are fused as users' are; Triton wants to be told.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# The interpreter's stand-ins for kernels cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from emoverse.kernels import (
    attention_triton,
    lora_triton,
    norm_triton,
    rope_triton,
    swiglu_triton,
)
from emoverse.kernels.triton_common import padded_rank

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}  # bytes a block may have
FP32 = {"rstd", "partial", "lse", "delta"}
FLOATS = {"eps", "scale", "keep_scale", "scale_log2"}
INTEGERS = {"T", "stream", "threshold", "chunk_tokens", "chunks", "size"}
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> kernel and its compile-time values."""
    masked = {"DROPOUT": True, "UPCAST": False}
    found: dict[str, tuple[Any, dict[str, Any]]] = {
        "sum": (lora_triton.sum_kernel, {"BLOCK": lora_triton.BLOCK_SUM})
    }
    for model, hidden, mlp, rank in (("4b", 3072, 8192, 8), ("8b", 4096, 14336, 24)):
        adapter = masked | {"R": rank, "BLOCK_R": padded_rank(rank)}
        lora_tile = {"BLOCK_T": lora_triton.BLOCK_T, "BLOCK_K": lora_triton.BLOCK_K}
        lora = adapter | lora_tile | {"K": hidden}
        norm = adapter | {
            "D": hidden,
            "BLOCK_T": norm_triton.BLOCK_T,
            "BLOCK_D": norm_triton.BLOCK_D,
        }
        swiglu = adapter | {
            "F": mlp,
            "BLOCK_T": swiglu_triton.BLOCK_T,
            "BLOCK_F": swiglu_triton.BLOCK_F,
        }
        found |= {
            f"lora_input {model}": (lora_triton.lora_input_kernel, lora),
            f"input_gradient {model}": (
                lora_triton.input_gradient_kernel,
                lora | {"BLOCK_T": lora_triton.GRADIENT_BLOCK_T},
            ),
            f"norm {model}": (norm_triton.norm_kernel, norm | {"UPDATE": True}),
            f"norm_backward {model}": (norm_triton.norm_backward_kernel, norm),
            f"swiglu {model}": (swiglu_triton.swiglu_kernel, swiglu),
            f"swiglu_backward {model}": (swiglu_triton.swiglu_backward_kernel, swiglu),
        }
        for form, width in enumerate((hidden, hidden, mlp)):
            values = lora | {"K": width, "FORM": form}
            name = f"weight_gradient {('plain', 'normed', 'activated')[form]} {model}"
            found[name] = (lora_triton.weight_gradient_kernel, values)
    for head_dim, heads, group in ((64, 16, 1), (96, 32, 1), (128, 32, 4)):
        rotary = {"HEADS": heads, "H": head_dim, "SIGN": 1, "BLOCK_N": rope_triton.BLOCK_N}
        half = triton.next_power_of_2(head_dim // 2)
        found[f"rope {head_dim}"] = (rope_triton.rope_kernel, rotary | {"BLOCK_H": half})
        attention = {"N": heads, "GROUP": group, "H": head_dim, "CAUSAL": head_dim != 64}
        attention |= {"UPCAST": False, "BLOCK_H": triton.next_power_of_2(head_dim)}
        large = {"BLOCK_M": attention_triton.BLOCK_M, "BLOCK_C": attention_triton.BLOCK_C}
        small = {"BLOCK_M": attention_triton.SMALL_M, "BLOCK_C": attention_triton.SMALL_C}
        for name, tiles in (("forward", large), ("query_gradient", small)):
            kernel = getattr(attention_triton, f"{name}_kernel")
            found[f"attention {name} {head_dim}"] = (kernel, attention | tiles)
        name, kernel = "key_value_gradient", attention_triton.key_value_gradient_kernel
        found[f"attention {name} {head_dim}"] = (kernel, attention | small)
    return found


def signature(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    """Types of the arguments, from their names."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name == "seed":
            return "i64"
        if name in INTEGERS or name.endswith(("_token", "_head")):
            return "i32"
        if name in FLOATS:
            return "fp32"
        if name == "borders":
            return "*i32"
        return "*fp32" if name in FP32 else "*bf16"

    return {name: kind(name) for name in kernel.arg_names}


def compile_one(job: tuple[str, int]) -> dict[str, Any]:
    """One kernel for one architecture."""
    name, arch = job
    kernel, constants = cases()[name]
    source = ASTSource(kernel, signature(kernel, constants), constants)
    warps = attention_triton.num_warps(constants["H"]) if name.startswith("attention") else 4
    target = GPUTarget("cuda", arch, 32)
    built = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
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
        "shared_bytes": built.metadata.shared,
        "shared_limit": SHARED_LIMIT[arch],
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
    }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel."""
    found = []
    if row["spilled_bytes"]:
        found.append(f"spills {row['spilled_bytes']} bytes")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 86, 90])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    jobs = [(name, arch) for name in cases() for arch in options.arch]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        rows = list(pool.map(compile_one, jobs))
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
