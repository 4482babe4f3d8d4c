"""Every YAML in configs/ loads, says what it needs, and plans against a likely index."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards.shards.index import ShardIndex
from data_shards.tasks import Task
from emoverse.config.schema import load_config, load_model, to_yaml
from emoverse.nano.pretrain_config import PretrainConfig
from emoverse.paper.tables import TABLES as PAPER_TABLES
from emoverse.paper.tables import variants
from launch.verbs.plan import make_plan, plan_text

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PRETRAIN = [path for path in sorted(CONFIGS.glob("*.yaml")) if "pretrain" in path.name]
OVERLAYS = [CONFIGS / "ablations" / f"{name}.yaml" for name in variants()]
SMALL = CONFIGS / "ablations" / "small.yaml"  # the size of all variants, not one of them
RUNS = [path for path in sorted(CONFIGS.glob("*.yaml")) if path not in PRETRAIN]

# As the corpora are: MSA and ER nearly everywhere, FER where a face is seen, few ERI entries.
SENTIMENT = (Task.MSA, Task.ER, Task.FER)
REASONS = (Task.MSA, Task.ER, Task.ERI)
CAUSES = (Task.ER, Task.ECPE)
CORPUS = {
    "nano": {(*SENTIMENT, Task.ERI): 2500, (*SENTIMENT, Task.ERI, Task.ECPE): 1500},
    "other": {SENTIMENT: 15870, (Task.MSA, Task.ER): 5150, REASONS: 4839, CAUSES: 7081},
}


def test_there_are_configs() -> None:
    names = {path.stem for path in RUNS}
    assert names >= {"nano", "emoverse_4b", "emoverse_8b", "emoverse_4b_2x3090", "debug_3090"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_config_plans(path: Path, tmp_path: Path, make_index: Callable[..., ShardIndex]) -> None:
    corpus = CORPUS.get(path.stem, CORPUS["other"])
    make_index(tmp_path / "shards", corpus, num_shards=20)
    config = load_config([path], [f"data.shards={tmp_path / 'shards'}"])
    _, plan, report = make_plan(config)
    assert set(report["stages"]) == {"stage1", "stage2"}
    for name, stage in config.stages.items():
        told = report["stages"][name]
        assert told["steps"] > 0
        assert sum(task["given"] for task in told["tasks"].values()) == told["samples_per_epoch"]
        assert sum(task["total"] for task in told["tasks"].values()) == told["samples"]
        assert plan.stages[name].at(0).task in stage.rates
    assert report["plan_fingerprint"] in plan_text(report)


def test_debugging_is_the_same_on_a_card_and_on_cpu(
    tmp_path: Path, make_index: Callable[..., ShardIndex]
) -> None:
    make_index(tmp_path / "shards", CORPUS["other"])
    card, cpu = (
        load_config([CONFIGS / f"{name}.yaml"], [f"data.shards={tmp_path / 'shards'}"])
        for name in ("debug_3090", "debug_cpu")
    )
    assert card.train == cpu.train
    assert card.train.detect_anomaly and card.train.offload == "optimizer"
    for config in (card, cpu):
        _, _, report = make_plan(config)
        assert [stage["steps"] for stage in report["stages"].values()] == [10, 10]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_config_survives_being_resolved(path: Path, tmp_path: Path) -> None:
    config = load_config([path])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize("base", ["nano", "emoverse_4b"])
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_an_ablation_is_a_few_lines_and_plans(
    overlay: Path, base: str, tmp_path: Path, make_index: Callable[..., ShardIndex]
) -> None:
    lines = [line for line in overlay.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 5
    make_index(tmp_path / "shards", CORPUS.get(base, CORPUS["other"]), num_shards=20)
    config = load_config(
        [CONFIGS / f"{base}.yaml", overlay], [f"data.shards={tmp_path / 'shards'}"]
    )
    plain = load_config([CONFIGS / f"{base}.yaml"], [f"data.shards={tmp_path / 'shards'}"])
    _, _, report = make_plan(config)
    _, _, expected = make_plan(plain)
    for name in ("stage1", "stage2"):  # the same data volume, so that rows compare
        assert report["stages"][name]["samples"] == expected["stages"][name]["samples"]


def test_the_small_set_changes_the_size_alone() -> None:
    plain, small = load_config([CONFIGS / "nano.yaml"]), load_config([CONFIGS / "nano.yaml", SMALL])
    size = ["stages.stage2.pool.rest_of=null", "train.processes=1"]
    for name, stage in small.stages.items():
        assert stage.epochs < plain.stages[name].epochs
        size += [
            f"stages.{name}.pool.take={stage.pool.take}",
            f"stages.{name}.epochs={stage.epochs}",
        ]
    size.append(f"evaluation.max_records={small.evaluation.max_records}")
    assert load_config([CONFIGS / "nano.yaml"], size) == small


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_a_pretraining_config_loads(path: Path) -> None:
    assert load_model(PretrainConfig, [path]).processes >= 1


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_config_says_how_it_is_run_and_where(path: Path) -> None:
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    text = "\n".join(lines[:end])
    assert f"configs/{path.name}" in text
    for word in ("Command:", "Hardware:", "Duration:", "Result:"):
        assert word in text, f"{path.name}: the header lacks {word}"


@pytest.mark.parametrize(
    ("name", "trainable"), [("emoverse_4b", 34_617_344), ("emoverse_8b", 54_542_336)]
)
def test_the_trainable_parameters_of_the_large_models(
    name: str, trainable: int, tmp_path: Path, make_index: Callable[..., ShardIndex]
) -> None:
    make_index(tmp_path / "shards", CORPUS["other"])
    path = CONFIGS / f"{name}.yaml"
    _, _, report = make_plan(load_config([path], [f"data.shards={tmp_path / 'shards'}"]))
    assert report["parameters"]["trainable"] == trainable


LARGE = ("emoverse_4b", "emoverse_8b", "emoverse_4b_2x3090")


def header_of(name: str) -> str:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line[1:] for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", LARGE)
def test_the_paper_s_settings_and_the_authors_(name: str) -> None:
    """The file follows the text; the overrides in its header give the defaults of the scripts."""
    config = load_config([CONFIGS / f"{name}.yaml"])
    paper, trained = config.model, list(config.stages.values())
    assert (paper.lora.preset, paper.lora.r, paper.lora.alpha) == ("paper", 8, 32)
    assert paper.projector == "full" and config.train.global_batch_size == 8
    for stage in trained:
        assert (stage.epochs, stage.shortage) == (2, "repeat")
        assert stage.optim.lr_lora == stage.optim.lr_projector == 1e-5
        assert (stage.optim.warmup, stage.optim.weight_decay, stage.optim.clip) == (0.05, 0.1, 1.0)
        assert stage.optim.betas == (0.9, 0.95)
    shares = [{str(task): str(rate) for task, rate in stage.rates.items()} for stage in trained]
    assert shares[0] == {"msa": "2/5", "er": "1/5", "fer": "2/5"}
    assert shares[1] == {"msa": "1/20", "er": "19/60", "eri": "19/60", "ecpe": "19/60"}
    overrides = re.findall(r"(?:model|stages)\.[\w.]+=\S+", header_of(name))
    overrides = [one for one in overrides if not one.startswith("model.base=")]
    assert len(overrides) == 7
    authors = load_config([CONFIGS / f"{name}.yaml"], overrides)
    assert (authors.model.lora.preset, authors.model.projector) == ("authors", "lora")
    assert (authors.model.lora.r, authors.model.lora.alpha) == (8, 32)
    assert authors.model.lora.dropout == 0.05
    assert authors.stages["stage2"].adapter == "merge"
    for stage in authors.stages.values():
        assert stage.optim.lr_lora == stage.optim.lr_projector == 1e-4


@pytest.mark.parametrize("name", LARGE)
def test_the_hours_of_the_header_are_those_of_plan(
    name: str, tmp_path: Path, make_index: Callable[..., ShardIndex]
) -> None:
    make_index(tmp_path / "shards", CORPUS["other"])
    config = load_config([CONFIGS / f"{name}.yaml"], [f"data.shards={tmp_path / 'shards'}"])
    _, _, report = make_plan(config)
    duration = header_of(name).partition("Duration:")[2].partition("the paper")[0]
    found = re.findall(r"([\d.]+) h on (one|two) (?:RTX )?(A100|H100|3090)", duration)
    assert found
    for hours, cards, card in found:
        expected = report["work"]["gpu_hours"][card] / {"one": 1, "two": 2}[cards]
        assert float(hours) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("name", LARGE)
def test_the_row_of_the_header_is_the_paper_s(name: str) -> None:
    """Its numbers stand in the transcribed tables, in the row of the right model."""
    size = "8B" if "8b" in name else "4B"
    result = header_of(name).partition("Result:")[2].partition("of this repository")[0]
    numbers = {float(number) for number in re.findall(r"\d\d\.\d\d", result)}
    printed = {
        value
        for table in PAPER_TABLES
        for row in table.rows
        if row.label == f"EmoVerse-{size}"
        for value in row.values
    }
    assert len(numbers) >= 4 and numbers <= printed, sorted(numbers - printed)
