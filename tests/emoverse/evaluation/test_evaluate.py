"""Evaluation: which clips, which batches, one answer per entry, the same answers by every way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import DamagedRecord
from data_shards.tasks import TASKS, Task
from emoverse.config.schema import Config, to_yaml
from emoverse.engine.distributed import RankError, World
from emoverse.evaluation.evaluate import run
from emoverse.evaluation.predictions import Prediction, from_json, read_predictions, to_json
from emoverse.inference.held_out import Entry, choose_entries, plan_batches, training_references
from emoverse.models.emoverse import build_model
from emoverse.report.report import write_report
from emoverse.run_dir.checkpoint import save_checkpoint

MakeConfig = Callable[..., Config]
Ranks = Callable[..., list[Any]]
SHORT = tuple(f"evaluation.max_new_tokens.{task}=6" for task in TASKS)
FEW = (*SHORT, "evaluation.max_records=5", "evaluation.batch_size=4")


def quiet(text: str) -> None:
    """No progress lines in tests."""


@pytest.fixture(scope="module")
def index(tiny_inputs: Any) -> ShardIndex:
    return ShardIndex.load(tiny_inputs.shards)


@pytest.fixture
def make_run(tiny_config: MakeConfig) -> Callable[..., tuple[Config, Path]]:
    """`make_run(*overrides, run="name")` -> config and a run directory with nothing trained."""

    def make(*overrides: str, run: str = "run") -> tuple[Config, Path]:
        config = tiny_config(*overrides, run=run)
        config.run.run_dir.mkdir(parents=True)
        (config.run.run_dir / "config.yaml").write_text(to_yaml(config))
        return config, config.run.run_dir

    return make


def answers(run_dir: Path, which: str) -> list[Prediction]:
    return read_predictions(run_dir / "eval" / which / "predictions.jsonl")


def work_folder(run_dir: Path) -> Path:
    work = run_dir / ".work"
    work.mkdir(exist_ok=True)
    return work


def save_stage(config: Config, stage: str, *, noise: float) -> None:
    """A checkpoint as training leaves it, with random instead of trained weights."""
    model = build_model(config.model.base, config.model, seed=config.run.seed)
    generator = torch.Generator().manual_seed(1)
    params = {
        name: value.detach() + noise * torch.randn(value.shape, generator=generator)
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    save_checkpoint(
        config.run.run_dir / stage / "checkpoints",
        params=params,
        exp_avg={name: torch.zeros_like(value) for name, value in params.items()},
        exp_avg_sq={name: torch.zeros_like(value) for name, value in params.items()},
        state={"step": 7},
        keep=1,
        work=work_folder(config.run.run_dir),
    )


# --- which entries, which batches ---


def test_without_a_limit_every_entry_is_chosen_in_the_order_of_the_shards(
    index: ShardIndex,
) -> None:
    chosen = choose_entries(index, None)
    assert list(chosen) == list(TASKS)
    for entries in chosen.values():
        assert len(entries) == index.num_records
        assert entries == sorted(entries, key=lambda one: (one.shard, one.slot))


def test_a_larger_limit_adds_clips_to_those_of_a_smaller_one(index: ShardIndex) -> None:
    few, more = choose_entries(index, 7), choose_entries(index, 20)
    for task in TASKS:
        assert len(few[task]) == 7 and len(more[task]) == 20
        assert set(few[task]) < set(more[task])
        assert len({one.shard for one in more[task]}) == index.num_shards
    assert few == choose_entries(index, 7)


def test_batches_hold_every_entry_once_one_task_each_longest_first(index: ShardIndex) -> None:
    chosen = choose_entries(index, 10)
    batches = plan_batches(index, chosen, 4)
    flat = [one for batch in batches for one in batch]
    assert sorted(flat, key=repr) == sorted(
        (one for entries in chosen.values() for one in entries), key=repr
    )
    assert all(len({one.task for one in batch}) == 1 and len(batch) <= 4 for batch in batches)

    def length(one: Entry) -> int:
        return int(index.entries(one.shard)[one.slot]["text_chars"])

    ecpe = [length(one) for one in flat if one.task is Task.ECPE]
    assert ecpe == sorted(ecpe, reverse=True)


# --- the whole way ---


def test_the_base_answers_and_is_scored(make_run: Callable[..., tuple[Config, Path]]) -> None:
    _, run_dir = make_run(*FEW)
    result = run(run_dir, which=["base"], log=quiet)
    metrics = json.loads((run_dir / "eval" / "base" / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result["base"]))
    assert "NaN" not in (run_dir / "eval" / "base" / "metrics.json").read_text()
    found = answers(run_dir, "base")
    assert [one.row.task for one in found] == [task for task in TASKS for _ in range(5)]
    assert metrics["answers"] == 25 and metrics["checkpoint"] is None
    assert metrics["protocol"]["give_emotion"] is False
    for task in TASKS:
        line = metrics["tasks"][str(task)]
        assert line["n"] == 5 == sum(line["answers"].values())
        assert line["majority_fitted_on"] == "36 training records"
        assert set(line["metrics"]) == set(line["majority"])
        assert line["metrics"][line["primary"]]["value"] is not None
    assert all(one.baseline is not None for one in found)
    assert from_json(json.loads(json.dumps(to_json(found[-1])))) == found[-1]
    assert sorted(path.name for path in (run_dir / "eval" / "base").iterdir()) == [
        "metrics.json",
        "predictions.jsonl",
    ]


def test_cached_features_and_repetition_change_no_answer(
    make_run: Callable[..., tuple[Config, Path]],
) -> None:
    _, live = make_run(*FEW, run="live")
    _, cached = make_run(*FEW, "model.cache_features=true", "data.workers=0", run="cached")
    run(live, which=["base"], log=quiet)
    run(cached, which=["base"], log=quiet)
    first = answers(cached, "base")
    assert first == answers(live, "base")
    assert list((cached / "cache").glob("features-*.bin"))
    run(cached, which=["base"], fresh=True, log=quiet)  # every feature comes from the file
    assert answers(cached, "base") == first


def test_a_stage_answers_with_its_newest_checkpoint(
    make_run: Callable[..., tuple[Config, Path]],
) -> None:
    config, run_dir = make_run(*FEW)
    save_stage(config, "stage1", noise=0.5)
    lines: list[str] = []
    result = run(run_dir, log=lines.append)  # as the config says, of what there is
    assert list(result) == ["base", "stage1"]
    assert "stage2: not trained yet, left out" in lines
    assert result["stage1"]["checkpoint"] == "stage1/checkpoints/step_000007"
    assert [p.row.response for p in answers(run_dir, "base")] != [
        p.row.response for p in answers(run_dir, "stage1")
    ]
    page = write_report(run_dir)
    assert page.stat().st_size > 50_000
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["tasks"]["er"]["stage1"] is not None
    assert summary["tasks"]["er"]["stage2"] is None


def test_an_untouched_stage_answers_as_the_base(
    make_run: Callable[..., tuple[Config, Path]],
) -> None:
    """New adapters change nothing, so stage 1 begins exactly at the base."""
    config, run_dir = make_run(*FEW)
    save_stage(config, "stage1", noise=0.0)
    run(run_dir, which=["base", "stage1"], log=quiet)
    assert answers(run_dir, "base") == answers(run_dir, "stage1")


def test_blank_frames_hide_the_clip(make_run: Callable[..., tuple[Config, Path]]) -> None:
    """With blanked frames clips of equal words get equal answers, with their frames they do not."""
    replies: dict[str, set[tuple[str, str]]] = {}
    for name, blank in (("seeing", "false"), ("blind", "true")):
        config, run_dir = make_run(*SHORT, f"model.blank_frames={blank}", run=name)
        save_stage(config, "stage1", noise=0.5)
        metrics = run(run_dir, which=["stage1"], log=quiet)["stage1"]
        assert metrics["protocol"]["blank_frames"] is (name == "blind")
        found = [p for p in answers(run_dir, "stage1") if p.row.task is not Task.ECPE]
        replies[name] = {(p.question, p.row.response) for p in found}
    assert len(replies["blind"]) == len({question for question, _ in replies["blind"]})
    assert len(replies["seeing"]) > len(replies["blind"])


@pytest.mark.parametrize(
    "settings",
    [
        ("train.zero_stage=2",),
        ("train.zero_stage=3",),
        ("train.zero_stage=3", "evaluation.batch_size=5"),  # five batches: one rank is done first
        ("train.zero_stage=3", "model.cache_features=true", "data.workers=0"),
        ("train.zero_stage=3", "model.blank_frames=true"),
    ],
    ids=" ".join,
)
def test_two_ranks_write_what_one_rank_writes(
    run_ranks: Ranks, make_run: Callable[..., tuple[Config, Path]], settings: tuple[str, ...]
) -> None:
    """Also when no rank holds all the weights."""
    alike = [line for line in settings if "blank" in line or "batch_size" in line]
    _, alone = make_run(*FEW, *alike, run="alone")
    _, shared = make_run(*FEW, *settings, run="shared")
    run(alone, which=["base"], log=quiet)

    def work(world: World) -> int:
        return int(run(shared, which=["base"], world=world, log=quiet)["base"]["answers"])

    assert run_ranks(work, 2) == [25, 25]
    assert answers(shared, "base") == answers(alone, "base")


# --- wrong input ---


def test_wrong_states_are_refused(make_run: Callable[..., tuple[Config, Path]]) -> None:
    _, run_dir = make_run(*FEW)
    with pytest.raises(
        ValueError, match="--which stage9: no such state; choose among base, stage1"
    ):
        run(run_dir, which=["stage9"], log=quiet)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; train stage1 first"):
        run(run_dir, which=["stage1"], log=quiet)


def test_a_checkpoint_of_another_model_section_is_refused(
    make_run: Callable[..., tuple[Config, Path]],
) -> None:
    config, run_dir = make_run(*FEW)
    save_stage(config, "stage1", noise=0.0)
    frozen = config.model_copy(
        update={"model": config.model.model_copy(update={"projector": "frozen"})}
    )
    (run_dir / "config.yaml").write_text(to_yaml(frozen))
    with pytest.raises(ValueError, match=r"trained tensors.*config\.yaml of the same run"):
        run(run_dir, which=["stage1"], log=quiet)


def damage(shards: Path, broken: Path) -> str:
    """A copy of a shard folder with one wrong byte; what is said about its record."""
    shutil.copytree(shards, broken)
    tar = sorted(broken.glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 0xFF
    tar.write_bytes(content)
    return rf"record clip-\d+ in {tar.name} at byte \d+: checksum"


def test_a_rank_with_a_damaged_clip_lets_the_others_finish(
    run_ranks: Ranks,
    make_run: Callable[..., tuple[Config, Path]],
    tiny_inputs: Any,
    tmp_path: Path,
) -> None:
    """They gather weights from it, and would wait for it until the time-out."""
    message = damage(tiny_inputs.shards, tmp_path / "broken")
    settings = (f"evaluation.shards={tmp_path / 'broken'}", "train.zero_stage=3")
    _, run_dir = make_run(*SHORT, *settings)

    def work(world: World) -> str:
        with pytest.raises(RankError) as caught:
            run(run_dir, which=["base"], world=world, log=quiet)
        return str(caught.value)

    first, second = run_ranks(work, 2, limit_s=60)
    assert first == second and re.search(message, first)


def test_a_damaged_clip_is_named_and_never_left_out(
    make_run: Callable[..., tuple[Config, Path]], tiny_inputs: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    message = damage(tiny_inputs.shards, broken)
    _, run_dir = make_run(*SHORT, f"evaluation.shards={broken}")
    with pytest.raises(DamagedRecord, match=message):
        run(run_dir, which=["base"], log=quiet)
    assert not (run_dir / "eval" / "base" / "predictions.jsonl").exists()
    with pytest.raises(DamagedRecord):
        training_references(broken, TASKS)


def test_missing_shards_are_named(
    make_run: Callable[..., tuple[Config, Path]], tmp_path: Path
) -> None:
    _, run_dir = make_run(*FEW, f"evaluation.shards={tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; .*emoverse build"):
        run(run_dir, which=["base"], log=quiet)
    assert training_references(tmp_path / "nowhere", TASKS) == {}
