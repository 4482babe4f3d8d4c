"""Stages that cannot be planned: each knob, shortage and pool is named."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from data_shards.plan.plan import StageSpec, plan_stages
from data_shards.tasks import TASKS, mask_of

MSA, ER, FER, ERI, ECPE = TASKS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rates": ((ER, Fraction(1, 3)),)},
            r"stages\.stage1\.rates: the rates .* sum to exactly 1",
        ),
        (
            {"rates": ((ER, Fraction(1, 2)), (ER, Fraction(1, 2)))},
            r"stages\.stage1\.rates: must name a task only once, found er, er",
        ),
        (
            {"take": 99_999},
            r"msa \+ er \+ fer together: 99,999 records asked, 2,584 available",
        ),
    ],
)
def test_a_wrong_stage_is_named(
    memory_table: Any, paper: Any, changes: dict[str, Any], message: str
) -> None:
    table = memory_table.of_classes(paper.tenth_counts(), 50)
    with pytest.raises(ValueError, match=message):
        plan_stages(table, [replace(paper.tenth(paper.stage_1), **changes)], seed=0)


def test_all_shortages_of_all_stages_come_at_once(memory_table: Any) -> None:
    table = memory_table.of_classes({mask_of([MSA, ER]): 50, mask_of([ER]): 50}, 10)
    specs = [
        StageSpec(name="a", rates=((MSA, Fraction(1)),), take=60),
        StageSpec(name="b", rates=((ECPE, Fraction(1)),), take=10),
        StageSpec(name="c", rates=((MSA, Fraction(1, 2)), (ER, Fraction(1, 2))), take=20),
    ]
    with pytest.raises(ValueError) as error:
        plan_stages(table, specs, seed=0)
    first, second, third = str(error.value).splitlines()
    assert "stages.a: an epoch asks for more" in first
    assert "msa: 60 records asked, 50 available" in first and "(then 50 samples" in first
    assert "stages.b: no record is left that offers ecpe (records in the shards: msa 50," in second
    assert "stages.c: no record is left that offers msa" in third


def test_pools_are_disjoint_by_definition(memory_table: Any) -> None:
    table = memory_table.of_classes({mask_of([ER]): 50}, 10)
    everything = StageSpec(name="all", rates=((ER, Fraction(1)),))
    take = replace(everything, name="some", take=10)
    plan = plan_stages(table, [everything], seed=0)
    assert plan.stages["all"].samples_per_epoch == 50
    with pytest.raises(ValueError, match=r"stages\.all\.pool\.rest_of: stages never share .*some"):
        plan_stages(table, [take, everything], seed=0)
    rest = replace(everything, rest_of=("some",))
    assert plan_stages(table, [take, rest], seed=0).stages["all"].samples_per_epoch == 40
    # A rest may come before the stage whose rest it is: what it is does not depend on the order.
    assert plan_stages(table, [rest, take], seed=0).stages["all"].samples_per_epoch == 40
    with pytest.raises(ValueError, match=r"stages\.all: its pool is empty"):
        plan_stages(table, [replace(take, take=50), rest], seed=0)
    with pytest.raises(ValueError, match="each with its own name"):
        plan_stages(table, [take, take], seed=0)
    with pytest.raises(ValueError, match=r"data\.block_shards: must be at least 1, found 0"):
        plan_stages(table, [take], seed=0, block_shards=0)


def test_a_corpus_without_records_or_with_impossible_masks_is_refused(memory_table: Any) -> None:
    spec = StageSpec(name="a", rates=((ER, Fraction(1)),), take=1)
    for shards, message in (([[]], "must hold 1"), ([[2, 0]], "found mask 0"), ([[64]], "mask 64")):
        with pytest.raises(ValueError, match=message):
            plan_stages(memory_table(shards), [spec], seed=0)


def test_repeats_need_at_least_one_record_per_task(memory_table: Any) -> None:
    table = memory_table.of_classes({mask_of([MSA, ER]): 1}, 10)
    spec = StageSpec(
        name="a", rates=((MSA, Fraction(1, 2)), (ER, Fraction(1, 2))), take=4, shortage="repeat"
    )
    with pytest.raises(ValueError, match="too few records are left to give er even one"):
        plan_stages(table, [spec], seed=0)
    with pytest.raises(ValueError, match="an epoch asks"):
        plan_stages(table, [replace(spec, shortage="error")], seed=0)
    shrunk = plan_stages(table, [replace(spec, shortage="shrink")], seed=0).stages["a"]
    assert shrunk.samples_per_epoch == 1
