"""Clusters, configs/cluster/: where a run may run, separate from what is trained.

In: a YAML file and `cluster.KEY=VALUE` overrides. Out: a checked `Cluster`. No torch, no submitit.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from emoverse.config.schema import Section, load_model
from launch.slurm.job_log import MAX_REQUEUES

PREFIX = "cluster."
NO_ACCOUNT = "none"
ACCOUNT_VARIABLE = "SBATCH_ACCOUNT"  # where sbatch takes the account from as well

Lines = Annotated[tuple[str, ...], Field(strict=False)]


class EvaluateSection(Section):
    """The last job of a chain, which scores; what is blank is as for training."""

    nodes: int = Field(1, ge=1, description="Nodes of the evaluation job.")
    tasks_per_node: int | None = Field(None, ge=1, description="Ranks per node.")
    gpus_per_node: int | None = Field(None, ge=0, description="GPUs per node.")
    minutes: int | None = Field(None, ge=1, description="Time limit in minutes.")


class Cluster(Section):
    """A cluster: how to ask it for nodes, and what a job finds there."""

    executor: Literal["slurm", "local"] = Field(
        description="slurm submits jobs; local starts them on this machine, in the background."
    )
    account: str | None = Field(
        None, min_length=1, description="Project that is charged; `none` where there is none."
    )
    partition: str | None = Field(None, description="Partition; blank is the cluster's default.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Features a node must have, such as a100.")
    exclude: str | None = Field(None, description="Nodes not to use, such as node[3,7].")
    nodes: int = Field(1, ge=1, description="Nodes of a training job.")
    tasks_per_node: int = Field(ge=1, description="Ranks per node: one per GPU.")
    gpus_per_node: int = Field(ge=0, description="GPUs per node; 0 trains on CPU.")
    gpu_memory_gib: float | None = Field(
        None, gt=0, description="Memory of one GPU in GiB, compared with what the model needs."
    )
    cpus_per_task: int = Field(1, ge=1, description="CPU cores per rank, data workers included.")
    mem_gb: float | None = Field(None, gt=0, description="Memory per node in GB; blank: default.")
    minutes: int = Field(ge=1, description="Time limit of a job in minutes; it requeues itself.")
    signal_s: int = Field(
        180, ge=1, description="Seconds before the time limit at which the ranks save and stop."
    )
    max_requeues: int = Field(
        MAX_REQUEUES, ge=0, description="Times that a job may begin again before it gives up."
    )
    array_parallelism: int = Field(
        8, ge=1, description="Jobs of an array that run at the same time."
    )
    python: str | None = Field(
        None, description="Command that starts Python in a job; blank is the one of this program."
    )
    setup: Lines = Field((), description="Shell lines before srun, such as `module load cuda`.")
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment of the ranks, such as NCCL_SOCKET_IFNAME."
    )
    flags: dict[str, str] = Field(
        default_factory=dict, description="Further sbatch flags by name, such as reservation."
    )
    evaluate: EvaluateSection = Field(
        default_factory=EvaluateSection, description="The job that scores."
    )

    @property
    def num_ranks(self) -> int:
        """Ranks of a training job."""
        return self.nodes * self.tasks_per_node


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the cluster, without their prefix, and those of the run."""
    own = [word.removeprefix(PREFIX) for word in words if word.startswith(PREFIX)]
    return own, [word for word in words if not word.startswith(PREFIX)]


def load_cluster(path: Path, overrides: Sequence[str] = ()) -> Cluster:
    """Reads a cluster file.

    Raises:
        ConfigError: all mistakes, with their lines. ValueError: values that contradict each other.
    """
    cluster = load_model(Cluster, [path], overrides)
    if cluster.executor == "local" and cluster.nodes > 1:
        raise ValueError(
            f"{path}: nodes: found {cluster.nodes}: the local executor has one node; set nodes: 1"
        )
    if cluster.gpus_per_node and cluster.tasks_per_node > cluster.gpus_per_node:
        raise ValueError(
            f"{path}: tasks_per_node: found {cluster.tasks_per_node}: at most one rank per GPU, "
            f"and gpus_per_node is {cluster.gpus_per_node}; lower one or raise the other"
        )
    return cluster


def check_account(cluster: Cluster) -> list[str]:
    """An account is set.

    Raises:
        ValueError: none is; a job without an account may be refused hours later, or charged to the
            wrong project.
    """
    given = cluster.account or os.environ.get(ACCOUNT_VARIABLE)
    if cluster.executor == "slurm" and not given:
        raise ValueError(
            "cluster.account: not set; give the project that is charged "
            "(cluster.account=NAME, or account: in the cluster file), or cluster.account=none "
            "where the cluster has no accounts"
        )
    return []
