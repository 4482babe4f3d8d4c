"""The order of a plan: for ever the same, identified, local to few shards, and of any size."""

import hashlib
import pickle
import tracemalloc
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_shards.plan.plan import Placement, StagePlan, StageSpec, plan_stages
from data_shards.tasks import TASKS, bit, mask_of

MSA, ER, FER, ERI, ECPE = TASKS


def placements(stage: StagePlan) -> list[Placement]:
    return [stage.at(position) for position in range(stage.num_samples)]


def address(place: Placement) -> tuple[int, int]:
    return place.shard, place.slot


def test_the_order_never_changes(memory_table: Any, paper: Any) -> None:
    """If this fails, every checkpoint in the world belongs to another plan: raise ALGORITHM."""
    table = memory_table.of_classes(paper.tenth_counts(), 50)
    plan = plan_stages(
        table, [paper.tenth(paper.stage_1), paper.tenth(paper.stage_2)], seed=42, block_shards=4
    )
    found = {
        name: [
            (p.shard, p.slot, p.task.value)
            for p in map(stage.at, (0, 1, 2, 700, stage.samples_per_epoch, stage.num_samples - 1))
        ]
        for name, stage in plan.stages.items()
    }
    assert found == GOLDEN_ORDER
    digest = hashlib.sha256()
    for stage in plan.stages.values():
        for place in placements(stage):
            digest.update(f"{place.shard} {place.slot} {place.task} {place.epoch}\n".encode())
    assert digest.hexdigest() == GOLDEN_DIGEST
    substitutes = [plan.stages["stage2"].substitute(100, attempt) for attempt in (1, 2)]
    assert [address(place) for place in substitutes] == GOLDEN_SUBSTITUTES
    assert plan.fingerprint == GOLDEN_FINGERPRINT


GOLDEN_ORDER = {
    "stage1": [
        (61, 21, "msa"),
        (23, 27, "fer"),
        (61, 43, "er"),
        (38, 44, "msa"),
        (55, 21, "msa"),
        (45, 37, "fer"),
    ],
    "stage2": [
        (41, 26, "er"),
        (59, 35, "eri"),
        (2, 19, "ecpe"),
        (28, 19, "ecpe"),
        (13, 31, "eri"),
        (56, 37, "ecpe"),
    ],
}
GOLDEN_DIGEST = "c6ded0e34b382284c20c10da16ec74d45ca2bc06dbf8a5d3c57493b9a9ae778c"
GOLDEN_SUBSTITUTES = [(2, 43), (41, 30)]
GOLDEN_FINGERPRINT = "fd14f9ab5d24d4c07b4ce067f148f4b7eabb409a1fbc6ea1e7a900f41f184ee6"


def test_the_fingerprint_changes_with_everything_that_matters(
    memory_table: Any, paper: Any
) -> None:
    counts = paper.tenth_counts()
    table = memory_table.of_classes(counts, 50)
    specs = [paper.tenth(paper.stage_1), paper.tenth(paper.stage_2)]
    other_rates = ((MSA, Fraction(1, 5)), (ER, Fraction(2, 5)), (FER, Fraction(2, 5)))
    plans = [
        plan_stages(table, specs, seed=1),
        plan_stages(table, specs, seed=2),
        plan_stages(table, specs, seed=1, block_shards=8),
        plan_stages(memory_table.of_classes(counts, 51), specs, seed=1),
        plan_stages(table, [replace(specs[0], take=1_499), specs[1]], seed=1),
        plan_stages(table, [replace(specs[0], rates=other_rates), specs[1]], seed=1),
        plan_stages(table, [replace(specs[0], epochs=1), specs[1]], seed=1),
        plan_stages(table, [replace(specs[0], shortage="shrink"), specs[1]], seed=1),
        plan_stages(table, [replace(specs[0], epoch_tasks="redraw"), specs[1]], seed=1),
        plan_stages(
            table, [replace(specs[0], name="one"), replace(specs[1], rest_of=("one",))], seed=1
        ),
        plan_stages(table, specs[:1], seed=1),
    ]
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    stages = [stage.fingerprint for plan in plans for stage in plan.stages.values()]
    assert len(set(stages)) == len(stages)
    same = [replace(specs[0], rates=specs[0].rates[::-1]), specs[1]]
    assert plan_stages(table, same, seed=1).fingerprint == plans[0].fingerprint


def test_a_stage_plan_travels_to_data_workers(memory_table: Any, paper: Any) -> None:
    table = memory_table.of_classes(paper.tenth_counts(), 50)
    stage = plan_stages(table, [paper.tenth(paper.stage_1)], seed=1).stages["stage1"]
    before = stage.at(77)
    copy = pickle.loads(pickle.dumps(stage))
    assert copy.at(77) == before and copy.fingerprint == stage.fingerprint


def test_positions_and_attempts_have_limits(memory_table: Any) -> None:
    table = memory_table.of_classes({bit(ER): 3}, 2)
    stage = plan_stages(
        table, [StageSpec(name="a", rates=((ER, Fraction(1)),), take=2)], seed=1
    ).stages["a"]
    for position in (-1, 2):
        with pytest.raises(IndexError, match=r"stages\.a: position must be 0\.\.1, found"):
            stage.at(position)
    with pytest.raises(ValueError, match="attempt must be at least 1, found 0"):
        stage.substitute(0, 0)
    records = {address(stage.at(0)), *(address(stage.substitute(0, n)) for n in (1, 2))}
    assert len(records) == 3
    with pytest.raises(ValueError, match="all 2 substitutes for task er"):
        stage.substitute(0, 3)


# ----------------------------------------------------------------------------- locality, scale


@pytest.mark.parametrize("mixed", [True, False])
def test_each_shard_is_fetched_about_once(memory_table: Any, paper: Any, mixed: bool) -> None:
    """Whole shards through a cache of two blocks: 100 shards, mixed or packed by source."""
    table = memory_table.of_classes(paper.tenth_counts(), 33, mixed=mixed)
    plan = plan_stages(
        table, [paper.tenth(paper.stage_1), paper.tenth(paper.stage_2)], seed=3, block_shards=16
    )
    for stage in plan.stages.values():
        cache: OrderedDict[int, None] = OrderedDict()
        fetches = 0
        shards = set()
        for position in range(stage.samples_per_epoch):
            shard = stage.at(position).shard
            shards.add(shard)
            fetches += shard not in cache
            cache[shard] = None
            cache.move_to_end(shard)
            if len(cache) > 32:
                cache.popitem(last=False)
        assert fetches <= 1.05 * len(shards)


class HugeTable:
    """1e9 records in 1e6 shards, known by arithmetic; a shard's slots are class after class."""

    fingerprint = "huge"
    num_shards = 10**6
    faces, causes, reasons = mask_of([MSA, ER, FER]), mask_of([ECPE]), mask_of([MSA, ER, ERI])

    def class_counts(self, shard: int | None = None) -> Mapping[int, int]:
        if shard is None:
            return {self.faces: 5 * 10**8, self.causes: 3 * 10**8, self.reasons: 2 * 10**8}
        shift = 10 * (shard % 10) - 45  # 0 on average
        return {self.faces: 500 + shift, self.causes: 300 - shift, self.reasons: 200}

    def slots(self, shard: int, mask: int) -> NDArray[np.int64]:
        counts = self.class_counts(shard)
        start = sum(number for other, number in counts.items() if other < mask)
        return np.arange(start, start + counts[mask])

    def mask(self, shard: int, slot: int) -> int:
        for mask, number in sorted(self.class_counts(shard).items()):
            if slot < number:
                return mask
            slot -= number
        raise AssertionError((shard, slot))


def test_a_billion_records_need_no_memory_per_record(paper: Any) -> None:
    table = HugeTable()
    specs = [
        replace(paper.stage_1, take=4 * 10**8),
        replace(paper.stage_2, epochs=3),
    ]
    plan = plan_stages(table, specs, seed=9)
    first, second = plan.stages["stage1"], plan.stages["stage2"]
    assert (first.num_samples, second.num_samples) == (8 * 10**8, 18 * 10**8)
    draws = np.random.default_rng(1)
    tracemalloc.start()
    used: dict[tuple[int, int], str] = {}
    for stage in (first, second):
        seen = set()
        for position in draws.integers(0, stage.samples_per_epoch, 150).tolist():
            place = stage.at(position)
            assert table.mask(*address(place)) & bit(place.task)
            assert used.setdefault(address(place), stage.name) == stage.name
            seen.add(address(place))
        last = stage.at(stage.num_samples - 1)
        assert last.epoch == stage.epochs - 1
        assert len(seen) == 150
        # All tasks are in the same few blocks at any time.
        middle = stage.samples_per_epoch // 2
        near = {stage.at(middle + n).shard for n in range(300)}
        assert len(near) <= 3 * 16
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20
    assert second.counts[3].records == 19 * 10**7  # ECPE has more than it asks
