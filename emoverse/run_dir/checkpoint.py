"""Checkpoints on disk: atomic, checksummed, free of pickle, of world size and of ZeRO stage.

In: full tensors by parameter name and a JSON state. Out: one folder per checkpoint,
    checkpoints/step_000500/{trained.safetensors, optimizer.safetensors, state.json, manifest.json}
    checkpoints/latest            the name of the newest one
A folder appears under its name by one rename, after everything in it is on the disk; reading
verifies every byte and falls back to the previous checkpoint. Only what was trained is saved: no
base weights.
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
    """What a folder holds: tensors by parameter name, and the state of the training loop."""

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
    """Writes `root`/step_NNNNNN and points `latest` at it; one rank calls it, alone.

    `state["step"]` names the folder. Afterwards only the newest `keep` checkpoints remain. At any
    moment in between a crash leaves the earlier checkpoints and `latest` as they were. All is made
    in, or moved through, `work`, a folder on the same file system: if a successor has taken that
    away (see lease.py), every rename fails.

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
    if final.exists():  # a damaged one, which the run fell back from and has now reached again
        storage.rename(final, work / f"{_DISCARDED}{name}")
    storage.rename(temporary, final)
    storage.sync(root)
    storage.publish_text(root / LATEST, name + "\n", work=work)
    # Later ones than this were damaged when the run fell back; they do not count as kept.
    kept = storage.step_of(final)
    reached = [folder for folder in storage.published(root) if storage.step_of(folder) <= kept]
    for old in reached[keep:]:
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
    """Compares every file with the manifest.

    Raises:
        DamagedCheckpoint: names the file, what the manifest says and what was found.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = manifest["files"]
        found_format = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} cannot be read: {error}") from error
    if found_format != FORMAT:
        raise DamagedCheckpoint(f"{folder} has format {found_format}, this version reads {FORMAT}")
    for name in (TRAINED, OPTIMIZER, STATE):
        try:
            found = _describe(folder / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name} cannot be read: {error}") from error
        if found != expected.get(name):
            raise DamagedCheckpoint(
                f"{folder / name} differs from the manifest: "
                f"expected {expected.get(name)}, found {found}"
            )


def find_checkpoint(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose bytes are intact; None if `root` holds no checkpoint at all.

    Says through `warn` which ones it passed over, and why.

    Raises:
        DamagedCheckpoint: there are checkpoints and none is intact.
    """
    folders = storage.published(root)
    for folder in folders:
        try:
            verify_checkpoint(folder)
        except DamagedCheckpoint as damage:
            warn(f"checkpoint passed over: {damage}")
            continue
        return folder
    if folders:
        raise DamagedCheckpoint(
            f"{root}: none of {len(folders)} checkpoints is intact; restore one from a copy, or "
            "remove the folder to train this stage from its start"
        )
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Loads a folder that `find_checkpoint` returned."""
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
    """The JSON state alone, of a folder that `find_checkpoint` returned."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def load_trained(stage_dir: Path, warn: Callable[[str], None] = print) -> dict[str, Tensor]:
    """Trained weights of a stage's newest intact checkpoint: fp32 by parameter name.

    The way from a stage to the next one and to evaluation.

    Raises:
        FileNotFoundError: the stage has no checkpoint.
        DamagedCheckpoint: it has some and none is intact.
    """
    folder = find_checkpoint(stage_dir / "checkpoints", warn)
    if folder is None:
        raise FileNotFoundError(
            f"{stage_dir / 'checkpoints'} holds no checkpoint; train {stage_dir.name} first, or "
            "check run.run_dir"
        )
    return load_file(folder / TRAINED)


# Identity --------------------------------------------------------------------------------------


def check_identity(found: Mapping[str, Any], expected: Mapping[str, Any], where: Path) -> None:
    """Refuses to continue another run: both are flat {knob: value} of what decides the numbers.

    Raises:
        OtherRun: lists every knob that differs with the saved and the current value.
    """
    found_differences = differences(found, expected)
    if found_differences:
        raise OtherRun(
            f"{where} belongs to another run; a resumed run must keep what decides its numbers. "
            f"Different: {'; '.join(found_differences)}. Undo the change, or choose another "
            "run.run_dir, or give --accept-changes to go on from there all the same"
        )


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Every knob that differs, with the saved and the current value."""
    return [
        f"{knob}: saved {found.get(knob)!r}, now {expected.get(knob)!r}"
        for knob in sorted(set(found) | set(expected))
        if found.get(knob) != expected.get(knob)
    ]
