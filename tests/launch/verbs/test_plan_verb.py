"""The report of `emoverse plan`: the method's own numbers, and what it says about shortages."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards.shards.index import ShardIndex
from data_shards.tasks import Task
from emoverse.config.schema import Config, load_config
from launch.verbs.plan import make_plan, plan_text

FILE = Path(__file__).resolve().parents[3] / "configs" / "emoverse_4b.yaml"
CORPUS = {
    (Task.MSA, Task.ER, Task.FER): 15870,
    (Task.MSA, Task.ER): 5150,
    (Task.MSA, Task.ER, Task.ERI): 4839,
    (Task.ER, Task.ECPE): 7081,
}


@pytest.fixture
def config(tmp_path: Path, make_index: Callable[..., ShardIndex]) -> Callable[..., Config]:
    make_index(tmp_path / "shards", CORPUS, num_shards=20)
    return lambda *more: load_config([FILE], [f"data.shards={tmp_path / 'shards'}", *more])


def test_the_steps_of_the_method(config: Callable[..., Config]) -> None:
    _, _, report = make_plan(config())
    stages = report["stages"]
    # 15,000 and the remaining 17,940 records, 2 epochs each, 8 samples per step.
    assert [stages[name]["steps"] for name in stages] == [3750, 4485]
    assert stages["stage1"]["tasks"]["fer"]["given"] == 6000
    text = plan_text(report)
    assert "stage2: from stage1, pool the rest of stage1, 2 epoch(s) of 17,940 samples" in text
    assert "parameters 4,146,855,936" in text


def test_scarce_records_are_named(config: Callable[..., Config]) -> None:
    _, _, report = make_plan(config())
    assert "  eri: 4,839 records give 5,681 samples (shortage: repeat)" in plan_text(report)
    _, _, report = make_plan(config("stages.stage2.shortage=shrink"))
    assert "  eri: 842 samples fewer than asked (shortage: shrink)" in plan_text(report)


def test_a_shortage_that_is_an_error(config: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match=r"eri: 5,681 records asked, 4,839 available"):
        make_plan(config("stages.stage2.shortage=error"))


def test_a_task_that_no_record_offers(
    tmp_path: Path, make_index: Callable[..., ShardIndex]
) -> None:
    make_index(tmp_path / "shards", {(Task.MSA, Task.ER): 20_000})
    with pytest.raises(ValueError, match=r"stages\.stage1: no record .*offers fer"):
        make_plan(load_config([FILE], [f"data.shards={tmp_path / 'shards'}"]))


def test_an_empty_pool(config: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match=r"stages\.stage2"):
        make_plan(config("stages.stage1.pool.take=32940"))


def test_other_projectors_train_other_parts(config: Callable[..., Config]) -> None:
    frozen = make_plan(config("model.projector=frozen"))[2]
    assert "trainable  12,582,912 (adapters of the llm 12,582,912)" in plan_text(frozen)
    authors = make_plan(config("model.projector=lora", "model.lora.preset=authors"))[2]
    assert "adapters of the projector" in plan_text(authors)
