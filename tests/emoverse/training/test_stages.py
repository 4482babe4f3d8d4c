"""What a stage is to the plan, and the hand-over from stage to stage."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from data_shards.shards.index import ShardIndex
from data_shards.tasks import TASKS, Task
from emoverse.config.schema import Config, load_config
from emoverse.training.stages import (
    run_plan,
    stage_dir,
    stage_specs,
    stages_to_train,
    starting_stage,
)

GOOD = Path(__file__).resolve().parents[1] / "good_config.yaml"


def load(*overrides: str) -> Config:
    return load_config([GOOD], overrides)


def test_the_specs_say_what_the_config_says() -> None:
    first, second = stage_specs(load("stages.stage2.shortage=shrink").stages)
    assert (first.name, first.take, first.rest_of, first.epochs) == ("stage1", 100, (), 2)
    assert first.rates[:2] == ((Task.MSA, Fraction(2, 5)), (Task.ER, Fraction(1, 5)))
    assert (second.take, second.rest_of, second.shortage) == (None, ("stage1",), "shrink")


def test_the_plan_of_a_stage_is_the_same_alone_and_with_the_others(
    tmp_path: Path, make_index: Callable[..., ShardIndex]
) -> None:
    index = make_index(tmp_path / "shards", {TASKS: 300})
    plan = run_plan(load(), index)
    again = run_plan(load(), index)
    assert plan.fingerprint == again.fingerprint
    assert plan.fingerprint != run_plan(load("run.seed=4"), index).fingerprint
    assert plan.stages["stage1"].at(7) == again.stages["stage1"].at(7)


def test_stages_are_trained_in_the_order_of_the_config() -> None:
    config = load()
    assert stages_to_train(config, None) == ("stage1", "stage2")
    assert stages_to_train(config, ["stage2", "stage1"]) == ("stage1", "stage2")
    assert stages_to_train(config, ["stage2"]) == ("stage2",)


def test_an_unknown_stage_is_wrong_input() -> None:
    with pytest.raises(ValueError) as caught:
        stages_to_train(load(), ["stage3"])
    assert str(caught.value) == (
        "--stage stage3: the config has no such stage (did you mean 'stage2'?); "
        "it has stage1, stage2"
    )


def test_a_stage_starts_from_the_base_or_from_a_finished_stage(tmp_path: Path) -> None:
    config = load(f"run.run_dir={tmp_path}")
    assert starting_stage(config, "stage1") is None
    with pytest.raises(FileNotFoundError) as caught:
        starting_stage(config, "stage2")
    assert str(caught.value) == (
        "stages.stage2.start_from: stage1 is not finished, "
        f"{tmp_path}/stage1/DONE does not exist; train it first (--stage stage1) or check "
        f"run.run_dir = {tmp_path}"
    )
    stage_dir(config, "stage1").mkdir()
    (tmp_path / "stage1" / "DONE").touch()
    assert starting_stage(config, "stage2") == tmp_path / "stage1"
