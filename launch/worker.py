"""One rank of a job: the one program that srun, submitit, torchrun and `emoverse` start per rank.

`python -m launch.worker CONFIG --stage stage1` reads its rank from the environment, trains, and
ends with 0 done, 2 wrong input, 1 a fault, or 75 stopped and resumable. `--evaluate` scores the
run afterwards, or only scores it; `--evaluate-target` scores one run, checkpoint or base without
training. In a job that a signal stopped, rank 0 puts the job back into the queue, unless that would
not help; all ranks then wait for the scheduler to end them. Importing this file does not import
torch.
"""

import argparse
import contextlib
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoverse.config.schema import Config, load_config, load_frozen
from emoverse.config.yaml_source import split_words
from emoverse.evaluation.parsing import MODES
from emoverse.evaluation.target import Target, resolve
from emoverse.training.shutdown import StopFlag, listen
from emoverse.training.stages import stages_to_train
from launch.context import RankContext, read_context
from launch.exit_codes import DONE, FAULT, OF_OUTCOME, STOPPED, WRONG_INPUT
from launch.slurm import job_log
from launch.slurm.job_log import EVAL
from launch.slurm.preflight import check_run
from launch.slurm.requeue import REQUEUE_CODE, requeue

if TYPE_CHECKING:
    from emoverse.engine.distributed import World
    from emoverse.training.outcome import Outcome

# How a training may start; the same options for every command that starts one.
FLAGS = {
    "--fresh": "refuse a stage that has begun instead of resuming it",
    "--accept-changes": "resume although data, settings or base differ from the checkpoint's",
    "--take-over": "take the run directory from an owner that seems to live; it writes no more",
}
# The scheduler ends a requeued job within seconds. In a job that is not requeued, srun ends the
# other ranks as soon as rank 0 has left.
WAIT_FOR_END_S = 60.0
# Longer than SLURM usually takes (300 s) to notice a lost node.
WAIT_FOR_VERDICT_S = 600.0
# Of one collective in an evaluation: as long as another rank may need for its batch.
EVALUATION_TIMEOUT_S = 1800.0
# In training the watchdog ends a hanging rank first; this much later the collective fails itself.
AFTER_HANG_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Trains or evaluates as the rank that the environment describes. Returns the exit code."""
    args = parse(argv)
    with listen() as flag:  # before heavy imports, so that a signal during them counts
        flag.add_elapsed(args.spent_s)
        try:
            job = make_job(args, read_context(os.environ))
        except (ValueError, FileNotFoundError) as error:
            print(error, file=sys.stderr)
            return WRONG_INPUT
        if args.end_with_input:
            threading.Thread(target=_end_with_input, daemon=True).start()
        if job.target is not None:  # every answered batch is on disk: nothing else to save
            _exit_on_signal(job, flag)
        prepare_environment(job.context)
        code = job.start()
        if code != DONE:
            return code
        return job.end(run_rank(job, args, flag))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The worker's arguments; overrides may follow options."""
    parser = argparse.ArgumentParser(prog="python -m launch.worker", description=__doc__)
    parser.add_argument(
        "config",
        nargs="+",
        help="YAML files and overrides such as run.seed=2, or one config that was frozen as .json",
    )
    parser.add_argument("--stage", action="append", help="stage to train; default: all, in order")
    parser.add_argument(
        "--evaluate", action="store_true", help="score the run and write its report"
    )
    for name, meaning in FLAGS.items():
        parser.add_argument(name, action="store_true", help=meaning)
    parser.add_argument("--logs", metavar="GLOB", help="pattern of the ranks' log files, to report")
    parser.add_argument(
        "--max-requeues",
        type=int,
        default=job_log.MAX_REQUEUES,
        help="how often a job may start again after a signal or a lost node (default %(default)s)",
    )
    parser.add_argument(
        "--spent-s", type=float, default=0.0, help="seconds of train.max_minutes used up before"
    )
    parser.add_argument("--end-with-input", action="store_true", help="leave when stdin ends")
    target = parser.add_argument_group("evaluation without training, see `emoverse evaluate`")
    target.add_argument(
        "--evaluate-target",
        type=Path,
        metavar="RUN|CHECKPOINT|BASE",
        help="score this by CONFIG and end; no stage is trained, no report is written",
    )
    target.add_argument("--which", action="append", help="state to score (repeatable)")
    target.add_argument("--parser", choices=MODES, default=MODES[0], help="how answers are read")
    target.add_argument("--answer-again", action="store_true", help="ignore earlier answers")
    target.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.config += rest
    return args


def read_config(words: Sequence[str]) -> Config:
    """The config of the command line: a frozen one as it is, anything else checked.

    Raises:
        ValueError, FileNotFoundError: what is wrong with it.
    """
    paths, overrides = split_words(words)
    if len(paths) == 1 and paths[0].suffix == ".json" and not overrides:
        return load_frozen(paths[0])
    return load_config(paths, overrides)


def make_job(args: argparse.Namespace, context: RankContext) -> "Job":
    """What this rank shall do.

    Raises:
        ValueError, FileNotFoundError: a wrong config, an unknown stage, nothing to evaluate.
    """
    config = read_config(args.config)
    target = None
    if args.evaluate_target is not None:
        target = resolve(args.evaluate_target, states=args.which or (), out=args.out, config=config)
        context = replace(context, job=None)  # started by hand: never requeued, nothing recorded
        stages: tuple[str, ...] = ()
    elif args.evaluate and not args.stage:
        stages = ()
    else:
        stages = stages_to_train(config, args.stage)
    evaluates = args.evaluate or target is not None
    return Job(
        config=config,
        parts=(*stages, EVAL) if evaluates else stages,
        context=context,
        max_requeues=args.max_requeues,
        logs=args.logs,
        accept_changes=args.accept_changes,
        target=target,
    )


def rank_defaults(threads: int) -> dict[str, str]:
    """Environment of a rank where the user has set nothing: few threads, no noise."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
        # Libraries warn about their own future, at every start and on every rank.
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
        # DeepSpeed compiles an optimiser that nobody uses when it is imported.
        "TORCHDYNAMO_DISABLE": "1",
    }


def prepare_environment(context: RankContext) -> None:
    """Sets the rank variables and the defaults, before torch is imported and reads them."""
    context.export(os.environ)
    defaults = rank_defaults(int(os.environ.get("SLURM_CPUS_PER_TASK") or 1))
    if context.launcher != "submitit":
        del defaults["GLOO_SOCKET_IFNAME"]  # ranks on several hosts meet over the network
    if context.launcher in ("variables", "none"):
        del defaults["OMP_NUM_THREADS"]  # the launcher's business, or all cores for one process
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:  # Python reads PYTHONWARNINGS only when it starts
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)


# The job around the work -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The job of a scheduler as this rank sees it; records nothing without a scheduler."""

    config: Config
    parts: Sequence[str]  # stages, or eval
    context: RankContext
    max_requeues: int
    logs: str | None
    accept_changes: bool = False
    target: Target | None = None  # what to evaluate instead of the config's run

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.config.run.run_dir

    @property
    def is_main(self) -> bool:
        """True on rank 0 of a scheduler's job, which records and requeues it."""
        return self.context.job is not None and self.context.rank == 0

    @property
    def started_empty(self) -> bool:
        """True if no step was saved when the job first started, so all steps are its own."""
        starts = job_log.read_job(self.run_dir, self.context.job or "").starts
        return bool(starts) and starts[0]["progress"] == 0

    def start(self) -> int:
        """Rank 0 checks what the run needs and records the start; the exit code if that fails."""
        if not self.is_main:
            return DONE
        try:
            notes = check_run(self.config, self.parts, accept_changes=self.accept_changes)
            for note in notes:
                job_log.log(note)
            logs = self._log()
            job_log.record_start(self.run_dir, self.parts, self.context, self.max_requeues, logs)
        except (ValueError, FileNotFoundError) as error:
            print(error, file=sys.stderr)
            return WRONG_INPUT
        except (RuntimeError, OSError) as error:
            print(error, file=sys.stderr)
            return FAULT
        nodes = os.environ.get("SLURM_JOB_NODELIST") or os.uname().nodename
        context = self.context
        job_log.log(
            f"job {context.job}, start {context.num_restarts + 1}, {', '.join(self.parts)}: "
            f"{context.world_size} ranks on {nodes}, meeting at {context.address}:{context.port}; "
            f"log {logs}"
        )
        return DONE

    def requeue(self) -> str | None:
        """Rank 0 puts the stopped job back into the queue; the reason if it does not."""
        assert self.context.job is not None
        progress = job_log.saved_steps(self.run_dir, self.parts)
        history = job_log.read_job(self.run_dir, self.context.job)
        reason = job_log.restart_refusal(history, progress, self.max_requeues)
        # Recorded first: the scheduler may end this process at any moment after the request.
        self._record_end(STOPPED, requeued=not reason, reason=reason)
        if reason is None:
            reason = requeue(self.context)
            if reason is not None:
                self._record_end(STOPPED, requeued=False, reason=reason)
        if reason is None:
            job_log.log(
                f"job {self.context.job} stopped and requeued; it resumes from what it saved"
            )
        else:
            job_log.log(f"job {self.context.job} stopped and is not requeued: {reason}")
        return reason

    def after_stop(self, requeued: bool) -> int:
        """The exit code of a stopped job; a requeued one waits for the scheduler to end it."""
        if not requeued:
            return STOPPED
        if self.context.launcher == "submitit":
            return REQUEUE_CODE
        # A rank that left would end the job before the scheduler has put it back.
        with contextlib.suppress(SystemExit):
            time.sleep(WAIT_FOR_END_S)
        return STOPPED

    def wait_for_scheduler(self, flag: StopFlag) -> None:
        """After the loss of another rank: lets the scheduler decide how this one ends.

        If the other rank crashed, srun ends this one within seconds and the job has failed. If its
        node is lost, nobody can know at once. A job that ended by itself now would count as failed;
        one that waits is started again on other nodes.
        """
        if self.context.launcher != "slurm" or self.context.job is None:
            return
        if self.is_main:
            reason = "lost contact to another rank"
            self._record_end(FAULT, requeued=False, reason=reason)
            job_log.log(f"{reason}: waiting for the scheduler to report whether its node is lost")
        deadline = time.monotonic() + WAIT_FOR_VERDICT_S
        while not flag.requested and time.monotonic() < deadline and not self._runs_elsewhere():
            time.sleep(0.5)
        sys.stdout.flush()
        os._exit(FAULT)  # nothing is left to record or release

    def _runs_elsewhere(self) -> bool:
        """True if the job has started again, because this node is the one that was cut off."""
        starts = job_log.read_job(self.run_dir, self.context.job or "").starts
        return any(start["start"] > self.context.num_restarts for start in starts)

    def end(self, code: int) -> int:
        """Rank 0 records how the job ended and logs the next step; returns the code."""
        if self.is_main and code in (DONE, FAULT, WRONG_INPUT):
            self._record_end(code, requeued=False)
            if code == DONE:
                job_log.log(f"job {self.context.job} done; {self._next()}")
            else:
                job_log.log(
                    f"job {self.context.job} failed with exit code {code} and is not requeued, "
                    f"since it would fail again; see {self._log()}"
                )
        return code

    def _record_end(self, code: int, **facts: Any) -> None:
        progress = job_log.saved_steps(self.run_dir, self.parts)
        job = self.context.job or ""
        try:
            job_log.add_event(self.run_dir, job, "end", code=code, progress=progress, **facts)
        except OSError as error:  # a full disk does not change how the work ended
            job_log.log(f"the end of job {job} cannot be recorded: {error}")

    def _log(self) -> str:
        job = self.context.job or ""
        if self.logs is not None:
            return self.logs.replace("%j", job)
        return f"{job_log.log_folder(self.run_dir, self.parts[0], job)}/rank_*.log"

    def _next(self) -> str:
        if EVAL in self.parts:
            return f"next: open {self.run_dir / 'report.html'}"
        names = list(self.config.stages)
        later = names[names.index(self.parts[-1]) + 1 :]
        script = f"slurm/{later[0]}.sh" if later else "slurm/evaluate.sh"
        return f"next: sbatch {script}, unless it is queued already"


# The work, which imports torch -----------------------------------------------------------------


def run_rank(job: Job, args: argparse.Namespace, flag: StopFlag) -> int:
    """Opens the process group, trains, evaluates, requeues a stopped job; the exit code.

    Order on every rank: check of the hosts, stages, evaluation, requeue, end of the group.
    """
    from emoverse.engine import distributed
    from emoverse.engine.deepspeed_engine import process_group
    from emoverse.training.outcome import Outcome, report_failure
    from emoverse.training.train import TrainOptions, train_stages

    stages = [part for part in job.parts if part != EVAL]
    command = "emoverse train" if stages else "emoverse evaluate"
    options = TrainOptions(
        resume=not args.fresh or job.started_empty,
        take_over=args.take_over,
        accept_changes=args.accept_changes,
    )
    timeout_s = 60 * job.config.train.hang_minutes + AFTER_HANG_S
    try:
        world = distributed.read_world()
    except ValueError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return WRONG_INPUT
    try:
        with process_group(world, timeout_s=EVALUATION_TIMEOUT_S if job.target else timeout_s):
            _check_hosts(job, world)
            outcome = Outcome.DONE
            if job.target is None:
                outcome = train_stages(job.config, stages, world, options=options, flag=flag)
            if outcome is Outcome.DONE and EVAL in job.parts:
                outcome = _evaluate(job, world, args, flag)
            if outcome is Outcome.STOPPED:
                return _requeue_together(job, world)
    except Exception as error:
        run_dir = job.run_dir if job.target is None else None
        outcome = report_failure(error, world, command=command, run_dir=run_dir)
        if outcome is Outcome.LOST_PEER:
            job.wait_for_scheduler(flag)
    return OF_OUTCOME[outcome]


def _check_hosts(job: Job, world: "World") -> None:
    """In a scheduler's job: refuses hosts that are not fit to train together; collective."""
    from emoverse.engine.health import check_nodes
    from emoverse.estimate.memory import estimate_memory

    if job.context.job is not None:
        for note in check_nodes(world, estimate_memory(job.config, world.world_size)):
            if world.is_main:
                job_log.log(note)


def _requeue_together(job: Job, world: "World") -> int:
    """After a stop that all ranks agreed on: rank 0 requeues, all end alike; collective."""
    from emoverse.engine.distributed import from_main

    if job.context.job is None:
        return STOPPED
    reason = from_main(world, job.requeue() if world.is_main else None)
    return job.after_stop(requeued=reason is None)


def _evaluate(job: Job, world: "World", args: argparse.Namespace, flag: StopFlag) -> "Outcome":
    """Answers and scores the held-out records on all ranks; rank 0 writes the report.

    Returns DONE, or STOPPED if a stop was requested before it began; a later signal ends the
    process. Raises RankError on every rank.
    """
    from emoverse.engine.distributed import INPUT_ERRORS, RankError, fail_together, gather_rows
    from emoverse.evaluation.evaluate import run, run_target
    from emoverse.report.report import write_report
    from emoverse.training.outcome import Outcome

    if gather_rows(world, [flag.requested]).any():  # at start-up, or in the last training step
        why = flag.reason or "another process was told to stop"
        print(f"evaluation not begun ({why})", flush=True)
        return Outcome.STOPPED
    try:
        if job.target is not None:
            run_target(job.target, world=world, mode=args.parser, fresh=args.answer_again)
            return Outcome.DONE
        _exit_on_signal(job, flag)
        run(job.run_dir, world=world, config=job.config)
    except INPUT_ERRORS as error:  # missing shards or states, which every rank finds alike
        raise RankError(str(error), wrong_input=True) from error
    with fail_together(world, "report"):
        if world.is_main:
            print(write_report(job.run_dir), flush=True)
    return Outcome.DONE


def _exit_on_signal(job: Job, flag: StopFlag) -> None:
    """From now on the first signal ends this process, after rank 0 has requeued the job.

    Each rank acts alone: all answers are on disk, so there is nothing to agree on. In a thread: a
    rank that has answered its share waits for the others in a collective, where no signal handler
    runs, and the job must be requeued before the scheduler kills it.
    """

    def wait_and_exit() -> None:
        flag.signalled.wait()
        code = FAULT
        try:
            reason = job.requeue() if job.is_main else None
            code = job.after_stop(requeued=job.context.job is not None and reason is None)
        except Exception:
            traceback.print_exc()
        with contextlib.suppress(OSError):  # a full disk
            sys.stdout.flush()
        os._exit(code)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def _end_with_input() -> None:
    """Ends this process when its launcher, which holds the other end of stdin, is gone."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(FAULT)


if __name__ == "__main__":
    sys.exit(main())
