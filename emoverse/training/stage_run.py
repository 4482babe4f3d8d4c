"""A stage that runs: how it saves, passes over a bad step, and ends.

In: the parts of the stage, the engine, the ranks. Out: checkpoints, dumps of bad steps, DONE.
All methods are collective; rank 0 writes, out of the work folder of its lease.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from emoverse.data.collate import Batch
from emoverse.engine.deepspeed_engine import Engine, deepspeed_config
from emoverse.engine.distributed import RankError, World, agree, from_main
from emoverse.engine.optim import build_optimizer, parameter_groups
from emoverse.engine.step_types import BadNumbers, TrainedState
from emoverse.models.adapters import is_lora
from emoverse.models.architecture import parameter_counts
from emoverse.run_dir import checkpoint, storage
from emoverse.run_dir.lineage import handed_over
from emoverse.run_dir.run_files import decisive_knobs, write_run_files
from emoverse.run_dir.run_lock import Lease
from emoverse.training.loss_guard import describe_samples, write_dump
from emoverse.training.stage_build import Parts
from emoverse.training.stages import DONE, stage_dir
from emoverse.training.telemetry import Telemetry, begin_wandb, flops_per_token


@dataclass(kw_only=True, slots=True)
class Run:
    """A stage ready to step."""

    parts: Parts
    world: World
    engine: Engine
    telemetry: Telemetry
    lease: Lease | None  # of the run directory, on rank 0
    saved_step: int = 0  # of the newest checkpoint
    _saved_at: float = field(default_factory=time.monotonic)

    def save_is_due(self) -> bool:
        """Have `train.save_minutes` passed? Ranks' clocks differ: rank 0's counts."""
        minutes = self.parts.config.train.save_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, step: int, *, must: bool) -> None:
        """Proves that the plan was trained, and writes a checkpoint.

        A disk that is full or not writable ends the run if `must`, or by `train.on_save_error`.

        Raises:
            RankError: nothing was saved; the checkpoints before are as they were.
        """
        parts, train = self.parts, self.parts.config.train
        begin = time.monotonic()
        data = parts.ledger.close_account(step)
        state = self.engine.export_state()
        self.telemetry.sync()
        failure: str | None = None
        size = 0
        with agree(self.world, f"{parts.stage}: saving step {step}"), _writing(self.lease) as work:
            if work is not None:
                try:
                    newest = checkpoint.save_checkpoint(
                        self._folder / "checkpoints",
                        params=state.params,
                        exp_avg=state.exp_avg,
                        exp_avg_sq=state.exp_avg_sq,
                        state={
                            "step": step,
                            "updates": state.updates,
                            "data": data,
                            "guard": parts.guard.state(),
                            "identity": parts.identity,
                            "accepted": parts.accepted,
                            "learning_rates": self.engine.learning_rates,
                            "world_size": self.world.world_size,
                            "zero_stage": train.zero_stage,
                        },
                        keep=train.keep_checkpoints,
                        work=work,
                    )
                    size = sum(file.stat().st_size for file in newest.iterdir())
                except OSError as error:
                    if must or train.on_save_error == "stop" or not self._still_owner():
                        raise
                    failure = str(error)
        failure = from_main(self.world, failure)
        self._saved_at = time.monotonic()
        if failure is not None:
            self.telemetry.say(
                f"step {step} could not be saved: {failure}; the checkpoint of step "
                f"{self.saved_step} is good, trying again at the next save",
                step,
            )
            return
        self.saved_step = step
        self.telemetry.saved(step, seconds=self._saved_at - begin, size=size)

    def skip(self, step: int, bad: BadNumbers, packs: Sequence[Batch]) -> None:
        """Writes down what was in a step that was not used; `step` counts it.

        Raises:
            RankError: by `train.bad_numbers`, or more than `train.max_skipped` were passed over.
        """
        parts, train = self.parts, self.parts.config.train
        mine = [
            (position, key, self.world.rank, number)
            for number, pack in enumerate(packs)
            for position, key in zip(pack.positions, pack.keys, strict=True)
        ]
        everyone = [mine] * self.world.world_size
        if self.world.world_size > 1:
            dist.all_gather_object(everyone, mine)
        path = self._folder / "bad_steps" / f"{storage.step_name(step)}.json"
        with agree(self.world, f"{parts.stage}: step {step}"), _writing(self.lease) as work:
            if work is not None:
                samples = [
                    (position, key, parts.ledger.place(position), rank, pack)
                    for share in everyone
                    for position, key, rank, pack in share
                ]
                facts = {
                    "step": step,
                    "reason": str(bad),
                    "loss": bad.result.loss,
                    "grad_norm": bad.result.grad_norm,
                    "rank_loss": bad.rank_loss,
                    "samples": describe_samples(parts.index, samples),
                }
                try:
                    write_dump(path, facts, work=work)
                except OSError as error:
                    if train.on_save_error == "stop" or not self._still_owner():
                        raise
                    self.telemetry.say(f"{path} could not be written: {error}", step)
        parts.guard.skipped.append(step)
        count = len(parts.guard.skipped)
        self.telemetry.skipped(step, reason=str(bad), dump=str(path), count=count)
        reason = f"{parts.stage} step {step}: {bad}; its samples are listed in {path}"
        if train.bad_numbers == "stop":
            raise RankError(
                f"{reason}; train.bad_numbers: skip would go on without them", wrong_input=False
            )
        if count > train.max_skipped:
            raise RankError(
                f"{reason}; train.max_skipped allows {train.max_skipped} such steps in a stage, "
                f"this is number {count}: look for the cause, lower the learning rate, or raise it",
                wrong_input=False,
            )

    def finish(self, step: int) -> None:
        """Marks the stage as done; its last checkpoint is on the disk."""
        parts = self.parts
        with agree(self.world, f"{parts.stage}: finishing"), _writing(self.lease) as work:
            if work is not None:
                done = {
                    "step": step,
                    "checkpoint": storage.step_name(step),
                    "audit": parts.ledger.audit,
                    "skipped": parts.guard.skipped,
                    "knobs": decisive_knobs(parts.config, parts.stage),
                }
                text = json.dumps(done, indent=1) + "\n"
                storage.publish_text(self._folder / DONE, text, work=work)
        skipped = f", {len(parts.guard.skipped)} skipped" if parts.guard.skipped else ""
        self.telemetry.say(f"done after {step} steps{skipped}, see {self._folder}", step)
        self.end(step, reason="done")

    def end(self, step: int, *, reason: str) -> None:
        """The last record of this launch."""
        parts = self.parts
        skipped = len(parts.guard.skipped)
        self.telemetry.end(step, reason=reason, audit=parts.ledger.audit, skipped=skipped)

    @property
    def _folder(self) -> Path:
        return stage_dir(self.parts.config, self.parts.stage)

    def _still_owner(self) -> bool:
        return self.lease is not None and self.lease.held()


def _writing(lease: Lease | None) -> contextlib.AbstractContextManager[Path | None]:
    """The folder to publish from, on the rank that owns the run directory."""
    return contextlib.nullcontext() if lease is None else lease.writing()


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
            offload=config.train.offload,
        )
        wandb = None
        if world.is_main and config.train.wandb is not None:
            wandb = begin_wandb(config.train.wandb, config.run.run_dir, stage)
        with _writing(lease) as work:
            if work is not None:
                write_run_files(config, stage, parts.index, parts.plan, settings, work=work)
    engine = Engine(parts.model, optimizer, world, settings, parts.model.deferred)
    with agree(world, f"{stage}: loading trained weights"):
        if parts.resume_from is not None:
            engine.import_state(_trained_state(parts.resume_from))
        elif parts.parent is not None:
            _hand_over(parts, engine)
    with agree(world, f"{stage}: telemetry"), _writing(lease) as work:
        telemetry = Telemetry(
            stage_dir=folder,
            stage=stage,
            rates=config.stages[stage].rates,
            num_steps=parts.num_steps,
            start_step=parts.start_step,
            log_every=config.train.log_every,
            world=world,
            tensorboard=config.train.tensorboard,
            work=work,
            wandb=wandb,
            skipped=len(parts.guard.skipped),
            flops=flops_per_token(architecture, counts),
        )
    try:
        _say_hello(parts, world, telemetry, num_trainable)
        yield Run(
            parts=parts,
            world=world,
            engine=engine,
            telemetry=telemetry,
            lease=lease,
            saved_step=parts.start_step,
        )
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
        whole = {name: value for name, value in trained.items() if not is_lora(name)}
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
        accepted=parts.accepted,
    )
