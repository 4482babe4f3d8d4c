"""The rank of this process, and the collectives by which ranks agree.

In: the five rank variables that a launcher sets. Out: a `World`, one consensus per step, and errors
that all ranks raise together. A rank that fails alone leaves the others waiting in a collective
until the time-out. Code that may fail on one rank only therefore runs inside `fail_together`, or
passes its error to `agree_on_step`.
"""

import contextlib
import os
import platform
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
INPUT_ERRORS = (ValueError, FileNotFoundError)  # what a user can put right


class RankError(RuntimeError):
    """One or more ranks failed; raised on every rank with the same text."""

    def __init__(self, text: str, *, wrong_input: bool, traceback: str = "") -> None:
        super().__init__(text)
        self.wrong_input = wrong_input  # what a user can put right, on every rank that failed
        self.traceback = traceback  # of the first rank that failed


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process: `rank` of `world_size`, on `device`; `init_method` as torch takes it."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    init_method: str = "env://"

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes shared files and prints for the user."""
        return self.rank == 0

    @property
    def backend(self) -> str:
        """The collective library of this device."""
        return "nccl" if self.device.type == "cuda" else "gloo"


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world described by the five rank variables; none of them means one process alone.

    Raises:
        ValueError: some variables are set and others are not, or a value is out of range.
    """
    present = [name for name in RANK_VARIABLES if environ.get(name)]
    missing = [name for name in RANK_VARIABLES if name not in present]
    if not present:
        alone = "tcp://127.0.0.1:0"  # port 0: any free one
        return World(rank=0, world_size=1, local_rank=0, device=_device(0), init_method=alone)
    if missing:
        raise ValueError(
            f"rank variables are partly set: {', '.join(present)} are set, {', '.join(missing)} "
            "are not; set all five (a launcher does) or unset all of them to run one process"
        )
    rank, local_rank, world_size = (
        _integer(environ, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    if not 0 <= rank < world_size or local_rank < 0:
        raise ValueError(
            f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={world_size}: "
            "the rule is 0 <= RANK < WORLD_SIZE and LOCAL_RANK >= 0; check the launcher"
        )
    device = _device(local_rank)
    return World(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


def _device(local_rank: int) -> torch.device:
    """The GPU of a local rank, or the CPU where torch has no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(
            f"LOCAL_RANK={local_rank} but {platform.node()} shows {gpus} GPUs; "
            "start at most one process per GPU"
        )
    return torch.device("cuda", local_rank)


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name} must be an integer, found {environ[name]!r}") from None


# Agreement -------------------------------------------------------------------------------------


@contextlib.contextmanager
def fail_together(world: World, doing: str) -> Iterator[None]:
    """Collective: runs a block; if it fails on any rank, every rank raises the same `RankError`.

    doing: what the block does, for the message.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(world, error, doing)


def raise_together(world: World, error: Exception | None, doing: str) -> None:
    """Collective: returns on every rank if no rank has an error, else raises on every rank.

    Raises:
        RankError: names the activity, and the failing ranks with their reasons.
    """
    mine = None
    if error is not None:
        is_input = isinstance(error, INPUT_ERRORS) or getattr(error, "wrong_input", False)
        stack = "".join(traceback.format_exception(error))
        mine = (f"{type(error).__name__}: {error}", is_input, stack)
    everyone: list[tuple[str, bool, str] | None] = [mine] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(everyone, mine)
    reasons: dict[str, list[int]] = {}
    for rank, failure in enumerate(everyone):
        if failure is not None:
            reasons.setdefault(failure[0], []).append(rank)
    if not reasons:
        return
    text = "; ".join(
        reason if world.world_size == 1 else f"rank {', '.join(map(str, ranks))}: {reason}"
        for reason, ranks in reasons.items()
    )
    failures = [failure for failure in everyone if failure is not None]
    raise RankError(
        f"{doing}: {text}",
        wrong_input=all(is_input for _, is_input, _ in failures),
        traceback=failures[0][2],
    ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConsensus:
    """What all ranks know before a step.

    num_packs: the most packs of any rank. normaliser: the sum over all ranks. stop: whether any
    rank has a stop request. extra: further numbers of each rank, in rank order.
    """

    num_packs: int
    normaliser: float
    stop: bool
    extra: list[list[float]]


def agree_on_step(
    world: World,
    *,
    num_packs: int,
    normaliser: float,
    stop: bool,
    error: Exception | None,
    doing: str,
    extra: Sequence[float] = (),
) -> StepConsensus:
    """The one collective before a step: MAX of packs, SUM of normalisers, ANY of stop and error.

    Raises:
        RankError: some rank has an `error`; on every rank.
    """
    mine = [float(num_packs), normaliser, float(stop), float(error is not None), *extra]
    rows = gather_rows(world, mine)
    if rows[:, 3].any():
        raise_together(world, error, doing)
    return StepConsensus(
        num_packs=int(rows[:, 0].max()),
        # Summed in rank order on every rank: the same float everywhere.
        normaliser=float(rows[:, 1].sum()),
        stop=bool(rows[:, 2].any()),
        extra=rows[:, 4:].tolist(),
    )


def gather_rows(world: World, row: Sequence[float]) -> torch.Tensor:
    """Collective: each rank's row, float64 [world_size, len(row)], on the CPU."""
    mine = torch.tensor(row, dtype=torch.float64, device=world.device)
    if world.world_size == 1:
        return mine.cpu()[None]
    rows = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(rows, mine)
    return torch.stack(rows).cpu()


def sum_integers(world: World, values: Sequence[int]) -> list[int]:
    """Collective: element-wise sum over ranks modulo 2**64 (hashes, counts)."""
    # int64 wraps around like unsigned 64-bit arithmetic; only the sign is interpreted differently.
    signed = [value - (1 << 64) if value >= 1 << 63 else value for value in values]
    total = torch.tensor(signed, dtype=torch.int64, device=world.device)
    if world.world_size > 1:
        dist.all_reduce(total)
    return [value % (1 << 64) for value in total.tolist()]


def from_main(world: World, value: Value) -> Value:
    """Collective: rank 0's value on every rank (small, picklable, never read from a file)."""
    values = [value]
    if world.world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def is_lost_peer(error: BaseException) -> bool:
    """True if this rank failed only because another rank is gone, which then has the cause."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def shutdown() -> None:
    """Leaves the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def largest(value: int, device: torch.device) -> int:
    """Collective: the largest value of all ranks; without a process group the value itself."""
    if not dist.is_initialized():
        return value
    maximum = torch.tensor([value], device=device)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return int(maximum)
