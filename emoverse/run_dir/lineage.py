"""Which weights a stage starts from, and whether they are the right ones.

In: the config, the stage folders of a run. Out: weights for training, evaluation and export.

Where the trained weights of a stage come from:
  1. its own newest checkpoint when the stage is resumed: weights and optimiser moments;
  2. else the last checkpoint of the stage in `start_from`: adapters and projector, or, with
     `adapter: merge`, the projector alone, because the adapters are merged into the base;
  3. else, with `start_from: base`, new adapters and the projector of the base.
The base is read with the adapters of all merged stages added to it (`adapters_below`). Labels
contain a hash of the weights, so a stage that was trained again after its successor is detected.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emoverse.config.schema import Config, LoraSection, StageSection
from emoverse.engine.step_types import TrainedState
from emoverse.models.merge import Adapter
from emoverse.run_dir.checkpoint import (
    MANIFEST,
    TRAINED,
    OtherRun,
    find_checkpoint,
    load_trained,
    read_checkpoint,
    read_state,
)
from emoverse.training.stages import BASE, DONE, merged_into

if TYPE_CHECKING:  # it imports deepspeed, which other users of this module do not need
    from emoverse.engine.deepspeed_engine import Engine

NATIVE = "native."  # where EmoVerse keeps the model whose names the base and PEFT use


def load_starting_weights(
    engine: "Engine",
    section: StageSection,
    *,
    resume_from: Path | None,
    parent: Path | None,
    log: Callable[[str], None],
) -> None:
    """Set the trained weights, and the moments where they continue; collective.

    `section`: of the stage that starts. `resume_from`: a checkpoint of this stage, if it is
    resumed. `parent`: folder of the stage that it starts from, None for the base.
    """
    if resume_from is not None:
        engine.import_state(_trained_state(resume_from))
    elif parent is not None and section.optimizer == "continue":
        engine.import_state(_trained_state(handed_over(parent)))
    elif parent is not None:
        trained = load_trained(parent, log)
        if section.adapter == "merge":
            from emoverse.models.adapters import is_lora  # peft: slow for other users of labels

            # The projector continues from its fp32 master weights, not from their rounded copy in
            # the base.
            projector = {name: value for name, value in trained.items() if not is_lora(name)}
            engine.import_params(projector, some=True)
        else:
            engine.import_params(trained)


def _trained_state(folder: Path) -> TrainedState:
    saved = read_checkpoint(folder)
    return TrainedState(
        params=saved.params,
        exp_avg=saved.exp_avg,
        exp_avg_sq=saved.exp_avg_sq,
        updates=int(saved.state["updates"]),
    )


def handed_over(stage_folder: Path) -> Path:
    """The checkpoint that a finished stage hands over: its last one, intact.

    Raises:
        FileNotFoundError: there is no checkpoint.
        OtherRun: the last one is damaged or missing, and only an earlier one is left.
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
    """Stage, step and hash of the trained weights: `stage1 step_000500 0123456789abcdef`."""
    digest = json.loads((checkpoint / MANIFEST).read_text())["files"][TRAINED]["sha256"]
    return f"{checkpoint.parent.parent.name} {checkpoint.name} {digest[:16]}"


def require_same_parent(run_dir: Path, stage: str, start_from: str) -> None:
    """Check that a finished stage started from the weights that `start_from` holds now.

    Nothing is compared where either stage has lost its checkpoints, for example to free space.

    Raises:
        OtherRun: `start_from` has been trained again since.
    """
    if start_from == BASE:
        return
    try:
        own, parent = (_last_checkpoint(run_dir / name) for name in (stage, start_from))
        trained_on, now = read_state(own)["identity"]["start"], label_of(parent)
    except FileNotFoundError:
        return
    if trained_on != now:
        folder = run_dir / stage
        raise OtherRun(
            f"{folder / DONE}: {stage} was trained from {trained_on}, but {start_from} has been "
            f"trained again since and is now {now}; remove {folder} to train {stage} from there, "
            f"restore that {start_from}, or give --accept-changes to keep {stage} anyway"
        )


def _last_checkpoint(stage_folder: Path) -> Path:
    done = json.loads((stage_folder / DONE).read_text())
    return stage_folder / "checkpoints" / str(done["checkpoint"])


def adapters_below(
    config: Config, stage: str, run_dir: Path, warn: Callable[[str], None] = print
) -> list[Adapter]:
    """The adapters that are merged into the base on which `stage` trains, the first stage first.

    If the stage itself has checkpoints, they must have been trained on exactly these.

    Raises:
        FileNotFoundError, OtherRun: an earlier stage is missing, or was trained again since.
    """
    names = merged_into(config.stages, stage) if stage != BASE else ()
    checkpoints = [handed_over(run_dir / name) for name in names]
    own = find_checkpoint(run_dir / stage / "checkpoints", warn) if names else None
    if own is not None:
        trained_on = read_state(own)["identity"].get("merged", [])
        now = [label_of(folder) for folder in checkpoints]
        if trained_on != now:
            raise OtherRun(
                f"{own} was trained on {trained_on} merged into the base, but the run directory "
                f"now holds {now}; restore those checkpoints, or train {stage} again"
            )
    return [read_stage_adapter(run_dir / name, config.model.lora) for name in names]


def adapters_below_checkpoint(config: Config, checkpoint: Path) -> list[Adapter]:
    """`adapters_below` for the stage of a checkpoint folder, in its own run directory."""
    stage, run_dir = checkpoint.parents[1].name, checkpoint.parents[2]
    return adapters_below(config, stage, run_dir) if stage in config.stages else []


def read_stage_adapter(stage_folder: Path, lora: LoraSection) -> Adapter:
    """The trained weights of a stage, ready to be merged into the base."""
    tensors = load_trained(stage_folder)
    return Adapter(
        tensors={name.removeprefix(NATIVE): value for name, value in tensors.items()},
        scale=lora.alpha / lora.r,
        origin=str(stage_folder),
    )
