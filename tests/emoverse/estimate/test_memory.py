"""The memory estimate against measured peaks of small models, and what `plan` makes of it."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_shards.shards.index import ShardIndex
from data_shards.tasks import Task
from emoverse.config.schema import load_config
from emoverse.engine.distributed import World
from emoverse.estimate.memory import (
    CARDS,
    GIB,
    MemoryEstimate,
    Setup,
    gpu_memory,
    memory_report,
    memory_text,
    setup_of,
)
from emoverse.models.architecture import REGISTRY, Architecture, load_architecture
from emoverse.models.emoverse import compose
from emoverse.models.internvl.checkpoint import build_native
from emoverse.models.internvl.released_config import new_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
LAYERS, FRAMES, ROWS = 8, 8, 24


def sizes(family: str) -> dict[str, Any]:
    """Small, but so that activations outweigh weights as they do on a GPU."""
    return new_config(
        family=family,
        vision_hidden=32,
        vision_layers=1,
        vision_heads=2,
        vision_mlp=64,
        image_size=56,
        hidden=64,
        layers=LAYERS,
        heads=4,
        kv_heads=4 if family == "phi3" else 2,
        mlp=192 if family == "phi3" else 224,
        vocab=200,
        bos_id=1,
        eos_id=2,
        pad_id=2,
        img_context_id=199,
    )


def lora(dropout: float) -> Any:
    return SimpleNamespace(preset="paper", r=8, alpha=32, dropout=dropout, targets=())


def pack(tokens: int) -> Any:
    """One packed batch of four samples with two frames each."""
    generator = torch.Generator().manual_seed(0)
    each = tokens // 4
    ids = torch.randint(3, 190, (tokens,), generator=generator)
    for start in range(0, tokens, each):
        ids[start + 2 : start + 2 + 8] = 199
    rows = torch.cat([torch.arange(s + each - 7, s + each - 1) for s in range(0, tokens, each)])
    batch = SimpleNamespace(
        ids_T=ids,
        position_ids_T=torch.arange(each).repeat(4),
        cu_seqlens=torch.arange(0, tokens + 1, each, dtype=torch.int32),
        max_seqlen=each,
        pixels=torch.zeros(FRAMES, 56, 56, 3, dtype=torch.uint8),
        features=None,
        supervised_rows=rows,
        targets=ids[rows + 1],
        row_weights=torch.ones(len(rows)),
        task_of_row=torch.zeros(len(rows), dtype=torch.long),
    )
    assert len(rows) == ROWS
    batch.to = lambda device: batch
    return batch


def peak_of(work: Callable[[], object]) -> int:
    """Largest number of bytes that tensors hold while `work` runs, above those held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def step_peak(family: str, setup: Setup, dropout: float, world: World) -> tuple[int, int]:
    """Bytes held between steps, and the peak of a step above them."""
    from emoverse.engine.deepspeed_engine import Engine, deepspeed_config

    config = sizes(family)
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    settings = SimpleNamespace(
        lora=lora(dropout), projector="full", attention="sdpa", lean="on" if setup.lean else "off"
    )
    model = compose(build_native(config, seed=0, dtype=dtype), config, settings).train()
    if setup.recompute:
        model.recompute_activations()
    groups = [
        {"name": part, "params": [p for _, p in named], "lr": 1e-4, "initial_lr": 1e-4}
        for part, named in model.trainable_groups().items()
    ]
    engine = Engine(
        model,
        torch.optim.AdamW(groups),
        world,
        deepspeed_config(
            zero_stage=setup.zero_stage,
            precision=setup.precision,
            clip=1.0,
            world_size=1,
            num_trainable=sum(p.numel() for group in groups for p in group["params"]),
        ),
    )
    batch = pack(setup.pack_tokens)

    def step() -> None:
        engine.step([batch], num_packs=1, normaliser=4.0, lr_factor=1.0, make_empty=lambda: batch)

    step()
    peak = peak_of(step)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    engine.close()
    return held, peak


@pytest.mark.parametrize("family", ["phi3", pytest.param("internlm2", marks=pytest.mark.slow)])
def test_activations_are_those_measured(family: str, run_ranks: Callable[..., list[Any]]) -> None:
    """Two pack sizes: their difference is what the tokens cost, free of everything constant."""
    cases = [
        ("fp32", 0.0, False, False),
        ("bf16", 0.05, False, False),
        ("bf16", 0.05, True, False),
        ("bf16", 0.05, False, True),
    ]

    def setups(precision: str, recompute: bool, lean: bool) -> list[Setup]:
        return [
            Setup(
                precision=precision,
                zero_stage=2,
                world_size=1,
                recompute=recompute,
                pack_tokens=tokens,
                frames=FRAMES,
                rows=ROWS,
                dropout=0.0,
                lean=lean,
            )
            for tokens in (256, 1024)
        ]

    def work(world: World) -> list[list[int]]:
        return [
            [
                step_peak(family, setup, dropout, world)[1]
                for setup in setups(precision, recompute, lean)
            ]
            for precision, dropout, recompute, lean in cases
        ]

    (measured,) = run_ranks(work, 1, limit_s=200)
    architecture = Architecture.from_config_json(sizes(family))
    for case, peaks in zip(cases, measured, strict=True):
        precision, dropout, recompute, lean = case
        estimates = [
            gpu_memory(architecture, lora(dropout), "full", replace(one, dropout=dropout))
            for one in setups(precision, recompute, lean)
        ]
        tokens = estimates[1].activations - estimates[0].activations
        share = tokens / (peaks[1] - peaks[0])
        # The whole of what a step needs above what it holds between steps.
        step = estimates[1].activations + estimates[1].logits + estimates[1].gradients
        print(f"{family} {case}: estimate / measured {share:.2f}, of a step {step / peaks[1]:.2f}")
        assert 0.85 < share < 1.25, case
        assert 0.85 < step / peaks[1] < 1.35, case


def test_the_chunk_of_the_loss_is_the_one_that_is_estimated() -> None:
    from emoverse import loss
    from emoverse.estimate import memory

    assert memory.MAX_LOGITS == loss.MAX_LOGITS


def test_the_held_bytes_are_those_measured(run_ranks: Callable[..., list[Any]]) -> None:
    """Weights by count: the estimate's first line is exact."""
    setup = Setup(
        precision="bf16",
        zero_stage=2,
        world_size=1,
        recompute=False,
        pack_tokens=256,
        frames=FRAMES,
        rows=ROWS,
        dropout=0.0,
    )
    ((held, _),) = run_ranks(lambda world: step_peak("phi3", setup, 0.0, world), 1)
    architecture = Architecture.from_config_json(sizes("phi3"))
    assert gpu_memory(architecture, lora(0.0), "full", setup).weights == held


def test_the_reference_figures_of_the_released_models() -> None:
    """Counted per layer with saved-tensor hooks elsewhere: GiB at 2,254 tokens in bf16."""
    from emoverse.estimate.memory import layer_bytes

    counted = {
        ("internvl2-4b", 0.0): 9.99,
        ("internvl2-4b", 0.05): 12.33,
        ("internvl2-8b", 0.0): 12.68,
        ("internvl2-8b", 0.05): 20.11,
    }
    for (name, dropout), gib in counted.items():
        setup = Setup(
            precision="bf16",
            zero_stage=2,
            world_size=1,
            recompute=False,
            pack_tokens=2254,
            frames=8,
            rows=10,
            dropout=dropout,
        )
        found = 32 * 2254 * layer_bytes(REGISTRY[name], lora(dropout), setup) / GIB
        assert found == pytest.approx(gib, rel=0.06), name


CORPUS = {
    (Task.MSA, Task.ER, Task.FER): 15870,
    (Task.MSA, Task.ER): 5150,
    (Task.MSA, Task.ER, Task.ERI): 4839,
    (Task.ER, Task.ECPE): 7081,
}


@pytest.mark.parametrize("name", ["emoverse_4b", "emoverse_8b", "emoverse_4b_2x3090"])
def test_verdicts_for_the_shipped_configs(name: str) -> None:
    """On its own hardware a shipped config fits; a change that plan proposes is true."""
    config = load_config([CONFIGS / f"{name}.yaml"])
    architecture = load_architecture(config.model.base)
    report = memory_report(config, architecture)
    assert list(report["cards"]) == list(CARDS)
    own = "RTX 3090" if "3090" in name else "A100-80"
    assert report["cards"][own]["fits"], memory_text(report)
    assert sum(report["parts"].values()) >= report["total"] > 8 * GIB
    changed = 0
    for card, verdict in report["cards"].items():
        if not verdict["fits"] and verdict["change"] is not None:
            changed += 1
            overrides = [f"{knob}={str(v).lower()}" for knob, v in verdict["change"].items()]
            again = load_config([CONFIGS / f"{name}.yaml"], overrides)
            assert memory_report(again, architecture)["cards"][card]["fits"], (card, overrides)
    assert changed or all(verdict["fits"] for verdict in report["cards"].values())


def test_what_saves_memory_saves_memory() -> None:
    config = load_config([CONFIGS / "emoverse_8b.yaml"])
    architecture = load_architecture(config.model.base)
    base = setup_of(config, architecture)
    model = config.model

    def total(**changes: Any) -> int:
        return gpu_memory(architecture, model.lora, model.projector, replace(base, **changes)).total

    assert total(recompute=True) < total()
    assert total(pack_tokens=4096, frames=8, rows=50) < total()
    assert total(zero_stage=3, world_size=8) < total(world_size=8) < total()
    assert total(lean=True) < total(dropout=0.0, lean=False) < total(dropout=0.05, lean=False)
    assert total(offload="optimizer") < total()
    assert total(zero_stage=3, offload="all") < total(zero_stage=3, offload="optimizer")


def test_what_leaves_the_gpu_is_on_the_host() -> None:
    config = load_config([CONFIGS / "emoverse_8b.yaml"])
    architecture = load_architecture(config.model.base)
    model, base = config.model, replace(setup_of(config, architecture), zero_stage=3, world_size=2)

    def needs(offload: str) -> MemoryEstimate:
        setup = replace(base, offload=offload)
        return gpu_memory(architecture, model.lora, model.projector, setup)

    off, optimizer, everything = (needs(offload) for offload in ("off", "optimizer", "all"))
    trained = 54_542_336
    assert (off.host, optimizer.optimizer) == (0, 0)
    assert optimizer.host == off.optimizer + 4 * trained // 2
    assert everything.host == optimizer.host + off.weights
    assert everything.weights == 2 * trained  # they are used so often that they stay


def test_one_small_card_is_told_to_offload() -> None:
    """An 8B model in fp32 is 30 GiB: too much for 24, unless it waits outside."""
    fp32 = ["train.processes=1", "model.precision=fp32"]
    config = load_config([CONFIGS / "emoverse_8b.yaml"], fp32)
    report = memory_report(config, load_architecture(config.model.base))
    change = report["cards"]["RTX 3090"]["change"]
    assert change["train.offload"] == "all" and change["train.zero_stage"] == 3
    assert "train.offload=all" in "\n".join(memory_text(report))
    again = load_config(
        [CONFIGS / "emoverse_8b.yaml"],
        [*fp32, *(f"{knob}={str(v).lower()}" for knob, v in change.items())],
    )
    after = memory_report(again, load_architecture(config.model.base))
    assert after["cards"]["RTX 3090"]["fits"] and after["host"] > 30 * GIB
    assert "in host memory" in "\n".join(memory_text(after))


def test_plan_tells_memory_and_work(tmp_path: Path, make_index: Callable[..., ShardIndex]) -> None:
    from launch.verbs.plan import make_plan, plan_text

    make_index(tmp_path / "shards", CORPUS, num_shards=4)
    config = load_config([CONFIGS / "emoverse_8b.yaml"], [f"data.shards={tmp_path / 'shards'}"])
    _, _, report = make_plan(config)
    text = plan_text(report)
    for words in ("memory per GPU, estimated:", "RTX 3090", "does not fit", "TFLOP per sample"):
        assert words in text
    assert report["memory"]["cards"]["RTX 3090"]["fits"] is False


def test_work_is_the_reference_s() -> None:
    """TFLOP of a training step on 2,254 tokens with the head at every position."""
    from emoverse.estimate.flops import sample_flops

    figures = {"internvl2-4b": (42.8, 60.1, 12_582_912), "internvl2-8b": (76.8, 109.6, 20_971_520)}
    for name, (plain, recomputed, adapters) in figures.items():
        found = sample_flops(
            REGISTRY[name], tokens=2254, frames=8, rows=2254, lora_parameters=adapters
        )
        assert found.vision / 8e12 == pytest.approx(0.724, rel=0.005)
        assert found.step(recompute=False) / 1e12 == pytest.approx(plain, rel=0.01)
        assert found.step(recompute=True) / 1e12 == pytest.approx(recomputed, rel=0.01)


def test_torch_is_not_needed() -> None:
    modules = "emoverse.estimate.memory, emoverse.estimate.flops"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent
    )
    assert done.stdout.strip() == "False", done.stderr
