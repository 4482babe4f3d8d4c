"""Which samples of a step belong to which rank, and the state from which a stage resumes.

In: the plan of a stage, the global batch size G, (rank, world size). Out: this rank's share of any
step, as a pure function of the step. Step k holds the positions k*G .. (k+1)*G - 1 for any world
size; the ranks share it by estimated length, so that none waits long for another. The state is the
number of consumed samples and the plan's fingerprint: resuming reads nothing, and the world size
may change.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from data_shards.plan.permutation import mix64
from data_shards.plan.plan import Placement, StagePlan
from data_shards.tasks import TASKS, Task

_CHARS_PER_TOKEN: Final = 4
_MASK_64: Final = (1 << 64) - 1


class LengthTable(Protocol):
    """What a sampler reads of a corpus; `data_shards.shards.index.ShardIndex` implements it."""

    def entries(self, shard: int) -> NDArray[np.void]:
        """[records] with the field `text_chars`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One sample of a step: its position in the stage, and the plan's sample at this position."""

    position: int
    placement: Placement


class WeightedTaskSampler:
    """A rank's samples of every step of a stage; tasks are mixed by the plan's exact rates.

    Args:
        stage_plan: the sampling order of the stage.
        index: text lengths of the records.
        global_batch_size: samples per step, over all ranks.
        rank, world_size: this rank, and the number of ranks.
        frames_per_clip, frames_per_peak, tokens_per_frame: size of a clip and of a peak view in the
            model, to estimate lengths; the same on all ranks.

    Raises:
        ValueError: a batch size, world size or rank outside its range.
    """

    def __init__(
        self,
        stage_plan: StagePlan,
        index: LengthTable,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        frames_per_clip: int = 8,
        frames_per_peak: int = 1,
        tokens_per_frame: int = 256,
    ) -> None:
        if global_batch_size < 1:
            raise ValueError(
                f"train.global_batch_size: must be at least 1, found {global_batch_size}"
            )
        if not 1 <= world_size <= global_batch_size:
            raise ValueError(
                f"world size: must be 1..train.global_batch_size = {global_batch_size}, so that "
                f"every rank has a sample in every step, found {world_size}; use fewer processes "
                "or a larger batch"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: must be 0..{world_size - 1}, found {rank}")
        self.stage_plan = stage_plan
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.num_steps = stage_plan.num_steps(global_batch_size)
        self.quarantine: list[Any] = []  # damaged records so far, as JSON values
        self._index = index
        self._clip_tokens = frames_per_clip * tokens_per_frame
        self._peak_tokens = frames_per_peak * tokens_per_frame

    def positions(self, step: int) -> range:
        """The positions of a step: global_batch_size of them, fewer only in the last step.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step must be 0..{self.num_steps - 1}, found {step}")
        first = step * self.global_batch_size
        return range(first, min(first + self.global_batch_size, self.stage_plan.num_samples))

    def share(self, step: int) -> list[Slot]:
        """This rank's samples of a step, by position. The shares of all ranks partition the step.

        Raises:
            IndexError: there is no such step.
        """
        positions = self.positions(step)
        slots = [Slot(position=p, placement=self.stage_plan.at(p)) for p in positions]
        lengths = [self._length(slot.placement) for slot in slots]
        mine = balanced_shares(lengths, self.world_size, first=step)[self.rank]
        return [slots[index] for index in mine]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps to resume at `step`: JSON values, the same on every rank."""
        if not 0 <= step <= self.num_steps:
            raise IndexError(f"step must be 0..{self.num_steps}, found {step}")
        return {
            "consumed": min(step * self.global_batch_size, self.stage_plan.num_samples),
            "fingerprint": self.stage_plan.fingerprint,
            "quarantine": list(self.quarantine),
        }

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Resume from a state, perhaps of another world size; returns the step to continue at.

        Raises:
            ValueError: the state is of another plan, or does not end at the end of a step.
        """
        if state["fingerprint"] != self.stage_plan.fingerprint:
            raise ValueError(
                f"stages.{self.stage_plan.name}: the checkpoint belongs to another plan: its "
                f"fingerprint is {state['fingerprint']}, this one is "
                f"{self.stage_plan.fingerprint}; shards, stages, rates, seed and block_shards must "
                "be those of the first start, or start again in another run_dir"
            )
        consumed, total = state["consumed"], self.stage_plan.num_samples
        step, rest = divmod(consumed, self.global_batch_size)
        if not 0 <= consumed <= total or (rest and consumed < total):
            raise ValueError(
                f"train.global_batch_size: the checkpoint stands at sample {consumed} of {total}, "
                f"which is no multiple of {self.global_batch_size}; use the batch size of the "
                "first start"
            )
        self.quarantine = list(state["quarantine"])
        return step if consumed < total else self.num_steps

    def _length(self, placement: Placement) -> int:
        """Estimated tokens of a sample: equal on every machine, and exact enough to balance."""
        chars = int(self._index.entries(placement.shard)["text_chars"][placement.slot])
        is_image = placement.task is Task.FER  # it sees the peak frame only
        visual = self._peak_tokens if is_image else self._clip_tokens
        return visual + chars // _CHARS_PER_TOKEN


def balanced_shares(lengths: Sequence[int], world_size: int, *, first: int = 0) -> list[list[int]]:
    """Distribute samples over ranks: per rank the indices into `lengths`, ascending.

    Longest first, each to the rank with the least load that has room; counts differ by at most one.
    Ties are broken in rank order, starting with rank `first` modulo the world size.
    """
    smallest, larger = divmod(len(lengths), world_size)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    queue = [(0, turn) for turn in range(world_size)]  # (load, turn): a heap already
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        while True:  # a rank that is full now stays full
            load, turn = heappop(queue)
            share = shares[(first + turn) % world_size]
            if len(share) < smallest + (larger > 0):
                break
        if len(share) == smallest:
            larger -= 1
        share.append(index)
        heappush(queue, (load + lengths[index], turn))
    return [sorted(share) for share in shares]


def audit_hash(position: int, key: str, task: Task) -> int:
    """64-bit hash of one trained sample; the sum modulo 2**64 does not depend on the order.

    Args:
        key: of the record that was read, which may be a substitute.
    """
    record = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "little")
    return mix64(mix64(record) ^ mix64((position * len(TASKS) + TASKS.index(task)) & _MASK_64))
