"""One stage made ready: what a rank reads and builds on its own, and what the stage starts from.

In: the config, this rank's world. Out: `Parts`, without any collective. A stage starts from the
base, from an earlier stage, or where it was left.
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
from emoverse.config.schema import Config
from emoverse.data.loader import StepLoader
from emoverse.data.pipeline import build_loader
from emoverse.engine.distributed import World
from emoverse.engine.optim import lr_factor, warmup_steps
from emoverse.models.architecture import load_architecture
from emoverse.models.emoverse import EmoVerse, build_model
from emoverse.run_dir import checkpoint
from emoverse.run_dir.lineage import adapters_below, label_of
from emoverse.run_dir.run_files import decisive_knobs, run_identity
from emoverse.training.loss_guard import Guard
from emoverse.training.sample_audit import Ledger
from emoverse.training.stages import BASE, DONE, run_plan, stage_dir, starting_stage


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
    guard: Guard
    identity: dict[str, Any]
    start_step: int
    resume_from: Path | None  # checkpoint of this stage
    parent: Path | None  # folder of the stage that hands over
    accepted: list[dict[str, Any]]  # changes of data, settings or base that the user wanted
    notes: list[str]  # for the user, said when the stage begins

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole stage."""
        return self.sampler.num_steps

    def lr_factor(self, step: int) -> float:
        """Learning rate of 0-based `step` as a share of its peak.

        A step that was not used does not move the schedule.
        """
        step -= len(self.guard.skipped)
        optim = self.config.stages[self.stage].optim
        return lr_factor(
            step,
            num_steps=self.num_steps,
            warmup=warmup_steps(optim.warmup, self.num_steps),
            min_ratio=optim.min_lr_ratio,
        )


def read_parts(
    config: Config, stage: str, world: World, *, resume: bool, accept_changes: bool
) -> Parts:
    """Data, model and what to start from; every rank for itself.

    `accept_changes`: go on from a checkpoint of other data, settings or base, and note it.

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
        frames_per_peak=config.data.frames_per_peak,
        tokens_per_frame=load_architecture(config.model.base).visual_tokens_per_frame,
    )
    changes: list[str] = []
    identity = run_identity(config, stage, plan, parent, changes if accept_changes else None)
    root = stage_dir(config, stage) / "checkpoints"
    folder = checkpoint.find_checkpoint(root, notes.append)
    state = None if folder is None else checkpoint.read_state(folder)
    if folder is not None and state is not None:
        if not resume:
            raise ValueError(
                f"{root} holds checkpoints, but the stage was to start afresh; choose another "
                "run.run_dir, or remove the stage's folder"
            )
        if accept_changes:
            changes += checkpoint.differences(state["identity"], identity)
            state["data"]["fingerprint"] = plan.stages[stage].fingerprint
        else:
            checkpoint.check_identity(state["identity"], identity, folder)
    model = build_model(
        config.model.base,
        config.model,
        device=world.device,
        dtype=torch.bfloat16 if config.model.precision == "bf16" else torch.float32,
        seed=config.run.seed,
        adapters=adapters_below(config, stage, config.run.run_dir, notes.append),
        # Cached features need the whole tower now; they are for small models.
        defer=config.train.zero_stage == 3 and not config.model.cache_features,
    ).train()
    if config.train.recompute:
        model.recompute_activations()
    ledger = Ledger(sampler, index, world, max_damaged=config.data.max_damaged)
    guard = Guard(spike_factor=config.train.spike_factor)
    start_step, accepted = _go_on(state, ledger, guard)
    if changes:
        accepted = [*accepted, {"step": start_step, "changes": changes}]
        notes.append(f"goes on in spite of changes, as --accept-changes says: {'; '.join(changes)}")
    return Parts(
        config=config,
        stage=stage,
        index=index,
        plan=plan,
        sampler=sampler,
        model=model,
        loader=build_loader(config, index, sampler, model),
        ledger=ledger,
        guard=guard,
        identity=identity,
        start_step=start_step,
        resume_from=folder,
        parent=parent,
        accepted=accepted,
        notes=notes,
    )


def _go_on(
    state: dict[str, Any] | None, ledger: Ledger, guard: Guard
) -> tuple[int, list[dict[str, Any]]]:
    """The step to go on at, and the changes accepted so far; the books go on from `state`."""
    if state is None:
        return 0, []
    step = int(state["step"])
    ledger.load(state["data"], step)
    # Checkpoints of the first version have neither; nothing was skipped or accepted in them.
    guard.load(state.get("guard", guard.state()))
    return step, state.get("accepted", [])


def is_done(config: Config, stage: str, *, accept_changes: bool = False) -> bool:
    """Is the stage finished, with the settings of this config?

    Raises:
        OtherRun: it is finished, but with other settings, which are listed; or the stage that it
            started from was trained again since.
    """
    marker: Path = stage_dir(config, stage) / DONE
    if not marker.is_file():
        return False
    done = json.loads(marker.read_text())
    if not accept_changes:
        checkpoint.check_identity(done["knobs"], decisive_knobs(config, stage), marker)
        _require_same_parent(config, stage)
    return True


def _require_same_parent(config: Config, stage: str) -> None:
    """A finished stage is that of the weights which the stage before it now holds.

    Where either has lost its checkpoints, to make room, there is nothing to compare.
    """
    start = config.stages[stage].start_from
    if start == BASE:
        return
    try:
        own, parent = (_last_checkpoint(stage_dir(config, name)) for name in (stage, start))
        trained_on, now = checkpoint.read_state(own)["identity"]["start"], label_of(parent)
    except FileNotFoundError:
        return
    if trained_on != now:
        folder = stage_dir(config, stage)
        raise checkpoint.OtherRun(
            f"{folder / DONE}: {stage} was trained from {trained_on}, but {start} has been trained "
            f"again since and is now {now}; remove {folder} to train {stage} from there, or "
            f"restore that {start}, or give --accept-changes to keep {stage} all the same"
        )


def _last_checkpoint(folder: Path) -> Path:
    done = json.loads((folder / DONE).read_text())
    return folder / "checkpoints" / str(done["checkpoint"])
