"""What a stage logs: the log line, metrics.jsonl, tensorboard, Weights & Biases.

In: one `StepResult` per step and the step's counts over all ranks. Out: RUN/STAGE/metrics.jsonl,
one JSON object per line with a "kind"; docs/telemetry.md explains every key. "step" counts
finished optimiser steps; a resumed stage drops the lines of the steps it repeats, so every step is
in the file once.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data_shards.files import flush_to_disk, read_complete_lines
from data_shards.progress import format_duration
from data_shards.tasks import TASKS, Task
from emoverse.engine.distributed import World
from emoverse.engine.step_types import StepResult
from emoverse.estimate.flops import PEAK_FLOPS
from emoverse.models.architecture import Architecture

# A rank is reported as slow if it needs this many times what the others need, and the difference is
# at least this share of a step.
SLOW_FACTOR, SLOW_SHARE = 1.2, 0.05
# Records about a launch, which are kept when steps are repeated.
LAUNCH_KINDS = ("start", "end")


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the device; None if unknown: no MFU is better than a wrong one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory_bytes(device: torch.device) -> int | None:
    """Memory of the GPU; None on CPU, where other processes share it."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def flops_per_token(architecture: Architecture, counts: Mapping[str, int]) -> float:
    """FLOPs per packed token through a frozen LLM with adapters: matrix products of layers only.

    `counts` are `parameter_counts`. Per weight, forward costs 2 and the gradient of the input 2;
    adapters also need their own gradient: 6. Embedding, head (few rows) and attention scores are
    not counted, so the MFU is a lower bound.
    """
    frozen = counts["llm"] - 2 * architecture.llm.vocab * architecture.llm.hidden
    return 4.0 * frozen + 6.0 * counts["lora_llm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """One step over all ranks."""

    samples: Mapping[Task, int]
    tokens: int  # packed tokens, supervised or not
    wait_s: Sequence[float]  # per rank: waiting for data
    forward_s: Sequence[float]  # per rank: the forward passes of the step before
    consensus_s: Sequence[float]  # per rank: waiting for the other ranks, in the step before
    most_tokens: int = 0  # of one rank
    packs: int = 0  # of all ranks, including the empty ones that keep them in step


class Telemetry:
    """Collects steps; writes and prints an interval every `log_every` steps.

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
        work: Path | None = None,
        wandb: Callable[[], Any] | None = None,
        skipped: int = 0,
        flops: float | None = None,
        print_line: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the files of the stage; on rank 0 only.

        Args:
            work: work folder of the run lock. metrics.jsonl is renamed from it, so that a former
                owner cannot replace the file of its successor.
            wandb: starts a run of Weights & Biases.
            skipped: steps skipped before this launch.
            flops: FLOPs per packed token; gives the MFU on a known GPU.
        """
        self._stage, self._rates, self._num_steps = stage, dict(rates), num_steps
        self._log_every, self._world, self._flops = log_every, world, flops
        self._print, self._clock = print_line, clock
        self._checkpoint_step, self._skipped = start_step, skipped
        self._started = self._clock()
        self._file: JsonLines | None = None
        self._writer: Any = None
        self._wandb: Any = None
        self._reset()
        if not world.is_main:
            return
        stage_dir.mkdir(parents=True, exist_ok=True)
        path = stage_dir / "metrics.jsonl"
        self._file = JsonLines(path, kept_lines(path, start_step), work=work or stage_dir)
        if tensorboard:
            self._writer = _event_writer(stage_dir, start_step)
        if wandb is not None:
            self._wandb = wandb()

    def _reset(self) -> None:
        self._since = self._clock()
        self._pause_s = 0.0  # spent on checkpoints
        self._steps: list[StepResult] = []
        self._counts: list[StepCounts] = []

    def log(self, text: str, step: int) -> None:
        """Print one line for the user, and record it as a note."""
        if self._world.is_main:
            self._print_safely(f"{self._stage} {text}")
            self._write({"kind": "note", "step": step, "text": text})

    def start(self, step: int, **facts: Any) -> None:
        """Write the first record of a launch."""
        rates = {task.value: float(rate) for task, rate in self._rates.items()}
        self._write({"kind": "start", "step": step, "rates": rates, **facts})

    def sync(self) -> None:
        """Flush to disk before a checkpoint: its steps are not repeated, so no line may be lost."""
        if self._file is not None:
            self._file.sync()

    def saved(self, step: int, *, seconds: float, size: int) -> None:
        """Record a checkpoint of `size` bytes that paused training for `seconds`."""
        self._checkpoint_step = step
        self._pause_s += seconds
        self._write({"kind": "save", "step": step, "seconds": seconds, "bytes": size})

    def skipped(self, step: int, *, reason: str, dump: str, count: int) -> None:
        """Record a skipped step, the `count`-th; the file `dump` lists its samples."""
        self._skipped = count
        self.log(f"step {step} was not used: {reason}; its samples: {dump}", step)
        self._write({"kind": "skip", "step": step, "reason": reason, "dump": dump})

    def record(
        self, step: int, result: StepResult, counts: StepCounts, lr: Mapping[str, float]
    ) -> None:
        """Record a finished step; `lr`: learning rates that it used, by parameter group."""
        if not self._world.is_main:
            return
        self._write({"kind": "step", "step": step, "loss": result.loss})
        self._steps.append(result)
        self._counts.append(counts)
        if step % self._log_every == 0 or step == self._num_steps:
            self._interval(step, lr)
            self._reset()

    def end(self, step: int, *, reason: str, audit: str, skipped: int) -> None:
        """Write the last record of a launch; `reason` is "done" or "stopped"."""
        seconds = self._clock() - self._started
        facts = {"reason": reason, "audit": audit, "skipped": skipped, "seconds": seconds}
        self._write({"kind": "end", "step": step, **facts})
        self.close()

    def close(self) -> None:
        """Close all outputs, also without an end record when the stage fails."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            with contextlib.suppress(OSError):  # it flushes, and the disk may be full
                self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._writer = self._wandb = None

    def _interval(self, step: int, lr: Mapping[str, float]) -> None:
        seconds = max(self._clock() - self._since, 1e-9)
        num_steps = len(self._steps)
        samples = sum(sum(counts.samples.values()) for counts in self._counts)
        tokens = sum(counts.tokens for counts in self._counts)
        peak = peak_flops(self._world.device)
        per_second = self._flops * tokens / seconds if self._flops else None
        ranks = self._by_rank()
        record: dict[str, Any] = {
            "kind": "interval",
            "step": step,
            "loss": sum(result.loss for result in self._steps) / num_steps,
            "task": self._by_task(samples),
            "lr": dict(lr),
            "grad_norm": self._steps[-1].grad_norm,
            "samples_per_s": samples / seconds,
            "tokens_per_s": tokens / seconds,
            "data_wait": sum(max(counts.wait_s) for counts in self._counts) / seconds,
            "checkpoint_wait": self._pause_s / seconds,
            **self._balance(tokens),
            "ranks": ranks,
            "memory_bytes": peak_memory_bytes(self._world.device),
            "memory_total_bytes": total_memory_bytes(self._world.device),
            "mfu": per_second / (peak * self._world.world_size) if per_second and peak else None,
            "eta_s": (self._num_steps - step) * seconds / num_steps,
            "checkpoint_step": self._checkpoint_step,
            "skipped": self._skipped,
        }
        self._write(record)
        self._print_safely(format_line(self._stage, self._num_steps, record))
        slow = straggler(ranks, seconds)
        if slow is not None:
            self.log(slow, step)
        self._draw(scalars(record), step)

    def _balance(self, tokens: int) -> dict[str, float]:
        """How evenly the ranks shared the interval, and how full their packs were.

        `imbalance`: tokens of the fullest rank over the mean, step by step. 1 is perfect; else the
        other ranks wait for (imbalance - 1) of their time.
        """
        fullest = sum(counts.most_tokens for counts in self._counts)
        packs = sum(counts.packs for counts in self._counts)
        return {
            "imbalance": fullest * self._world.world_size / max(tokens, 1),
            "tokens_per_pack": tokens / max(packs, 1),
        }

    def _by_task(self, all_samples: int) -> dict[str, dict[str, float | None]]:
        all_weight = sum(sum(result.task_weight) for result in self._steps)
        all_loss = sum(sum(result.task_loss) for result in self._steps)
        rows: dict[str, dict[str, float | None]] = {}
        for index, task in enumerate(TASKS):
            if task not in self._rates:
                continue
            weight = sum(result.task_weight[index] for result in self._steps)
            loss = sum(result.task_loss[index] for result in self._steps)
            samples = sum(counts.samples.get(task, 0) for counts in self._counts)
            rows[task.value] = {
                "loss": loss / weight if weight else None,
                "samples": samples,
                "mix": samples / all_samples,
                "rate": float(self._rates[task]),
                "tokens": sum(result.task_tokens[index] for result in self._steps),
                "weight_share": weight / all_weight,
                "loss_share": loss / all_loss if all_loss else 0.0,
            }
        return rows

    def _by_rank(self) -> list[dict[str, float]]:
        """Seconds of each rank in the interval; those of its last step are in the next interval."""
        return [
            {
                "data_s": sum(counts.wait_s[rank] for counts in self._counts),
                "forward_s": sum(counts.forward_s[rank] for counts in self._counts),
                "vote_s": sum(counts.consensus_s[rank] for counts in self._counts),
            }
            for rank in range(self._world.world_size)
        ]

    def _draw(self, curves: Sequence[tuple[str, float]], step: int) -> None:
        """Send to tensorboard and W&B; training continues without them if they fail."""
        try:
            for tag, value in curves if self._writer is not None else ():
                self._writer.add_scalar(tag, value, step)
        except OSError as error:
            self._writer = None  # its thread has ended and cannot be restarted
            self.log(f"continues without tensorboard, which cannot write: {error}", step)
        try:
            if self._wandb is not None:
                self._wandb.log({f"{self._stage}/{tag}": value for tag, value in curves})
        except Exception as error:
            self._wandb = None
            self.log(f"continues without Weights & Biases: {type(error).__name__}: {error}", step)

    def _print_safely(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the log may be on the full disk
            self._print(text)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        error = self._file.write(record)
        if error is not None:
            self._print_safely(
                f"{self._stage} metrics.jsonl cannot be written: {error}; trying again"
            )


class JsonLines:
    """A JSON lines file that is appended to without buffering.

    Lines that do not fit on the disk are kept in memory and written first once there is room, so a
    full disk loses no line and never ends a training.
    """

    def __init__(self, path: Path, content: str, *, work: Path) -> None:
        """Create `path` with `content`, through a rename from the folder `work`."""
        temporary = work / f"{path.name}.tmp"
        temporary.write_text(content)
        flush_to_disk(temporary)
        self._file = temporary.open("ab", buffering=0)
        temporary.replace(path)
        self._pending = b""
        self._reported = False

    def write(self, record: Mapping[str, Any]) -> OSError | None:
        """Add a line. Returns the error that delays it, the first time only."""
        self._pending += (json.dumps(record) + "\n").encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            reported, self._reported = self._reported, True
            return None if reported else error
        self._reported = False
        return None

    def sync(self) -> None:
        """Flush the lines to disk."""
        with contextlib.suppress(OSError):  # a full disk never ends a training
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; lines that are still delayed are lost."""
        self._file.close()


def _event_writer(stage_dir: Path, start_step: int) -> Any:
    # Imported here: tensorboard costs half a second and only rank 0 uses it.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(stage_dir / "tensorboard"), purge_step=start_step + 1)


def begin_wandb(project: str, run_dir: Path, stage: str) -> Callable[[], Any]:
    """A function that starts, or continues, the run of Weights & Biases of this stage.

    Raises:
        ValueError: the package is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"train.wandb: {project} needs the package wandb, which is not installed; run pip "
            "install 'emoverse[wandb]', or leave the key blank"
        )
    digest = hashlib.sha256(f"{run_dir.resolve()}/{stage}".encode()).hexdigest()[:16]

    def begin() -> Any:
        import wandb  # type: ignore[import-not-found,unused-ignore]  # optional, slow

        name = f"{run_dir.name}/{stage}"
        return wandb.init(project=project, name=name, id=digest, resume="allow", dir=str(run_dir))

    return begin


def scalars(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The values of an interval that are drawn as curves."""
    speeds = ("samples_per_s", "tokens_per_s", "data_wait", "memory_bytes", "mfu")
    names = ("loss", "grad_norm", "imbalance", "tokens_per_pack", *speeds)
    curves = [(name, record[name]) for name in names if record[name] is not None]
    curves += [(f"lr/{group}", value) for group, value in record["lr"].items()]
    for task, row in record["task"].items():
        curves += [(f"{key}/{task}", row[key]) for key in ("loss", "mix") if row[key] is not None]
    return curves


def kept_lines(path: Path, step: int) -> str:
    """The lines of an earlier launch without records of steps after `step`, which are repeated."""
    records = read_complete_lines(path)
    kept = (r for r in records if r["step"] <= step or r["kind"] in LAUNCH_KINDS)
    return "".join(json.dumps(record) + "\n" for record in kept)


# Text ------------------------------------------------------------------------------------------


def format_line(stage: str, num_steps: int, record: Mapping[str, Any]) -> str:
    """The log line of an interval: one line, fields in a fixed order, easy to grep."""
    step = record["step"]
    rows = record["task"]
    losses = " ".join(f"{task} {_or_dash(row['loss'])}" for task, row in rows.items())
    mix = "/".join(f"{100 * row['mix']:.1f}" for row in rows.values())
    rates = "/".join(f"{100 * row['rate']:.1f}" for row in rows.values())
    speed = f"{_short(record['samples_per_s'])} smp/s {_short(record['tokens_per_s'])} tok/s"
    mfu = f" mfu {record['mfu']:.0%}" if record["mfu"] is not None else ""
    rate = "/".join(f"{value:.1e}" for value in _distinct(record["lr"].values()))
    total = record["memory_total_bytes"]
    fields = [
        f"{stage} step {step}/{num_steps} {100 * step / num_steps:.1f}%",
        f"loss {record['loss']:.3f} ({losses})",
        f"mix {mix} of {rates}",
        f"lr {rate} gn {record['grad_norm']:.2f}",
        f"{speed}{mfu} data {record['data_wait']:.0%}",
        f"mem {record['memory_bytes'] / 2**30:.1f}{f'/{total / 2**30:.1f}' if total else ''}G",
        f"eta {format_duration(record['eta_s'])}",
        f"ckpt {step - record['checkpoint_step']} steps ago",
    ]
    if record["skipped"]:
        fields.append(f"skipped {record['skipped']}")
    return " | ".join(fields)


def straggler(ranks: Sequence[Mapping[str, float]], seconds: float) -> str | None:
    """A sentence about the rank that the others wait for; None if there is none.

    Args:
        ranks: per rank its own seconds in an interval, waiting for data and in forward passes,
            without waiting for other ranks.
        seconds: of the interval.
    """
    if len(ranks) < 2:
        return None
    own = [rank["data_s"] + rank["forward_s"] for rank in ranks]
    slow = max(range(len(own)), key=own.__getitem__)
    usual = median(own[:slow] + own[slow + 1 :])
    if own[slow] < SLOW_FACTOR * usual or own[slow] - usual < SLOW_SHARE * seconds:
        return None
    row = ranks[slow]
    return (
        f"rank {slow} slows the others down: {row['data_s'] / seconds:.0%} of the time waiting for "
        f"data, {row['forward_s'] / seconds:.0%} in forward passes; the others "
        f"{usual / seconds:.0%} for both"
    )


def _distinct(values: Iterable[float]) -> list[float]:
    return list(dict.fromkeys(values))


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.1f}"
