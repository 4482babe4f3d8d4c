"""Telemetry: the log line, the file's schema, and that every step stands in it once."""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_shards.tasks import Task
from emoverse.engine.distributed import World
from emoverse.engine.step_types import StepResult
from emoverse.models.architecture import REGISTRY, parameter_counts
from emoverse.training.telemetry import (
    StepCounts,
    Telemetry,
    begin_wandb,
    flops_per_token,
    kept_lines,
    peak_flops,
    straggler,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
RATES = {Task.MSA: Fraction(2, 5), Task.ER: Fraction(1, 5), Task.FER: Fraction(2, 5)}
WHY = "division by zero"
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
    "checkpoint_wait",
    "ranks",
    "memory_total_bytes",
    "skipped",
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
        consensus_s=[0.08, 0.0],
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
            telemetry.saved(2, seconds=0.5, size=70)
    telemetry.end(5, reason="done", audit="00ff", skipped=0)
    assert len(lines) == 3  # steps 2, 4 and the last one
    assert lines[1].startswith(
        "stage1 step 4/5 80.0% | loss 4.500 (msa 1.00 er 3.00 fer -) | "
        "mix 50.0/50.0/0.0 of 40.0/20.0/40.0 | lr 1.0e-05/2.0e-05 gn 0.50 | "
        "4.0 smp/s 500.0 tok/s data 10% | mem "
    )
    assert lines[1].endswith(" | eta 1s | ckpt 2 steps ago")
    records = read(tmp_path)
    kinds = " ".join(record["kind"] for record in records)
    assert kinds == "start step step interval save step step interval step interval end"
    assert records[4] == {"kind": "save", "step": 2, "seconds": 0.5, "bytes": 70}
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
    assert interval["data_wait"] == 0.1 and interval["checkpoint_wait"] == 0
    assert records[7]["checkpoint_wait"] == 0.25  # half a second of the next interval's two
    assert interval["ranks"][1] == {"data_s": 0.2, "forward_s": 0.4, "vote_s": 0.0}
    assert interval["skipped"] == 0 and interval["memory_total_bytes"] is None
    # Two ranks, one with 300 of 500 tokens: it does 1.2 times its share.
    assert (interval["imbalance"], interval["tokens_per_pack"]) == (1.2, 125)
    assert records[-1] == {**records[-1], "kind": "end", "reason": "done", "audit": "00ff"}


@pytest.mark.promise(9)
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
    again.end(5, reason="done", audit="", skipped=0)
    records = read(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in records if r["kind"] == "interval"] == [2, 4, 5]
    assert [r["step"] for r in records if r["kind"] == "start"] == [0, 2]


def documented() -> dict[str, set[str]]:
    """Keys per kind of record, as the tables of docs/telemetry.md say."""
    found: dict[str, set[str]] = {}
    kind = ""
    for line in (ROOT / "docs" / "telemetry.md").read_text().splitlines():
        if line.startswith("## `"):
            kind = line.split("`")[1]
            found[kind] = {"kind", "step"}
        elif line.startswith("| `") and kind:
            found[kind] |= set(line.split("|")[1].replace("`", "").replace(" ", "").split(","))
        elif line.startswith("## "):
            kind = ""
    return found


@pytest.mark.promise(9)
def test_the_documented_keys_are_the_ones_written(tmp_path: Path) -> None:
    keys = documented()
    assert keys["interval"] == INTERVAL_KEYS
    telemetry = make(tmp_path, [])
    telemetry.log("x", 0)
    step(telemetry, 1)
    telemetry.saved(1, seconds=0.5, size=70)
    telemetry.skipped(2, reason="", dump="", count=1)
    telemetry.end(2, reason="stopped", audit="", skipped=1)
    for record in read(tmp_path):
        assert set(record) == keys[record["kind"]], record["kind"]
    assert set(keys) == {"start", "step", "interval", "save", "skip", "note", "end"}


def test_nothing_to_drop_without_a_file(tmp_path: Path) -> None:
    assert kept_lines(tmp_path / "metrics.jsonl", 3) == ""
    assert not list(tmp_path.iterdir())


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    lines: list[str] = []
    telemetry = make(tmp_path / "stage", lines, rank=1)
    telemetry.start(0)
    step(telemetry, 2)
    telemetry.log("hello", 2)
    telemetry.end(2, reason="stopped", audit="", skipped=0)
    assert lines == [] and not (tmp_path / "stage").exists()


def test_tensorboard_files_are_optional(tmp_path: Path) -> None:
    telemetry = make(tmp_path, [], tensorboard=True)
    step(telemetry, 2)
    telemetry.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_notes_are_printed_and_kept(tmp_path: Path) -> None:
    lines: list[str] = []
    telemetry = make(tmp_path, lines)
    telemetry.log("resumes", 3)
    telemetry.close()
    assert lines == ["stage1 resumes"]
    assert read(tmp_path) == [{"kind": "note", "step": 3, "text": "resumes"}]


@pytest.mark.promise(3)
def test_a_full_disk_costs_no_line_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    nowhere = os.open("/dev/full", os.O_WRONLY)
    telemetry = make(tmp_path, lines, tensorboard=True)
    step(telemetry, 1)
    assert telemetry._file is not None
    good = telemetry._file._file
    monkeypatch.setattr(telemetry._writer, "add_scalar", lambda *_: os.write(nowhere, b"x"))
    with open("/dev/full", "ab", buffering=0) as full:
        telemetry._file._file = full
        step(telemetry, 2)
        telemetry.saved(2, seconds=0.5, size=70)
        step(telemetry, 3)
    assert [line for line in lines if "No space left on device; trying again" in line] == [
        "stage1 metrics.jsonl cannot be written: [Errno 28] No space left on device; trying again"
    ]
    telemetry._file._file = SimpleNamespace(write=lambda data: good.write(data[:7]))  # in pieces
    step(telemetry, 4)
    telemetry._file._file = good
    telemetry.end(4, reason="stopped", audit="", skipped=0)
    os.close(nowhere)
    assert sum("continues without tensorboard, which cannot write" in line for line in lines) == 1
    found = [(record["kind"], record["step"]) for record in read(tmp_path)]
    assert [step for kind, step in found if kind == "step"] == [1, 2, 3, 4]
    assert [kind for kind, _ in found if kind != "note"] == [
        *("step", "step", "interval", "save", "step", "step", "interval", "end")
    ]


def test_a_service_that_fails_is_done_without(tmp_path: Path) -> None:
    lines: list[str] = []
    telemetry = make(tmp_path, lines, wandb=lambda: SimpleNamespace(log=lambda values: 1 / 0))
    step(telemetry, 2)
    telemetry.close()
    assert lines[1:] == ["stage1 continues without Weights & Biases: ZeroDivisionError: " + WHY]


def test_no_mfu_without_a_known_gpu() -> None:
    assert peak_flops(CPU) is None


def test_flops_of_the_4b_model_are_four_per_weight() -> None:
    architecture = REGISTRY["internvl2-4b"]
    lora = SimpleNamespace(preset="paper", r=8, targets=())
    counts = parameter_counts(architecture, lora, "full")
    layers = 32 * (3072 * 9216 + 3072 * 3072 + 3072 * 16384 + 8192 * 3072)
    assert flops_per_token(architecture, counts) == pytest.approx(4 * layers, rel=0.01)


def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    even = {"data_s": 1.0, "forward_s": 2.0, "vote_s": 0.0}
    assert straggler([even], 10) is None
    assert straggler([even, even, {**even, "forward_s": 2.3}], 10) is None
    assert straggler([even, even, {**even, "data_s": 1.7}], 100) is None  # too little to matter
    assert straggler([even, {**even, "data_s": 4.0}, even], 10) == (
        "rank 1 slows the others down: 40% of the time waiting for data, 20% in forward passes; "
        "the others 30% for both"
    )


def test_a_skipped_step_is_told_and_counted(tmp_path: Path) -> None:
    lines: list[str] = []
    telemetry = make(tmp_path, lines)
    step(telemetry, 1)
    telemetry.skipped(2, reason="loss is not finite: nan", dump="x.json", count=1)
    step(telemetry, 3)
    step(telemetry, 4)
    telemetry.end(4, reason="stopped", audit="", skipped=1)
    assert lines[0] == "stage1 step 2 was not used: loss is not finite: nan; its samples: x.json"
    assert lines[1].endswith(" | skipped 1")
    records = read(tmp_path)
    assert {"kind": "skip", "step": 2, "reason": "loss is not finite: nan", "dump": "x.json"} in (
        records
    )
    assert records[-1]["skipped"] == records[-2]["skipped"] == 1


WANDB = """
def tell(*words):
    with open({log!r}, "a") as log:
        print(*words, file=log)

class Run:
    def log(self, values):
        tell("log", sorted(values)[:2])

    def finish(self):
        tell("finish")

def init(**arguments):
    tell("init", sorted(arguments.items()))
    return Run()
"""


def test_weights_and_biases_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of this name on the path is used; without it the config is refused."""
    run = tmp_path / "my-run"
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"train\.wandb: lab needs the package wandb"):
        begin_wandb("lab", run, "stage1")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "wandb.py").write_text(WANDB.format(log=str(tmp_path / "log")))
    importlib.invalidate_caches()
    try:
        telemetry = make(tmp_path, [], wandb=begin_wandb("lab", run, "stage1"))
        step(telemetry, 2)
        telemetry.close()
    finally:
        sys.modules.pop("wandb", None)
    first, second, third = (tmp_path / "log").read_text().splitlines()
    assert "('name', 'my-run/stage1'), ('project', 'lab'), ('resume', 'allow')" in first
    assert second == "log ['stage1/data_wait', 'stage1/grad_norm']" and third == "finish"
