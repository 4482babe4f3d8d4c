"""Telemetry: the log line, the file's schema, and that every step stands in it once."""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_shards.tasks import Task
from emoverse.distributed import World
from emoverse.engine import StepResult
from emoverse.models.architecture import REGISTRY, parameter_counts
from emoverse.telemetry import (
    StepCounts,
    Telemetry,
    drop_after,
    flops_per_token,
    format_duration,
    peak_flops,
)

CPU = torch.device("cpu")
RATES = {Task.MSA: Fraction(2, 5), Task.ER: Fraction(1, 5), Task.FER: Fraction(2, 5)}
INTERVAL_KEYS = {
    "kind",
    "step",
    "loss",
    "task",
    "lr",
    "grad_norm",
    "samples_per_s",
    "tokens_per_s",
    "data_wait",
    "imbalance",
    "tokens_per_pack",
    "memory_bytes",
    "mfu",
    "eta_s",
    "checkpoint_step",
}


def ticking() -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += 2.0  # every look at the clock is two seconds later


def make(
    folder: Path, lines: list[str], *, rank: int = 0, start: int = 0, **more: Any
) -> Telemetry:
    clock = ticking()
    return Telemetry(
        stage_dir=folder,
        stage="stage1",
        rates=RATES,
        num_steps=5,
        start_step=start,
        log_every=2,
        world=World(rank=rank, world_size=2, local_rank=rank, device=CPU),
        print_line=lines.append,
        clock=lambda: next(clock),
        **{"tensorboard": False, **more},
    )


def step(telemetry: Telemetry, number: int) -> None:
    result = StepResult(
        loss=1.0 + number,
        task_loss=[2.0, 6.0, 0.0, 0.0, 0.0],
        task_weight=[2.0, 2.0, 0.0, 0.0, 0.0],
        task_tokens=[4, 8, 0, 0, 0],
        grad_norm=0.5,
        forward_s=0.3,
    )
    counts = StepCounts(
        samples={Task.MSA: 2, Task.ER: 2},
        tokens=500,
        wait_s=[0.02, 0.1],
        forward_s=[0.3, 0.2],
        vote_s=[0.08, 0.0],
        most_tokens=300,
        packs=4,
    )
    telemetry.record(number, result, counts, {"lora": 1e-5, "projector": 2e-5})


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_line_and_records_of_a_stage(tmp_path: Path) -> None:
    lines: list[str] = []
    telemetry = make(tmp_path, lines)
    telemetry.start(0, world_size=2)
    for number in range(1, 6):
        step(telemetry, number)
        if number == 2:
            telemetry.saved(2)
    telemetry.end(5, reason="done", audit="00ff")
    assert len(lines) == 3  # steps 2, 4 and the last one
    assert lines[1].startswith(
        "stage1 step 4/5 80.0% | loss 4.500 (msa 1.00 er 3.00 fer -) | "
        "mix 50.0/50.0/0.0 of 40.0/20.0/40.0 | lr 1.0e-05/2.0e-05 gn 0.50 | "
        "4.0 smp/s 500.0 tok/s data 10% | mem "
    )
    assert lines[1].endswith(" | eta 1s | ckpt 2 steps ago")
    records = read(tmp_path)
    assert [record["kind"] for record in records] == (
        ["start", "step", "step", "interval", "step", "step", "interval", "step", "interval", "end"]
    )
    assert records[0]["rates"] == {"msa": 0.4, "er": 0.2, "fer": 0.4}
    interval = records[3]
    assert set(interval) == INTERVAL_KEYS
    assert interval["task"]["er"] == {
        "loss": 3.0,
        "samples": 4,
        "mix": 0.5,
        "rate": 0.2,
        "tokens": 16,
        "weight_share": 0.5,
        "loss_share": 0.75,
    }
    assert interval["task"]["fer"]["loss"] is None
    assert interval["mfu"] is None and interval["memory_bytes"] > 0
    # Two ranks, one with 300 of 500 tokens: it does 1.2 times its share.
    assert (interval["imbalance"], interval["tokens_per_pack"]) == (1.2, 125)
    assert records[-1] == {**records[-1], "kind": "end", "reason": "done", "audit": "00ff"}


def test_a_resumed_stage_holds_every_step_once(tmp_path: Path) -> None:
    first = make(tmp_path, [])
    first.start(0)
    for number in range(1, 5):
        step(first, number)
    first.close()  # a crash after the checkpoint of step 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    again = make(tmp_path, [], start=2)
    again.start(2)
    for number in range(3, 6):
        step(again, number)
    again.end(5, reason="done", audit="")
    records = read(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in records if r["kind"] == "interval"] == [2, 4, 5]
    assert [r["step"] for r in records if r["kind"] == "start"] == [0, 2]


def test_nothing_to_drop_without_a_file(tmp_path: Path) -> None:
    drop_after(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    lines: list[str] = []
    telemetry = make(tmp_path / "stage", lines, rank=1)
    telemetry.start(0)
    step(telemetry, 2)
    telemetry.say("hello", 2)
    telemetry.end(2, reason="stopped", audit="")
    assert lines == [] and not (tmp_path / "stage").exists()


def test_tensorboard_files_are_optional(tmp_path: Path) -> None:
    telemetry = make(tmp_path, [], tensorboard=True)
    step(telemetry, 2)
    telemetry.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_notes_are_printed_and_kept(tmp_path: Path) -> None:
    lines: list[str] = []
    telemetry = make(tmp_path, lines)
    telemetry.say("resumes", 3)
    telemetry.close()
    assert lines == ["stage1 resumes"]
    assert read(tmp_path) == [{"kind": "note", "step": 3, "text": "resumes"}]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (245, "4m05s"), (11520, "3h12m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_no_mfu_without_a_known_gpu() -> None:
    assert peak_flops(CPU) is None


def test_flops_of_the_4b_model_are_four_per_weight() -> None:
    architecture = REGISTRY["internvl2-4b"]
    lora = SimpleNamespace(preset="paper", r=8, targets=())
    counts = parameter_counts(architecture, lora, "full")
    layers = 32 * (3072 * 9216 + 3072 * 3072 + 3072 * 16384 + 8192 * 3072)
    assert flops_per_token(architecture, counts) == pytest.approx(4 * layers, rel=0.01)
