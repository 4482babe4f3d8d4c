"""One rank of a job: the same program behind srun, submitit, torchrun and `emoverse train`.

`python -m launch.worker CONFIG.yaml --stage stage1` finds out which rank it is, trains, and ends
with 0 done, 2 wrong input, 1 a fault, 75 stopped and resumable. A job that was stopped by a signal
is put back into the queue by its rank 0, unless that would not help; all ranks then wait for the
scheduler to end them. `--evaluate` scores the run instead. Importing this file does not import
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emoverse.config.schema import Config, load_config
from emoverse.config.yaml_source import split_words
from emoverse.training.shutdown import EXIT_STOPPED as STOPPED
from emoverse.training.shutdown import StopFlag, listen
from emoverse.training.stages import stages_to_train
from launch.context import RankContext, read_context
from launch.slurm import job_log
from launch.slurm.job_log import EVAL
from launch.slurm.preflight import check_run
from launch.slurm.requeue import REQUEUE_CODE, requeue

if TYPE_CHECKING:
    from emoverse.engine.distributed import World

DONE, FAULT, WRONG_INPUT = 0, 1, 2
# How a user may want a training to start, whatever the context.
FLAGS = {
    "--fresh": "refuse a stage that has begun instead of resuming it",
    "--accept-changes": "resume although data, settings or base differ from the checkpoint's",
    "--take-over": "take the run directory from an owner that seems to live; it writes no more",
}
# The scheduler ends a requeued job within seconds; the others of a job that was not requeued are
# ended by srun as soon as rank 0 has left.
WAIT_FOR_END_S = 60.0
# Longer than SLURM's usual time (300 s) to find out that a node is gone.
WAIT_FOR_VERDICT_S = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Trains or evaluates as the rank that the environment says. Returns the exit code."""
    args = parse(argv)
    with listen() as flag:  # before the imports: a signal during them stops at the first agreement
        flag.began_before(args.spent_s)
        try:
            context = read_context(os.environ)
            config = load_config(*split_words(args.config))
            stages = () if args.evaluate and not args.stage else stages_to_train(config, args.stage)
        except (ValueError, FileNotFoundError) as error:
            print(error, file=sys.stderr)
            return WRONG_INPUT
        if args.end_with_input:
            threading.Thread(target=_end_with_input, daemon=True).start()
        prepare_environment(context)
        job = Job(
            config=config,
            parts=(*stages, EVAL) if args.evaluate else stages,
            context=context,
            max_requeues=args.max_requeues,
            logs=args.logs,
            accept_changes=args.accept_changes,
        )
        code = job.begin()
        if code != DONE:
            return code
        return job.end(_work(job, args, flag))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The worker's arguments; overrides may follow options."""
    parser = argparse.ArgumentParser(prog="python -m launch.worker", description=__doc__)
    parser.add_argument("config", nargs="+", help="YAML files, and overrides such as run.seed=2")
    parser.add_argument("--stage", action="append", help="stage to train; default: all, in order")
    parser.add_argument(
        "--evaluate", action="store_true", help="score the run and write its report"
    )
    for name, meaning in FLAGS.items():
        parser.add_argument(name, action="store_true", help=meaning)
    parser.add_argument("--logs", metavar="GLOB", help="where the ranks' output is, to be told")
    parser.add_argument(
        "--max-requeues",
        type=int,
        default=job_log.MAX_REQUEUES,
        help="times that a job may begin again after a signal or a lost node (default %(default)s)",
    )
    parser.add_argument(
        "--spent-s", type=float, default=0.0, help="seconds of train.max_minutes that have passed"
    )
    parser.add_argument("--end-with-input", action="store_true", help="leave when stdin ends")
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.config += rest
    return args


def rank_defaults(threads: int) -> dict[str, str]:
    """Environment that a rank wants unless the user has set it: threads, and no noise."""
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
    if context.launcher == "variables" or context.launcher == "none":
        del defaults["OMP_NUM_THREADS"]  # the launcher's business, or all cores for one process
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:  # PYTHONWARNINGS is read when Python starts, so this one needs more
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)


# The job around the work -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a scheduler started, as this rank sees it; silent without a scheduler."""

    config: Config
    parts: Sequence[str]  # stages, or eval
    context: RankContext
    max_requeues: int
    logs: str | None
    accept_changes: bool = False

    @property
    def is_mine(self) -> bool:
        """Is there a job, and does this rank speak for it?"""
        return self.context.job is not None and self.context.rank == 0

    @property
    def began_empty(self) -> bool:
        """Did this job find no saved step at its first start? Then what is there now is its own."""
        starts = job_log.read_job(self.config.run.run_dir, self.context.job or "").starts
        return bool(starts) and starts[0]["progress"] == 0

    def begin(self) -> int:
        """Rank 0 checks what the run needs and notes the start; its exit code if that fails."""
        if not self.is_mine:
            return DONE
        try:
            notes = check_run(self.config, self.parts, accept_changes=self.accept_changes)
            for note in notes:
                job_log.say(note)
            job_log.begin_start(
                self.config, self.parts, self.context, self.max_requeues, self._log()
            )
        except (ValueError, FileNotFoundError) as error:
            print(error, file=sys.stderr)
            return WRONG_INPUT
        except (RuntimeError, OSError) as error:
            print(error, file=sys.stderr)
            return FAULT
        nodes = os.environ.get("SLURM_JOB_NODELIST") or os.uname().nodename
        job_log.say(
            f"job {self.context.job}, start {self.context.num_restarts + 1}, {', '.join(self.parts)}: "
            f"{self.context.world_size} ranks on {nodes}, meeting at {self.context.address}:"
            f"{self.context.port}; log {self._log()}"
        )
        return DONE

    def requeue(self) -> str | None:
        """Rank 0 puts the stopped job back into the queue; the reason if it does not."""
        assert self.context.job is not None
        run_dir, progress = self.config.run.run_dir, job_log.saved_steps(self.config, self.parts)
        history = job_log.read_job(run_dir, self.context.job)
        reason = job_log.why_not_again(history, progress, self.max_requeues)
        # Noted first: once the scheduler has accepted, this process may end at any moment.
        self._note(STOPPED, requeued=not reason, reason=reason)
        if reason is None:
            reason = requeue(self.context)
            if reason is not None:
                self._note(STOPPED, requeued=False, reason=reason)
        if reason is None:
            job_log.say(
                f"job {self.context.job} stopped and requeued; it resumes from what it saved"
            )
        else:
            job_log.say(f"job {self.context.job} stopped and is not requeued: {reason}")
        return reason

    def after_stop(self, requeued: bool) -> int:
        """On every rank: the exit code of a stopped job, once the scheduler wants it."""
        if not requeued:
            return STOPPED
        if self.context.launcher == "submitit":
            return REQUEUE_CODE
        # A rank that left would end the job before the scheduler has put it back.
        with contextlib.suppress(SystemExit):
            time.sleep(WAIT_FOR_END_S)
        return STOPPED

    def wait_for_verdict(self, flag: StopFlag) -> None:
        """On a rank whose collective failed because another rank is gone: who ends this one?

        If that rank crashed, srun does within seconds and the job has failed. If its node is lost,
        nobody can know at once; a job that ended by itself now would count as failed, while one
        that waits is started again on other nodes.
        """
        if self.context.launcher != "slurm":
            return
        if self.is_mine:
            reason = "lost contact to another rank"
            self._note(FAULT, requeued=False, reason=reason)
            job_log.say(f"{reason}: waiting for the scheduler to say whether its node is gone")
        deadline = time.monotonic() + WAIT_FOR_VERDICT_S
        while not flag.requested and time.monotonic() < deadline and not self._succeeded():
            time.sleep(0.5)
        sys.stdout.flush()
        os._exit(FAULT)  # nothing is left to be noted or released

    def _succeeded(self) -> bool:
        """Has the job begun again elsewhere, because this node is the one that was cut off?"""
        starts = job_log.read_job(self.config.run.run_dir, self.context.job or "").starts
        return any(start["start"] > self.context.num_restarts for start in starts)

    def end(self, code: int) -> int:
        """Rank 0 notes how the job ended and says what comes next; returns the code."""
        if self.is_mine and code in (DONE, FAULT, WRONG_INPUT):
            self._note(code, requeued=False)
            if code == DONE:
                job_log.say(f"job {self.context.job} done; {self._next()}")
            else:
                job_log.say(
                    f"job {self.context.job} failed with exit code {code} and is not requeued, since "
                    f"it would fail again; see {self._log()}"
                )
        return code

    def _note(self, code: int, **facts: Any) -> None:
        progress = job_log.saved_steps(self.config, self.parts)
        run_dir, job = self.config.run.run_dir, self.context.job or ""
        try:
            job_log.add_event(run_dir, job, "end", code=code, progress=progress, **facts)
        except OSError as error:  # the work is done and saved, or not, whatever can be noted
            job_log.say(f"the end of job {job} cannot be noted: {error}")

    def _log(self) -> str:
        if self.logs is not None:
            return self.logs.replace("%j", self.context.job or "")
        return (
            f"{job_log.log_folder(self.config, self.parts[0], self.context.job or '')}/rank_*.log"
        )

    def _next(self) -> str:
        if EVAL in self.parts:
            return f"next: open {self.config.run.run_dir / 'report.html'}"
        names = list(self.config.stages)
        later = names[names.index(self.parts[-1]) + 1 :]
        script = f"slurm/{later[0]}.sh" if later else "slurm/evaluate.sh"
        return f"next: sbatch {script}, unless it is queued already"


# The work, which imports torch -----------------------------------------------------------------


def _work(job: Job, args: argparse.Namespace, flag: StopFlag) -> int:
    from emoverse.engine.distributed import World, from_main
    from emoverse.engine.health import check_nodes
    from emoverse.estimate.memory import memory_need
    from emoverse.training.train import Launch, train_stages

    def requeue_together(world: World) -> int:
        if job.context.job is None:
            return STOPPED
        reason = from_main(world, job.requeue() if world.is_main else None)
        return job.after_stop(requeued=reason is None)

    def evaluate(world: World) -> None:
        if EVAL in job.parts:
            _evaluate(job, world, flag)

    def check(world: World) -> None:
        if job.context.job is not None:
            for note in check_nodes(world, memory_need(job.config, world.world_size)):
                if world.is_main:
                    job_log.say(note)

    launch = Launch(
        resume=not args.fresh or job.began_empty,
        take_over=args.take_over,
        accept_changes=args.accept_changes,
        check=check,
        on_stop=requeue_together,
        on_lost=lambda: job.wait_for_verdict(flag),
        then=evaluate,
    )
    stages = [part for part in job.parts if part != EVAL]
    try:
        return train_stages(job.config, stages, launch=launch, flag=flag)
    except SystemExit:
        return _stop_evaluation(job)  # it was told to stop before it began


def _stop_evaluation(job: Job) -> int:
    """Every rank for itself: all answers are kept, there is nothing to agree about."""
    reason = job.requeue() if job.is_mine else None
    return job.after_stop(requeued=job.context.job is not None and reason is None)


def _evaluate(job: Job, world: "World", flag: StopFlag) -> None:
    """Answers and scores the held-out records on all ranks; rank 0 writes the report."""
    from emoverse.engine.distributed import agree, gather_rows
    from emoverse.evaluation.evaluate import run
    from emoverse.report.report import write_report

    if gather_rows(world, [flag.requested]).any():  # while it started, or in the last step before
        why = flag.reason or "another process was told to stop"
        print(f"evaluation not begun ({why})", flush=True)
        raise SystemExit(STOPPED)
    threading.Thread(target=_leave_when_told, args=(job, flag), daemon=True).start()
    # One rank alone has nobody to agree with inside, and its mistakes are wrong input too.
    with agree(world, "evaluation") if world.world_size == 1 else contextlib.nullcontext():
        run(job.config.run.run_dir, world=world, config=job.config)
    with agree(world, "report"):
        if world.is_main:
            print(write_report(job.config.run.run_dir), flush=True)


def _leave_when_told(job: Job, flag: StopFlag) -> None:
    """Ends this process after the first signal.

    In a thread: a rank that has answered its share waits for the others inside a collective, where
    no handler runs, and the job must be requeued before the scheduler's patience is over.
    """
    flag.heard.wait()
    code = FAULT
    try:
        code = _stop_evaluation(job)
    except Exception:
        traceback.print_exc()
    with contextlib.suppress(OSError):  # a full disk
        sys.stdout.flush()
    os._exit(code)


def _end_with_input() -> None:
    """Ends this process when its launcher, which holds the other end of our input, is gone."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(FAULT)


if __name__ == "__main__":
    sys.exit(main())
