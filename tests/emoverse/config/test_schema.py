"""The config: what loads, what it means exactly, and that its resolved form repeats it."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from data_shards.tasks import TASKS, Task
from emoverse.config import schema
from emoverse.config.errors import ConfigError
from emoverse.config.schema import (
    Config,
    freeze_config,
    from_json,
    frozen_path,
    load_config,
    load_frozen,
    to_json,
    to_yaml,
)
from emoverse.config.values import parse_rate
from emoverse.config.yaml_source import ExactFloat, resolve_scalar, split_words
from emoverse.engine import rank_faults
from emoverse.run_dir import run_lock
from launch.slurm import job_log

GOOD = Path(__file__).resolve().parents[1] / "good_config.yaml"


def load(*overrides: str) -> Config:
    return load_config([GOOD], overrides)


def test_the_values_of_a_good_config() -> None:
    config = load()
    assert config.run.run_dir == Path("runs/tiny")
    assert config.stages["stage1"].rates == {
        Task.MSA: Fraction(2, 5),
        Task.ER: Fraction(1, 5),
        Task.FER: Fraction(2, 5),
    }
    assert config.stages["stage1"].optim.lr_lora == 1e-5
    assert config.stages["stage2"].pool.rest_of == ("stage1",)
    assert list(config.evaluation.max_new_tokens) == list(TASKS)


def test_rates_keep_the_canonical_order_and_drop_zeros() -> None:
    rates = load("stages.stage1.rates={fer: 0, er: 3/5}").stages["stage1"].rates
    assert list(rates.items()) == [(Task.MSA, Fraction(2, 5)), (Task.ER, Fraction(3, 5))]


def test_later_files_and_overrides_win_from_left_to_right(tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("train: {global_batch_size: 4, zero_stage: 1}\n")
    config = load_config(
        [GOOD, more],
        ["train.zero_stage=3", "train.zero_stage=0", "stages.stage1.optim.betas=[0.5, 0.9]"],
    )
    assert (config.train.global_batch_size, config.train.zero_stage) == (4, 0)
    assert config.train.processes == 2
    assert config.stages["stage1"].optim.betas == (0.5, 0.9)
    assert config.stages["stage1"].optim.lr_lora == 1e-5


@pytest.mark.parametrize(
    "name", [rank_faults.FOLDER, job_log.JOBS, job_log.EVAL, run_lock.FOLDER, "cache"]
)
def test_no_stage_has_the_name_of_another_folder_of_the_run(name: str) -> None:
    """A stage called faults would lose its checkpoints at the next start."""
    with pytest.raises(ConfigError, match=rf"stages\.{name}: .* taken in the run directory"):
        load_config([GOOD], [f"stages={{{name}: {{}}}}"])


def test_a_path_may_hold_an_equals_sign() -> None:
    words = ["a.yaml", "run.run_dir=runs/lr=1", "runs/lr=1e-4/config.yaml", "./x=1.yaml"]
    paths, overrides = split_words(words)
    assert paths == [Path("a.yaml"), Path("runs/lr=1e-4/config.yaml"), Path("x=1.yaml")]
    assert overrides == ["run.run_dir=runs/lr=1"]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.zero_stage = 1  # type: ignore[misc]


def test_every_field_says_what_it_is() -> None:
    def fields(model: Any) -> Any:
        for name, field in model.model_fields.items():
            yield f"{model.__name__}.{name}", field.description
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation)

    for name, description in fields(Config):
        assert description and description.endswith("."), name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("010", 10),
        ("-3", -3),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("NULL", None),
        ("no", "no"),
        ("yes", "yes"),
        ("2/5", "2/5"),
        ("1_000", "1_000"),
        ("nUll", "nUll"),
        ("1e", "1e"),
        (".inf", float("inf")),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    resolved = resolve_scalar(text)
    assert resolved == value
    assert isinstance(resolved, type(value))


def test_a_rate_is_its_text_and_not_a_binary_float() -> None:
    assert parse_rate(ExactFloat("0.1")) == parse_rate(0.1) == parse_rate("1/10") == Fraction(1, 10)
    assert parse_rate(1) == 1
    with pytest.raises(ValueError, match="denominator of a rate is at most 10000"):
        parse_rate(ExactFloat("0.1000000000000000000001"))


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,12}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
positive = st.floats(1e-12, 1e3, allow_nan=False)


@st.composite
def rates(draw: st.DrawFn) -> dict[str, str]:
    parts = draw(st.lists(st.integers(0, 40), min_size=5, max_size=5).filter(any))
    return {t.value: str(Fraction(n, sum(parts))) for t, n in zip(TASKS, parts, strict=True)}


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    def stage(pool: dict[str, Any], start: str) -> dict[str, Any]:
        return {
            "pool": pool,
            "rates": draw(rates()),
            "epochs": draw(st.integers(1, 9)),
            "start_from": start,
            "optim": {"lr_lora": draw(positive), "eps": draw(positive)},
        }

    return {
        "run": {"name": draw(names), "seed": draw(st.integers(0, 2**63 - 1))},
        "model": {"base": draw(texts), "lora": {"dropout": draw(st.floats(0, 0.99))}},
        "data": {"shards": draw(texts), "workers": draw(st.integers(0, 9))},
        "stages": {
            "stage1": stage({"take": draw(st.integers(1, 10**9))}, "base"),
            "stage2": stage({"rest_of": ["stage1"]}, draw(st.sampled_from(["base", "stage1"]))),
        },
        "train": {"global_batch_size": draw(st.integers(1, 99))},
        "evaluation": {"shards": draw(texts), "max_new_tokens": {"eri": draw(st.integers(1, 9))}},
    }


@given(tree=trees())
def test_the_resolved_config_alone_is_the_same_config(
    tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = Config.model_validate(tree)
    path = tmp_path_factory.mktemp("config") / "resolved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    for again in (load_config([path]), from_json(to_json(config))):
        assert again == config
        assert to_yaml(again) == to_yaml(config)


def test_a_frozen_config_is_loaded_without_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher has checked it; workers neither walk YAML nor check it across fields."""
    config = load("stages.stage1.rates.fer=0.4")
    path = freeze_config(config, tmp_path)
    assert path == frozen_path(config, tmp_path)
    monkeypatch.setattr(schema, "load_model", lambda *_, **__: pytest.fail("must not be called"))
    assert load_frozen(path) == config
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"config-.*\.json: not a frozen config of this version"):
        load_frozen(path)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), tree=trees(), value=anything)
def test_a_value_in_the_wrong_place_is_a_config_error_or_fine(
    data: st.DataObject,
    tree: dict[str, Any],
    value: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    here: Any = tree
    while True:
        key = data.draw(st.sampled_from(sorted(here)))
        if not isinstance(here[key], dict) or not here[key] or data.draw(st.booleans()):
            here[key] = value
            break
        here = here[key]
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="rt").dump(tree, file)
    try:
        config = load_config([path])
    except ConfigError as error:
        assert all(problem.place.startswith(str(path)) for problem in error.problems)
    else:
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config([path]) == config


@given(text=st.text(max_size=40), override=st.text(max_size=30))
def test_any_text_is_a_config_error_and_nothing_else(
    text: str, override: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(ConfigError):
        load_config([path])
    with pytest.raises(ConfigError):
        load_config([GOOD], [override])
