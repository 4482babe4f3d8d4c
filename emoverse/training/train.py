"""Training a stage: build the parts, execute the plan step by step, save, stop, resume.

In: the config and this rank's world, whose process group is open. Out: RUN/STAGE/{checkpoints,
metrics.jsonl, DONE} and an `Outcome`. Every rank runs this file; ranks differ only in their share
of each step.

Graceful shutdown: a signal or the time limit sets a flag; ranks learn of it from the consensus
before the next step, save together, and return `Outcome.STOPPED`.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from data_shards.tasks import TASKS
from emoverse.config.schema import Config
from emoverse.data.collate import Batch
from emoverse.engine import distributed, rank_faults
from emoverse.engine.distributed import RankError, Vote, World, agree, vote
from emoverse.engine.step_types import BadNumbers
from emoverse.engine.watchdog import Watchdog, watching
from emoverse.loss import rank_normaliser
from emoverse.run_dir.run_lock import Lease, acquire
from emoverse.training.anomaly import anomaly_checks
from emoverse.training.outcome import Outcome
from emoverse.training.shutdown import StopFlag
from emoverse.training.stage_build import is_done, read_parts
from emoverse.training.stage_run import Run, build_run
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
    lease: Lease | None = None
    with agree(world, "run directory"):
        if world.is_main:
            lease = acquire(config.run.run_dir, take_over=options.take_over)
            rank_faults.clear(config.run.run_dir)
    outcome = Outcome.DONE
    try:
        for stage in stages:
            outcome = _train_stage(config, stage, world, options=options, flag=flag, lease=lease)
            if outcome is not Outcome.DONE:
                break
    finally:
        if lease is not None:
            lease.release()
    # Also a barrier: no rank goes on before the lease is released.
    return distributed.from_main(world, outcome)


def _train_stage(
    config: Config,
    stage: str,
    world: World,
    *,
    options: TrainOptions,
    flag: StopFlag,
    lease: Lease | None,
) -> Outcome:
    """Trains one stage to its end, or to a stop; collective."""
    folder = stage_dir(config, stage)
    with agree(world, f"{stage}: run directory"):
        done = is_done(config, stage, accept_changes=options.accept_changes)
    if distributed.from_main(world, done):
        if world.is_main:
            print(f"{stage} already done, see {folder}", flush=True)
        return Outcome.DONE
    if distributed.gather_rows(world, [flag.requested]).any():  # before minutes of building
        return Outcome.STOPPED
    limit_s = 60 * config.train.hang_minutes

    def lost() -> Exception | None:
        return None if lease is None else lease.loss

    with watching(folder / "heartbeat", world, limit_s=limit_s, lost=lost) as dog:
        with agree(world, f"{stage}: set-up"):
            parts = read_parts(
                config,
                stage,
                world,
                resume=options.resume,
                accept_changes=options.accept_changes,
            )
        _require_same_start(world, stage, parts.start_step)
        checks = anomaly_checks(parts.model, on=config.train.detect_anomaly)
        with build_run(parts, world, lease) as run, checks:
            return _loop(run, flag, dog)


def _require_same_start(world: World, stage: str, start_step: int) -> None:
    steps = [int(row[0]) for row in distributed.gather_rows(world, [start_step]).tolist()]
    if len(set(steps)) > 1:
        raise RankError(
            f"{stage}: ranks found different checkpoints, at steps {steps}; run.run_dir must be "
            "one shared folder for all of them",
            wrong_input=True,
        )


# The loop --------------------------------------------------------------------------------------


def _loop(run: Run, flag: StopFlag, dog: Watchdog) -> Outcome:
    """From the start step to the last, or to a stop. One turn is one optimiser step."""
    parts, world, spent = run.parts, run.world, Spent()
    step = parts.start_step
    batches = parts.loader.iterate(step)
    while step < parts.num_steps:
        # (1) This rank's share of the step; an error waits for the vote, so that all hear of it.
        dog.beat("waiting for data", step + 1)
        share = _next_share(batches, run, spent)
        # (2) The ranks agree: how many packs, what the weights sum to, does anybody want to stop?
        dog.beat("waiting for the other ranks", step + 1)
        begin = time.monotonic()
        ballot = vote(
            world,
            num_packs=len(share.packs),
            normaliser=share.normaliser,
            stop=flag.requested,
            error=share.error,
            doing=f"{parts.stage} step {step + 1}",
            extra=share.counts,
        )
        spent.vote_s = time.monotonic() - begin
        if ballot.stop:
            break
        dog.beat("forward, backward, update", step + 1)
        for damage in parts.ledger.add(share.packs, num_damaged=int(_total(ballot, DAMAGED))):
            run.telemetry.say(f"replaced damaged record {damage.key}: {damage.cause}", step)
        # (3) Forward, backward, update. Dropout depends on the step and the rank alone.
        torch.manual_seed(step_seed(parts.config.run.seed, parts.stage, step, world.rank))
        try:
            result = run.engine.step(
                share.packs,
                num_packs=ballot.num_packs,
                normaliser=ballot.normaliser,
                lr_factor=parts.lr_factor(step),
                make_empty=parts.loader.zero_batch,
                judge=parts.guard.judge,
            )
        except BadNumbers as bad:
            step += 1
            spent.forward_s = bad.result.forward_s
            run.skip(step, bad, share.packs)
        else:
            step += 1
            spent.forward_s = result.forward_s
            run.telemetry.record(step, result, _step_counts(ballot), run.engine.learning_rates)
        # (4) Save.
        last = step == parts.num_steps
        if last or step % parts.config.train.save_every == 0 or ballot.extra[0][SAVE]:
            dog.beat("saving", step)
            run.save(step, must=last)
    if step < parts.num_steps:
        if run.saved_step < step:
            run.save(step, must=True)
        why = flag.reason or "another process was told to"
        run.telemetry.say(f"stopped after step {step}; the same command resumes ({why})", step)
        run.end(step, reason="stopped")
        return Outcome.STOPPED
    run.finish(step)
    return Outcome.DONE


# Places in the row of numbers that every rank adds to its vote; samples per task come last.
WAIT, FORWARD, VOTE, TOKENS, DAMAGED, SAVE, TASK = range(7)


@dataclass(kw_only=True, slots=True)
class Spent:
    """Seconds of this rank in the step before, told in the vote of the next one."""

    forward_s: float = 0.0
    vote_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank brings to a step."""

    packs: list[Batch]
    error: Exception | None
    counts: list[float]

    @property
    def normaliser(self) -> float:
        """Sum of the weights of this rank's samples."""
        return rank_normaliser(self.packs)


def _next_share(batches: Iterator[list[Batch]], run: Run, spent: Spent) -> Share:
    begin = time.monotonic()
    packs: list[Batch] = []
    error: Exception | None = None
    try:
        packs = next(batches)
    except Exception as caught:
        error = caught
    wait = time.monotonic() - begin
    if run.lease is not None and run.lease.loss is not None:
        error = run.lease.loss
    tasks = [task for pack in packs for task in pack.tasks]
    damaged = sum(len(pack.quarantine) for pack in packs)
    num_tokens = sum(pack.num_tokens for pack in packs)
    counts = [wait, spent.forward_s, spent.vote_s, num_tokens, damaged, run.save_is_due()]
    counts += [tasks.count(task) for task in TASKS]
    return Share(packs=packs, error=error, counts=[float(count) for count in counts])


def _total(ballot: Vote, place: int) -> float:
    return sum(row[place] for row in ballot.extra)


def _step_counts(ballot: Vote) -> StepCounts:
    return StepCounts(
        samples={task: int(_total(ballot, TASK + number)) for number, task in enumerate(TASKS)},
        tokens=int(_total(ballot, TOKENS)),
        wait_s=[row[WAIT] for row in ballot.extra],
        forward_s=[row[FORWARD] for row in ballot.extra],
        vote_s=[row[VOTE] for row in ballot.extra],
        most_tokens=int(max(row[TOKENS] for row in ballot.extra)),
        packs=ballot.num_packs * len(ballot.extra),
    )


def step_seed(seed: int, stage: str, step: int, rank: int) -> int:
    """Seed of everything random inside one step of one rank; nothing random is ever saved."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
