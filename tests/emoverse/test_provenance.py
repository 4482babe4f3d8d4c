"""Provenance: every launch is noted, and another base has another fingerprint."""

import json
from pathlib import Path

import pytest

from emoverse import provenance
from emoverse.provenance import append_launch, base_fingerprint, describe_launch, git_state


def base(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_every_launch_is_kept(tmp_path: Path) -> None:
    for stage in ("stage1", "stage2"):
        append_launch(tmp_path, describe_launch(stage=stage))
    launches = json.loads((tmp_path / "provenance.json").read_text())
    assert [launch["stage"] for launch in launches] == ["stage1", "stage2"]
    assert launches[0]["versions"]["torch"] and launches[0]["host"]
    assert [path.name for path in tmp_path.iterdir()] == ["provenance.json"]


def test_no_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) is None
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
