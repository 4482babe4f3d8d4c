"""Training a stage: build the parts, walk the plan step by step, save, stop, resume.

In: the config and this rank's world. Out: RUN/STAGE/{checkpoints, metrics.jsonl, DONE} and an exit
code. Every rank runs this file; ranks differ only in their share of each step.

The stop protocol: a signal sets a flag; ranks learn of it from the vote before the next step, save
together and leave with exit code 75. The same command then resumes.
"""

import contextlib
import hashlib
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import torch

from data_shards.tasks import TASKS
from emoverse import distributed
from emoverse.collate import Batch
from emoverse.config import Config
from emoverse.distributed import RankError, Vote, World, agree, vote
from emoverse.engine import start_process_group
from emoverse.stage_run import Run, build_run, is_done, read_parts
from emoverse.stages import stage_dir
from emoverse.telemetry import StepCounts

EXIT_DONE, EXIT_FAULT, EXIT_WRONG_INPUT, EXIT_STOPPED = 0, 1, 2, 75
TIMEOUT_S = 1800.0  # of one collective; the slowest is waiting for another rank's first batch
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def train_stages(config: Config, stages: Sequence[str], *, resume: bool = True) -> int:
    """Trains stages in turn as the rank that the environment says.

    Returns:
        0 done, 75 stopped and resumable, 2 wrong input, 1 a fault; the reason is on stderr.
    """
    try:
        world = distributed.read_world()
    except ValueError as error:
        print(f"emoverse train: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    try:
        start_process_group(world, timeout_s=TIMEOUT_S)
        for stage in stages:
            code = train_stage(config, stage, world, resume=resume)
            if code != EXIT_DONE:
                break
        distributed.shutdown()
        return code
    except Exception as error:
        # No shutdown: other ranks may wait in a collective, and leaving is what tells them.
        code = error.exit_code if isinstance(error, RankError) else EXIT_FAULT
        if code == EXIT_FAULT:
            traceback.print_exc()
        print(f"emoverse train: {error}", file=sys.stderr)
        return code


def train_stage(config: Config, stage: str, world: World, *, resume: bool = True) -> int:
    """Trains one stage to its end, or to a stop; collective.

    Raises:
        RankError: the reason of the rank that failed, on every rank.
    """
    folder = stage_dir(config, stage)
    with agree(world, f"{stage}: run directory"):
        done = is_done(config, stage)
    if distributed.from_main(world, done):
        if world.is_main:
            print(f"{stage} already done, see {folder}", flush=True)
        return EXIT_DONE
    with agree(world, f"{stage}: set-up"):
        parts = read_parts(config, stage, world, resume=resume)
    _require_same_start(world, stage, parts.start_step)
    with stop_flag() as stop, build_run(parts, world) as run:
        return _loop(run, stop)


def _require_same_start(world: World, stage: str, start_step: int) -> None:
    steps = [int(row[0]) for row in distributed.gather_rows(world, [start_step]).tolist()]
    if len(set(steps)) > 1:
        raise RankError(
            f"{stage}: ranks found different checkpoints, at steps {steps}; run.run_dir must be "
            "one shared folder for all of them",
            wrong_input=True,
        )


# The loop --------------------------------------------------------------------------------------


def _loop(run: Run, stop: "StopFlag") -> int:
    """From the start step to the last, or to a stop. One turn is one optimiser step."""
    parts, world = run.parts, run.world
    step = saved = parts.start_step
    batches = parts.loader.iterate(step)
    while step < parts.num_steps:
        # (1) This rank's share of the step; an error waits for the vote, so that all hear of it.
        share = _next_share(batches)
        # (2) The ranks agree: how many packs, what the weights sum to, does anybody want to stop?
        ballot = vote(
            world,
            num_packs=len(share.packs),
            normaliser=share.normaliser,
            stop=stop.requested,
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
        run.telemetry.say(f"stopped after step {step}; the same command resumes", step)
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


def _next_share(batches: Iterator[list[Batch]]) -> Share:
    begin = time.monotonic()
    packs: list[Batch] = []
    error: Exception | None = None
    try:
        packs = next(batches)
    except Exception as caught:
        error = caught
    wait = time.monotonic() - begin
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
    )


def step_seed(seed: int, stage: str, step: int, rank: int) -> int:
    """Seed of everything random inside one step of one rank; nothing random is ever saved."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class StopFlag:
    """Becomes true at the first signal to stop; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.requested = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: only sets the flag."""
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Listens to the signals to stop while the block runs."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag.handle) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
