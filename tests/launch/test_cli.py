"""The command line: help, exit codes, messages, and that nothing heavy is loaded too early."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from data_shards.shards.index import ShardIndex
from data_shards.tasks import TASKS
from launch import cli
from launch.verbs import plan

ROOT = Path(__file__).resolve().parents[2]
GOOD = ROOT / "tests" / "emoverse" / "good_config.yaml"


@pytest.fixture
def shards(tmp_path: Path, make_index: Callable[..., ShardIndex]) -> Path:
    make_index(tmp_path / "shards", {TASKS: 300})
    return tmp_path / "shards"


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `emoverse WORDS`."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as end:
        code = int(str(end.code))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for verb in cli.VERBS:
        assert f"    {verb} " in out
    assert call(capsys, "--version")[1].startswith("emoverse 0.1")


@pytest.mark.parametrize(
    "verb",
    [
        *cli.VERBS,
        *("annotate fer", "annotate reasons", "build synthetic"),
        *("convert export", "convert import"),
    ],
)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *verb.split(), "--help")
    assert code == 0
    assert "usage: emoverse" in out
    if verb not in ("train", "annotate", "build", "convert", "demo"):
        assert "--json" in out


@pytest.mark.parametrize("verb", ["plan", "train", "pretrain"])
def test_the_override_in_the_help_is_a_key_of_that_verb(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(call(capsys, verb, "--help")[1].split())
    key, _, value = text.partition("overrides such as ")[2].partition(",")[0].partition("=")
    file = {"pretrain": "nano_pretrain.yaml"}.get(verb, "nano.yaml")
    tree = YAML(typ="safe").load(Path("configs", file).read_text(encoding="utf-8"))
    for part in key.split("."):
        tree = tree[part]
    assert isinstance(tree, int) and value.isdigit()


@pytest.mark.parametrize("words", [[], ["fly"], ["plan"], ["plan", "x.yaml", "--fast"]])
def test_a_wrong_command_line_ends_with_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "usage: emoverse" in err


def test_a_config_error_ends_with_2_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "plan", GOOD, "--json", "train.proceses=3", "run.seed=-1")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "emoverse plan: 2 problems in the config:",
        "  override 'run.seed=-1': run.seed: found -1: must be at least 0 "
        "(Seed of everything random: plan, initial adapters, dropout)",
        "  override 'train.proceses=3': train.proceses: found 3: unknown key "
        "(did you mean 'processes'?)",
    ]


def test_a_traceback_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "--debug", "plan", "nowhere.yaml")
    assert code == 2
    assert "Traceback" in err and "nowhere.yaml: no such file" in err


def test_overrides_need_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "plan", "run.seed=1")
    assert (code, err) == (
        2,
        "emoverse plan: a config file is needed before the overrides run.seed=1\n",
    )


def test_missing_shards_are_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "plan", GOOD, "data.shards=/nowhere", "model.base=internvl2-4b")
    assert code == 2
    assert err.startswith("emoverse plan: shard folder /nowhere: no such folder; build it with")


def test_an_unknown_stage_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "train", GOOD, "--stage", "stage3")
    assert code == 2
    assert "--stage stage3: the config has no such stage" in err


def test_a_fault_shows_its_traceback_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: object) -> int:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(plan, "run", fail)
    code, _, err = call(capsys, "plan", "a.yaml")
    assert code == 1
    assert "Traceback" in err and "RuntimeError: the disk is on fire" in err


def test_a_failing_disk_or_network_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: object) -> int:
        error = OSError(28, "No space left on device", "/runs/a/plan.json")
        error.add_note("while the plan was written")
        raise error

    monkeypatch.setattr(plan, "run", fail)
    line = (
        "emoverse plan: [Errno 28] No space left on device: '/runs/a/plan.json'; while the plan "
        "was written\n"
    )
    assert call(capsys, "plan", "a.yaml") == (1, "", line)
    code, _, err = call(capsys, "--debug", "plan", "a.yaml")
    assert code == 1 and err.startswith("Traceback") and err.endswith(line)


def test_plan_as_text_and_json(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", GOOD, f"data.shards={shards}", "model.base=internvl2-4b"]
    code, text, _ = call(capsys, *words)
    assert code == 0
    assert "trainable  28,325,888" in text
    code, out, _ = call(capsys, *words, "--json")
    report = json.loads(out)
    assert report["stages"]["stage1"]["samples"] == 200
    assert report["stages"]["stage1"]["steps"] == 25
    assert report["stages"]["stage1"]["tasks"]["msa"]["rate"] == "2/5"
    assert report["plan_fingerprint"] in text


def test_the_order_holds_every_sample_once(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = tmp_path / "new" / "order.jsonl"
    words = ["plan", GOOD, f"data.shards={shards}", "model.base=internvl2-4b", "--json"]
    _, out, _ = call(capsys, *words, "--order", order)
    lines = [json.loads(line) for line in order.read_text().splitlines()]
    for name, stage in json.loads(out)["stages"].items():
        mine = [line for line in lines if line["stage"] == name]
        assert [line["position"] for line in mine] == list(range(stage["samples"]))
        assert {line["epoch"] for line in mine} == {0, 1}
    assert set(lines[0]) == {"position", "stage", "epoch", "record", "task"}
    first = {line["record"] for line in lines if line["stage"] == "stage1"}
    second = {line["record"] for line in lines if line["stage"] == "stage2"}
    assert len(first) == 100 and len(second) == 200 and not first & second


@pytest.mark.parametrize("what", ["help", "plan", "error"])
def test_the_quick_verbs_are_quick_and_load_no_torch(
    what: str, shards: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    words = {
        "help": ["--help"],
        "plan": [
            "plan",
            str(ROOT / "configs" / "nano.yaml"),
            f"data.shards={shards}",
            "stages.stage1.pool.take=100",
        ],
        "error": ["plan", str(GOOD), "train.zero_stage=9"],
    }[what]
    code = (
        "import sys, time\nfrom launch.cli import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'transformers', 'deepspeed', 'av') if n in sys.modules])\n"
        "print(time.process_time())"
    )
    done = run_python("-c", code)
    *_, heavy, seconds = done.stdout.splitlines()
    assert heavy == "[]", done.stdout + done.stderr
    # Seconds of its own, not of the clock: other processes may be busy on the test machine.
    assert float(seconds) < 1.0


def test_the_data_verbs(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "stats", shards, "--index-only", "--json")
    assert (code, json.loads(out)["records"]) == (0, 300)
    # The tars of this folder are empty space, which lint must find: a fault, and told on stdout.
    code, out, _ = call(capsys, "lint", shards)
    assert code == 1
    assert "problem(s)" in out
    for verb in ("lint", "stats", "preview"):
        code, out, err = call(capsys, verb, "/nowhere")
        assert (code, out) == (2, "")
        assert err.startswith(f"emoverse {verb}: ") and "/nowhere" in err


def test_build_makes_a_folder_that_lint_and_preview_accept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", "synthetic", "--out", tmp_path / "shards", "--clips", 6, "--identities", 4]
    code, out, _ = call(capsys, *words, "--json")
    assert code == 0
    assert json.loads(out)
    code, out, _ = call(capsys, "lint", tmp_path / "shards", "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    code, out, _ = call(capsys, "preview", tmp_path / "shards", "-n", 2, "--json")
    assert len(json.loads(out)["records"]) == 2


def test_a_folder_that_is_no_run_is_wrong_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "report", tmp_path)
    assert code == 2
    assert "config.yaml: not found; a run directory holds" in err
