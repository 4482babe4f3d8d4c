"""Training a stage: build the parts, walk the plan step by step, save, stop, resume.

In: the config and this rank's world. Out: RUN/STAGE/{checkpoints, metrics.jsonl, DONE} and an exit
code. Every rank runs this file; ranks differ only in their share of each step.

The stop protocol: a signal or the time limit sets a flag; ranks learn of it from the vote before
the next step, save together, and do what the launcher wants done (by default: exit with 75).
"""

import hashlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from data_shards.tasks import TASKS
from emoverse import distributed, stop
from emoverse.collate import Batch
from emoverse.config import Config
from emoverse.distributed import RankError, Vote, World, agree, vote
from emoverse.engine import start_process_group
from emoverse.lease import Lease, acquire
from emoverse.stage_run import Run, build_run, is_done, read_parts
from emoverse.stages import stage_dir
from emoverse.stop import EXIT_STOPPED, StopFlag
from emoverse.telemetry import StepCounts

EXIT_DONE, EXIT_FAULT, EXIT_WRONG_INPUT = 0, 1, 2
TIMEOUT_S = 1800.0  # of one collective; the slowest is waiting for another rank's first batch


def exit_as_stopped(world: World) -> int:
    """What a launcher wants done when all ranks have saved and stopped: nothing but the code."""
    return EXIT_STOPPED


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a launcher starts a training: the same on all ranks, and nothing that is learned from."""

    resume: bool = True  # False refuses a stage that has begun
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
        with stop.listen() as own:
            return train_stages(config, stages, launch=launch, flag=own)
    try:
        world = distributed.read_world()
    except ValueError as error:
        print(f"emoverse train: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    try:
        start_process_group(world, timeout_s=TIMEOUT_S)
        launch.check(world)
        code = train_in_group(config, stages, world, launch=launch, flag=flag)
        if code == EXIT_DONE:
            launch.then(world)
        if code == EXIT_STOPPED:
            code = launch.on_stop(world)
        distributed.shutdown()
        return code
    except Exception as error:
        # No shutdown: other ranks may wait in a collective, and leaving is what tells them.
        code = error.exit_code if isinstance(error, RankError) else EXIT_FAULT
        if code == EXIT_FAULT:
            traceback.print_exc()
        print(f"emoverse train: {error}", file=sys.stderr)
        if distributed.is_lost_peer(error):
            launch.on_lost()
        return code


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
        done = is_done(config, stage)
    if distributed.from_main(world, done):
        if world.is_main:
            print(f"{stage} already done, see {folder}", flush=True)
        return EXIT_DONE
    if distributed.gather_rows(world, [flag.requested]).any():  # before minutes of building
        return EXIT_STOPPED
    with agree(world, f"{stage}: set-up"):
        parts = read_parts(config, stage, world, resume=launch.resume)
    _require_same_start(world, stage, parts.start_step)
    anomalies = torch.autograd.set_detect_anomaly(config.train.detect_anomaly)
    with anomalies, build_run(parts, world, lease) as run:
        return _loop(run, flag)


def _require_same_start(world: World, stage: str, start_step: int) -> None:
    steps = [int(row[0]) for row in distributed.gather_rows(world, [start_step]).tolist()]
    if len(set(steps)) > 1:
        raise RankError(
            f"{stage}: ranks found different checkpoints, at steps {steps}; run.run_dir must be "
            "one shared folder for all of them",
            wrong_input=True,
        )


# The loop --------------------------------------------------------------------------------------


def _loop(run: Run, flag: StopFlag) -> int:
    """From the start step to the last, or to a stop. One turn is one optimiser step."""
    parts, world = run.parts, run.world
    step = saved = parts.start_step
    batches = parts.loader.iterate(step)
    while step < parts.num_steps:
        # (1) This rank's share of the step; an error waits for the vote, so that all hear of it.
        share = _next_share(batches, run.lease)
        # (2) The ranks agree: how many packs, what the weights sum to, does anybody want to stop?
        ballot = vote(
            world,
            num_packs=len(share.packs),
            normaliser=share.normaliser,
            stop=flag.requested,
            error=share.error,
            doing=f"{parts.stage} step {step + 1}",
            extra=share.counts,
        )
        if ballot.stop:
            break
        for damage in parts.ledger.add(share.packs, num_damaged=int(_total(ballot, DAMAGED))):
            run.telemetry.say(f"replaced damaged record {damage.key}: {damage.cause}", step)
        # (3) Forward, backward, update. Dropout depends on the step and the rank alone.
        torch.manual_seed(step_seed(parts.config.run.seed, parts.stage, step, world.rank))
        result = run.engine.step(
            share.packs,
            num_packs=ballot.num_packs,
            normaliser=ballot.normaliser,
            lr_factor=parts.lr_factor(step),
            make_empty=parts.loader.zero_batch,
        )
        step += 1
        # (4) Tell, and save.
        run.telemetry.record(step, result, _step_counts(ballot), run.engine.learning_rates)
        if step % parts.config.train.save_every == 0 or step == parts.num_steps:
            saved = run.save(step)
    if step < parts.num_steps:
        if saved < step:
            run.save(step)
        why = flag.reason or "another process was told to"
        run.telemetry.say(f"stopped after step {step}; the same command resumes ({why})", step)
        run.telemetry.end(step, reason="stopped", audit=parts.ledger.audit)
        return EXIT_STOPPED
    run.finish(step)
    return EXIT_DONE


# Places in the row of numbers that every rank adds to its vote; samples per task come last.
WAIT, TOKENS, DAMAGED, TASK = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank brings to a step."""

    packs: list[Batch]
    error: Exception | None
    counts: list[float]

    @property
    def normaliser(self) -> float:
        """Sum of the weights of this rank's samples."""
        return sum(pack.normaliser for pack in self.packs)


def _next_share(batches: Iterator[list[Batch]], lease: Lease | None) -> Share:
    begin = time.monotonic()
    packs: list[Batch] = []
    error: Exception | None = None
    try:
        packs = next(batches)
    except Exception as caught:
        error = caught
    wait = time.monotonic() - begin
    if lease is not None and lease.loss is not None:
        error = lease.loss
    tasks = [task for pack in packs for task in pack.tasks]
    damaged = sum(len(pack.quarantine) for pack in packs)
    counts = [wait, sum(pack.num_tokens for pack in packs), damaged]
    counts += [tasks.count(task) for task in TASKS]
    return Share(packs=packs, error=error, counts=[float(count) for count in counts])


def _total(ballot: Vote, place: int) -> float:
    return sum(row[place] for row in ballot.extra)


def _step_counts(ballot: Vote) -> StepCounts:
    return StepCounts(
        samples={task: int(_total(ballot, TASK + number)) for number, task in enumerate(TASKS)},
        tokens=int(_total(ballot, TOKENS)),
        wait_s=max(row[WAIT] for row in ballot.extra),
        most_tokens=int(max(row[TOKENS] for row in ballot.extra)),
        packs=ballot.num_packs * len(ballot.extra),
    )


def step_seed(seed: int, stage: str, step: int, rank: int) -> int:
    """Seed of everything random inside one step of one rank; nothing random is ever saved."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
