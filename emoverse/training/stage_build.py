"""What a stage needs before its first step: data, model, and the point where it starts.

In: the config, this rank's world. Out: a `StageSetup`, built by each rank without any collective.
The order: index and plan -> sampler -> identity -> newest checkpoint, which must match the
identity -> model -> sample audit and loss guard, which continue from the checkpoint -> loader.
Which weights the stage starts from is decided here and explained in run_dir/lineage.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_shards.plan.plan import Plan
from data_shards.plan.sampler import WeightedTaskSampler
from data_shards.shards.index import ShardIndex
from data_shards.shards.open import open_index
from emoverse.config.schema import Config, StageSection
from emoverse.data.loader import StepLoader, build_loader
from emoverse.engine.distributed import World
from emoverse.engine.optim import lr_factor, warmup_steps
from emoverse.models.architecture import load_architecture
from emoverse.models.emoverse import EmoVerse, build_model
from emoverse.run_dir import checkpoint
from emoverse.run_dir.lineage import adapters_below, require_same_parent
from emoverse.run_dir.run_files import decisive_knobs, run_identity
from emoverse.training.loss_guard import LossGuard
from emoverse.training.sample_audit import SampleAudit
from emoverse.training.stages import DONE, run_plan, stage_dir, starting_stage


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSetup:
    """A stage as one rank has read and built it."""

    config: Config
    stage: str
    index: ShardIndex
    plan: Plan
    sampler: WeightedTaskSampler
    model: EmoVerse
    loader: StepLoader
    audit: SampleAudit
    loss_guard: LossGuard
    identity: dict[str, Any]
    start_step: int
    resume_from: Path | None  # checkpoint of this stage
    parent: Path | None  # folder of the stage that it starts from
    accepted: list[dict[str, Any]]  # changes of data, settings or base that the user accepted
    notes: list[str]  # for the user, logged when the stage begins

    @property
    def section(self) -> StageSection:
        """The config of this stage."""
        return self.config.stages[self.stage]

    @property
    def folder(self) -> Path:
        """The folder of this stage in the run directory."""
        return stage_dir(self.config, self.stage)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole stage."""
        return self.sampler.num_steps

    def lr_factor(self, step: int) -> float:
        """Learning rate of 0-based `step` as a share of its peak.

        Skipped steps do not advance the schedule.
        """
        optim = self.section.optim
        return lr_factor(
            step - len(self.loss_guard.skipped),
            num_steps=self.num_steps,
            warmup=warmup_steps(optim.warmup, self.num_steps),
            min_ratio=optim.min_lr_ratio,
        )


def set_up_stage(
    config: Config, stage: str, world: World, *, resume: bool, accept_changes: bool
) -> StageSetup:
    """Read the data, build the model, and find where to start; every rank for itself.

    `accept_changes`: continue from a checkpoint of other data, settings or base, and record it.

    Raises:
        ValueError, FileNotFoundError: what the user can correct.
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
        frames_per_peak=config.data.frames_per_peak,
        tokens_per_frame=load_architecture(config.model.base).visual_tokens_per_frame,
    )
    changes: list[str] = []
    identity = run_identity(config, stage, plan, parent, changes if accept_changes else None)
    root = stage_dir(config, stage) / "checkpoints"
    resume_from = checkpoint.find_checkpoint(root, notes.append)
    state: dict[str, Any] | None = None
    if resume_from is not None:
        if not resume:
            raise ValueError(
                f"{root} holds checkpoints, but the stage was to start from scratch; choose "
                "another run.run_dir, or remove the stage's folder"
            )
        state = checkpoint.read_state(resume_from)
        if accept_changes:
            changes += checkpoint.differences(state["identity"], identity)
            state["data"]["fingerprint"] = plan.stages[stage].fingerprint
        else:
            checkpoint.check_identity(state["identity"], identity, resume_from)
    model = build_model(
        config.model.base,
        config.model,
        device=world.device,
        dtype=torch.bfloat16 if config.model.precision == "bf16" else torch.float32,
        seed=config.run.seed,
        adapters=adapters_below(config, stage, config.run.run_dir, notes.append),
        # Cached features need the whole vision tower now; they are for small models.
        defer=config.train.zero_stage == 3 and not config.model.cache_features,
    ).train()
    if config.train.recompute:
        model.recompute_activations()
    audit = SampleAudit(sampler, index, world, max_damaged=config.data.max_damaged)
    loss_guard = LossGuard(spike_factor=config.train.spike_factor)
    start_step, accepted = _restore(state, audit, loss_guard)
    if changes:
        accepted = [*accepted, {"step": start_step, "changes": changes}]
        notes.append(f"continues with changes, by --accept-changes: {'; '.join(changes)}")
    return StageSetup(
        config=config,
        stage=stage,
        index=index,
        plan=plan,
        sampler=sampler,
        model=model,
        loader=build_loader(config, index, sampler, model),
        audit=audit,
        loss_guard=loss_guard,
        identity=identity,
        start_step=start_step,
        resume_from=resume_from,
        parent=parent,
        accepted=accepted,
        notes=notes,
    )


def _restore(
    state: dict[str, Any] | None, audit: SampleAudit, loss_guard: LossGuard
) -> tuple[int, list[dict[str, Any]]]:
    """Restore audit and guard; returns the step to start at and the changes accepted so far."""
    if state is None:
        return 0, []
    step = int(state["step"])
    audit.load(state["data"], step)
    # Checkpoints of the first version lack both keys; nothing was skipped or accepted in them.
    loss_guard.load(state.get("guard", loss_guard.state()))
    return step, state.get("accepted", [])


def is_done(config: Config, stage: str, *, accept_changes: bool = False) -> bool:
    """Whether the stage is finished, with the settings of this config.

    Raises:
        OtherRun: it was finished with other settings, which are listed; or the stage that it
            started from has been trained again since.
    """
    marker = stage_dir(config, stage) / DONE
    if not marker.is_file():
        return False
    if not accept_changes:
        done = json.loads(marker.read_text())
        checkpoint.check_identity(done["knobs"], decisive_knobs(config, stage), marker)
        require_same_parent(config.run.run_dir, stage, config.stages[stage].start_from)
    return True
