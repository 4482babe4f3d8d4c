"""The report of every config mistake, compared word for word with config_mistakes.txt.

Each mistake is one edit of good_config.yaml, or overrides; a changed message is reviewed by
changing the text file in the same commit.
"""

import re
from pathlib import Path

import pytest

from emoverse.config.errors import ConfigError
from emoverse.config.schema import load_config

HERE = Path(__file__).parent
GOOD = (HERE.parent / "good_config.yaml").read_text()
STAGES = GOOD[GOOD.index("stages:") : GOOD.index("train:")]
STAGE2 = STAGES[STAGES.index("  stage2:") :]
SAME = ("", "")

# (name, (a place of the good config, what stands there instead), overrides)
MISTAKES: list[tuple[str, tuple[str, str], list[str]]] = [
    ("unknown key", ("processes: 2", "proceses: 2"), []),
    ("unknown key with no near one", ("processes: 2", "gpus: 2"), []),
    ("unknown section", ("train:\n", "trian:\n"), []),
    ("key of another section", ("  base: nano", "  base: nano\n  workers: 2"), []),
    ("required key missing", ("  base: nano\n", ""), []),
    ("section missing", ("evaluation:\n  shards: shards/test\n", ""), []),
    ("section blank", ("evaluation:\n  shards: shards/test\n", "evaluation:\n"), []),
    ("key blank", ("max_tokens: 512", "max_tokens:"), []),
    ("text for a number", ("max_tokens: 512", "max_tokens: many"), []),
    ("quoted number", ("max_tokens: 512", "max_tokens: '512'"), []),
    ("fraction for a whole number", ("global_batch_size: 8", "global_batch_size: 8.5"), []),
    ("yes for a switch", ("base: nano", "base: nano\n  cache_features: yes"), []),
    ("number for a text", ("base: nano", "base: 4"), []),
    ("list for a number", ("max_tokens: 512", "max_tokens: [512]"), []),
    ("number too large", SAME, ["train.zero_stage=4"]),
    ("number too small", SAME, ["train.global_batch_size=0", "train.processes=null"]),
    ("not finite", ("1e-5", "1e-5, eps: .nan"), []),
    ("word not in the list", ("precision: fp32", "precision: fp16"), []),
    ("list too short", SAME, ["stages.stage1.optim.betas=[0.9]"]),
    ("list too long", SAME, ["stages.stage1.optim.betas=[0.9, 0.95, 0.99]"]),
    ("bad name", ("name: tiny", "name: my run"), []),
    ("bad stage name", ("stage2:\n", "Stage-2:\n"), ["evaluation.when=[base]"]),
    ("reserved stage name", ("stage2:\n", "plan:\n"), ["evaluation.when=[base]"]),
    ("no stages", (STAGES, "stages: {}\n"), ["evaluation.when=[base]"]),
    ("rates too small", SAME, ["stages.stage1.rates.er=0.1"]),
    ("rates too large", SAME, ["stages.stage1.rates.er=0.5"]),
    ("rates empty", ("rates: {msa: 2/5, er: 0.2, fer: '0.4'}", "rates: {}"), []),
    ("rates blank", ("rates: {msa: 2/5, er: 0.2, fer: '0.4'}", "rates:"), []),
    ("unknown task", ("er: 0.2", "es: 0.2"), []),
    ("rate is no number", ("er: 0.2", "er: low"), []),
    ("rate blank", ("er: 0.2", "er: ~"), []),
    ("rate above 1", ("er: 0.2", "er: 20"), []),
    ("rate over nothing", ("er: 0.2", "er: 1/0"), []),
    (
        "rates without a common denominator",
        (
            "rates: {msa: 2/5, er: 0.2, fer: '0.4'}",
            "rates: {msa: 3000/8633, er: 3052/9797, fer: 3065/8989}",
        ),
        [],
    ),
    ("rate too fine", ("er: 0.2", "er: 0.20001"), []),
    ("pool with both keys", ("pool: {rest_of: stage1}", "pool: {rest_of: stage1, take: 9}"), []),
    ("pool with neither key", ("{take: 100}", "{rest_of: []}"), []),
    ("rest of a later stage", ("take: 100", "rest_of: stage2"), []),
    ("rest of an unknown stage", ("rest_of: stage1", "rest_of: [stage1, stage3]"), []),
    ("start from an unknown stage", ("start_from: stage1", "start_from: stag1"), []),
    ("start from itself", ("start_from: stage1", "start_from: stage2"), []),
    ("start from a later stage", ("take: 100}", "take: 100}\n    start_from: stage2"), []),
    (
        "cached features with workers",
        ("base: nano", "base: nano\n  cache_features: true"),
        [],
    ),
    (
        "cached features of tiles",
        ("base: nano", "base: nano\n  cache_features: true"),
        ["data.workers=0", "data.peak_tiles=6"],
    ),
    ("frames of earlier turns", ("max_tokens: 512", "max_tokens: 512\n  history_frames: 8"), []),
    ("pack below sample", ("max_tokens: 512", "max_tokens: 512\n  pack_tokens: 256"), []),
    ("more processes than samples", SAME, ["train.processes=9"]),
    ("ZeRO-0 in bf16", SAME, ["train.zero_stage=0", "model.precision=bf16"]),
    ("offloading at the wrong stage", SAME, ["train.zero_stage=1", "train.offload=optimizer"]),
    ("offloading weights that are whole", SAME, ["train.zero_stage=2", "train.offload=all"]),
    ("flash attention in fp32", ("precision: fp32", "precision: fp32\n  attention: flash"), []),
    ("custom adapters without targets", ("lora: {r: 4}", "lora: {preset: custom}"), []),
    ("targets without custom", ("lora: {r: 4}", "lora: {targets: o_proj}"), []),
    ("authors without projector adapters", ("lora: {r: 4}", "lora: {preset: authors}"), []),
    ("scored state unknown", SAME, ["evaluation.when=[base, stage3]"]),
    ("default scored state missing", (STAGE2, ""), []),
    ("key twice", ("  processes: 2", "  processes: 2\n  global_batch_size: 9"), []),
    ("anchor", ("lora: {r: 4}", "lora: &lora {r: 4}"), []),
    ("tag", ("base: nano", "base: !env BASE"), []),
    ("tab", ("  base: nano", "\tbase: nano"), []),
    ("open bracket", ("{take: 100}", "{take: 100"), []),
    ("not a mapping", (GOOD, "- one\n- two\n"), []),
    ("override without value", SAME, ["train.processes"]),
    ("override without key", SAME, ["train.=3"]),
    ("override with broken value", SAME, ["train.processes={1"]),
    ("override of an unknown key", SAME, ["train.proceses=3"]),
    ("override of an unknown stage", SAME, ["stages.stag1.epochs=3"]),
    ("override below a value", SAME, ["train.processes.most=3"]),
    ("override beyond a list", SAME, ["evaluation.when=[base]", "evaluation.when.3=stage1"]),
]


def read_reports() -> dict[str, str]:
    blocks = re.split(r"^## (.*)\n", (HERE / "config_mistakes.txt").read_text(), flags=re.M)[1:]
    return dict(zip(blocks[::2], blocks[1::2], strict=True))


def report(edit: tuple[str, str], overrides: list[str]) -> str:
    """The problems of the edited config, without the line that counts them."""
    assert edit == SAME or GOOD.count(edit[0]) == 1, edit
    Path("c.yaml").write_text(GOOD.replace(*edit) if edit != SAME else GOOD)
    with pytest.raises(ConfigError) as caught:
        load_config([Path("c.yaml")], overrides)
    return "".join(f"{problem}\n" for problem in caught.value.problems)


@pytest.mark.parametrize(("name", "edit", "overrides"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_the_report_of_a_mistake(
    name: str,
    edit: tuple[str, str],
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(edit, overrides) == read_reports()[name]


def test_every_report_belongs_to_a_mistake() -> None:
    assert list(read_reports()) == [name for name, _, _ in MISTAKES]


def test_all_problems_come_at_once_in_the_order_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(GOOD.replace("er: 0.2", "er: 0.3").replace("base: nano", "bse: nano"))
    Path("more.yaml").write_text("train: {zero_stage: 7}\ndata: {pack_tokens: 100}\n")
    with pytest.raises(ConfigError) as caught:
        load_config([Path("c.yaml"), Path("more.yaml")], ["train.processes=20", "oops"])
    lines = str(caught.value).split("\n")
    assert lines[0] == "7 problems in the config:"
    assert [re.split(r": ", line.strip())[:2] for line in lines[1:]] == [
        ["c.yaml:2", "model.base"],
        ["c.yaml:3", "model.bse"],
        ["c.yaml:12", "stages.stage1.rates"],
        ["more.yaml:1", "train.zero_stage"],
        ["more.yaml:2", "data.pack_tokens"],
        ["override 'oops'", "an override is KEY.KEY=VALUE, for example train.processes=2"],
        ["override 'train.processes=20'", "train.processes"],
    ]


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nano.yaml").write_text(GOOD)
    Path("latin.yaml").write_bytes(b"run: {name: \xe9}")
    with pytest.raises(ConfigError) as caught:
        load_config([Path("nanno.yaml"), Path("latin.yaml"), tmp_path])
    assert str(caught.value).split("\n  ")[1:] == [
        "nanno.yaml: no such file; relative paths start at the working directory "
        "(did you mean 'nano.yaml'?)",
        "latin.yaml: cannot be read: 'utf-8' codec can't decode byte 0xe9 in position 12: "
        "invalid continuation byte",
        f"{tmp_path}: a config is a YAML file, not a folder",
    ]


def test_an_empty_file_lacks_every_section(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / "empty.yaml"])
    missing = [problem.path for problem in caught.value.problems]
    sections = ("run", "model", "data", "stages", "train", "evaluation")
    assert missing == [(section,) for section in sections]
