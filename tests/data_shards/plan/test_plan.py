"""The plan: exact rates, disjoint stages, even use of records; the numbers of the paper."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.plan.allocation import is_feasible
from data_shards.plan.plan import Placement, Plan, StagePlan, StageSpec, plan_stages
from data_shards.plan.rates import TaskOrder, prefix_bound
from data_shards.tasks import TASKS, Task, bit, mask_of

MSA, ER, FER, ERI, ECPE = TASKS


def placements(stage: StagePlan) -> list[Placement]:
    return [stage.at(position) for position in range(stage.num_samples)]


def address(place: Placement) -> tuple[int, int]:
    return place.shard, place.slot


@st.composite
def small_plans(draw: st.DrawFn) -> tuple[list[list[int]], list[StageSpec], int, int]:
    """Shards of records, stages, seed, block_shards."""
    masks = draw(st.lists(st.integers(1, 31), min_size=1, max_size=4))
    records = st.lists(st.sampled_from(masks), max_size=14)
    shards = draw(st.lists(records, min_size=1, max_size=7).filter(lambda s: any(map(len, s))))
    specs = []
    takes = draw(st.integers(0, 2))
    for number in range(takes + 1):
        offered = sorted({task for mask in masks for task in TASKS if mask & bit(task)})
        weights = draw(st.lists(st.integers(0, 6), min_size=len(offered), max_size=len(offered)))
        weights[0] += not any(weights)
        specs.append(
            StageSpec(
                name=f"s{number}",
                rates=tuple(
                    (task, Fraction(weight, sum(weights)))
                    for task, weight in zip(offered, weights, strict=True)
                ),
                take=draw(st.integers(1, 25)) if number < takes else None,
                rest_of=tuple(f"s{n}" for n in range(takes)) if number == takes else (),
                epochs=draw(st.integers(1, 4)),
                shortage=draw(st.sampled_from(["error", "repeat", "shrink"])),
                epoch_tasks=draw(st.sampled_from(["keep", "redraw"])),
            )
        )
    return shards, specs, draw(st.integers(0, 2**63)), draw(st.integers(1, 4))


def check_rates(stage: StagePlan, places: Sequence[Placement]) -> None:
    counts: Counter[Task] = Counter()
    bound = prefix_bound(len(stage.order.rates))
    for length, place in enumerate(places, 1):
        counts[place.task] += 1
        assert place.epoch == (length - 1) // stage.samples_per_epoch
        for task, rate in stage.order.rates.items():
            assert abs(counts[task] - length * rate) <= bound
    assert {count.task: count.total for count in stage.counts} == dict(counts) | {
        task: 0 for task in stage.order.tasks if task not in counts
    }


def check_uses(stage: StagePlan, places: Sequence[Placement], *, takes_all: bool) -> None:
    """No record twice in an epoch, or evenly; a record keeps its task."""
    epochs = [[p for p in places if p.epoch == epoch] for epoch in range(stage.epochs)]
    tasks: dict[tuple[int, int], set[Task]] = {}
    for place in places:
        tasks.setdefault(address(place), set()).add(place.task)
    if stage.spec.epoch_tasks == "keep":
        changing = [record for record, served in tasks.items() if len(served) > 1]
        assert len(changing) <= (2 * len(stage.order.tasks) ** 2 if takes_all else 0)
    if not stage.repeats:
        for epoch in epochs:
            assert len({address(place) for place in epoch}) == stage.samples_per_epoch
        return
    for count in stage.counts:
        uses = Counter(address(place) for place in places if place.task is count.task)
        if stage.spec.epoch_tasks == "keep":
            each = Fraction(count.total, count.records)
            assert len(uses) == min(count.records, count.total)
            assert set(uses.values()) <= {int(each), -int(-each // 1)}
        for epoch in epochs:
            uses = Counter(address(place) for place in epoch if place.task is count.task)
            each = Fraction(sum(uses.values()), count.records)
            assert max(uses.values(), default=0) <= each + 2


def check_plan(plan: Plan, table: Any, specs: Sequence[StageSpec]) -> None:
    used: dict[tuple[int, int], str] = {}
    for spec in specs:
        stage = plan.stages[spec.name]
        places = placements(stage)
        for place in places:
            assert table.mask(*address(place)) & bit(place.task)
            assert used.setdefault(address(place), spec.name) == spec.name
        check_rates(stage, places)
        records = sum(table.class_counts().values())
        own = {record for record, name in used.items() if name == spec.name}
        check_uses(stage, places, takes_all=spec.take is None or len(used) == records)
        if spec.take is not None and spec.shortage != "shrink":
            assert stage.samples_per_epoch == spec.take
        if spec.take is None and spec.shortage == "error":
            assert stage.samples_per_epoch == len(own)


@settings(max_examples=150, deadline=None)
@given(case=small_plans())
def test_any_plan_keeps_the_law_or_says_why_not(memory_table: Any, case: Any) -> None:
    shards, specs, seed, block_shards = case
    table = memory_table(shards)
    try:
        plan = plan_stages(table, specs, seed=seed, block_shards=block_shards)
    except ValueError as error:
        assert "stages." in str(error)
        policies = {spec.name: spec.shortage for spec in specs}
        for line in str(error).splitlines():
            name = line.split(".")[1].split(":")[0]
            # Only an error stage may be short; others can only lack a task or any record at all.
            assert policies[name] == "error" or "records asked" not in line
        return
    check_plan(plan, table, specs)


@settings(max_examples=60, deadline=None)
@given(case=small_plans())
def test_a_single_epoch_is_refused_only_if_it_is_impossible(memory_table: Any, case: Any) -> None:
    shards, specs, seed, _ = case
    table = memory_table(shards)
    spec = replace(specs[0], take=specs[0].take or 9, rest_of=(), epochs=1, shortage="error")
    counts, order = table.class_counts(), TaskOrder(dict(spec.rates))
    possible = is_feasible(counts, {}, order.counts(spec.take or 0)) and all(
        any(mask & bit(task) for mask in counts) for task in order.tasks
    )
    try:
        plan_stages(table, [spec], seed=seed)
        assert possible
    except ValueError:
        assert not possible


@settings(max_examples=40, deadline=None)
@given(case=small_plans())
def test_substitutes_are_pure_and_of_the_same_task(memory_table: Any, case: Any) -> None:
    shards, specs, seed, block_shards = case
    table = memory_table(shards)
    specs = [replace(spec, shortage="repeat") for spec in specs]
    try:
        plan = plan_stages(table, specs, seed=seed, block_shards=block_shards)
    except ValueError:
        return
    used = {address(place) for stage in plan.stages.values() for place in placements(stage)}
    for stage in plan.stages.values():
        position = seed % stage.num_samples
        wanted = stage.at(position)
        unused: list[tuple[int, int]] = []
        for attempt in range(1, 100):
            try:
                place = stage.substitute(position, attempt)
            except ValueError as error:
                assert f"substitutes for task {wanted.task} were tried" in str(error)
                break
            assert place == stage.substitute(position, attempt)
            assert (place.task, place.epoch) == (wanted.task, wanted.epoch)
            assert table.mask(*address(place)) & bit(wanted.task)
            if address(place) not in used:
                unused.append(address(place))
            if address(place) == address(wanted):
                assert stage.repeats
        else:
            raise AssertionError("the substitutes never end")
        assert len(set(unused)) == len(unused)


# ----------------------------------------------------------------------------------- the paper


def test_the_paper_as_written_is_refused_as_the_docs_say(memory_table: Any, paper: Any) -> None:
    table = memory_table.of_classes(paper.counts, 1_000)
    specs = [paper.stage_1, replace(paper.stage_2, shortage="error")]
    with pytest.raises(ValueError, match=r"stages\.stage2: an epoch asks for more") as error:
        plan_stages(table, specs, seed=0)
    page = Path(__file__).resolve().parents[3] / "docs" / "rates.md"
    assert str(error.value) in " ".join(page.read_text(encoding="utf-8").split())


def test_scarce_records_come_again_as_evenly_as_the_docs_say(memory_table: Any, paper: Any) -> None:
    table = memory_table.of_classes(paper.counts, 100)
    stage = plan_stages(table, [paper.stage_1, paper.stage_2], seed=0).stages["stage2"]
    uses: dict[Task, Counter[tuple[int, int]]] = {task: Counter() for task in stage.order.tasks}
    for place in placements(stage):
        uses[place.task][address(place)] += 1
    assert {task: Counter(uses[task].values()) for task in uses} == {
        MSA: {2: 669, 3: 152},
        ER: {2: 4_235, 3: 964},
        ERI: {2: 3_155, 3: 1_684},
        ECPE: {2: 5_681},
    }


def test_the_paper_with_repeats_and_shrunk(memory_table: Any, paper: Any) -> None:
    table = memory_table.of_classes(paper.counts, 1_000)
    plan = plan_stages(table, [paper.stage_1, paper.stage_2], seed=0)
    first, second = plan.stages["stage1"], plan.stages["stage2"]
    assert [(c.asked, c.available, c.given, c.records, c.total) for c in first.counts] == [
        (6_000, 25_859, 6_000, 6_000, 12_000),
        (3_000, 25_859, 3_000, 3_000, 6_000),
        (6_000, 15_870, 6_000, 6_000, 12_000),
    ]
    assert [(c.asked, c.available, c.given, c.records, c.total) for c in second.counts] == [
        (897, 10_859, 897, 821, 1_794),
        (5_681, 10_859, 5_681, 5_199, 11_362),
        (5_681, 4_839, 5_681, 4_839, 11_362),
        (5_681, 7_081, 5_681, 5_681, 11_362),
    ]
    assert (second.samples_per_epoch, second.num_samples) == (17_940, 35_880)
    assert (first.num_steps(8), second.num_steps(8)) == (3_750, 4_485)
    shrunk = plan_stages(table, [paper.stage_1, replace(paper.stage_2, shortage="shrink")], seed=0)
    assert shrunk.stages["stage2"].samples_per_epoch == 15_281
    assert [c.given for c in shrunk.stages["stage2"].counts] == [764, 4_839, 4_839, 4_839]
    for percent, samples in ((2, 14_814), (5, 15_282), (10, 15_513)):
        other = Fraction(100 - percent, 300)
        rates = ((MSA, Fraction(percent, 100)), (ER, other), (ERI, other), (ECPE, other))
        once = replace(paper.stage_2, rates=rates, shortage="shrink", epochs=1)
        shrunk = plan_stages(table, [paper.stage_1, once], seed=0)
        assert shrunk.stages["stage2"].samples_per_epoch == samples


def test_a_tenth_of_the_paper_in_full(memory_table: Any, paper: Any) -> None:
    table = memory_table.of_classes(paper.tenth_counts(), 50)
    for shortage in ("repeat", "shrink"):
        specs = [paper.tenth(paper.stage_1), paper.tenth(paper.stage_2, shortage=shortage)]
        check_plan(plan_stages(table, specs, seed=5, block_shards=8), table, specs)


def test_stage_one_leaves_the_scarce_records_to_stage_two(memory_table: Any, paper: Any) -> None:
    table = memory_table.of_classes(paper.tenth_counts(), 50)
    plan = plan_stages(table, [paper.tenth(paper.stage_1), paper.tenth(paper.stage_2)], seed=1)
    scarce = bit(ERI)
    first = placements(plan.stages["stage1"])
    assert not any(table.mask(*address(place)) & scarce for place in first)
    # Alone it takes the classes as they come: ERI records in proportion.
    alone = placements(plan_stages(table, [paper.tenth(paper.stage_1)], seed=1).stages["stage1"])
    share = sum(bool(table.mask(*address(place)) & scarce) for place in alone) / len(alone)
    fer = share_of_eri = 0
    for place in alone:
        fer += place.task is FER
        share_of_eri += place.task is FER and bool(table.mask(*address(place)) & scarce)
    assert 0.15 < share < 0.30
    assert abs(share_of_eri / fer - 483 / 1_586) < 0.02


# -------------------------------------------------------------------------------------- epochs


def test_epochs_go_on_without_a_gap_in_a_new_order(memory_table: Any) -> None:
    table = memory_table.of_classes({mask_of([MSA, ER]): 400}, 20)
    spec = StageSpec(name="a", rates=((MSA, Fraction(1, 2)), (ER, Fraction(1, 2))), epochs=3)
    stage = plan_stages(table, [spec], seed=2, block_shards=4).stages["a"]
    epochs = [[stage.at(400 * e + n) for n in range(400)] for e in range(3)]
    served = [{address(place): place.task for place in epoch} for epoch in epochs]
    assert served[0] == served[1] == served[2] and len(served[0]) == 400
    orders = [[address(place) for place in epoch] for epoch in epochs]
    assert sum(a == b for a, b in zip(orders[0], orders[1], strict=True)) < 10
    redrawn = plan_stages(table, [replace(spec, epoch_tasks="redraw")], seed=2).stages["a"]
    tasks = [
        {address(p): p.task for p in (redrawn.at(400 * e + n) for n in range(400))}
        for e in range(2)
    ]
    assert tasks[0].keys() == tasks[1].keys()
    assert 150 < sum(tasks[0][record] is tasks[1][record] for record in tasks[0]) < 250


def test_odd_epochs_keep_rates_tasks_and_records(memory_table: Any) -> None:
    """21 records, half and half: the rates ask 11 + 10, then 10 + 11."""
    both, spec = (
        mask_of([MSA, ER]),
        StageSpec(name="a", rates=((MSA, Fraction(1, 2)), (ER, Fraction(1, 2))), epochs=2),
    )
    whole = memory_table.of_classes({both: 21}, 5)
    for table, changing in ((whole, 1), (memory_table.of_classes({both: 30}, 5), 0)):
        stage = plan_stages(table, [replace(spec, take=21)], seed=3).stages["a"]
        epochs = [
            {address(p): p.task for p in placements(stage) if p.epoch == epoch}
            for epoch in range(2)
        ]
        assert [len(epoch) for epoch in epochs] == [21, 21]
        both_epochs = epochs[0].keys() & epochs[1].keys()
        assert sum(epochs[0][record] is not epochs[1][record] for record in both_epochs) == changing
        assert len(both_epochs) == (21 if changing else 20)
    apart = memory_table.of_classes({bit(MSA): 11, bit(ER): 10}, 5)
    with pytest.raises(ValueError, match=r"the largest epochs .* er: 11 records asked"):
        plan_stages(apart, [replace(spec, take=21)], seed=3)
