"""The progress bar: on a terminal only, below the lines, from the metrics file alone."""

import io
import json
import os
import pty
from pathlib import Path
from typing import Any

import pytest

from launch import progress
from launch.progress import Screen, StageProgress, bar_text, stage_screen


def write(path: Path, *records: dict[str, Any], mode: str = "a") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


START = {"kind": "start", "num_steps": 40, "step": 0}


def test_how_far_a_stage_is(tmp_path: Path) -> None:
    path = tmp_path / "stage1" / "metrics.jsonl"
    bar = StageProgress(path)
    assert bar.text(200) == ""
    path.parent.mkdir()
    write(path, START)
    assert bar.text(200) == ""
    write(path, {"kind": "step", "step": 10, "loss": 1.5})
    assert bar.text(200) == f"stage1 [{'#' * 7}{'-' * 23}] 10/40 25.0% loss 1.50"
    write(path, {"kind": "interval", "step": 20, "loss": 1.25, "eta_s": 3725})
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 21, "lo')
    assert bar.text(200).endswith("] 20/40 50.0% loss 1.25 eta 1h02m")
    with path.open("a") as file:
        file.write('ss": 1.0}\n')
    assert " 21/40 " in bar.text(200) and len(bar.text(30)) == 29
    write(path, {"kind": "end", "step": 40})
    assert bar.text(200) == ""


def test_a_resumed_stage_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "stage1.jsonl"
    bar = StageProgress(path)
    write(path, START, {"kind": "step", "step": 30, "loss": 1.0})
    assert " 30/40 " in bar.text(99)
    other = tmp_path / "new"
    write(other, START, {"kind": "step", "step": 20, "loss": 1.0})
    other.replace(path)
    assert " 20/40 " in bar.text(99)


def test_lines_stay_above_the_bar() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    screen.line("one\n")
    screen.status("bar")
    screen.status("bar")  # not drawn twice
    screen.line("two\n")
    screen.status("")
    assert stream.getvalue() == "one\n\r\x1b[Kbar\r\x1b[Ktwo\nbar\r\x1b[K"


def test_no_bar_in_a_log(tmp_path: Path) -> None:
    stream = io.StringIO()
    write(tmp_path / "m", START, {"kind": "step", "step": 30, "loss": 1.0})
    with stage_screen(tmp_path / "m", stream) as screen:
        screen.line("text\n")
    assert stream.getvalue() == "text\n"


@pytest.mark.timeout(120)  # a bar that is not drawn, or not removed, never ends the reading
def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PERIOD_S", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    write(tmp_path / "m", START, {"kind": "step", "step": 30, "loss": 1.0})
    parent, child = pty.openpty()
    found = ""
    with os.fdopen(child, "w") as terminal:
        with stage_screen(tmp_path / "m", terminal) as screen:
            screen.line("text\n")
            while "loss" not in found:  # the terminal hands over what was written piece by piece
                found += os.read(parent, 10_000).decode()
        while not found.endswith("\r\x1b[K"):
            found += os.read(parent, 10_000).decode()
    os.close(parent)
    assert "text\r\n" in found and "] 30/40 75.0% loss" in found


def test_the_bar_is_full_at_the_end() -> None:
    assert "#" * progress.WIDTH in bar_text({"name": "s", "step": 5, "num_steps": 5, "loss": 0.0})
