"""Runs of `emoverse train` on this machine, with real processes."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.files import read_complete_lines
from emoverse.config.schema import Config
from launch.local import run_local

MakeConfig = Callable[..., Config]
Train = Callable[..., list[Any]]
AtStep = Callable[..., contextlib.AbstractContextManager[None]]


def records(config: Config, kind: str, stage: str = "stage1") -> list[dict[str, Any]]:
    lines = read_complete_lines(config.run.run_dir / stage / "metrics.jsonl")
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.promise(9)
def test_local_processes_need_no_compiler_and_are_quiet(
    tiny_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The door of `emoverse train`: two real processes, both stages, no tool in PATH."""
    home, extensions = tmp_path / "home", tmp_path / "extensions"
    for name, folder in (("HOME", home), ("TORCH_EXTENSIONS_DIR", extensions)):
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CXX", raising=False)
    config = tiny_config()
    assert run_local(config, stages=["stage1", "stage2"]) == 0
    said = capfd.readouterr()
    assert all(line.startswith(("stage1 ", "stage2 ")) for line in said.out.splitlines())
    assert said.err == ""
    assert not list(extensions.iterdir()) and not list(home.iterdir())
    logs = config.run.run_dir / "stage2" / "logs"
    shown = [line for line in said.out.splitlines() if line.startswith("stage2 ")]
    assert (logs / "rank_0.log").read_text().splitlines() == shown
    assert (logs / "rank_1.log").read_text() == ""


@pytest.mark.promise(6)
def test_local_processes_stop_together(
    tiny_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after the first log line: saved where they stand, exit code 75, no second stage."""
    config = tiny_config("stages.stage1.epochs=2000", "train.save_every=10000")
    metrics = config.run.run_dir / "stage1" / "metrics.jsonl"

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if metrics.exists() and '"interval"' in metrics.read_text():
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert run_local(config, stages=["stage1", "stage2"]) == 75
    out = capfd.readouterr().out
    step = int(out.split("stopped after step ")[1].split(";")[0])
    assert records(config, "end")[-1]["step"] == step == len(records(config, "step"))
