"""The verb `ablate`: its commands, what it refuses, failures, and what it collects."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from emoverse.config.schema import Config, load_config
from launch.cli import main
from launch.subcommands import SubcommandError
from launch.verbs import ablate

NANO = str(Path(__file__).resolve().parents[3] / "configs" / "nano.yaml")


def dry(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    assert main(["ablate", NANO, *words, "--dry-run", "--json"]) == 0
    found: list[list[str]] = json.loads(capsys.readouterr().out)["commands"]
    return found


def test_the_whole_set_is_seven_runs_with_checked_configs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = dry(capsys, "run.run_dir=abl", "run.seed=4")
    assert [words[0] for words in commands] == ["train", "evaluate"] * 7
    for train, evaluate in zip(commands[::2], commands[1::2], strict=True):
        words = train[1:]
        stage = words[words.index("--stage") + 1] if "--stage" in words else None
        words = words[: words.index("--stage")] if stage else words
        config = load_config(
            [Path(w) for w in words if "=" not in w], [w for w in words if "=" in w]
        )
        assert str(config.run.run_dir) == evaluate[1] and config.run.seed == 4
        alone = {"nano-fer_low": "stage1"} | {
            f"nano-{t}_only": "stage2" for t in ["msa", "er", "ecpe"]
        }
        assert stage == alone.get(config.run.name)
        assert "base" in evaluate or "m2se" not in evaluate[1]
    ecpe = next(words for words in commands if "ecpe_only" in " ".join(words))
    config = load_config([Path(w) for w in ecpe[1:] if w.endswith(".yaml")])
    assert {str(t): str(r) for t, r in config.stages["stage2"].rates.items()} == {"ecpe": "1"}


def test_a_table_or_a_variant_alone(capsys: pytest.CaptureFixture[str]) -> None:
    seven = dry(capsys, "--table", "VII")
    assert [Path(words[1]).name for words in seven[1::2]] == ["m2se", "fer_low"]
    assert seven[0][-2:] == ["--stage", "stage1"]  # the table ends with stage 1
    assert [Path(words[1]).name for words in dry(capsys, "--variant", "t3")[1::2]] == ["t3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "m2s"], "--variant m2s: no such variant (did you mean 'm2se'?)"),
        (["--overlays", "nowhere"], "nowhere/m2se.yaml: no such overlay"),
        (["--parallel", "0"], "--parallel: must be 1 or more, found 0"),
        (["train.global_batch=3"], "unknown key"),
        (["run.run_dir=nothing-here", "--collect"], "nothing-here: no evaluated variant"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", NANO, *words]) == 2
    said = capsys.readouterr().err
    assert message in said


def test_stages_of_other_names_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(Path(NANO).read_text().replace("stage1", "first").replace("stage2", "second"))
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    (overlays / "m2se.yaml").write_text("stages: {}\n")
    words = ["ablate", str(other), "evaluation.when=base", "--variant", "m2se"]
    assert main([*words, "--overlays", str(overlays)]) == 2
    assert "the tables show the state stage1, the config has the stages" in capsys.readouterr().err


def test_a_failed_variant_leaves_the_others_alone_and_a_stop_ends_resumable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    codes = {"er_only": 1}

    def step(words: Any, **options: Any) -> None:
        line = shlex.join(words)
        ran.append(line)
        for name, code in codes.items():
            if f"/{name}.yaml" in line:
                raise SubcommandError(f"emoverse train ended with exit code {code}", code=code)

    monkeypatch.setattr(ablate, "run_subcommand", step)
    words = ["ablate", NANO, f"run.run_dir={tmp_path}", "--table", "VI"]
    assert main([*words, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["failed"] == {"er_only": "emoverse train ended with exit code 1"}
    assert sum(line.startswith("train") for line in ran) == 4
    assert sum(line.startswith("evaluate") for line in ran) == 3
    codes["er_only"] = 75
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 75


def test_the_page_names_the_variants_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(words: Any, **options: Any) -> None:
        raise SubcommandError("emoverse train ended with exit code 1", code=1)

    conditions = {"lines": [], "unequal_protocols": [], "unfinished": []}
    evaluated = {"tables": [], "effects": [], "conditions": conditions}  # of an earlier run
    monkeypatch.setattr(ablate, "ablation_json", lambda home, tables: evaluated)
    monkeypatch.setattr(ablate, "run_subcommand", step)
    assert main(["ablate", NANO, f"run.run_dir={tmp_path}", "--variant", "t3"]) == 1
    assert "t3 failed: emoverse train ended with exit code 1" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "ablations.json").read_text())["failed"]) == ["t3"]
    assert "t3 failed, its rows are missing" in (tmp_path / "ablations.html").read_text()


def test_what_variants_share_is_looked_for_before_each_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    asked: list[tuple[str, str, str]] = []  # whose, which stage, of whom

    def adopt(config: Config, stage: str, donor: Path) -> bool:
        asked.append((config.run.run_dir.name, stage, donor.name))
        if donor.name == "er_only":
            raise ValueError("its checkpoint is damaged")
        return (config.run.run_dir.name, donor.name) == ("t1", "m2se")

    monkeypatch.setattr("emoverse.run_dir.stage_reuse.reuse_stage", adopt)
    monkeypatch.setattr(ablate, "run_subcommand", lambda words, **options: ran.append(words[0]))
    words = ["ablate", NANO, f"run.run_dir={tmp_path}", "--variant", "t1", "--variant", "ecpe_only"]
    assert main(words) == 2  # nothing really ran, so there is nothing to collect
    assert ran == ["train", "evaluate"] * 2
    assert {one[:2] for one in asked} == {
        *(("t1", "stage1"), ("t1", "stage2"), ("ecpe_only", "stage2"))
    }
    assert all(who != donor for who, _, donor in asked)
    said = capsys.readouterr().err
    assert f"t1: stage1 is that of {tmp_path / 'm2se'}, not trained again" in said
    assert "stage2 is not taken from" in said and "its checkpoint is damaged" in said
    monkeypatch.setattr("emoverse.training.stage_build.is_done", lambda config, stage: True)
    ran.clear()
    assert main(words) == 2
    assert ran == ["evaluate"] * 2  # what is trained is not asked again
    for name in ("t1", "ecpe_only"):  # frozen features, in files named by their content
        assert (tmp_path / name / "cache").resolve() == (tmp_path / "cache").resolve()


def test_a_cluster_gets_one_job_array_of_the_overlays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(ablate, "run_subcommand", lambda words, **options: ran.append(list(words)))
    words = ["ablate", NANO, f"run.run_dir={tmp_path}", "--table", "VIII"]
    assert main([*words, "--cluster", "a100.yaml"]) == 0
    (launch,) = ran
    assert launch[:3] == ["launch", "a100.yaml", NANO]
    overlays = [
        Path(w).stem for w, flag in zip(launch[1:], launch, strict=False) if flag == "--variant"
    ]
    assert overlays == ["m2se", "t1", "t3"]
    assert "submitted m2se, t1, t3" in capsys.readouterr().out
