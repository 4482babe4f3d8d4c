"""The local run as a user starts it, and the small rules of the loop that need no run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from emoverse.config.schema import Config
from emoverse.training.train import step_seed
from launch.local import run_local

MakeConfig = Callable[..., Config]


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


def test_step_seeds_differ() -> None:
    seeds = {
        step_seed(seed, stage, step, rank)
        for seed in (0, 1)
        for stage in ("stage1", "stage2")
        for step in range(50)
        for rank in (0, 1)
    }
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
