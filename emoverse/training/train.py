"""Training of stages: set up each stage, run its loop, save, stop, resume.

In: the config and this rank's world, whose process group is open. Out: RUN/STAGE/{checkpoints,
metrics.jsonl, DONE} and an `Outcome`. Every rank runs this file; ranks differ only in their share
of each step.

Graceful shutdown: a signal or the time limit sets a flag (shutdown.py). The consensus before the
next step shares it; all ranks then save the same step (`StageRun.stop`) and return
`Outcome.STOPPED`.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from data_shards.tasks import TASKS
from emoverse.config.schema import Config
from emoverse.data.collate import Batch
from emoverse.engine import distributed, rank_faults
from emoverse.engine.distributed import RankError, World, agree_on_step, fail_together
from emoverse.engine.step_types import BadNumbers
from emoverse.engine.watchdog import Watchdog, watching
from emoverse.loss import rank_normaliser
from emoverse.run_dir.run_lock import RunLock, acquire
from emoverse.training.anomaly import anomaly_checks
from emoverse.training.outcome import Outcome
from emoverse.training.shutdown import StopFlag
from emoverse.training.stage_build import is_done, set_up_stage
from emoverse.training.stage_run import StageRun, start_run
from emoverse.training.stages import stage_dir
from emoverse.training.telemetry import StepCounts


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How to start a training: the same on all ranks, without influence on what is learned."""

    resume: bool = True  # False refuses a stage that has begun
    accept_changes: bool = False  # of data, settings or base since the checkpoint
    take_over: bool = False  # of a run directory whose owner seems to live


def train_stages(
    config: Config,
    stages: Sequence[str],
    world: World,
    *,
    flag: StopFlag,
    options: TrainOptions = TrainOptions(),
) -> Outcome:
    """Trains stages in turn, in an open process group; collective.

    The time limit `train.max_minutes` counts from when `flag` was made.

    Returns:
        DONE or STOPPED, the same on every rank; the run directory is released by then.

    Raises:
        RankError: the reason of the rank that failed, on every rank.
    """
    flag.limit(config.train.max_minutes)
    lock: RunLock | None = None
    with fail_together(world, "run directory"):
        if world.is_main:
            lock = acquire(config.run.run_dir, take_over=options.take_over)
            rank_faults.clear(config.run.run_dir)
    outcome = Outcome.DONE
    try:
        for stage in stages:
            outcome = _train_stage(config, stage, world, options=options, flag=flag, lock=lock)
            if outcome is not Outcome.DONE:
                break
    finally:
        if lock is not None:
            lock.release()
    # Also a barrier: no rank continues before the run lock is released.
    return distributed.from_main(world, outcome)


def _train_stage(
    config: Config,
    stage: str,
    world: World,
    *,
    options: TrainOptions,
    flag: StopFlag,
    lock: RunLock | None,
) -> Outcome:
    """Train one stage to its end, or to a stop; collective. `lock`: on rank 0 only."""
    folder = stage_dir(config, stage)
    with fail_together(world, f"{stage}: run directory"):
        done = is_done(config, stage, accept_changes=options.accept_changes)
    if distributed.from_main(world, done):
        if world.is_main:
            print(f"{stage} already done, see {folder}", flush=True)
        return Outcome.DONE
    if distributed.gather_rows(world, [flag.requested]).any():  # before minutes of set-up
        return Outcome.STOPPED

    def lost() -> Exception | None:
        return None if lock is None else lock.error

    limit_s = 60 * config.train.hang_minutes
    with watching(folder / "heartbeat", world, limit_s=limit_s, lost=lost) as watchdog:
        with fail_together(world, f"{stage}: set-up"):
            setup = set_up_stage(
                config, stage, world, resume=options.resume, accept_changes=options.accept_changes
            )
        _require_same_start(world, stage, setup.start_step)
        checks = anomaly_checks(setup.model, on=config.train.detect_anomaly)
        with start_run(setup, world, lock) as run, checks:
            return _loop(run, flag, watchdog)


def _require_same_start(world: World, stage: str, start_step: int) -> None:
    steps = [int(row[0]) for row in distributed.gather_rows(world, [start_step]).tolist()]
    if len(set(steps)) > 1:
        raise RankError(
            f"{stage}: ranks found different checkpoints, at steps {steps}; run.run_dir must be "
            "one shared folder for all of them",
            wrong_input=True,
        )


# The loop --------------------------------------------------------------------------------------


def _loop(run: StageRun, flag: StopFlag, watchdog: Watchdog) -> Outcome:
    """From the start step to the last, or to a stop. One iteration is one optimiser step."""
    setup, world = run.setup, run.world
    step = setup.start_step
    batches = setup.loader.iterate(step)
    forward_s = consensus_s = 0.0  # of this rank in the step before
    while step < setup.num_steps:
        # (1) This rank's packs. An error waits for the consensus, so that all ranks raise it.
        watchdog.beat("waiting for data", step + 1)
        packs, wait_s, error = _next_packs(batches)
        report = RankReport(
            wait_s=wait_s,
            forward_s=forward_s,
            consensus_s=consensus_s,
            tokens=sum(pack.num_tokens for pack in packs),
            damaged=sum(len(pack.quarantine) for pack in packs),
            save_is_due=run.save_is_due(),
            samples=_samples_per_task(packs),
        )
        # (2) The ranks agree: how many packs, the sum of weights, does any rank want to stop?
        watchdog.beat("waiting for the other ranks", step + 1)
        begin = time.monotonic()
        consensus = agree_on_step(
            world,
            num_packs=len(packs),
            normaliser=rank_normaliser(packs),
            stop=flag.requested,
            error=run.lock.error if run.lock is not None and run.lock.error is not None else error,
            doing=f"{setup.stage} step {step + 1}",
            extra=report.to_row(),
        )
        consensus_s = time.monotonic() - begin
        if consensus.stop:
            break
        reports = [RankReport.from_row(row) for row in consensus.extra]
        watchdog.beat("forward, backward, update", step + 1)
        for damage in setup.audit.add(packs, num_damaged=sum(row.damaged for row in reports)):
            run.telemetry.log(f"replaced damaged record {damage.key}: {damage.cause}", step)
        # (3) Forward, backward, update. Dropout depends on the step and the rank only.
        torch.manual_seed(step_seed(setup.config.run.seed, setup.stage, step, world.rank))
        try:
            result = run.engine.step(
                packs,
                num_packs=consensus.num_packs,
                normaliser=consensus.normaliser,
                lr_factor=setup.lr_factor(step),
                make_empty=setup.loader.zero_batch,
                check=setup.loss_guard.check,
            )
        except BadNumbers as bad:
            step += 1
            forward_s = bad.result.forward_s
            run.skip(step, bad, packs)
        else:
            step += 1
            forward_s = result.forward_s
            counts = _step_counts(reports, consensus.num_packs)
            run.telemetry.record(step, result, counts, run.engine.learning_rates)
        # (4) Save.
        last = step == setup.num_steps
        if last or step % setup.config.train.save_every == 0 or reports[0].save_is_due:
            watchdog.beat("saving", step)
            run.save(step, must=last)
    if step < setup.num_steps:
        run.stop(step, reason=flag.reason or "stop request of another process")
        return Outcome.STOPPED
    run.finish(step)
    return Outcome.DONE


def _next_packs(batches: Iterator[list[Batch]]) -> tuple[list[Batch], float, Exception | None]:
    """The packs of this rank, the seconds it waited for them, and the error if there are none."""
    begin = time.monotonic()
    try:
        return next(batches), time.monotonic() - begin, None
    except Exception as error:
        return [], time.monotonic() - begin, error


class RankReport(NamedTuple):
    """Numbers of one rank that all ranks receive with the consensus before a step."""

    wait_s: float  # waiting for the data of this step
    forward_s: float  # in forward passes, in the step before
    consensus_s: float  # waiting for the other ranks, in the step before
    tokens: int
    damaged: int  # records that were replaced
    save_is_due: bool  # on rank 0, see `StageRun.save_is_due`
    samples: list[int]  # per task, in the order of TASKS

    def to_row(self) -> list[float]:
        """As floats: scalars in the order of the fields, then the samples."""
        return [*map(float, self[:-1]), *map(float, self.samples)]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> "RankReport":
        """The inverse of `to_row`."""
        wait_s, forward_s, consensus_s, tokens, damaged, save_is_due, *samples = row
        return cls(
            wait_s=wait_s,
            forward_s=forward_s,
            consensus_s=consensus_s,
            tokens=int(tokens),
            damaged=int(damaged),
            save_is_due=bool(save_is_due),
            samples=[int(count) for count in samples],
        )


def _samples_per_task(packs: Sequence[Batch]) -> list[int]:
    tasks = [task for pack in packs for task in pack.tasks]
    return [tasks.count(task) for task in TASKS]


def _step_counts(reports: Sequence[RankReport], packs_per_rank: int) -> StepCounts:
    samples = zip(*(report.samples for report in reports), strict=True)
    return StepCounts(
        samples={task: sum(counts) for task, counts in zip(TASKS, samples, strict=True)},
        tokens=sum(report.tokens for report in reports),
        wait_s=[report.wait_s for report in reports],
        forward_s=[report.forward_s for report in reports],
        consensus_s=[report.consensus_s for report in reports],
        most_tokens=max(report.tokens for report in reports),
        packs=packs_per_rank * len(reports),
    )


def step_seed(seed: int, stage: str, step: int, rank: int) -> int:
    """Seed of all randomness inside one step of one rank; no random state is ever saved."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
