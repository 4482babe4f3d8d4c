"""Evaluation by every way: 1, 2, 3 ranks, killed and resumed, one checkpoint, a base."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.tasks import TASKS, Task
from emoverse.config.schema import Config, ConfigError, freeze_config, load_frozen, to_yaml
from emoverse.engine.distributed import World
from emoverse.evaluation.evaluate import run, run_target
from emoverse.evaluation.predictions import (
    PartWriter,
    Prediction,
    read_parts,
    read_predictions,
    write_predictions,
)
from emoverse.evaluation.result_files import read_results, score_results
from emoverse.evaluation.target import resolve
from emoverse.inference.generate import Answerer
from emoverse.models.emoverse import build_model
from emoverse.run_dir.checkpoint import save_checkpoint
from launch.cli import main

MakeRun = Callable[..., tuple[Config, Path]]
Ranks = Callable[..., list[Any]]
FEW = (
    *(f"evaluation.max_new_tokens.{task}=6" for task in TASKS),
    "evaluation.max_records=5",
    "evaluation.batch_size=2",  # 15 batches: no world size below shares them evenly
)


def quiet(text: str) -> None:
    """No progress lines in tests."""


@pytest.fixture
def make_run(tiny_config: Callable[..., Config]) -> MakeRun:
    """`make_run(*overrides, run="name")` -> config and a run directory with nothing trained."""

    def make(*overrides: str, run: str = "run") -> tuple[Config, Path]:
        config = tiny_config(*FEW, *overrides, run=run)
        config.run.run_dir.mkdir(parents=True)
        (config.run.run_dir / "config.yaml").write_text(to_yaml(config))
        return config, config.run.run_dir

    return make


def numbers(run_dir: Path, which: str = "base") -> dict[str, Any]:
    """metrics.json without what may differ between two ways to the same numbers."""
    metrics = json.loads((run_dir / "eval" / which / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name not in ("seconds", "versions")}


def file_of(run_dir: Path, which: str = "base") -> str:
    return (run_dir / "eval" / which / "predictions.jsonl").read_text()


def test_one_two_and_three_ranks_give_identical_files(run_ranks: Ranks, make_run: MakeRun) -> None:
    _, alone = make_run(run="alone")
    run(alone, which=["base"], log=quiet)
    for world_size in (2, 3):
        _, shared = make_run(run=f"shared{world_size}")

        def work(world: World, shared: Path = shared) -> int:
            return int(run(shared, which=["base"], world=world, log=quiet)["base"]["answers"])

        assert run_ranks(work, world_size) == [25] * world_size
        assert file_of(shared) == file_of(alone)
        assert numbers(shared) == numbers(alone)
        assert not (shared / "eval" / "base" / "parts").exists()


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is tidied up."""


def kill_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    real = Answerer.predict

    def predict(self: Answerer, model: Any, given: Any) -> Iterator[list[Prediction]]:
        for number, answers in enumerate(real(self, model, given)):
            if number == batches:
                raise Killed
            yield answers

    monkeypatch.setattr(Answerer, "predict", predict)


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    real, counts = Answerer.predict, [0]

    def predict(self: Answerer, model: Any, given: Any) -> Iterator[list[Prediction]]:
        counts[0] += len(given)
        return real(self, model, given)

    monkeypatch.setattr(Answerer, "predict", predict)
    return counts


def test_a_killed_evaluation_goes_on_with_another_number_of_ranks(
    run_ranks: Ranks, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, alone = make_run(run="alone")
    run(alone, which=["base"], log=quiet)
    _, killed = make_run(run="killed")
    parts = killed / "eval" / "base" / "parts"
    for batches in (4, 3):
        with monkeypatch.context() as patch:
            kill_after(patch, batches)
            with pytest.raises(Killed):
                run(killed, which=["base"], log=quiet)
        assert not (killed / "eval" / "base" / "predictions.jsonl").exists()
    last = max(parts.iterdir())  # the line under way when the power went
    last.write_text(last.read_text() + '{"batch": 14, "answers": [{"key"')

    lines: list[str] = []

    def work(world: World) -> tuple[int, int]:
        with pytest.MonkeyPatch.context() as patch:
            counts = count_batches(patch)
            found = run(killed, which=["base"], world=world, log=lines.append)
        return counts[0], found["base"]["answers"]

    assert run_ranks(work, 2) == [(4, 25), (4, 25)]  # 15 less 4 less 3
    assert file_of(killed) == file_of(alone) and numbers(killed) == numbers(alone)
    assert not parts.exists()


def test_a_finished_evaluation_is_scored_again_without_a_model(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run_dir = make_run()
    run(run_dir, which=["base"], log=quiet)
    first = file_of(run_dir)
    counts = count_batches(monkeypatch)
    lines: list[str] = []
    strict = run(run_dir, which=["base"], mode="strict", log=lines.append)["base"]
    assert counts == [0] and "base: 15 of 15 batches are answered already" in lines
    assert strict["parser"] == "strict"
    assert all(
        set(line["answers"]) <= {"parsed", "unparseable"} for line in strict["tasks"].values()
    )
    run(run_dir, which=["base"], log=quiet)
    assert file_of(run_dir) == first  # the mode of reading leaves no trace in the answers
    run(run_dir, which=["base"], fresh=True, log=quiet)
    assert counts == [15] and file_of(run_dir) == first


def test_verdicts_that_stay_keep_the_name_of_their_judge(make_run: MakeRun) -> None:
    """A finished evaluation keeps its verdicts when it is scored again without --judge."""
    _, run_dir = make_run()
    run(run_dir, which=["base"], log=quiet)
    folder = run_dir / "eval" / "base"
    judged = [
        replace(one, row=replace(one.row, judge=0.7)) if one.row.task is Task.ERI else one
        for one in read_predictions(folder / "predictions.jsonl")
    ]
    write_predictions(folder / "predictions.jsonl", judged)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["tasks"]["eri"]["judge"] = {"model": "m"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    again = run(run_dir, which=["base"], log=quiet)["base"]["tasks"]["eri"]
    assert again["metrics"]["judge"]["value"] == pytest.approx(0.7)
    assert again["judge"] == {"model": "m"}
    fresh = run(run_dir, which=["base"], fresh=True, log=quiet)["base"]["tasks"]["eri"]
    assert "judge" not in fresh and "judge" not in fresh["metrics"]


def test_answers_of_another_protocol_are_not_taken_over(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run_dir = make_run()
    run(run_dir, which=["base"], log=quiet)
    counts = count_batches(monkeypatch)
    other = resolve(run_dir, overrides=["data.give_emotion=true"], states=["base"])
    found = run_target(other, log=quiet)["base"]
    assert counts == [15] and found["protocol"]["give_emotion"] is True
    with PartWriter(run_dir / "parts", "one", 0) as writer:
        writer.write(3, [])
    assert read_parts(run_dir / "parts", "one") == {3: []}
    assert read_parts(run_dir / "parts", "two") == {}


# --- targets ---


def test_one_checkpoint_is_evaluated_beside_the_newest(make_run: MakeRun) -> None:
    config, run_dir = make_run()
    model = build_model(config.model.base, config.model, seed=config.run.seed)
    work = run_dir / ".work"
    work.mkdir()
    for step, noise in ((3, 0.0), (7, 0.5)):
        params = {
            name: value.detach() + noise * torch.ones_like(value)
            for name, value in model.named_parameters()
            if value.requires_grad
        }
        save_checkpoint(
            run_dir / "stage1" / "checkpoints",
            params=params,
            exp_avg={name: torch.zeros_like(value) for name, value in params.items()},
            exp_avg_sq={name: torch.zeros_like(value) for name, value in params.items()},
            state={"step": step},
            keep=2,
            work=work,
        )
    run(run_dir, which=["base", "stage1"], log=quiet)
    early = run_dir / "stage1" / "checkpoints" / "step_000003"
    found = run_target(resolve(early), log=quiet)
    assert list(found) == ["stage1@step_000003"]
    assert found["stage1@step_000003"]["checkpoint"] == "stage1/checkpoints/step_000003"

    def said(which: str) -> list[str]:
        path = run_dir / "eval" / which / "predictions.jsonl"
        return [one.row.response for one in read_predictions(path)]

    assert said("stage1@step_000003") == said("base") != said("stage1")
    with pytest.raises(ValueError, match="is one checkpoint; give neither"):
        resolve(early, states=["stage1"])
    loose = run_dir.parent / "loose" / "a" / "b" / "step_000003"
    shutil.copytree(early, loose)
    with pytest.raises(FileNotFoundError, match="evaluated inside its run directory"):
        resolve(loose)


def test_a_base_as_it_was_downloaded_answers_like_the_state_base(
    make_run: MakeRun, tiny_inputs: Any, tmp_path: Path
) -> None:
    _, run_dir = make_run()
    run(run_dir, which=["base"], log=quiet)
    out = tmp_path / "zero-shot"
    yaml = run_dir / "config.yaml"
    target = resolve(tiny_inputs.base, configs=[yaml], overrides=["model.base=nano"], out=out)
    assert (target.kind, target.states) == ("base", ("base",))
    run_target(target, log=quiet)
    assert file_of(out) == file_of(run_dir)
    assert resolve(out).kind == "run"  # so that `report` reads it
    with pytest.raises(ValueError, match="name its config after it"):
        resolve(tiny_inputs.base)
    with pytest.raises(ValueError, match="has no state but base"):
        resolve(tiny_inputs.base, configs=[yaml], states=["stage1"])


def test_what_cannot_be_evaluated_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    _, run_dir = make_run()
    with pytest.raises(FileNotFoundError, match="nothing to evaluate; give a run directory"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"own config\.yaml; give overrides"):
        resolve(run_dir, configs=[run_dir / "config.yaml"])
    with pytest.raises(ConfigError, match="unknown key"):
        resolve(run_dir, overrides=["evaluation.batch=3"])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"not JSON .* download the folder again"):
        resolve(broken)


def test_our_predictions_are_result_lines_and_come_back_unchanged(make_run: MakeRun) -> None:
    _, run_dir = make_run()
    run(run_dir, which=["base"], log=quiet)
    path = run_dir / "eval" / "base" / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(isinstance(line["images"], list) for line in lines)
    assert read_results(path) == read_predictions(path)
    twice = run_dir / "twice.jsonl"
    twice.write_text(path.read_text() * 2)  # two files in one: every clip would count twice
    with pytest.raises(ValueError, match=rf":{len(lines) + 1}: .* is answered on line 1 already"):
        read_results(twice)
    foreign = ("query", "response", "label", "images", "sentiment")
    outside = run_dir / "swift.jsonl"
    kept = [{name: line[name] for name in foreign} for line in lines]
    outside.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    theirs = read_results(outside)
    ours = read_predictions(path)
    assert [(o.row.task, o.row.value, o.row.reference) for o in theirs] == [
        (o.row.task, o.row.value, o.row.reference) for o in ours
    ]
    inside, without = score_results(path), score_results(outside)
    for task in ("msa", "er", "fer"):
        assert inside["tasks"][task]["metrics"] == without["tasks"][task]["metrics"]


def test_the_command_shares_the_batches_between_workers(
    make_run: MakeRun, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--processes 2`: two worker programs, which load the config as it was frozen."""
    _, alone = make_run(run="alone")
    run(alone, which=["base"], log=quiet)
    _, shared = make_run(run="shared")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["evaluate", str(shared), "--processes", "2", "--which", "base", "--json"]
    assert main(words) == 0
    metrics = json.loads(capfd.readouterr().out)["base"]
    assert metrics["answers"] == 25 and file_of(shared) == file_of(alone)
    (frozen,) = (shared / "eval" / "logs").glob("config-*.json")
    assert load_frozen(frozen).run.run_dir == shared


def test_a_worker_that_evaluates_a_target_ends_at_the_first_signal(make_run: MakeRun) -> None:
    """Every answered batch is on disk; nothing is agreed on and nothing is requeued."""
    config, run_dir = make_run()
    code = f"""
import os, signal, sys, threading
from emoverse.evaluation import evaluate
from launch import worker

def answer(*_, **__):
    os.kill(os.getpid(), signal.SIGUSR2)
    threading.Event().wait()

evaluate.run_target = answer
sys.exit(worker.main([{str(freeze_config(config, run_dir))!r}, "--evaluate-target={run_dir}"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert not (run_dir / "faults").exists() and not (run_dir / "jobs").exists()
