"""The verb `evaluate` at the front door: targets, processes, results as text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main


def results(path: Path) -> Path:
    lines: list[dict[str, Any]] = [
        {"task": "er", "response": "happy", "label": "Happy."},
        {"task": "er", "response": "Anger.", "label": "Happy."},
        {"task": "msa", "response": "1.2", "label": "Positive.", "sentiment": 2.0},
        {"task": "msa", "response": "-2", "label": "Negative.", "sentiment": -1.0},
        {"task": "ecpe", "response": "3_joy,3", "label": "3_joy,2;3_joy,3"},
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_a_result_file_is_scored_without_torch_and_beside_the_rules(tmp_path: Path) -> None:
    path = results(tmp_path / "answers.jsonl")
    code = (
        f"import sys; from launch.cli import main; main(['evaluate', {str(path)!r}, '--json']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["answers.jsonl"]
    assert found == json.loads((tmp_path / "answers.metrics.json").read_text())
    assert found["tasks"]["msa"]["metrics"]["mae"]["value"] == pytest.approx(0.9)
    assert found["tasks"]["msa"]["baselines"]["majority"]["mae"]["value"] == pytest.approx(1.5)
    assert found["tasks"]["ecpe"]["baselines"]["self+previous"]["pair_f1"]["value"] == 1.0
    assert found["versions"]["torch"] and len(found["data"]["fingerprint"]) == 64


def test_the_table_names_scores_intervals_rules_and_the_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = results(tmp_path / "answers.jsonl")
    assert main(["evaluate", str(path), "--paper", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "majority 1.000" in shown and "self+previous 1.000" in shown
    assert "undefined: stops at the answer 'happy' of line-1" in shown
    assert "1 of 2 answers are right in one way of counting only" in shown
    assert "the count of right answers starts at 83.87" in shown
    assert (tmp_path / "out" / "metrics.json").is_file()
    assert main(["evaluate", str(path), "--parser", "strict", "--json"]) == 0
    strict = json.loads(capsys.readouterr().out)["answers.jsonl"]
    assert strict["tasks"]["er"]["unparseable"] == 1 and strict["tasks"]["msa"]["unparseable"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: nothing to evaluate; give a run directory"),
        (["no.jsonl"], "no.jsonl: nothing to evaluate"),
        (["FILE", "--processes", "0"], "--processes: must be 1 or more, found 0"),
    ],
)
def test_wrong_targets_are_told_with_the_next_step(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = results(tmp_path / "answers.jsonl")
    words = [str(path) if word == "FILE" else word for word in words]
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err
