"""The check of the nodes at the start of a job: equal software and devices, working collectives.

In: a new process group. Out: lines for the log, or a RankError on every rank that names the node at
fault. What one host can check alone was checked before (launch/slurm/preflight.py).
"""

import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from emoverse.engine.distributed import RankError, World
from emoverse.estimate.memory import GIB, MemoryEstimate
from emoverse.run_dir.provenance import package_versions

CLOCK_S = 5.0  # larger differences are logged: run lock and logs compare times of several nodes
ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # of the probe, fp32
ROUNDS = 3
WORK_SIZE = {"cpu": 256, "cuda": 4096}  # rows of the square matrices of the compute probe
SLOW = 3.0  # times the median
FREE_SHARE = 0.9  # of a GPU's memory that must be free
CPU_WANTED = "EMOVERSE_CPU"  # set to train on the CPUs of a node although the job has its GPUs


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """What a rank reports about its node and device."""

    rank: int
    host: str
    versions: dict[str, str]
    clock: float  # seconds since 1970, right after a barrier
    device: str
    gpus: int  # that the scheduler gave to this node
    memory: int  # bytes of the device, 0 for a CPU
    free_share: float  # of the device's memory
    work_s: float  # for a fixed amount of arithmetic
    reduced: bool  # the all_reduce probe returned the right sum
    reduce_s: float


def check_nodes(world: World, need: MemoryEstimate) -> list[str]:
    """Collective; returns lines for the log. `need`: the memory estimate of `plan`, per GPU.

    Raises:
        RankError: on every rank, with all problems and their hosts.
    """
    mine = probe(world)
    everyone: list[NodeFacts] = [mine] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(everyone, mine)
    problems = problems_of(everyone, need)
    if problems:
        hosts = ",".join(sorted({host for host, _ in problems}))
        text = "; ".join(f"{host}: {what}" for host, what in problems)
        raise RankError(
            f"the nodes cannot train together: {text}. Repair them or exclude them "
            f"(sbatch --exclude={hosts}, emoverse launch --exclude {hosts})",
            wrong_input=False,
        )
    return [*memory_notes(everyone, need), *notes_of(everyone, mine, world)]


def probe(world: World) -> NodeFacts:
    """Measures this rank; collective."""
    device, kind = world.device, world.device.type
    matrix = torch.ones(WORK_SIZE[kind], WORK_SIZE[kind], device=device)
    matrix @ matrix  # the first product loads libraries
    begin = _now(device)
    for _ in range(ROUNDS):
        matrix @ matrix
    work_s = _now(device) - begin
    expected = world.world_size * (world.world_size + 1) / 2
    right, seconds = True, []
    for _ in range(ROUNDS):
        values = torch.full((ELEMENTS[kind],), world.rank + 1.0, device=device)
        begin = _now(device)
        if world.world_size > 1:
            dist.all_reduce(values)
        seconds.append(_now(device) - begin)
        right = right and bool((values == expected).all())
    if world.world_size > 1:
        dist.barrier()
    clock = time.time()
    free, total = torch.cuda.mem_get_info(device) if kind == "cuda" else (0, 0)
    held = torch.cuda.memory_reserved(device) if kind == "cuda" else 0
    return NodeFacts(
        rank=world.rank,
        host=platform.node(),
        versions={"python": platform.python_version(), **package_versions()},
        clock=clock,
        device=torch.cuda.get_device_name(device) if kind == "cuda" else "cpu",
        gpus=_gpus_given(os.environ),
        memory=total,
        free_share=(free + held) / total if total else 1.0,
        work_s=work_s,
        reduced=right,
        reduce_s=min(seconds),
    )


def _gpus_given(environ: Mapping[str, str]) -> int:
    """GPUs of this node that SLURM allocated to the job; 0 also where the user wants the CPU."""
    given = environ.get("SLURM_GPUS_ON_NODE", "")
    return int(given) if given.isdigit() and not environ.get(CPU_WANTED) else 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def problems_of(everyone: Sequence[NodeFacts], need: MemoryEstimate) -> list[tuple[str, str]]:
    """(host, problem); the most common value counts as the normal one."""
    problems: dict[tuple[str, str], None] = {}  # ranks of one host report the same problem once
    names = sorted({name for facts in everyone for name in facts.versions})
    for name in names:
        usual = _usual([facts.versions.get(name, "missing") for facts in everyone])
        for facts in everyone:
            version = facts.versions.get(name, "missing")
            if version != usual:
                problems[facts.host, f"{name} {version}, elsewhere {usual}"] = None
    usual = _usual([facts.device for facts in everyone])
    for facts in everyone:
        if facts.device != usual:
            problems[facts.host, f"device {facts.device}, elsewhere {usual}"] = None
        if facts.gpus and not facts.memory:
            problems[facts.host, _why_on_cpu(facts)] = None
        if 0 < facts.memory < need.states:
            problems[facts.host, f"rank {facts.rank}: {_too_small(facts.memory, need)}"] = None
        if facts.free_share < FREE_SHARE:
            used = f"{1 - facts.free_share:.0%} of its GPU's memory is used by another process"
            problems[facts.host, f"rank {facts.rank}: {used}"] = None
        if not facts.reduced:
            problems[facts.host, f"rank {facts.rank} received a wrong sum from all_reduce"] = None
    return list(problems)


def _why_on_cpu(facts: NodeFacts) -> str:
    torch_version = facts.versions.get("torch", "missing")
    return (
        f"the job has {facts.gpus} GPUs there, but torch {torch_version} would train on the CPU; "
        "install a torch that is built for the driver (nvidia-smi shows it), or set "
        f"{CPU_WANTED}=1 to train on the CPU"
    )


def _too_small(memory: int, need: MemoryEstimate) -> str:
    return (
        f"its GPU has {memory / GIB:.1f} GiB, weights and optimiser states alone take "
        f"{need.states / GIB:.1f} GiB; emoverse plan shows what fits"
    )


def memory_notes(everyone: Sequence[NodeFacts], need: MemoryEstimate) -> list[str]:
    """A note if the whole estimate does not fit into some GPU; no error, as estimates are rough."""
    smallest = min((facts.memory for facts in everyone if facts.memory), default=0)
    if not smallest or need.total <= smallest:
        return []
    return [
        f"plan estimates {need.total / GIB:.1f} GiB per GPU and the smallest has "
        f"{smallest / GIB:.1f} GiB: if memory runs out, emoverse plan shows what fits"
    ]


def _usual(values: Sequence[str]) -> str:
    return Counter(values).most_common(1)[0][0]


def notes_of(everyone: Sequence[NodeFacts], mine: NodeFacts, world: World) -> list[str]:
    """The measured bandwidth, and what is suspicious but no error."""
    if world.world_size == 1:
        return []
    size = 4 * ELEMENTS[world.device.type]
    moved = 2 * (world.world_size - 1) / world.world_size * size  # of a ring, per rank
    slowest = max(facts.reduce_s for facts in everyone)
    hosts = list(dict.fromkeys(facts.host for facts in everyone))
    notes = [
        f"{len(hosts)} equal nodes ({mine.device}, torch {mine.versions.get('torch')}); all_reduce "
        f"of {size / 2**20:.0f} MiB in {1000 * slowest:.1f} ms, {moved / slowest / 1e9:.2f} GB/s "
        "per rank"
    ]
    middle = statistics.median(facts.clock for facts in everyone)
    usual = statistics.median(facts.work_s for facts in everyone)
    for facts in everyone:
        if abs(facts.clock - middle) > CLOCK_S:
            notes.append(f"{facts.host}: its clock is {facts.clock - middle:+.0f} s off the others")
        if facts.work_s > SLOW * usual:
            notes.append(
                f"{facts.host}: rank {facts.rank} computes {facts.work_s / usual:.1f} times slower "
                "than the median; if that persists, exclude the node"
            )
    return list(dict.fromkeys(notes))
