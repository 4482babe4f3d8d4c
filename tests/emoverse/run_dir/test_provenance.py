"""Provenance: every launch and code change is noted; another base has another fingerprint."""

import json
import subprocess
from pathlib import Path

import pytest

from emoverse.run_dir import provenance
from emoverse.run_dir.provenance import (
    append_launch,
    base_fingerprint,
    describe_launch,
    git_state,
    uncommitted_changes,
)


def base(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_every_launch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "installed" / "provenance.py"))
    for stage in ("stage1", "stage2"):
        append_launch(tmp_path, describe_launch(stage=stage), work=tmp_path)
    launches = json.loads((tmp_path / "provenance.json").read_text())
    assert [launch["stage"] for launch in launches] == ["stage1", "stage2"]
    assert launches[0]["versions"]["torch"] and launches[0]["host"]
    assert [path.name for path in tmp_path.iterdir()] == ["provenance.json"]


def commit(folder: Path) -> None:
    (folder / "a.py").write_text("x = 1\n")
    for words in (
        ("init", "-q"),
        ("add", "-A"),
        ("-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "first"),
    ):
        subprocess.run(["git", "-C", str(folder), *words], check=True)


def test_uncommitted_changes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, run = tmp_path / "code", tmp_path / "run"
    code.mkdir()
    run.mkdir()
    commit(code)
    monkeypatch.setattr(provenance, "__file__", str(code / "a.py"))
    append_launch(run, describe_launch(stage="stage1"), work=run)
    (code / "a.py").write_text("x = 2\n")
    append_launch(run, describe_launch(stage="stage1"), work=run)
    append_launch(run, describe_launch(stage="stage2"), work=run)
    first, second, third = json.loads((run / "provenance.json").read_text())
    assert "changes" not in first and first["git"]["changed_files"] == 0
    assert second["changes"] == third["changes"] and second["git"]["changed_files"] == 1
    assert "-x = 1\n+x = 2\n" in (run / second["changes"]).read_text()
    assert len(list(run.glob("*.diff"))) == 1
    assert third["stage"] == "stage2" and third["versions"]["torch"]


def test_no_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) is None and uncommitted_changes(tmp_path) == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_a_base_is_known_by_its_content(tmp_path: Path) -> None:
    first = base_fingerprint(base(tmp_path / "a", b"123456"))
    assert base_fingerprint(base(tmp_path / "b", b"123456")) == first
    assert base_fingerprint(base(tmp_path / "c", b"123457")) != first
    (tmp_path / "b" / "provenance.json").write_text("{}")
    (tmp_path / "b" / "README.md").write_text("x")
    assert base_fingerprint(tmp_path / "b") == first


def test_large_weights_are_known_by_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "WHOLE_BYTES", 8)
    prints = {
        base_fingerprint(base(tmp_path / str(number), weights))
        for number, weights in enumerate(
            (b"abcdXXefgh", b"abcdYYefgh", b"abceXXefgh", b"abcdXXefgg")
        )
    }
    assert len(prints) == 3  # the middle is not read


def test_the_kept_changes_can_be_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they end with an empty line, and under a user's own way to show changes."""
    code, run = tmp_path / "code", tmp_path / "run"
    code.mkdir()
    run.mkdir()
    commit(code)
    (code / "a.py").write_text("x = 1\n\n")
    commit_again = ("-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qam", "second")
    for words in (
        commit_again,
        ("config", "diff.external", "echo"),
        ("config", "color.ui", "always"),
    ):
        subprocess.run(["git", "-C", str(code), *words], check=True)
    (code / "a.py").write_text("x = 2\n\n")
    monkeypatch.setattr(provenance, "__file__", str(code / "a.py"))
    append_launch(run, describe_launch(stage="stage1"), work=run)
    (patch,) = run.glob("*.diff")
    subprocess.run(["git", "-C", str(code), "apply", "--reverse", str(patch)], check=True)
    assert (code / "a.py").read_text() == "x = 1\n\n"


def test_changes_in_any_encoding_do_not_end_a_training(tmp_path: Path) -> None:
    commit(tmp_path)
    (tmp_path / "a.py").write_bytes("# caf\u00e9\n".encode("latin-1"))
    assert "+# caf\ufffd\n" in uncommitted_changes(tmp_path) + "\n"
