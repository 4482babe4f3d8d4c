"""Checkpoints: what is saved comes back, a damaged one never does, another run's is refused."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emoverse.run_dir import storage
from emoverse.run_dir.checkpoint import (
    DamagedCheckpoint,
    OtherRun,
    check_identity,
    find_checkpoint,
    load_trained,
    read_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "llm.layer.0.lora_A": torch.randn(3, 5, generator=generator),
        "projector.bias": torch.randn(4, generator=generator),
    }


def save(root: Path, step: int, *, keep: int = 3, **state: Any) -> Path:
    return save_checkpoint(
        root,
        params=tensors(step),
        exp_avg=tensors(step + 1),
        exp_avg_sq=tensors(step + 2),
        state={"step": step, **state},
        keep=keep,
        work=work_folder(root),
    )


def work_folder(root: Path) -> Path:
    work = root.parent / f"{root.name}-work"
    work.mkdir(parents=True, exist_ok=True)
    return work


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def silent(message: str) -> None:
    pytest.fail(f"unexpected warning: {message}")


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 7, consumed=112, quarantine=[3, 5], lineage=["base", "stage1"])
    assert names(folder) == sorted(
        ["trained.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    )
    assert (tmp_path / "latest").read_text() == "step_000007\n"
    assert find_checkpoint(tmp_path, silent) == folder
    loaded = read_checkpoint(folder)
    assert loaded.step == 7
    assert loaded.state["quarantine"] == [3, 5]
    for found, seed in ((loaded.params, 7), (loaded.exp_avg, 8), (loaded.exp_avg_sq, 9)):
        expected = tensors(seed)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["latest", "step_000006", "step_000008"]


@pytest.mark.promise(3)
def test_a_damaged_later_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """A run that fell back from step 9 keeps two it can load, and replaces the damaged one."""
    for step in (2, 4, 9):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_000009" / "state.json").write_text("{}")
    save(tmp_path, 6, keep=2)
    save(tmp_path, 7, keep=2)
    assert names(tmp_path) == ["latest", "step_000006", "step_000007", "step_000009"]
    save(tmp_path, 9, keep=2)
    assert names(tmp_path) == ["latest", "step_000007", "step_000009"]
    assert find_checkpoint(tmp_path, silent) == tmp_path / "step_000009"


@pytest.mark.promise(3)
def test_a_copy_beside_them_is_none_of_ours(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 2), tmp_path / "step_000002.bak")
    (tmp_path / "step_best").mkdir()
    newest = save(tmp_path, 4, keep=1)
    assert find_checkpoint(tmp_path, silent) == newest
    assert names(tmp_path) == ["latest", "step_000002.bak", "step_000004", "step_best"]


def test_steps_beyond_six_digits_are_in_order(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        newest = save(tmp_path, step, keep=1)
    assert find_checkpoint(tmp_path, silent) == newest
    assert names(tmp_path) == ["latest", "step_1000000"]


def test_a_file_system_without_sync_of_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "fsync", fsync)
    storage.sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        storage.sync(tmp_path / "file")


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "absent", silent) is None


@pytest.mark.promise(3)
@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_falls_back_to_the_previous(tmp_path: Path, file: str, damage: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    content = bytearray((bad / file).read_bytes())
    if damage == "remove":
        (bad / file).unlink()
    elif damage == "cut":
        (bad / file).write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        (bad / file).write_bytes(content)
    said: list[str] = []
    assert find_checkpoint(tmp_path, said.append) == good
    assert len(said) == 1 and f"skipped: {bad / file}" in said[0]


@pytest.mark.parametrize("text", ["", "[]", '{"files": {}}', '{"format": 99, "files": {}}'])
def test_a_bad_manifest_is_damage(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json cannot be read|has format 99"):
        verify_checkpoint(folder)
    with pytest.raises(DamagedCheckpoint, match=r"none of 1 checkpoints is intact; restore one"):
        find_checkpoint(tmp_path, lambda message: None)


@pytest.mark.parametrize("call", ["write_tensors", "sync", "publish_text"])
def test_a_crash_while_saving_keeps_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    good = save(tmp_path, 1)

    def crash(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, call, crash)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    found = find_checkpoint(tmp_path, silent)
    # Once renamed the new one is whole; only the pointer for humans is then behind.
    assert found == (tmp_path / "step_000002" if call == "publish_text" else good)
    save(tmp_path, 3)
    assert not names(work_folder(tmp_path))


@pytest.mark.promise(3)
def test_everything_is_on_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd)
    )
    monkeypatch.setattr(
        Path, "rename", lambda self, to: events.append("RENAME") or rename(self, to)
    )
    save(tmp_path, 1)
    before = [Path(event).name for event in events[: events.index("RENAME")]]
    assert set(before) == {
        "trained.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
        "saving-step_000001",
    }
    assert events[events.index("RENAME") + 1] == str(tmp_path)


def test_a_damaged_step_can_be_reached_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    (bad / "state.json").write_text("{}")
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path, silent) == bad
    assert names(tmp_path) == ["latest", "step_000001", "step_000002"]


def test_trained_weights_of_a_stage(tmp_path: Path) -> None:
    stage = tmp_path / "stage1"
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint; train stage1 first"):
        load_trained(stage)
    save(stage / "checkpoints", 5)
    assert torch.equal(load_trained(stage)["projector.bias"], tensors(5)["projector.bias"])


def test_a_state_that_json_cannot_hold_exactly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path, 1, loss=float("nan"))


@pytest.mark.promise(4)
def test_another_run_is_refused_with_every_difference(tmp_path: Path) -> None:
    saved = json.loads(json.dumps({"plan": "abc", "optim.lr_lora": 1e-5, "model.base": "x"}))
    check_identity(saved, dict(saved), tmp_path)
    now = {"plan": "abc", "optim.lr_lora": 2e-5, "train.loss": "token", "model.base": "x"}
    with pytest.raises(OtherRun) as refused:
        check_identity(saved, now, tmp_path)
    text = str(refused.value)
    assert "optim.lr_lora: saved 1e-05, now 2e-05; train.loss: saved None, now 'token'" in text
    assert "plan" not in text.split("Different")[1]
    assert text.endswith("or give --accept-changes to continue anyway")
