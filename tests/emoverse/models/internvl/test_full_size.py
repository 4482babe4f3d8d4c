"""InternVL2-4B at full size, from generated random shards: bounded memory, exact tensors (slow).

Needs about 17 GB of disk and 10 GB of memory; prints what it measured.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from emoverse.models.architecture import REGISTRY, parameter_counts
from emoverse.models.internvl.released_config import new_config
from emoverse.models.internvl.released_files import ShardWriter, open_weights
from emoverse.models.internvl.tensor_names import tensor_names

GB = 10**9
SIZES = REGISTRY["internvl2-4b"]

# Runs in a process of its own: only then is its peak the import's.
MEASURE = """
import json, sys, threading, time
import torch
from emoverse.export import layouts
from emoverse.models import adapters
from emoverse.models.internvl import checkpoint as internvl2
from emoverse.models.internvl.checkpoint import *
from emoverse.models.merge import Adapter

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)

folder, what = sys.argv[1], sys.argv[2]
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
begin = time.monotonic()
out = {}
if what == "import":
    native, _ = import_checkpoint(folder)
    layer = native.model.language_model.layers[31]
    out["sums"] = {
        "qkv": layer.self_attn.qkv_proj.weight[:2, :5].float().tolist(),
        "head": native.lm_head.weight[-1, :5].float().tolist(),
    }
    out["parameters"] = sum(p.numel() for p in native.parameters())
    out["dtypes"] = sorted({str(p.dtype) for p in native.parameters()})
    out["rotary"] = str(native.model.language_model.rotary_emb.inv_freq.dtype)
elif what == "defer":
    native, _, deferred = internvl2.import_deferred(folder, torch.bfloat16)
    out["parameters"] = sum(value.numel() for _, value in deferred.values())
else:
    name = "model.language_model.layers.31.self_attn.qkv_proj"
    tensors = {
        f"{name}.lora_A.default.weight": torch.full((8, 3072), 0.5),
        f"{name}.lora_B.default.weight": torch.full((9216, 8), 0.5),
    }
    released = internvl2.open_checkpoint(folder)
    adapter = Adapter(tensors=tensors, scale=4.0, origin="test")
    layouts.write_internvl2(released, [adapter], __import__("pathlib").Path(sys.argv[3]))
running = False
thread.join()
print(json.dumps({**out, "peak": peak - before, "seconds": time.monotonic() - begin}))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internvl2-4b")
    if shutil.disk_usage(folder).free < 20 * GB:
        pytest.skip("needs 20 GB of free disk")
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 6 * GB:
        pytest.skip("needs 10 GB of memory")
    vision, llm = SIZES.vision, SIZES.llm
    factors = [1.0 + place / 48 for place in range(48)]
    config = new_config(
        family=llm.family,
        vision_hidden=vision.hidden,
        vision_layers=vision.layers,
        vision_heads=vision.heads,
        vision_mlp=vision.mlp,
        image_size=vision.image_size,
        hidden=llm.hidden,
        layers=llm.layers,
        heads=llm.heads,
        mlp=llm.mlp,
        vocab=llm.vocab,
        bos_id=1,
        eos_id=32000,
        pad_id=32000,
        img_context_id=32013,
        max_positions=131072,
        rope_scaling={"type": "su", "short_factor": factors, "long_factor": factors},
    )
    config["llm_config"]["original_max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    writer = ShardWriter(folder, shard_bytes=2 * GB)
    for number, entry in enumerate(tensor_names(SIZES)):
        count = 1
        for size in entry.shape:
            count *= size
        # Every tensor begins elsewhere in the block, so that no two are alike.
        tensor = block.roll(997 * number).repeat(-(-count // len(block)))[:count]
        writer.add(entry.released, tensor.reshape(entry.shape).contiguous())
    assert len(writer.close()) == 5
    yield folder
    shutil.rmtree(folder)


def measure(folder: Path, *words: object) -> dict[str, Any]:
    command = [sys.executable, "-c", MEASURE, str(folder), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[4]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{words[0]}: peak {found['peak'] / GB:.2f} GB in {found['seconds']:.0f} s")
    return found


def stored(folder: Path, name: str) -> torch.Tensor:
    files = open_weights(folder)
    file = next(file for file, held in files.files.items() if name in held)
    return next(value.clone() for key, value in files.tensors([file]) if key == name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_import_holds_the_model_and_one_tensor(shards: Path) -> None:
    found = measure(shards, "import")
    total = parameter_counts(SIZES, None, "frozen")["total"]
    assert found["parameters"] == total == 4_146_855_936
    assert found["dtypes"] == ["torch.bfloat16"] and found["rotary"] == "torch.float32"
    # 8.29 GB of weights, and the largest tensor (197 MB) twice at most.
    assert 2 * total <= found["peak"] < 2 * total + 0.5 * GB
    block = "language_model.model.layers.31.self_attn.qkv_proj.weight"
    assert found["sums"]["qkv"] == stored(shards, block)[:2, :5].float().tolist()
    head = stored(shards, "language_model.lm_head.weight")
    assert found["sums"]["head"] == head[-1, :5].float().tolist()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_deferred_import_never_holds_the_model(shards: Path) -> None:
    found = measure(shards, "defer")
    counts = parameter_counts(SIZES, None, "frozen")
    assert found["parameters"] == counts["total"] - counts["projector"]
    assert found["peak"] < 0.8 * GB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_export_holds_one_shard(shards: Path, tmp_path: Path) -> None:
    found = measure(shards, "export", tmp_path / "out")
    # A shard of 5 GB and one tensor; never the whole model.
    assert found["peak"] < 6 * GB
    name = "language_model.model.layers.31.self_attn.qkv_proj.weight"
    before, after = stored(shards, name), stored(tmp_path / "out", name)
    # 4 * 8 * 0.5 * 0.5 = 8 more everywhere.
    assert torch.equal(after, (before.float() + 8).bfloat16())
    other = "language_model.model.layers.0.self_attn.qkv_proj.weight"
    assert torch.equal(stored(shards, other), stored(tmp_path / "out", other))
    shutil.rmtree(tmp_path / "out")
