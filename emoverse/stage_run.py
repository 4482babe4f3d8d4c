"""One stage made ready: what a rank reads and builds, what it starts from, how it saves and ends.

In: the config, this rank's world. Out: `Parts` (no collective needed) and then a `Run`, which the
loop in train.py steps through. A stage starts from the base, from an earlier stage, or where it was
left.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_shards.index import ShardIndex
from data_shards.plan import Plan
from data_shards.remote import open_index
from data_shards.sampler import WeightedTaskSampler
from emoverse import checkpoint, storage
from emoverse.batches import build_loader
from emoverse.config import Config
from emoverse.distributed import World, agree
from emoverse.engine import Engine, TrainedState, deepspeed_config
from emoverse.handover import folds_below, handed_over
from emoverse.lease import Lease
from emoverse.ledger import Ledger
from emoverse.loader import StepLoader
from emoverse.models.architecture import load_architecture, parameter_counts
from emoverse.models.emoverse import EmoVerse, build_model
from emoverse.models.lora import is_adapter
from emoverse.optim import build_optimizer, lr_factor, parameter_groups, warmup_steps
from emoverse.runfiles import decisive_knobs, run_identity, write_run_files
from emoverse.stages import DONE, run_plan, stage_dir, starting_stage
from emoverse.telemetry import Telemetry, flops_per_token


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a rank can read and build on its own, without any collective."""

    config: Config
    stage: str
    index: ShardIndex
    plan: Plan
    sampler: WeightedTaskSampler
    model: EmoVerse
    loader: StepLoader
    ledger: Ledger
    identity: dict[str, Any]
    start_step: int
    resume_from: Path | None  # checkpoint of this stage
    parent: Path | None  # folder of the stage that hands over
    notes: list[str]  # for the user, said when the stage begins

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole stage."""
        return self.sampler.num_steps

    def lr_factor(self, step: int) -> float:
        """Learning rate of 0-based `step` as a share of its peak."""
        optim = self.config.stages[self.stage].optim
        return lr_factor(
            step,
            num_steps=self.num_steps,
            warmup=warmup_steps(optim.warmup, self.num_steps),
            min_ratio=optim.min_lr_ratio,
        )


def read_parts(config: Config, stage: str, world: World, *, resume: bool) -> Parts:
    """Data, model and what to start from; every rank for itself.

    Raises:
        ValueError, FileNotFoundError: what the user can put right.
    """
    notes: list[str] = []
    parent = starting_stage(config, stage)
    index = open_index(config.data.shards, config.data.cache)
    plan = run_plan(config, index)
    sampler = WeightedTaskSampler(
        plan.stages[stage],
        index,
        global_batch_size=config.train.global_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        frames_per_clip=config.data.frames_per_clip,
        tokens_per_frame=load_architecture(config.model.base).visual_tokens_per_frame,
    )
    identity = run_identity(config, stage, plan, parent)
    folder = _find_resume(config, stage, identity, resume=resume, notes=notes)
    model = build_model(
        config.model.base,
        config.model,
        device=world.device,
        dtype=torch.bfloat16 if config.model.precision == "bf16" else torch.float32,
        seed=config.run.seed,
        folds=folds_below(config, stage, config.run.run_dir, notes.append),
        defer=config.train.zero_stage == 3,
    ).train()
    if config.train.recompute:
        model.recompute_activations()
    ledger = Ledger(sampler, index, world, max_damaged=config.data.max_damaged)
    start_step = 0
    if folder is not None:
        state = checkpoint.read_state(folder)
        start_step = int(state["step"])
        ledger.load(state["data"], start_step)
    return Parts(
        config=config,
        stage=stage,
        index=index,
        plan=plan,
        sampler=sampler,
        model=model,
        loader=build_loader(config, index, sampler, model),
        ledger=ledger,
        identity=identity,
        start_step=start_step,
        resume_from=folder,
        parent=parent,
        notes=notes,
    )


def _find_resume(
    config: Config, stage: str, identity: dict[str, Any], *, resume: bool, notes: list[str]
) -> Path | None:
    root = stage_dir(config, stage) / "checkpoints"
    folder = checkpoint.find_checkpoint(root, notes.append)
    if folder is None:
        return None
    if not resume:
        raise ValueError(
            f"{root} holds checkpoints, but the stage was to start afresh; choose another "
            "run.run_dir, or remove the stage's folder"
        )
    checkpoint.check_identity(checkpoint.read_state(folder)["identity"], identity, folder)
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A stage ready to step; all its methods are collective."""

    parts: Parts
    world: World
    engine: Engine
    telemetry: Telemetry
    lease: Lease | None  # of the run directory, on rank 0

    def writing(self) -> contextlib.AbstractContextManager[Path | None]:
        """The folder to publish from, on the rank that owns the run directory."""
        return contextlib.nullcontext() if self.lease is None else self.lease.writing()

    def save(self, step: int) -> int:
        """Proves that the plan was trained, and writes a checkpoint; returns `step`."""
        parts, train = self.parts, self.parts.config.train
        data = parts.ledger.close_account(step)
        state = self.engine.export_state()
        with agree(self.world, f"{parts.stage}: saving step {step}"), self.writing() as work:
            if work is not None:
                checkpoint.save_checkpoint(
                    stage_dir(parts.config, parts.stage) / "checkpoints",
                    params=state.params,
                    exp_avg=state.exp_avg,
                    exp_avg_sq=state.exp_avg_sq,
                    state={
                        "step": step,
                        "updates": state.updates,
                        "data": data,
                        "identity": parts.identity,
                        "learning_rates": self.engine.learning_rates,
                        "world_size": self.world.world_size,
                        "zero_stage": train.zero_stage,
                    },
                    keep=train.keep_checkpoints,
                    work=work,
                )
        self.telemetry.saved(step)
        return step

    def finish(self, step: int) -> None:
        """Marks the stage as done; its last checkpoint is on the disk."""
        parts = self.parts
        folder = stage_dir(parts.config, parts.stage)
        with agree(self.world, f"{parts.stage}: finishing"), self.writing() as work:
            if work is not None:
                done = {
                    "step": step,
                    "checkpoint": checkpoint.step_name(step),
                    "audit": parts.ledger.audit,
                    "knobs": decisive_knobs(parts.config, parts.stage),
                }
                storage.publish_text(folder / DONE, json.dumps(done, indent=1) + "\n", work=work)
        self.telemetry.say(f"done after {step} steps, see {folder}", step)
        self.telemetry.end(step, reason="done", audit=parts.ledger.audit)


@contextlib.contextmanager
def build_run(parts: Parts, world: World, lease: Lease | None) -> Iterator[Run]:
    """Engine and telemetry; collective. `lease`: of the run directory, on rank 0 only."""
    config, stage = parts.config, parts.stage
    optim, folder = config.stages[stage].optim, stage_dir(config, stage)
    architecture, groups = parts.model.architecture, parts.model.trainable_groups()
    counts = parameter_counts(architecture, config.model.lora, config.model.projector)
    num_trainable = sum(p.numel() for named in groups.values() for _, p in named)
    with agree(world, f"{stage}: engine settings"):
        optimizer = build_optimizer(parameter_groups(groups, optim), optim)
        settings = deepspeed_config(
            zero_stage=config.train.zero_stage,
            precision=config.model.precision,
            clip=optim.clip,
            world_size=world.world_size,
            num_trainable=num_trainable,
        )
        if world.is_main:
            write_run_files(config, stage, parts.index, parts.plan, settings)
    engine = Engine(parts.model, optimizer, world, settings, parts.model.deferred)
    with agree(world, f"{stage}: loading trained weights"):
        if parts.resume_from is not None:
            engine.import_state(_trained_state(parts.resume_from))
        elif parts.parent is not None:
            _hand_over(parts, engine)
    telemetry = Telemetry(
        stage_dir=folder,
        stage=stage,
        rates=config.stages[stage].rates,
        num_steps=parts.num_steps,
        start_step=parts.start_step,
        log_every=config.train.log_every,
        world=world,
        tensorboard=config.train.tensorboard,
        flops=flops_per_token(architecture, counts),
    )
    try:
        _say_hello(parts, world, telemetry, num_trainable)
        yield Run(parts=parts, world=world, engine=engine, telemetry=telemetry, lease=lease)
    finally:
        telemetry.close()
        engine.close()


def _hand_over(parts: Parts, engine: Engine) -> None:
    """Sets what the earlier stage passes on; merged adapters are in the base already."""
    assert parts.parent is not None
    stage = parts.config.stages[parts.stage]
    if stage.optimizer == "continue":
        engine.import_state(_trained_state(handed_over(parts.parent)))
        return
    trained = checkpoint.load_trained(parts.parent, parts.notes.append)
    if stage.adapter == "merge":
        # The projector goes on from its fp32 masters, not from their rounded copy in the base.
        whole = {name: value for name, value in trained.items() if not is_adapter(name)}
        engine.import_params(whole, some=True)
    else:
        engine.import_params(trained)


def _trained_state(folder: Path) -> TrainedState:
    found = checkpoint.read_checkpoint(folder)
    return TrainedState(
        params=found.params,
        exp_avg=found.exp_avg,
        exp_avg_sq=found.exp_avg_sq,
        updates=int(found.state["updates"]),
    )


def _say_hello(parts: Parts, world: World, telemetry: Telemetry, num_trainable: int) -> None:
    config, step = parts.config, parts.start_step
    for note in parts.notes:
        telemetry.say(note, step)
    begin = f"resumes from step {step}" if step else f"starts from {parts.identity['start']}"
    telemetry.say(
        f"{begin}: {parts.num_steps} steps of {config.train.global_batch_size} samples, "
        f"{num_trainable:,} trained parameters, {world.world_size} processes on "
        f"{world.device.type}, ZeRO-{config.train.zero_stage}, {config.model.precision}, "
        f"{parts.model.implementations}",
        step,
    )
    telemetry.start(
        step,
        resumed=bool(step),
        world_size=world.world_size,
        zero_stage=config.train.zero_stage,
        trainable=num_trainable,
        num_steps=parts.num_steps,
        num_samples=parts.plan.stages[parts.stage].num_samples,
        lineage=parts.identity["start"],
    )


def is_done(config: Config, stage: str) -> bool:
    """Is the stage finished, with the settings of this config?

    Raises:
        OtherRun: it is finished, but with other settings; lists them.
    """
    marker: Path = stage_dir(config, stage) / DONE
    if not marker.is_file():
        return False
    done = json.loads(marker.read_text())
    checkpoint.check_identity(done["knobs"], decisive_knobs(config, stage), marker)
    return True
