"""Which rank of which job this process is, read from the environment of its launcher; no torch.

In: the environment as srun, submitit or torchrun has set it, or nobody. Out: a `RankContext`, and
through `export` the five variables that the process group reads. A partly set environment is an
error here; later it would be a rank that waits for ever.
"""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OWN_RANK = RANK_VARIABLES[:3]
SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
SUBMITIT_VARIABLES = (
    "SUBMITIT_LOCAL_GLOBALID",
    "SUBMITIT_LOCAL_LOCALID",
    "SUBMITIT_LOCAL_NTASKS",
    "SUBMITIT_LOCAL_JOB_ID",
)
# Below the range from which Linux takes the ports of outgoing connections.
FIRST_PORT, NUM_PORTS = 12_000, 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RankContext:
    """This rank and its launcher; `address` is None for a single process."""

    launcher: Literal["slurm", "submitit", "variables", "none"]
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    address: str | None = None
    port: int = 0
    # As the scheduler names the job: 4711, or 4711_3 in an array; None where it cannot be requeued.
    job: str | None = None
    num_restarts: int = 0  # how often the scheduler has started this job before

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Sets the five variables, unless a launcher has or there is one process only."""
        if self.address is None or self.launcher == "variables":
            return
        values = (self.rank, self.local_rank, self.world_size, self.address, self.port)
        environ.update(zip(RANK_VARIABLES, map(str, values), strict=True))


def read_context(environ: Mapping[str, str]) -> RankContext:
    """Which launcher has started this process, and as which rank.

    The five variables win over SLURM's, since torchrun may run inside a SLURM step.

    Raises:
        ValueError: the environment is partly set; names what is set and what is missing.
    """
    if all(environ.get(name) for name in RANK_VARIABLES):
        return RankContext(
            launcher="variables",
            rank=_integer(environ, "RANK"),
            local_rank=_integer(environ, "LOCAL_RANK"),
            world_size=_integer(environ, "WORLD_SIZE"),
            address=environ["MASTER_ADDR"],
            port=_integer(environ, "MASTER_PORT"),
        )
    in_step, in_submitit = "SLURM_STEP_ID" in environ, "SUBMITIT_LOCAL_GLOBALID" in environ
    _refuse_partly_set(environ, RANK_VARIABLES[:3] if in_step or in_submitit else RANK_VARIABLES)
    if in_step:
        return _slurm_context(environ)
    if in_submitit:
        return _submitit_context(environ)
    num_tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environ and "SLURM_PROCID" in environ and num_tasks != "1":
        raise ValueError(
            f"SLURM_NTASKS={num_tasks} but this process was not started by srun (SLURM_STEP_ID is "
            "not set), so it would wait for ranks that never come; put srun before the command, "
            "as slurm/stage1.sh does"
        )
    return RankContext(launcher="none")


def scheduler_job(environ: Mapping[str, str]) -> str | None:
    """The job of this process as SLURM's commands name it, None outside SLURM."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return environ.get("SLURM_JOB_ID")


def _slurm_context(environ: Mapping[str, str]) -> RankContext:
    _require(environ, SRUN_VARIABLES, "srun sets them; start the command with srun alone")
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS")
    step = int(environ["SLURM_STEP_ID"])
    # The raw id differs between the tasks of an array, which may share a node.
    raw = int(environ.get("SLURM_JOB_ID") or 0)
    port = FIRST_PORT + (8 * raw + step) % NUM_PORTS
    return RankContext(
        launcher="slurm",
        rank=_integer(environ, "SLURM_PROCID"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        world_size=world_size,
        address=environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        port=_integer(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else port,
        job=scheduler_job(environ),
        num_restarts=int(environ.get("SLURM_RESTART_COUNT") or 0),
    )


def _submitit_context(environ: Mapping[str, str]) -> RankContext:
    _require(environ, SUBMITIT_VARIABLES, "submitit's local executor sets them")
    job = environ["SUBMITIT_LOCAL_JOB_ID"]
    return RankContext(
        launcher="submitit",
        rank=_integer(environ, "SUBMITIT_LOCAL_GLOBALID"),
        local_rank=_integer(environ, "SUBMITIT_LOCAL_LOCALID"),
        world_size=_integer(environ, "SUBMITIT_LOCAL_NTASKS"),
        address="127.0.0.1",
        port=FIRST_PORT + int(job) % NUM_PORTS,
        job=job,
    )


def _refuse_partly_set(environ: Mapping[str, str], names: tuple[str, ...]) -> None:
    present = [name for name in names if environ.get(name)]
    if present:
        missing = [name for name in RANK_VARIABLES if not environ.get(name)]
        raise ValueError(
            f"rank variables are partly set: {', '.join(present)} are set, {', '.join(missing)} "
            "are not; set all five (torchrun does) or unset all of them, and srun or submitit fill "
            "them in"
        )


def _require(environ: Mapping[str, str], names: tuple[str, ...], rule: str) -> None:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        present = [name for name in names if environ.get(name)]
        raise ValueError(
            f"the launcher's variables are partly set: {', '.join(present) or 'none'} of them are "
            f"set, {', '.join(missing)} are not; {rule}"
        )


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name} must be an integer, found {environ[name]!r}") from None


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: `gpu[003-007,9],x1` gives `gpu003`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST must name hosts, found {nodelist!r}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group())
