"""Training a stage: build the parts, walk the plan step by step, save, stop, resume.

In: the config and this rank's world. Out: RUN/STAGE/{checkpoints, metrics.jsonl, DONE} and an exit
code. Every rank runs this file; ranks differ only in their share of each step.

The stop protocol: a signal or the time limit sets a flag; ranks learn of it from the vote before
the next step, save together, and do what the launcher wants done (by default: exit with 75).
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from data_shards.tasks import TASKS
from emoverse.config.schema import Config
from emoverse.data.collate import Batch
from emoverse.engine import distributed, rank_faults
from emoverse.engine.deepspeed_engine import start_process_group
from emoverse.engine.distributed import RankError, Vote, World, agree, vote
from emoverse.engine.step_types import BadNumbers
from emoverse.engine.watchdog import Watchdog, watching
from emoverse.loss import rank_normaliser
from emoverse.run_dir.run_lock import Lease, acquire
from emoverse.training import shutdown
from emoverse.training.anomaly import anomaly_checks
from emoverse.training.shutdown import EXIT_STOPPED, StopFlag
from emoverse.training.stage_build import is_done, read_parts
from emoverse.training.stage_run import Run, build_run
from emoverse.training.stages import stage_dir
from emoverse.training.telemetry import StepCounts

EXIT_DONE, EXIT_FAULT, EXIT_WRONG_INPUT = 0, 1, 2
AFTER_HANG_S = 60.0  # a collective that outlives the watchdog by this much fails by itself


def exit_as_stopped(world: World) -> int:
    """What a launcher wants done when all ranks have saved and stopped: nothing but the code."""
    return EXIT_STOPPED


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a launcher starts a training: the same on all ranks, and nothing that is learned from."""

    resume: bool = True  # False refuses a stage that has begun
    accept_changes: bool = False  # of data, settings or base since the checkpoint
    take_over: bool = False  # of a run directory whose owner seems to live
    # Called on every rank after a stop, when all have saved and the run directory is given back;
    # returns the exit code, if it returns (a requeued job waits for its end instead).
    on_stop: Callable[[World], int] = exit_as_stopped
    # Called when a collective failed since another rank is gone, before this one ends as a fault.
    on_lost: Callable[[], None] = lambda: None
    # Called on every rank as soon as the process group stands; raises RankError on all or none.
    check: Callable[[World], None] = lambda world: None
    # Called on every rank after the last stage, while the process group stands: a group that has
    # been left cannot be joined again in the same process.
    then: Callable[[World], None] = lambda world: None


def train_stages(
    config: Config,
    stages: Sequence[str],
    *,
    launch: Launch = Launch(),
    flag: StopFlag | None = None,
) -> int:
    """Trains stages in turn as the rank that the environment says.

    `flag`: of a `stop.listen()` that began earlier; without one, signals count from here on.

    Returns:
        0 done, 75 stopped and resumable, 2 wrong input, 1 a fault; the reason is on stderr.
    """
    if flag is None:
        with shutdown.listen() as own:
            return train_stages(config, stages, launch=launch, flag=own)
    try:
        world = distributed.read_world()
    except ValueError as error:
        print(f"emoverse train: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    try:
        timeout_s = 60 * config.train.hang_minutes + AFTER_HANG_S
        start_process_group(world, timeout_s=timeout_s)
        launch.check(world)
        code = train_in_group(config, stages, world, launch=launch, flag=flag)
        if code == EXIT_DONE:
            launch.then(world)
        if code == EXIT_STOPPED:
            code = launch.on_stop(world)
        distributed.shutdown()
        return code
    except RankError as error:
        if error.exit_code == EXIT_FAULT and world.is_main:
            print(error.traceback, file=sys.stderr, end="")
        print(f"emoverse train: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        # No shutdown: other ranks may wait in a collective, and leaving is what tells them.
        rank_faults.report(config.run.run_dir, world.rank, error)
        print(f"emoverse train: {error}", file=sys.stderr)
        if distributed.is_lost_peer(error):
            launch.on_lost()
        return EXIT_FAULT


def train_in_group(
    config: Config, stages: Sequence[str], world: World, *, launch: Launch, flag: StopFlag
) -> int:
    """Like `train_stages`, in a process group that stands; collective.

    Raises:
        RankError: the reason of the rank that failed, on every rank.
    """
    flag.limit(config.train.max_minutes)
    lease: Lease | None = None
    with agree(world, "run directory"):
        if world.is_main:
            lease = acquire(config.run.run_dir, take_over=launch.take_over)
            rank_faults.clear(config.run.run_dir)
    code = EXIT_DONE
    try:
        for stage in stages:
            code = _train_stage(config, stage, world, launch=launch, flag=flag, lease=lease)
            if code != EXIT_DONE:
                break
    finally:
        if lease is not None:
            lease.release()
    return distributed.from_main(world, code)  # nobody goes on before the lease is given back


def _train_stage(
    config: Config, stage: str, world: World, *, launch: Launch, flag: StopFlag, lease: Lease | None
) -> int:
    """Trains one stage to its end, or to a stop; collective."""
    folder = stage_dir(config, stage)
    with agree(world, f"{stage}: run directory"):
        done = is_done(config, stage, accept_changes=launch.accept_changes)
    if distributed.from_main(world, done):
        if world.is_main:
            print(f"{stage} already done, see {folder}", flush=True)
        return EXIT_DONE
    if distributed.gather_rows(world, [flag.requested]).any():  # before minutes of building
        return EXIT_STOPPED
    limit_s = 60 * config.train.hang_minutes

    def lost() -> Exception | None:
        return None if lease is None else lease.loss

    with watching(folder / "heartbeat", world, limit_s=limit_s, lost=lost) as dog:
        with agree(world, f"{stage}: set-up"):
            parts = read_parts(
                config, stage, world, resume=launch.resume, accept_changes=launch.accept_changes
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


def _loop(run: Run, flag: StopFlag, dog: Watchdog) -> int:
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
        return EXIT_STOPPED
    run.finish(step)
    return EXIT_DONE


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
