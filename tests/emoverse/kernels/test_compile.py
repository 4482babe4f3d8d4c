"""Every Triton kernel compiles ahead of time for the three kinds of GPU, without a GPU.

benchmarks/kernels/compile.py does it, in a process without the interpreter, by launching a layer's
forward and backward as training does.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from emoverse.kernels.backend import has_triton

ROOT = Path(__file__).resolve().parents[3]
# Registers of a thread by kind of kernel; more would cost occupancy, or spill next.
MOST_REGISTERS = {
    "lora_input": 128,
    "input_gradient": 64,
    "weight_gradient": 160,
    "norm": 128,
    "norm_backward": 144,
    "swiglu": 96,
    "swiglu_backward": 96,
    "rope": 64,
    "sum": 64,
    "attention_forward": 200,
    "attention_query_gradient": 128,
    "attention_key_value_gradient": 255,
}
# Of a layer of 4B and 8B: norms before and after an update, rotary positions forward and of q, k
# and v backward, the three forms of A's gradient.
FEWEST_VARIANTS = {"norm": 4, "norm_backward": 3, "rope": 7, "weight_gradient": 7}


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
    for arch in (80, 86, 90):
        kinds = Counter(row["kernel"].split()[0] for row in rows if row["arch"] == arch)
        assert kinds.keys() == MOST_REGISTERS.keys()
        assert all(kinds[kind] >= fewest for kind, fewest in FEWEST_VARIANTS.items()), kinds
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["registers"] <= MOST_REGISTERS[row["kernel"].split()[0]], row
    # Hopper's own matrix instructions, where the tiles are large enough for them.
    forward = [r for r in rows if r["kernel"].startswith("attention_forward") and r["arch"] == 90]
    assert forward and all(row["wgmma"] for row in forward)
