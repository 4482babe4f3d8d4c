"""A stage while it runs: start, save, skip a bad step, stop, finish.

In: the set-up of the stage, the ranks. Out: the engine with its starting weights; checkpoints,
lists of the samples of bad steps, DONE. All methods are collective; rank 0 writes, from the work
folder of its run lock.

`StageRun.save` shows what is in a checkpoint; run_dir/checkpoint.py writes it.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from emoverse.config.deepspeed_settings import deepspeed_config
from emoverse.data.collate import Batch
from emoverse.engine.deepspeed_engine import Engine
from emoverse.engine.distributed import RankError, World, fail_together, from_main
from emoverse.engine.optim import build_optimizer, parameter_groups
from emoverse.engine.step_types import BadNumbers
from emoverse.models.architecture import parameter_counts
from emoverse.run_dir import checkpoint, storage
from emoverse.run_dir.lineage import load_starting_weights
from emoverse.run_dir.run_files import decisive_knobs, write_run_files
from emoverse.run_dir.run_lock import RunLock
from emoverse.training.loss_guard import describe_samples, write_dump
from emoverse.training.stage_build import StageSetup
from emoverse.training.stages import DONE
from emoverse.training.telemetry import Telemetry, begin_wandb, flops_per_token


@contextlib.contextmanager
def start_run(setup: StageSetup, world: World, lock: RunLock | None) -> Iterator["StageRun"]:
    """Build the engine, load the starting weights, open the telemetry; collective.

    `lock`: of the run directory, on rank 0 only.
    """
    config, stage, optim = setup.config, setup.stage, setup.section.optim
    architecture, groups = setup.model.architecture, setup.model.trainable_groups()
    counts = parameter_counts(architecture, config.model.lora, config.model.projector)
    num_trainable = sum(p.numel() for named in groups.values() for _, p in named)
    with fail_together(world, f"{stage}: engine settings"):
        optimizer = build_optimizer(parameter_groups(groups, optim), optim)
        settings = deepspeed_config(
            zero_stage=config.train.zero_stage,
            precision=config.model.precision,
            clip=optim.clip,
            world_size=world.world_size,
            num_trainable=num_trainable,
            offload=config.train.offload,
        )
        wandb = None
        if world.is_main and config.train.wandb is not None:
            wandb = begin_wandb(config.train.wandb, config.run.run_dir, stage)
        with _writing(lock) as work:
            if work is not None:
                write_run_files(config, stage, setup.index, setup.plan, settings, work=work)
    engine = Engine(setup.model, optimizer, world, settings, setup.model.deferred)
    with fail_together(world, f"{stage}: loading trained weights"):
        load_starting_weights(
            engine,
            setup.section,
            resume_from=setup.resume_from,
            parent=setup.parent,
            log=setup.notes.append,
        )
    with fail_together(world, f"{stage}: telemetry"), _writing(lock) as work:
        telemetry = Telemetry(
            stage_dir=setup.folder,
            stage=stage,
            rates=setup.section.rates,
            num_steps=setup.num_steps,
            start_step=setup.start_step,
            log_every=config.train.log_every,
            world=world,
            tensorboard=config.train.tensorboard,
            work=work,
            wandb=wandb,
            skipped=len(setup.loss_guard.skipped),
            flops=flops_per_token(architecture, counts),
        )
    try:
        _log_start(setup, world, telemetry, num_trainable)
        yield StageRun(
            setup=setup,
            world=world,
            engine=engine,
            telemetry=telemetry,
            lock=lock,
            saved_step=setup.start_step,
        )
    finally:
        telemetry.close()
        engine.close()


def _log_start(setup: StageSetup, world: World, telemetry: Telemetry, num_trainable: int) -> None:
    config, step = setup.config, setup.start_step
    for note in setup.notes:
        telemetry.log(note, step)
    begin = f"resumes from step {step}" if step else f"starts from {setup.identity['start']}"
    telemetry.log(
        f"{begin}: {setup.num_steps} steps of {config.train.global_batch_size} samples, "
        f"{num_trainable:,} trained parameters, {world.world_size} processes on "
        f"{world.device.type}, ZeRO-{config.train.zero_stage}, {config.model.precision}, "
        f"{setup.model.implementations}",
        step,
    )
    telemetry.start(
        step,
        resumed=bool(step),
        world_size=world.world_size,
        zero_stage=config.train.zero_stage,
        trainable=num_trainable,
        num_steps=setup.num_steps,
        num_samples=setup.plan.stages[setup.stage].num_samples,
        lineage=setup.identity["start"],
        accepted=setup.accepted,
    )


@dataclass(kw_only=True, slots=True)
class StageRun:
    """A stage that is ready for optimiser steps."""

    setup: StageSetup
    world: World
    engine: Engine
    telemetry: Telemetry
    lock: RunLock | None  # of the run directory, on rank 0
    saved_step: int = 0  # of the newest checkpoint
    _saved_at: float = field(default_factory=time.monotonic)

    def save_is_due(self) -> bool:
        """Whether `train.save_minutes` have passed. Clocks differ: that of rank 0 decides."""
        minutes = self.setup.config.train.save_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, step: int, *, must: bool) -> None:
        """Verify that the planned samples were trained, and write a checkpoint.

        A full or read-only disk ends the run if `must` is set, or with `train.on_save_error: stop`.

        Raises:
            RankError: nothing was saved; earlier checkpoints are unchanged.
        """
        setup, train = self.setup, self.setup.config.train
        begin = time.monotonic()
        data = setup.audit.verify(step)
        trained = self.engine.export_state()
        state = {
            "step": step,
            "updates": trained.updates,
            "data": data,
            "guard": setup.loss_guard.state(),
            "identity": setup.identity,
            "accepted": setup.accepted,
            "learning_rates": self.engine.learning_rates,
            "world_size": self.world.world_size,
            "zero_stage": train.zero_stage,
        }
        self.telemetry.sync()
        failure: str | None = None
        size = 0
        with (
            fail_together(self.world, f"{setup.stage}: saving step {step}"),
            _writing(self.lock) as work,
        ):
            if work is not None:
                try:
                    newest = checkpoint.save_checkpoint(
                        setup.folder / "checkpoints",
                        params=trained.params,
                        exp_avg=trained.exp_avg,
                        exp_avg_sq=trained.exp_avg_sq,
                        state=state,
                        keep=train.keep_checkpoints,
                        work=work,
                    )
                    size = sum(file.stat().st_size for file in newest.iterdir())
                except OSError as error:
                    if must or train.on_save_error == "stop" or not self._is_owner():
                        raise
                    failure = str(error)
        failure = from_main(self.world, failure)
        self._saved_at = time.monotonic()
        if failure is not None:
            self.telemetry.log(
                f"step {step} could not be saved: {failure}; the checkpoint of step "
                f"{self.saved_step} is good, trying again at the next save",
                step,
            )
            return
        self.saved_step = step
        self.telemetry.saved(step, seconds=self._saved_at - begin, size=size)

    def skip(self, step: int, bad: BadNumbers, packs: Sequence[Batch]) -> None:
        """List the samples of a step that was not used, and count it; `step` includes it.

        Raises:
            RankError: with `train.bad_numbers: stop`, or after more than `train.max_skipped`.
        """
        setup, train = self.setup, self.setup.config.train
        path = setup.folder / "bad_steps" / f"{storage.step_name(step)}.json"
        self._dump(path, step, bad, packs)
        setup.loss_guard.skipped.append(step)
        count = len(setup.loss_guard.skipped)
        self.telemetry.skipped(step, reason=str(bad), dump=str(path), count=count)
        reason = f"{setup.stage} step {step}: {bad}; its samples are listed in {path}"
        if train.bad_numbers == "stop":
            raise RankError(
                f"{reason}; train.bad_numbers: skip would continue without them", wrong_input=False
            )
        if count > train.max_skipped:
            raise RankError(
                f"{reason}; train.max_skipped allows {train.max_skipped} such steps in a stage, "
                f"this is number {count}: find the cause, lower the learning rate, or raise it",
                wrong_input=False,
            )

    def _dump(self, path: Path, step: int, bad: BadNumbers, packs: Sequence[Batch]) -> None:
        """Write what is known about a bad step, with the samples of all ranks."""
        setup, train = self.setup, self.setup.config.train
        own = [
            (position, key, self.world.rank, pack_index)
            for pack_index, pack in enumerate(packs)
            for position, key in zip(pack.positions, pack.keys, strict=True)
        ]
        by_rank = [own] * self.world.world_size
        if self.world.world_size > 1:
            dist.all_gather_object(by_rank, own)
        with fail_together(self.world, f"{setup.stage}: step {step}"), _writing(self.lock) as work:
            if work is None:
                return
            samples = [
                (position, key, setup.audit.placement(position), rank, pack_index)
                for rows in by_rank
                for position, key, rank, pack_index in rows
            ]
            facts: dict[str, Any] = {
                "step": step,
                "reason": str(bad),
                "loss": bad.result.loss,
                "grad_norm": bad.result.grad_norm,
                "rank_loss": bad.rank_loss,
                "samples": describe_samples(setup.index, samples),
            }
            try:
                write_dump(path, facts, work=work)
            except OSError as error:
                if train.on_save_error == "stop" or not self._is_owner():
                    raise
                self.telemetry.log(f"{path} could not be written: {error}", step)

    def stop(self, step: int, *, reason: str) -> None:
        """Save after a stop request, unless `step` has just been saved, and end this launch."""
        if self.saved_step < step:
            self.save(step, must=True)
        self.telemetry.log(f"stopped after step {step}; the same command resumes ({reason})", step)
        self._end(step, reason="stopped")

    def finish(self, step: int) -> None:
        """Mark the stage as done, after its last checkpoint has been written."""
        setup = self.setup
        skipped = setup.loss_guard.skipped
        with fail_together(self.world, f"{setup.stage}: finishing"), _writing(self.lock) as work:
            if work is not None:
                done = {
                    "step": step,
                    "checkpoint": storage.step_name(step),
                    "audit": setup.audit.digest,
                    "skipped": skipped,
                    "knobs": decisive_knobs(setup.config, setup.stage),
                }
                text = json.dumps(done, indent=1) + "\n"
                storage.publish_text(setup.folder / DONE, text, work=work)
        num_skipped = f", {len(skipped)} skipped" if skipped else ""
        self.telemetry.log(f"done after {step} steps{num_skipped}, see {setup.folder}", step)
        self._end(step, reason="done")

    def _end(self, step: int, *, reason: str) -> None:
        skipped = len(self.setup.loss_guard.skipped)
        self.telemetry.end(step, reason=reason, audit=self.setup.audit.digest, skipped=skipped)

    def _is_owner(self) -> bool:
        return self.lock is not None and self.lock.is_held()


def _writing(lock: RunLock | None) -> contextlib.AbstractContextManager[Path | None]:
    """The folder to publish from, on the rank that owns the run directory, None on the others."""
    return contextlib.nullcontext() if lock is None else lock.writing()
