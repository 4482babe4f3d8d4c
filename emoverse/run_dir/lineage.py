"""From one stage to the next, to evaluation and export: which weights, and are they the right ones?

In: the config and the stage folders of a run. Out: the adapters that rebuild the base of a stage,
and labels with the hash of what was handed over; a stage that was trained again after its successor
started is found by them.
"""

import json
from collections.abc import Callable
from pathlib import Path

from emoverse.config.schema import Config
from emoverse.models.merge import Adapter
from emoverse.run_dir.checkpoint import (
    MANIFEST,
    TRAINED,
    OtherRun,
    find_checkpoint,
    load_trained,
    read_state,
)
from emoverse.training.stages import BASE, DONE, merged_into

NATIVE = "native."  # where EmoVerse keeps the model whose names the base and PEFT use


def handed_over(stage_folder: Path) -> Path:
    """The checkpoint that a finished stage hands over: its last one, intact.

    Raises:
        FileNotFoundError: it has none.
        OtherRun: its last one is damaged or gone, so that only an earlier one is left.
    """
    folder = find_checkpoint(stage_folder / "checkpoints", lambda message: None)
    if folder is None:
        raise FileNotFoundError(
            f"{stage_folder / 'checkpoints'} holds no checkpoint, so {stage_folder.name} has "
            f"nothing to hand over; restore it or train {stage_folder.name} again"
        )
    marker = stage_folder / DONE
    last = json.loads(marker.read_text())["checkpoint"] if marker.is_file() else folder.name
    if folder.name != last:
        raise OtherRun(
            f"{stage_folder.name} was finished with {last}, but the newest intact checkpoint is "
            f"{folder.name}; restore {stage_folder / 'checkpoints' / last} from a copy, or remove "
            f"{marker} and train the rest of {stage_folder.name} again"
        )
    return folder


def label_of(checkpoint: Path) -> str:
    """Stage, step and hash of the trained weights: what a lineage is made of."""
    digest = json.loads((checkpoint / MANIFEST).read_text())["files"][TRAINED]["sha256"]
    return f"{checkpoint.parent.parent.name} {checkpoint.name} {digest[:16]}"


def adapters_below(
    config: Config, stage: str, run_dir: Path, warn: Callable[[str], None] = print
) -> list[Adapter]:
    """The adapters that are merged into the base which `stage` trains, the first stage first.

    Where the stage itself has checkpoints, they must have been trained on exactly these.

    Raises:
        FileNotFoundError, OtherRun: an earlier stage is missing, or was trained again since.
    """
    names = merged_into(config, stage) if stage != BASE else ()
    found = [handed_over(run_dir / name) for name in names]
    own = find_checkpoint(run_dir / stage / "checkpoints", warn) if names else None
    if own is not None:
        trained_on = read_state(own)["identity"].get("merged", [])
        now = [label_of(folder) for folder in found]
        if trained_on != now:
            raise OtherRun(
                f"{own} was trained on {trained_on} merged into the base, but the run directory "
                f"now holds {now}; restore those checkpoints, or train {stage} again"
            )
    return [read_stage_adapter(config, run_dir / name) for name in names]


def adapters_below_checkpoint(config: Config, checkpoint: Path) -> list[Adapter]:
    """`adapters_below` for the stage of a checkpoint folder, in its own run directory."""
    stage, run_dir = checkpoint.parents[1].name, checkpoint.parents[2]
    return adapters_below(config, stage, run_dir) if stage in config.stages else []


def read_stage_adapter(config: Config, stage_folder: Path) -> Adapter:
    """What a stage has trained, ready to be merged."""
    tensors = load_trained(stage_folder)
    return Adapter(
        tensors={name.removeprefix(NATIVE): value for name, value in tensors.items()},
        scale=config.model.lora.alpha / config.model.lora.r,
        origin=str(stage_folder),
    )
