"""What a stage tells while it trains: the log line, metrics.jsonl, tensorboard, Weights & Biases.

In: one `StepResult` per step and the step's counts over all ranks. Out: RUN/STAGE/metrics.jsonl,
one JSON object per line, told apart by "kind"; every key is explained in docs/telemetry.md.
"step" counts finished optimiser steps; a resumed stage drops the lines of the steps it repeats, so
every step stands in the file once.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from data_shards.tasks import TASKS, Task
from emoverse.engine.distributed import World
from emoverse.engine.step_types import StepResult
from emoverse.estimate.flops import PEAK_FLOPS
from emoverse.models.architecture import Architecture
from emoverse.run_dir import storage
from emoverse.training.telemetry_line import format_line, straggler


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


def total_memory_bytes(device: torch.device) -> int | None:
    """Memory of the GPU; None on a CPU, which is shared with others."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


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
    wait_s: Sequence[float]  # per rank: waited for its data
    forward_s: Sequence[float]  # per rank: the forward passes of the step before
    vote_s: Sequence[float]  # per rank: waited for the other ranks before the step before
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
        work: Path | None = None,
        wandb: Callable[[], Any] | None = None,
        skipped: int = 0,
        flops: float | None = None,
        print_line: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`flops`: FLOPs per packed token; with a known GPU it gives the MFU.

        `wandb`: begins a run of Weights & Biases. `skipped`: steps passed over before this launch.
        `work`: of the lease; metrics.jsonl is renamed out of it, so a former owner cannot touch it.
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

    def say(self, text: str, step: int) -> None:
        """One line for the user, kept in the file as a note."""
        if self._world.is_main:
            self._show(f"{self._stage} {text}")
            self._write({"kind": "note", "step": step, "text": text})

    def start(self, step: int, **facts: Any) -> None:
        """First record of a launch."""
        rates = {task.value: float(rate) for task, rate in self._rates.items()}
        self._write({"kind": "start", "step": step, "rates": rates, **facts})

    def sync(self) -> None:
        """Before a checkpoint: a resumed stage repeats no step whose line a power cut has taken."""
        if self._file is not None:
            self._file.sync()

    def saved(self, step: int, *, seconds: float, size: int) -> None:
        """A checkpoint of `step`, of `size` bytes, is on the disk; training stood for `seconds`."""
        self._checkpoint_step = step
        self._pause_s += seconds
        self._write({"kind": "save", "step": step, "seconds": seconds, "bytes": size})

    def skipped(self, step: int, *, reason: str, dump: str, count: int) -> None:
        """`step` was passed over: what is in it stands in the file `dump`; `count` so far."""
        self._skipped = count
        self.say(f"step {step} was not used: {reason}; its samples: {dump}", step)
        self._write({"kind": "skip", "step": step, "reason": reason, "dump": dump})

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

    def end(self, step: int, *, reason: str, audit: str, skipped: int) -> None:
        """Last record of a launch: `reason` is "done" or "stopped"."""
        seconds = self._clock() - self._started
        facts = {"reason": reason, "audit": audit, "skipped": skipped, "seconds": seconds}
        self._write({"kind": "end", "step": step, **facts})
        self.close()

    def close(self) -> None:
        """Also without an end record, when the stage fails."""
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
        record = {
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
            "ranks": self._by_rank(),
            "memory_bytes": peak_memory_bytes(self._world.device),
            "memory_total_bytes": total_memory_bytes(self._world.device),
            "mfu": per_second / (peak * self._world.world_size) if per_second and peak else None,
            "eta_s": (self._num_steps - step) * seconds / num_steps,
            "checkpoint_step": self._checkpoint_step,
            "skipped": self._skipped,
        }
        self._write(record)
        self._show(format_line(self._stage, self._num_steps, record))
        slow = straggler(record["ranks"], seconds)
        if slow is not None:
            self.say(slow, step)
        self._draw(scalars(record), step)

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

    def _by_rank(self) -> list[dict[str, float]]:
        """Seconds of each rank in the interval; the last step's come with the next interval."""
        return [
            {
                "data_s": sum(counts.wait_s[rank] for counts in self._counts),
                "forward_s": sum(counts.forward_s[rank] for counts in self._counts),
                "vote_s": sum(counts.vote_s[rank] for counts in self._counts),
            }
            for rank in range(self._world.world_size)
        ]

    def _draw(self, curves: Sequence[tuple[str, float]], step: int) -> None:
        """For tensorboard and W&B, without which a training goes on whatever befalls them."""
        try:
            for tag, value in curves if self._writer is not None else ():
                self._writer.add_scalar(tag, value, step)
        except OSError as error:
            self._writer = None  # its thread has ended and cannot be started again
            self.say(f"goes on without tensorboard, which cannot write: {error}", step)
        try:
            if self._wandb is not None:
                self._wandb.log({f"{self._stage}/{tag}": value for tag, value in curves})
        except Exception as error:
            self._wandb = None
            self.say(f"goes on without Weights & Biases: {type(error).__name__}: {error}", step)

    def _show(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the log may be on the disk that is full
            self._print(text)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        error = self._file.write(record)
        if error is not None:
            self._show(f"{self._stage} metrics.jsonl cannot be written: {error}; trying again")


class JsonLines:
    """A file that gets one JSON object per line, each as soon as it is written.

    What does not fit on the disk waits here and is written first when there is room again, so a
    full disk costs no line and never ends a training.
    """

    def __init__(self, path: Path, content: str, *, work: Path) -> None:
        """A new file at `path` that begins with `content`; made in `work`."""
        temporary = work / f"{path.name}.tmp"
        temporary.write_text(content)
        storage.sync(temporary)
        self._file = temporary.open("ab", buffering=0)
        temporary.replace(path)
        self._waiting = b""
        self._told = False

    def write(self, record: Mapping[str, Any]) -> OSError | None:
        """Adds a line; the error that keeps it waiting, the first time that it does."""
        self._waiting += (json.dumps(record) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            told, self._told = self._told, True
            return None if told else error
        self._told = False
        return None

    def sync(self) -> None:
        """Forces the lines onto the disk."""
        with contextlib.suppress(OSError):  # as above: no reason to end
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """What still waits is lost."""
        self._file.close()


def _event_writer(stage_dir: Path, start_step: int) -> Any:
    # Imported here: tensorboard costs half a second and is wanted on rank 0 only.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(stage_dir / "tensorboard"), purge_step=start_step + 1)


def begin_wandb(project: str, run_dir: Path, stage: str) -> Callable[[], Any]:
    """What begins, or continues, this stage's run of Weights & Biases.

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
        import wandb  # optional, and slow to import

        name = f"{run_dir.name}/{stage}"
        return wandb.init(project=project, name=name, id=digest, resume="allow", dir=str(run_dir))

    return begin


def scalars(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The curves of an interval for tensorboard."""
    speeds = ("samples_per_s", "tokens_per_s", "data_wait", "memory_bytes", "mfu")
    names = ("loss", "grad_norm", "imbalance", "tokens_per_pack", *speeds)
    found = [(name, record[name]) for name in names if record[name] is not None]
    found += [(f"lr/{group}", value) for group, value in record["lr"].items()]
    for task, row in record["task"].items():
        found += [(f"{key}/{task}", row[key]) for key in ("loss", "mix") if row[key] is not None]
    return found


# What says something about the launch and not about a step is kept whatever is repeated.
KEPT = ("start", "end")


def kept_lines(path: Path, step: int) -> str:
    """The file without records of steps after `step`, which are repeated, and a torn last line."""
    if not path.exists():
        return ""
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that a crash cut off
        if record["step"] <= step or record["kind"] in KEPT:
            kept.append(line + "\n")
    return "".join(kept)
