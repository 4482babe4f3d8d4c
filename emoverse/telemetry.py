"""What a stage tells while it trains: the log line, metrics.jsonl, tensorboard.

In: one `StepResult` per step and the step's counts over all ranks. Out: RUN/STAGE/metrics.jsonl,
one JSON object per line, told apart by "kind":
  start     step, resumed, world_size, zero_stage, trainable, num_steps, num_samples, rates, lineage
  step      step, loss
  interval  step, loss, task {name: {loss, samples, mix, rate, tokens, weight_share, loss_share}},
            lr {part: rate}, grad_norm, samples_per_s, tokens_per_s, data_wait, imbalance,
            tokens_per_pack, memory_bytes, mfu, eta_s, checkpoint_step
  note      step, text
  end       step, seconds, audit, reason
"step" counts finished optimiser steps; a resumed stage drops the lines after the step it resumes
from, so every step stands in the file once.
"""

import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

import torch

from data_shards.tasks import TASKS, Task
from emoverse.distributed import World
from emoverse.engine import StepResult
from emoverse.models.architecture import Architecture
from emoverse.work import PEAK_FLOPS


def peak_flops(device: torch.device) -> float | None:
    """Peak of this device; None on CPU and unknown GPUs: no MFU is better than a wrong one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory in use so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flops_per_token(architecture: Architecture, counts: Mapping[str, int]) -> float:
    """FLOPs of a packed token through a frozen LLM with adapters, matrix products of layers only.

    `counts` are `parameter_counts`. Forward costs 2 per weight, the gradient of the input 2 more;
    adapters need their own gradient too: 6. The embedding costs nothing and the head runs on few
    rows; attention scores are left out as well, so an MFU from this is a lower bound.
    """
    frozen = counts["llm"] - 2 * architecture.llm.vocab * architecture.llm.hidden
    return 4.0 * frozen + 6.0 * counts["lora_llm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """One step over all ranks."""

    samples: Mapping[Task, int]
    tokens: int  # packed tokens, supervised or not
    wait_s: float  # longest time that a rank waited for its data
    most_tokens: int = 0  # of one rank
    packs: int = 0  # of all ranks, the empty ones that keep them together included


class Telemetry:
    """Collects steps, and writes and prints an interval every `log_every` of them.

    Rank 0 writes; on the other ranks every method does nothing.
    """

    def __init__(
        self,
        *,
        stage_dir: Path,
        stage: str,
        rates: Mapping[Task, Fraction],
        num_steps: int,
        start_step: int,
        log_every: int,
        world: World,
        tensorboard: bool,
        flops: float | None = None,
        print_line: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`flops`: FLOPs per packed token; with a known GPU it gives the MFU."""
        self._stage, self._rates, self._num_steps = stage, dict(rates), num_steps
        self._log_every, self._world, self._flops = log_every, world, flops
        self._print, self._clock = print_line, clock
        self._checkpoint_step = start_step
        self._started = self._clock()
        self._file: TextIO | None = None
        self._writer: Any = None
        self._reset()
        if not world.is_main:
            return
        stage_dir.mkdir(parents=True, exist_ok=True)
        path = stage_dir / "metrics.jsonl"
        drop_after(path, start_step)
        self._file = path.open("a", buffering=1)  # a line reaches the file when it is written
        if tensorboard:
            self._writer = _event_writer(stage_dir, start_step)

    def _reset(self) -> None:
        self._since = self._clock()
        self._steps: list[StepResult] = []
        self._counts: list[StepCounts] = []

    def say(self, text: str, step: int) -> None:
        """One line for the user, kept in the file as a note."""
        if self._world.is_main:
            self._print(f"{self._stage} {text}")
            self._write({"kind": "note", "step": step, "text": text})

    def start(self, step: int, **facts: Any) -> None:
        """First record of a launch."""
        rates = {task.value: float(rate) for task, rate in self._rates.items()}
        self._write({"kind": "start", "step": step, "rates": rates, **facts})

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is on the disk."""
        self._checkpoint_step = step

    def record(
        self, step: int, result: StepResult, counts: StepCounts, lr: Mapping[str, float]
    ) -> None:
        """After `step` finished steps; `lr` is what the last one used, by part of the model."""
        if not self._world.is_main:
            return
        self._write({"kind": "step", "step": step, "loss": result.loss})
        self._steps.append(result)
        self._counts.append(counts)
        if step % self._log_every == 0 or step == self._num_steps:
            self._interval(step, lr)
            self._reset()

    def end(self, step: int, *, reason: str, audit: str) -> None:
        """Last record of a launch: `reason` is "done" or "stopped"."""
        seconds = self._clock() - self._started
        self._write(
            {"kind": "end", "step": step, "reason": reason, "audit": audit, "seconds": seconds}
        )
        self.close()

    def close(self) -> None:
        """Also without an end record, when the stage fails."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        self._file = self._writer = None

    def _interval(self, step: int, lr: Mapping[str, float]) -> None:
        seconds = max(self._clock() - self._since, 1e-9)
        num_steps = len(self._steps)
        samples = sum(sum(counts.samples.values()) for counts in self._counts)
        tokens = sum(counts.tokens for counts in self._counts)
        peak = peak_flops(self._world.device)
        per_second = self._flops * tokens / seconds if self._flops else None
        record = {
            "kind": "interval",
            "step": step,
            "loss": sum(result.loss for result in self._steps) / num_steps,
            "task": self._by_task(samples),
            "lr": dict(lr),
            "grad_norm": self._steps[-1].grad_norm,
            "samples_per_s": samples / seconds,
            "tokens_per_s": tokens / seconds,
            "data_wait": sum(counts.wait_s for counts in self._counts) / seconds,
            **self._balance(tokens),
            "memory_bytes": peak_memory_bytes(self._world.device),
            "mfu": per_second / (peak * self._world.world_size) if per_second and peak else None,
            "eta_s": (self._num_steps - step) * seconds / num_steps,
            "checkpoint_step": self._checkpoint_step,
        }
        self._write(record)
        self._print(format_line(self._stage, self._num_steps, record))
        if self._writer is not None:
            for tag, value in scalars(record):
                self._writer.add_scalar(tag, value, step)

    def _balance(self, tokens: int) -> dict[str, float]:
        """How evenly the ranks shared the interval, and how full their packs were.

        `imbalance`: tokens of the fullest rank over the mean, step by step; 1 is perfect, and the
        others wait for imbalance - 1 of their time.
        """
        fullest = sum(counts.most_tokens for counts in self._counts)
        packs = sum(counts.packs for counts in self._counts)
        return {
            "imbalance": fullest * self._world.world_size / max(tokens, 1),
            "tokens_per_pack": tokens / max(packs, 1),
        }

    def _by_task(self, all_samples: int) -> dict[str, dict[str, float]]:
        all_weight = sum(sum(result.task_weight) for result in self._steps)
        all_loss = sum(sum(result.task_loss) for result in self._steps)
        rows = {}
        for number, task in enumerate(TASKS):
            if task not in self._rates:
                continue
            weight = sum(result.task_weight[number] for result in self._steps)
            loss = sum(result.task_loss[number] for result in self._steps)
            samples = sum(counts.samples.get(task, 0) for counts in self._counts)
            rows[task.value] = {
                "loss": loss / weight if weight else None,
                "samples": samples,
                "mix": samples / all_samples,
                "rate": float(self._rates[task]),
                "tokens": sum(result.task_tokens[number] for result in self._steps),
                "weight_share": weight / all_weight,
                "loss_share": loss / all_loss if all_loss else 0.0,
            }
        return rows

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")


def _event_writer(stage_dir: Path, start_step: int) -> Any:
    # Imported here: tensorboard costs half a second and is wanted on rank 0 only.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(stage_dir / "tensorboard"), purge_step=start_step + 1)


def scalars(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The curves of an interval for tensorboard."""
    speeds = ("samples_per_s", "tokens_per_s", "data_wait", "memory_bytes", "mfu")
    names = ("loss", "grad_norm", "imbalance", "tokens_per_pack", *speeds)
    found = [(name, record[name]) for name in names if record[name] is not None]
    found += [(f"lr/{group}", value) for group, value in record["lr"].items()]
    for task, row in record["task"].items():
        found += [(f"{key}/{task}", row[key]) for key in ("loss", "mix") if row[key] is not None]
    return found


def drop_after(path: Path, step: int) -> None:
    """Removes records of steps after `step` and a torn last line; resuming repeats those steps."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that a crash cut off
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


# The log line ----------------------------------------------------------------------------------


def format_line(stage: str, num_steps: int, record: Mapping[str, Any]) -> str:
    """One grep-able line per interval, fields in a fixed order."""
    step = record["step"]
    rows = record["task"]
    losses = " ".join(f"{task} {_number(row['loss'])}" for task, row in rows.items())
    mix = "/".join(f"{100 * row['mix']:.1f}" for row in rows.values())
    rates = "/".join(f"{100 * row['rate']:.1f}" for row in rows.values())
    speed = f"{_short(record['samples_per_s'])} smp/s {_short(record['tokens_per_s'])} tok/s"
    mfu = f" mfu {record['mfu']:.0%}" if record["mfu"] is not None else ""
    rate = "/".join(f"{value:.1e}" for value in _distinct(record["lr"].values()))
    parts = (
        f"{stage} step {step}/{num_steps} {100 * step / num_steps:.1f}%",
        f"loss {record['loss']:.3f} ({losses})",
        f"mix {mix} of {rates}",
        f"lr {rate} gn {record['grad_norm']:.2f}",
        f"{speed}{mfu} data {record['data_wait']:.0%}",
        f"mem {record['memory_bytes'] / 2**30:.1f}G",
        f"eta {format_duration(record['eta_s'])}",
        f"ckpt {step - record['checkpoint_step']} steps ago",
    )
    return " | ".join(parts)


def _distinct(values: Any) -> list[float]:
    return list(dict.fromkeys(values))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.1f}"


def format_duration(seconds: float) -> str:
    """3h12m, 4m05s or 12s."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
