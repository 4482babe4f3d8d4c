"""The verb `launch`: a run, or an array of runs, as a chain of jobs on a cluster.

(1) runs       the config, once per variant and seed, each with a run directory of its own
(2) preflight  reports everything that is wrong, before anything is queued
(3) freeze     code and config into the run directory, so that later edits do not reach the jobs
(4) submit     stage1 -> stage2 -> evaluate through submitit, each waiting for the one before
The jobs run `launch.worker`, as `sbatch slurm/stage1.sh` does.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError
from submitit.helpers import DelayedSubmission, clean_env, environment_variables

from emoverse.config.schema import Config, freeze_config, frozen_path
from emoverse.training.stages import BASE, DONE, stage_dir
from launch.slurm import job_log, snapshot
from launch.slurm.cluster import NO_ACCOUNT, Cluster, check_account
from launch.slurm.job_log import EVAL, JOBS
from launch.slurm.preflight import check_memory, check_ranks, collect, run_checks
from launch.slurm.variants import Run

TEST_TIMEOUT_S = 60


class TrainJob:
    """What submitit pickles: only the command line of the worker.

    All state is on disk, so a checkpoint of this object is the object itself.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)

    def __call__(self) -> int:
        """Runs the worker on every rank; ends the process with its code unless that is 0."""
        from launch import worker  # on the compute node, from the frozen code

        code = worker.main(self.words)
        if code:
            # Not an exception: the scheduler sees the code, and no result is written that would
            # make a requeued job look finished.
            sys.exit(code)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Called if a signal comes before the worker handles signals: the job just runs again."""
        return DelayedSubmission(TrainJob(self.words))


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One link of the chain: the same part of every run."""

    name: str
    parts: tuple[str, ...]

    @property
    def scores(self) -> bool:
        """True for the evaluation."""
        return self.parts == (EVAL,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """Everything that one call of `launch` submits."""

    cluster: Cluster
    cluster_file: Path
    runs: tuple[Run, ...]
    steps: tuple[Step, ...]
    accept_changes: bool = False  # resume although settings differ from the checkpoint's

    @property
    def home(self) -> Path:
        """The run directory, or with variants the folder that holds theirs."""
        return self.runs[0].home.resolve()


def steps_of(cluster: Cluster, stages: Sequence[str], *, evaluate: bool) -> tuple[Step, ...]:
    """The links of the chain; the local executor has no dependencies, so there is one link."""
    parts = [*stages, *([EVAL] if evaluate else [])]
    if cluster.executor == "local":
        return (Step(name="-".join(parts), parts=tuple(parts)),)
    return tuple(Step(name=part, parts=(part,)) for part in parts)


def unfinished(chain: Chain) -> Chain:
    """The chain without stages that every run has finished.

    A finished stage that starts from an unfinished one stays: its job checks whether it is valid.
    """

    def is_required(run: Run, part: str) -> bool:
        if part == EVAL or not (stage_dir(run.config, part) / DONE).is_file():
            return True
        start = run.config.stages[part].start_from
        return start != BASE and is_required(run, start)

    remaining = [
        step
        for step in chain.steps
        if any(is_required(run, part) for run in chain.runs for part in step.parts)
    ]
    return replace(chain, steps=tuple(remaining))


# Parameters of a job ---------------------------------------------------------------------------


def shared_parameters(chain: Chain, step: Step) -> dict[str, Any]:
    """The parameters that submitit has for every executor, by its names."""
    cluster, score = chain.cluster, chain.cluster.evaluate

    def pick(own: int | None, other: int) -> int:
        return own if step.scores and own is not None else other

    return {
        "name": f"emoverse-{step.name}-{chain.runs[0].base_name}",
        "nodes": score.nodes if step.scores else cluster.nodes,
        "tasks_per_node": pick(score.tasks_per_node, cluster.tasks_per_node),
        "gpus_per_node": pick(score.gpus_per_node, cluster.gpus_per_node),
        "cpus_per_task": cluster.cpus_per_task,
        "timeout_min": pick(score.minutes, cluster.minutes),
        "stderr_to_stdout": True,
        **({"mem_gb": cluster.mem_gb} if cluster.mem_gb is not None else {}),
    }


def slurm_parameters(chain: Chain, code: Path, dependency: str | None) -> dict[str, Any]:
    """The parameters for SLURM only, by submitit's names; unset ones are left out."""
    cluster = chain.cluster
    given = {
        "account": None if cluster.account == NO_ACCOUNT else cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "dependency": dependency,
    }
    return {
        **{name: value for name, value in given.items() if value is not None},
        "signal_delay_s": cluster.signal_s,
        "array_parallelism": cluster.array_parallelism,
        "setup": [*cluster.setup, *_exports(cluster, code)],
        # submitit sets neither: the first ends a job whose rank has died, the second gives the
        # step the cores of the job, which SLURM 22.05 and later do not by themselves.
        "srun_args": [
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={cluster.cpus_per_task}",
            "--open-mode=append",
        ],
        "additional_parameters": {
            "requeue": True,
            "kill-on-invalid-dep": "yes",
            **cluster.flags,
        },
    }


def job_environment(cluster: Cluster, code: Path) -> dict[str, str]:
    """Environment of the ranks; the frozen code takes precedence over the working folder."""
    return {
        **cluster.environment,
        "PYTHONPATH": str(code),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def _exports(cluster: Cluster, code: Path) -> list[str]:
    return [
        f"export {name}={shlex.quote(value)}"
        for name, value in job_environment(cluster, code).items()
    ]


def job_of(chain: Chain, run: Run, step: Step) -> TrainJob:
    """The worker's command line for one run."""
    return TrainJob(
        [
            str(frozen_path(run.config, jobs_folder(run.config))),
            *(f"--stage={part}" for part in step.parts if part != EVAL),
            *(["--evaluate"] if EVAL in step.parts else []),
            *(["--accept-changes"] if chain.accept_changes else []),
            f"--logs={log_folder(chain, step)}/%j_*_log.out",
            f"--max-requeues={chain.cluster.max_requeues}",
        ]
    )


def jobs_folder(config: Config) -> Path:
    """Where the frozen code and config of a run's jobs are, as an absolute path."""
    return config.run.run_dir.resolve() / JOBS


def log_folder(chain: Chain, step: Step) -> Path:
    """Where submitit keeps what belongs to a job, %j being its id."""
    return chain.home / step.parts[0] / "logs" / "%j"


# The exact script, without a scheduler ---------------------------------------------------------


class _ScriptWriter(submitit.SlurmExecutor):
    """Writes the script that SlurmExecutor would submit, also where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, num_jobs: int) -> str:
        """The text of the sbatch file; more than one job is an array."""
        if num_jobs > 1:
            self.parameters["map_count"] = num_jobs
        return str(self._make_submission_file_text(self._submitit_command_str, ""))


def script_of(chain: Chain, step: Step, code: Path, dependency: str | None) -> str:
    """The exact text that sbatch gets for a step."""
    with tempfile.TemporaryDirectory() as elsewhere:  # leaves the run directory untouched
        writer = _ScriptWriter(Path(elsewhere), python=_python(chain.cluster))
        writer.folder = log_folder(chain, step)
        writer.update_parameters(
            **writer._convert_parameters(shared_parameters(chain, step)),
            **slurm_parameters(chain, code, dependency),
        )
        return writer.script(len(chain.runs))


def _python(cluster: Cluster) -> str:
    return cluster.python or shlex.quote(sys.executable)


# Preflight and submission ----------------------------------------------------------------------


def preflight(chain: Chain) -> list[str]:
    """Every check that is possible before jobs are queued; returns notes.

    Raises:
        ValueError: all problems together.
    """
    parts = [part for step in chain.steps for part in step.parts]
    checks: list[Callable[[], list[str]]] = [partial(check_account, chain.cluster)]
    for run in chain.runs:
        checks += [
            partial(check_ranks, run.config.train, chain.cluster),
            partial(check_memory, run.config, chain.cluster),
            *run_checks(run.config, parts, accept_changes=chain.accept_changes, checksums=True),
        ]
    notes = collect(checks)
    if chain.cluster.executor == "slurm":
        notes += collect([partial(ask_slurm, chain, step) for step in chain.steps])
    return list(dict.fromkeys(notes))


def ask_slurm(chain: Chain, step: Step) -> list[str]:
    """Lets SLURM check a script: partition, account, limits, nodes of this kind."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "sbatch is not on PATH: call `emoverse launch` on a login node of the cluster, look at "
            "the scripts with --dry-run, or choose configs/cluster/local.yaml"
        )
    text = script_of(chain, step, snapshot.code_folder(chain.home), None)
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file, _outside_of_jobs({}):
        file.write(text)
        file.flush()
        done = subprocess.run(
            ["sbatch", "--test-only", file.name],
            capture_output=True,
            text=True,
            timeout=TEST_TIMEOUT_S,
        )
    if done.returncode:
        reason = " ".join(done.stderr.split())
        cluster = chain.cluster
        raise ValueError(
            f"sbatch would refuse the job of {step.name}: {reason} (partition {cluster.partition}, "
            f"account {cluster.account}, qos {cluster.qos}, {cluster.nodes} nodes; correct "
            f"{chain.cluster_file} or override cluster.KEY=VALUE)"
        )
    return []


def dry_run(chain: Chain) -> list[dict[str, Any]]:
    """Per step its name and the exact script; <id of STEP> stands for a job that is waited for."""
    scripts, dependency = [], None
    for step in chain.steps:
        if chain.cluster.executor == "slurm":
            script = script_of(chain, step, snapshot.code_folder(chain.home), dependency)
        else:
            words = [shlex.join(job_of(chain, run, step).words) for run in chain.runs]
            script = "\n".join(f"python -m launch.worker {line}" for line in words)
        scripts.append({"step": step.name, "runs": len(chain.runs), "script": script})
        dependency = f"{_after(chain)}:<id of {step.name}>"
    return scripts


def _after(chain: Chain) -> str:
    """In arrays each task waits for its own predecessor."""
    return "aftercorr" if len(chain.runs) > 1 else "afterok"


def submit(chain: Chain) -> list[dict[str, Any]]:
    """Queues the whole chain, or nothing; returns the jobs as they are recorded in RUN/jobs/."""
    code = snapshot.freeze_code(chain.home)
    for run in chain.runs:
        freeze_config(run.config, jobs_folder(run.config))
    submitted: list[dict[str, Any]] = []
    queued: list[str] = []
    dependency = None
    try:
        for step in chain.steps:
            jobs = _submit_step(chain, step, code, dependency)
            queued += [job.job_id for job in jobs]
            first = jobs[0].job_id.split("_")[0]
            for run, job in zip(chain.runs, jobs, strict=True):
                facts = {
                    "parts": list(step.parts),
                    "run": run.config.run.name,
                    "waits_for": dependency,
                    "logs": str(log_folder(chain, step) / "%j_*_log.out").replace("%j", job.job_id),
                    "executor": chain.cluster.executor,
                    "code": str(code),
                    "minutes": shared_parameters(chain, step)["timeout_min"],
                }
                job_log.write_submission(run.config.run.run_dir, job.job_id, **facts)
                submitted.append(
                    {"job": job.job_id, "run_dir": str(run.config.run.run_dir), **facts}
                )
            dependency = f"{_after(chain)}:{first}"
    except (FailedJobError, OSError, subprocess.SubprocessError) as error:
        if queued and chain.cluster.executor == "slurm":
            subprocess.run(["scancel", *queued], check=False)
        raise ValueError(f"the scheduler refused a job, so none is queued: {error}") from error
    return submitted


def _submit_step(
    chain: Chain, step: Step, code: Path, dependency: str | None
) -> list[submitit.Job[int]]:
    cluster = chain.cluster
    executor = submitit.AutoExecutor(
        folder=log_folder(chain, step),
        cluster=cluster.executor,
        slurm_max_num_timeout=cluster.max_requeues,
        slurm_python=_python(cluster),
        local_max_num_timeout=cluster.max_requeues,
        local_python=_python(cluster),
    )
    for_slurm = slurm_parameters(chain, code, dependency)
    executor.update_parameters(
        **shared_parameters(chain, step),
        **{f"slurm_{name}": value for name, value in for_slurm.items()},
        local_setup=list(cluster.setup),
    )
    if cluster.executor == "local":  # AutoExecutor does not pass this parameter on
        executor._executor.update_parameters(signal_delay_s=cluster.signal_s)
    # A local job inherits our environment; SLURM's script sets it.
    environment = job_environment(cluster, code) if cluster.executor == "local" else {}
    with _outside_of_jobs(environment), executor.batch():
        return [executor.submit(job_of(chain, run, step)) for run in chain.runs]


@contextlib.contextmanager
def _outside_of_jobs(extra: Mapping[str, str]) -> Iterator[None]:
    """Submitting from inside a job must not pass on what dewriters that job.

    What the user or the site has set for sbatch stays.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or name.startswith("SBATCH_")
    }
    with clean_env(), environment_variables(**kept, **extra):
        yield
