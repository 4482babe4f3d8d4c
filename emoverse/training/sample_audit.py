"""The sample audit: proof that the ranks trained exactly the samples of the plan, each once.

In: the batches that this rank trained. Out: the data part of a checkpoint's state (samples
consumed, damaged records, audit hash), or an error if samples differ from the plan.
The hash is the sum modulo 2**64 of a hash per (position, record, task). It does not depend on
order, ranks or packing, so the sum over all ranks can be compared with that of the plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch.distributed as dist

from data_shards.plan.plan import Placement, StagePlan
from data_shards.plan.sampler import WeightedTaskSampler, audit_hash
from data_shards.shards.index import ShardIndex
from data_shards.stream import Damage
from emoverse.data.collate import Batch
from emoverse.engine.distributed import RankError, World, sum_integers

MODULUS = 1 << 64


class SampleAudit:
    """Audit of one rank. `add` and `verify` are collective; the results are equal on all ranks."""

    def __init__(
        self,
        sampler: WeightedTaskSampler,
        index: ShardIndex,
        world: World,
        *,
        max_damaged: int,
    ) -> None:
        self._sampler, self._index, self._world = sampler, index, world
        self._max_damaged = max_damaged
        self._verified_step = 0
        self._verified = 0  # hash of all samples of the steps before `_verified_step`
        self._pending = 0  # hash of this rank's samples since then

    @property
    def digest(self) -> str:
        """Hash of all samples trained up to the last `verify`, 16 hex digits."""
        return f"{self._verified:016x}"

    def load(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from what `verify` returned.

        Raises:
            ValueError: the state belongs to another plan or another batch size.
        """
        num_steps = self._sampler.load_state(state)
        if num_steps != step:
            raise ValueError(
                f"train.global_batch_size: the checkpoint's {step} steps took {state['consumed']} "
                f"samples, which are {num_steps} steps of {self._sampler.global_batch_size}; a "
                "stage keeps its batch size, even with --accept-changes: undo the change, or "
                "choose another run.run_dir"
            )
        self._verified_step, self._verified = step, int(state["audit"], 16)

    def add(self, packs: Sequence[Batch], *, num_damaged: int) -> list[Damage]:
        """Record one step's batches; returns the damaged records of the step, on every rank.

        `num_damaged`: replaced records on all ranks.

        Raises:
            RankError: more records were replaced than the config allows; on every rank.
        """
        for pack in packs:
            for position, key, task in zip(pack.positions, pack.keys, pack.tasks, strict=True):
                self._pending = (self._pending + audit_hash(position, key, task)) % MODULUS
        if not num_damaged:
            return []
        own = [damage for pack in packs for damage in pack.quarantine]
        by_rank: list[list[Damage]] = [own] * self._world.world_size
        if self._world.world_size > 1:
            dist.all_gather_object(by_rank, own)
        damaged = sorted(chain.from_iterable(by_rank), key=lambda damage: damage.position)
        quarantine = self._sampler.quarantine
        for damage in damaged:
            quarantine.append(asdict(damage))
            records = {entry["key"] for entry in quarantine}
            if len(records) > self._max_damaged:
                raise RankError(
                    f"data.max_damaged allows {self._max_damaged} damaged records per stage, this "
                    f"is number {len(records)}: record {damage.key} in {damage.shard}: "
                    f"{damage.cause}; build the shards again, or raise data.max_damaged",
                    wrong_input=True,
                )
        return damaged

    def placement(self, position: int) -> Placement:
        """The record trained at a position: that of the plan, or its substitute."""
        tried = sum(entry["position"] == position for entry in self._sampler.quarantine)
        plan = self._sampler.stage_plan
        return plan.substitute(position, tried) if tried else plan.at(position)

    def verify(self, step: int) -> dict[str, Any]:
        """Compare what all ranks trained since the last call with the plan, up to `step` steps.

        Returns the data part of the state: consumed samples, fingerprint, quarantine, audit.

        Raises:
            RuntimeError: on every rank, if they differ.
        """
        trained, expected = sum_integers(self._world, [self._pending, self._expected(step)])
        if trained != expected:
            first = self._verified_step
            raise RuntimeError(
                f"audit: ranks did not train the planned samples in steps {first} to {step - 1}: "
                f"hash {trained:016x}, expected {expected:016x}; nothing was saved, the last "
                "checkpoint is good"
            )
        self._verified = (self._verified + trained) % MODULUS
        self._verified_step, self._pending = step, 0
        return {**self._sampler.state(step), "audit": self.digest}

    def _expected(self, step: int) -> int:
        """This rank's share of the plan's hash: every world_size-th position since `verify`."""
        plan = self._sampler.stage_plan
        batch = self._sampler.global_batch_size
        first = min(self._verified_step * batch, plan.num_samples)
        last = min(step * batch, plan.num_samples)
        total = 0
        for position in range(first + self._world.rank, last, self._world.world_size):
            total += _placement_hash(self._index, position, self.placement(position))
        return total % MODULUS


def planned_audit(plan: StagePlan, index: ShardIndex) -> str:
    """`SampleAudit.digest` at the end of a stage in which no record was replaced."""
    positions = range(plan.num_samples)
    total = sum(_placement_hash(index, position, plan.at(position)) for position in positions)
    return f"{total % MODULUS:016x}"


def _placement_hash(index: ShardIndex, position: int, placement: Placement) -> int:
    key = index.key(placement.shard, placement.slot)
    return audit_hash(position, key, placement.task)
