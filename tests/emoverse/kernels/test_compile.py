"""Every Triton kernel compiles ahead of time for the three kinds of GPU, without a GPU.

benchmarks/kernels/compile.py does it, in a process without the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emoverse.kernels.backend import has_triton

ROOT = Path(__file__).resolve().parents[3]
# Registers of a thread by kind of kernel; more would cost occupancy, or spill next.
MOST_REGISTERS = {
    "lora_input": 200,
    "input_gradient": 168,
    "weight_gradient": 200,
    "norm": 255,
    "norm_backward": 255,
    "swiglu": 168,
    "swiglu_backward": 168,
    "rope": 128,
    "sum": 64,
    "attention": 255,
}


@pytest.mark.aot
@pytest.mark.timeout(600)
@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_every_kernel_for_every_architecture() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kernels" / "compile.py"), "--json"],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)["kernels"]
    assert {row["arch"] for row in rows} == {80, 86, 90}
    kinds = {row["kernel"].split()[0] for row in rows}
    assert kinds == set(MOST_REGISTERS)
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["registers"] <= MOST_REGISTERS[row["kernel"].split()[0]], row
    # Hopper's own matrix instructions, where the tiles are large enough for them.
    forward = [r for r in rows if r["kernel"].startswith("attention forward") and r["arch"] == 90]
    assert forward and all(row["wgmma"] for row in forward)
