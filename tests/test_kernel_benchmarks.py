"""The kernel benchmarks run, and what does not depend on the machine holds its goals."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emoverse.kernels.attention import configure_attention
from emoverse.kernels.backend import configure_kernels, has_triton

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """`run("activations", "--tokens", "32")` -> the JSON that the script prints."""
    for folder in ("benchmarks", "benchmarks/kernels"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    before = set(sys.modules)

    def call(name: str, *arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", [name, "--json", *arguments])
        assert importlib.import_module(name).main() == 0
        return json.loads(capsys.readouterr().out)

    yield call
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    configure_attention("auto")
    configure_kernels("auto")


@pytest.mark.parametrize(
    "arguments",
    [("--sizes", "tiny", "--tokens", "32"), pytest.param((), marks=pytest.mark.aot)],
    ids=["tiny", "eighths"],
)
def test_activations(run: Any, arguments: tuple[str, ...]) -> None:
    figures = run("activations", *arguments)
    assert figures["ratio"] <= 0.45
    if has_triton():
        assert figures["kernels"] == "lean, Triton"
        assert figures["operations_ratio"] <= 1 / 3


def test_step(run: Any) -> None:
    figures = run("step", "--sizes", "tiny", "--tokens", "60", "--repeats", "1")
    ways = [row["way"] for row in figures["rows"]]
    assert ways[0] == "transformers + PEFT, checkpointing"
    assert ways[-1] == "lean layers, supervised rows" or len(ways) > 6
    assert all(row["seconds"] > 0 for row in figures["rows"])
    assert figures["times baseline, tiny"] > 0 and figures["times best peer, tiny"] > 0


@pytest.mark.parametrize("name", ["attention", "loss", "lora", "norm", "rope", "swiglu"])
def test_small(run: Any, name: str) -> None:
    # All logits of the full vocabulary take a CPU minutes.
    sizes = ("--sizes", "tiny") if name == "loss" else ()
    figures = run(name, "--tokens", "16", "--repeats", "1", *sizes)
    assert "machine" in figures and figures["rows"]
