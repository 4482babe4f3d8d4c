"""For plans: a small corpus in memory (an index without files), and the paper's stages."""

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from data_shards.plan import StageSpec
from data_shards.tasks import Task, mask_of


class MemoryTable:
    """Shards as lists of task masks; slot i of a shard offers the tasks of its i-th mask."""

    def __init__(self, shards: Sequence[Sequence[int]]) -> None:
        self.shards = [np.array(shard, dtype=np.int64) for shard in shards]

    @classmethod
    def of_classes(
        cls, counts: Mapping[int, int], per_shard: int = 100, *, mixed: bool = True
    ) -> "MemoryTable":
        """`counts` records of each mask in shards of `per_shard`, mixed or class after class."""
        masks = [mask for mask, number in counts.items() for _ in range(number)]
        if mixed:
            draw = random.Random(0)  # its random() is the same in every version of Python
            masks.sort(key=lambda mask: draw.random())
        return cls([masks[i : i + per_shard] for i in range(0, len(masks), per_shard)])

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr([s.tolist() for s in self.shards]).encode()).hexdigest()

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def class_counts(self, shard: int | None = None) -> Mapping[int, int]:
        chosen = self.shards if shard is None else [self.shards[shard]]
        return Counter(mask for masks in chosen for mask in masks.tolist())

    def slots(self, shard: int, mask: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.shards[shard] == mask)

    def entries(self, shard: int) -> NDArray[np.void]:
        """Text lengths of 0 to 999 characters, by (shard, slot)."""
        number = len(self.shards[shard])
        entries = np.zeros(number, dtype=[("text_chars", "<u2")])
        entries["text_chars"] = (np.arange(number) * 7919 + shard * 104729) % 1000
        return entries

    def mask(self, shard: int, slot: int) -> int:
        return int(self.shards[shard][slot])


@pytest.fixture(scope="session")
def memory_table() -> type[MemoryTable]:
    return MemoryTable


class Paper:
    """The EMT dataset by the counts of its Table I, and our reading of the two stages' rates."""

    counts: ClassVar = {
        mask_of([Task.MSA, Task.ER, Task.FER]): 15_870 - 4_839,
        mask_of([Task.MSA, Task.ER, Task.FER, Task.ERI]): 4_839,
        mask_of([Task.MSA, Task.ER]): 9_989,
        mask_of([Task.ECPE]): 7_081,
    }
    stage_1 = StageSpec(
        name="stage1",
        rates=(
            (Task.MSA, Fraction(2, 5)),
            (Task.ER, Fraction(1, 5)),
            (Task.FER, Fraction(2, 5)),
        ),
        take=15_000,
        epochs=2,
    )
    stage_2 = StageSpec(
        name="stage2",
        rates=(
            (Task.MSA, Fraction(1, 20)),
            (Task.ER, Fraction(19, 60)),
            (Task.ERI, Fraction(19, 60)),
            (Task.ECPE, Fraction(19, 60)),
        ),
        rest_of=("stage1",),
        epochs=2,
        shortage="repeat",
    )

    @staticmethod
    def tenth(spec: StageSpec, **changes: Any) -> StageSpec:
        """The stage for `tenth_counts`."""
        return replace(spec, **{"take": spec.take and spec.take // 10, **changes})

    def tenth_counts(self) -> dict[int, int]:
        return {mask: number // 10 for mask, number in self.counts.items()}


@pytest.fixture(scope="session")
def paper() -> Paper:
    return Paper()
