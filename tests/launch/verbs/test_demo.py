"""The verb `demo`: memory of a process tree, commands that fail, the folder."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.cli import main, parse
from launch.subcommands import SubcommandError, run_subcommand
from launch.verbs.demo import MemoryWatch, descendants, pss_bytes

ROOT = Path(__file__).resolve().parents[3]
MIB = 2**20
needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are started as `python -m launch.cli`, as `make demo` does."""
    monkeypatch.chdir(ROOT)


@contextmanager
def family(mebibytes: int) -> Iterator[tuple[int, int]]:
    """A child and a grandchild of this process; the grandchild holds some memory."""
    grandchild = "held = b'x' * int(sys.argv[1]); print(os.getpid(), flush=True); input()"
    child = textwrap.dedent(
        """
        import subprocess, sys
        sys.exit(subprocess.call([sys.executable, "-c", "import os, sys; " + sys.argv[1],
                                  sys.argv[2]]))
        """
    )
    command = [sys.executable, "-c", child, grandchild, str(mebibytes * MIB)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.communicate("\n", timeout=20)


@needs_proc
def test_descendants_are_children_and_theirs() -> None:
    own = os.getpid()
    assert own in descendants(own)
    with family(1) as (child, grandchild):
        assert {own, child, grandchild} <= descendants(own)
        assert descendants(child) == {child, grandchild}
        assert descendants(grandchild) == {grandchild}
    assert not {child, grandchild} & descendants(own)
    assert descendants(child) == set()


@needs_proc
def test_memory_is_that_of_the_whole_tree() -> None:
    with family(48) as (child, grandchild):
        assert 48 * MIB < pss_bytes(grandchild) < 96 * MIB
        assert 0 < pss_bytes(child) < 48 * MIB
        watch = MemoryWatch(every_s=0.01)
        watch.start()
        while watch.peak_bytes is None and watch.is_alive():
            time.sleep(0.01)
        together = sum(pss_bytes(pid) for pid in descendants(os.getpid()))
        peak = watch.stop()
    assert together > pss_bytes(os.getpid()) + 48 * MIB
    assert peak == pytest.approx(together, rel=0.2)
    assert pss_bytes(grandchild) == 0  # it has ended


def test_a_failing_command_is_reported_with_the_end_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "new" / "plan.log"
    with pytest.raises(SubcommandError) as caught:
        run_subcommand(["plan", str(tmp_path / "no config.yaml")], log_file=log)
    head, *tail = str(caught.value).splitlines()
    assert head == "emoverse plan ended with exit code 2"
    assert tail == log.read_text().splitlines()[-15:]
    assert any("no config.yaml: no such file" in line for line in tail)
    assert capsys.readouterr().out == f"$ emoverse plan '{tmp_path}/no config.yaml'\n"


def test_a_failing_command_without_a_log_shows_its_own_message(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SubcommandError, match=r"^emoverse plan ended with exit code 2$"):
        run_subcommand(["plan", "nowhere.yaml"])
    assert "nowhere.yaml: no such file" in capfd.readouterr().err


def test_the_output_of_a_command_goes_to_its_log(tmp_path: Path) -> None:
    run_subcommand(["--version"], log_file=tmp_path / "version.log")
    assert (tmp_path / "version.log").read_text().startswith("emoverse ")


def test_a_folder_that_is_no_demo_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"emoverse demo: {tmp_path} exists and is not a demo's folder; "
        "remove it or name another with --out\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_earlier_demo_is_replaced_and_a_failing_one_ends_with_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "demo.json").write_text("{}")
    (out / "stage1").mkdir()
    assert main(["demo", "--out", str(out), "--clips", "0"]) == 1
    error = capfd.readouterr().err
    assert "clips and identities: must be at least 1, found 0 and 2" in error
    assert "emoverse demo: emoverse build ended with exit code 2" in error
    assert [path.name for path in out.iterdir()] == ["demo.json"]
    assert json.loads((out / "demo.json").read_text())["clips"] == 0


def test_the_defaults_are_those_of_make_demo() -> None:
    args = parse(["demo"])
    assert (args.config, args.out) == (Path("configs/nano.yaml"), Path("runs/demo"))
    assert args.overrides == []
    args = parse(["demo", "--clips", "9", "stages.stage1.epochs=1"])
    assert (args.clips, args.overrides) == (9, ["stages.stage1.epochs=1"])
