"""The books of a stage: how much of the plan was trained, which records were damaged, and a proof.

In: the batches that this rank trained. Out: the data part of a checkpoint's state, and an error if
the ranks together trained anything but the plan's samples, each once.
The proof is a sum modulo 2**64 of a hash per (position, record, task): it does not depend on order,
ranks or packing, so what was trained can be compared with what the plan says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from data_shards.plan.plan import Placement, StagePlan
from data_shards.plan.sampler import WeightedTaskSampler, audit_hash
from data_shards.shards.index import ShardIndex
from data_shards.stream import Damage
from emoverse.data.collate import Batch
from emoverse.engine.distributed import RankError, World, sum_integers

MODULUS = 1 << 64


class Ledger:
    """State of one rank; equal on all ranks after every public method (all collective)."""

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
        self._closed_step = 0
        self._closed = 0  # hash of all samples of the steps before `_closed_step`
        self._open = 0  # this rank's samples since then

    @property
    def audit(self) -> str:
        """Hash of everything trained up to the last closed account, 16 hex digits."""
        return f"{self._closed:016x}"

    def load(self, state: Mapping[str, Any], step: int) -> None:
        """Continues from what `close_account` returned.

        Raises:
            ValueError: the state belongs to another plan, or its steps had another size.
        """
        reached = self._sampler.load_state(state)
        if reached != step:
            raise ValueError(
                f"train.global_batch_size: the checkpoint's {step} steps took {state['consumed']} "
                f"samples, which are {reached} steps of {self._sampler.global_batch_size}; a stage "
                "keeps its batch size, also with --accept-changes: undo the change, or choose "
                "another run.run_dir"
            )
        self._closed_step, self._closed = step, int(state["audit"], 16)

    def add(self, packs: Sequence[Batch], *, num_damaged: int) -> list[Damage]:
        """Enters one step's batches; `num_damaged` is the number of replaced records on all ranks.

        Returns the damage of this step, on every rank.

        Raises:
            RankError: more records were replaced than the config allows; on every rank.
        """
        for pack in packs:
            for position, key, task in zip(pack.positions, pack.keys, pack.tasks, strict=True):
                self._open = (self._open + audit_hash(position, key, task)) % MODULUS
        if not num_damaged:
            return []
        mine = [damage for pack in packs for damage in pack.quarantine]
        everyone: list[list[Damage]] = [mine] * self._world.world_size
        if self._world.world_size > 1:
            dist.all_gather_object(everyone, mine)
        found = sorted((d for part in everyone for d in part), key=lambda d: d.position)
        quarantine = self._sampler.quarantine
        for damage in found:
            quarantine.append(asdict(damage))
            records = {entry["key"] for entry in quarantine}
            if len(records) > self._max_damaged:
                raise RankError(
                    f"data.max_damaged allows {self._max_damaged} damaged records per stage, this "
                    f"is number {len(records)}: record {damage.key} in {damage.shard}: "
                    f"{damage.cause}; build the shards again, or raise data.max_damaged",
                    wrong_input=True,
                )
        return found

    def place(self, position: int) -> Placement:
        """What was, or will be, trained at a position: the plan's record, or its substitute."""
        tried = sum(entry["position"] == position for entry in self._sampler.quarantine)
        plan = self._sampler.stage_plan
        return plan.substitute(position, tried) if tried else plan.at(position)

    def close_account(self, step: int) -> dict[str, Any]:
        """Compares what all ranks trained since the last account with the plan, up to `step` steps.

        Returns the data part of the state: consumed samples, fingerprint, quarantine, audit.

        Raises:
            RuntimeError: on every rank, if they differ.
        """
        expected_here = self._expected(step)
        trained, expected = sum_integers(self._world, [self._open, expected_here])
        if trained != expected:
            raise RuntimeError(
                f"audit: the ranks did not train what the plan says in steps {self._closed_step} "
                f"to {step - 1}: hash {trained:016x}, the plan's is {expected:016x}; nothing was "
                "saved, the last checkpoint is good"
            )
        self._closed = (self._closed + trained) % MODULUS
        self._closed_step, self._open = step, 0
        return {**self._sampler.state(step), "audit": self.audit}

    def _expected(self, step: int) -> int:
        """This rank's share of the plan's hash: every world_size-th position since the account."""
        plan = self._sampler.stage_plan
        batch = self._sampler.global_batch_size
        first = min(self._closed_step * batch, plan.num_samples)
        last = min(step * batch, plan.num_samples)
        total = 0
        for position in range(first + self._world.rank, last, self._world.world_size):
            place = self.place(position)
            key = self._index.key(place.shard, place.slot)
            total += audit_hash(position, key, place.task)
        return total % MODULUS


def planned_audit(plan: StagePlan, index: ShardIndex) -> str:
    """`Ledger.audit` at the end of a stage in which no record was replaced."""
    total = 0
    for position in range(plan.num_samples):
        place = plan.at(position)
        total += audit_hash(position, index.key(place.shard, place.slot), place.task)
    return f"{total % MODULUS:016x}"
