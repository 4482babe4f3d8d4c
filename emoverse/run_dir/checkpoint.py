"""Checkpoints on disk: atomic, with checksums, without pickle, for any world size and ZeRO stage.

In: full tensors by parameter name and a JSON state. Out: one folder per checkpoint,
    checkpoints/step_000500/{trained.safetensors, optimizer.safetensors, state.json, manifest.json}
    checkpoints/latest            the name of the newest one
A folder gets its name by one rename, after everything in it is on disk. Reading verifies every
byte and falls back to the previous checkpoint. Only trained parameters are saved, no base weights.
`StageRun.save` in training/stage_run.py makes the JSON state.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from emoverse.run_dir import storage

FORMAT = 1
MANIFEST = "manifest.json"
TRAINED = "trained.safetensors"  # master weights, fp32, by parameter name
OPTIMIZER = "optimizer.safetensors"  # "exp_avg.<parameter>" and "exp_avg_sq.<parameter>", fp32
STATE = "state.json"
LATEST = "latest"
_TEMPORARY, _DISCARDED = "saving-", "discarded-"


class DamagedCheckpoint(ValueError):
    """A checkpoint folder is incomplete or its bytes differ from its manifest."""


class OtherRun(ValueError):
    """The checkpoint belongs to a run with other data, settings or base model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Content of a checkpoint folder: tensors by parameter name, state of the training loop."""

    path: Path
    params: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimiser steps done."""
        return int(self.state["step"])


# Writing ---------------------------------------------------------------------------------------


def save_checkpoint(
    root: Path,
    *,
    params: Mapping[str, Tensor],
    exp_avg: Mapping[str, Tensor],
    exp_avg_sq: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    work: Path,
) -> Path:
    """Write `root`/step_NNNNNN and point `latest` at it; called by one rank.

    `state["step"]` names the folder. Afterwards only the newest `keep` checkpoints remain. A crash
    at any moment leaves the earlier checkpoints and `latest` unchanged. Everything is written to,
    or moved through, `work`, a folder on the same file system: after a takeover (run_lock.py)
    that folder is gone and every rename fails.

    Raises:
        OSError: the disk is full or not writable; nothing that existed is lost.
    """
    name = storage.step_name(int(state["step"]))
    final, temporary = root / name, work / f"{_TEMPORARY}{name}"
    if not root.exists():
        root.mkdir(parents=True)
        storage.sync(root.parent)
    _remove_leftovers(work)
    storage.make_folder(temporary)
    storage.write_tensors(temporary / TRAINED, params)
    moments = {f"exp_avg.{key}": value for key, value in exp_avg.items()}
    moments |= {f"exp_avg_sq.{key}": value for key, value in exp_avg_sq.items()}
    storage.write_tensors(temporary / OPTIMIZER, moments)
    storage.write_text(temporary / STATE, _to_json(state))
    files = {file: _describe(temporary / file) for file in (TRAINED, OPTIMIZER, STATE)}
    storage.write_text(temporary / MANIFEST, _to_json({"format": FORMAT, "files": files}))
    for file in (*files, MANIFEST):
        storage.sync(temporary / file)
    storage.sync(temporary)
    if final.exists():  # damaged: the run fell back from it and has now reached its step again
        storage.rename(final, work / f"{_DISCARDED}{name}")
    storage.rename(temporary, final)
    storage.sync(root)
    storage.publish_text(root / LATEST, name + "\n", work=work)
    # Checkpoints of later steps were damaged when the run fell back; they do not count as kept.
    step = storage.step_of(final)
    valid = [folder for folder in storage.published(root) if storage.step_of(folder) <= step]
    for old in valid[keep:]:
        storage.rename(old, work / f"{_DISCARDED}{old.name}")
    _remove_leftovers(work)
    return final


def _remove_leftovers(work: Path) -> None:
    for leftover in (*work.glob(f"{_TEMPORARY}*"), *work.glob(f"{_DISCARDED}*")):
        storage.remove(leftover)


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


# Reading ---------------------------------------------------------------------------------------


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedCheckpoint: names the file, the manifest's values and the actual ones.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = manifest["files"]
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} cannot be read: {error}") from error
    if version != FORMAT:
        raise DamagedCheckpoint(f"{folder} has format {version}, this version reads {FORMAT}")
    for name in (TRAINED, OPTIMIZER, STATE):
        try:
            actual = _describe(folder / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name} cannot be read: {error}") from error
        if actual != expected.get(name):
            raise DamagedCheckpoint(
                f"{folder / name} differs from the manifest: "
                f"expected {expected.get(name)}, found {actual}"
            )


def find_checkpoint(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint; None if `root` holds no checkpoint at all.

    `warn` is called for every damaged one.

    Raises:
        DamagedCheckpoint: there are checkpoints and none is intact.
    """
    folders = storage.published(root)
    for folder in folders:
        try:
            verify_checkpoint(folder)
        except DamagedCheckpoint as damage:
            warn(f"damaged checkpoint skipped: {damage}")
            continue
        return folder
    if folders:
        raise DamagedCheckpoint(
            f"{root}: none of {len(folders)} checkpoints is intact; restore one from a copy, or "
            "remove the folder to train this stage from its start"
        )
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Load a folder that `find_checkpoint` returned."""
    moments = load_file(folder / OPTIMIZER)
    by_kind = {
        kind: {
            key.removeprefix(f"{kind}."): value
            for key, value in moments.items()
            if key.startswith(f"{kind}.")
        }
        for kind in ("exp_avg", "exp_avg_sq")
    }
    params = load_file(folder / TRAINED)
    return Checkpoint(path=folder, params=params, state=read_state(folder), **by_kind)


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a folder that `find_checkpoint` returned."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def load_trained(stage_dir: Path, warn: Callable[[str], None] = print) -> dict[str, Tensor]:
    """Trained weights of a stage's newest intact checkpoint: fp32 by parameter name.

    Raises:
        FileNotFoundError: the stage has no checkpoint.
        DamagedCheckpoint: none of its checkpoints is intact.
    """
    folder = find_checkpoint(stage_dir / "checkpoints", warn)
    if folder is None:
        raise FileNotFoundError(
            f"{stage_dir / 'checkpoints'} holds no checkpoint; train {stage_dir.name} first, or "
            "check run.run_dir"
        )
    return load_file(folder / TRAINED)


# Identity --------------------------------------------------------------------------------------


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any], where: Path) -> None:
    """Refuse to continue another run. Both are flat {knob: value} of what decides the numbers.

    Raises:
        OtherRun: lists every knob that differs with the saved and the current value.
    """
    changes = differences(saved, current)
    if changes:
        raise OtherRun(
            f"{where} belongs to another run; a resumed run must keep what decides its numbers. "
            f"Different: {'; '.join(changes)}. Undo the change, choose another run.run_dir, or "
            "give --accept-changes to continue anyway"
        )


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Every knob that differs, with the saved and the current value."""
    return [
        f"{knob}: saved {saved.get(knob)!r}, now {current.get(knob)!r}"
        for knob in sorted(set(saved) | set(current))
        if saved.get(knob) != current.get(knob)
    ]
