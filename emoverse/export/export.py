"""A trained state, or an adapter folder, as a model that others can load.

(1) locate    the base, the adapters merged into it before, and what the state itself trained
(2) write     --layout internvl2 | transformers (merged in fp32, shard by shard) or adapter (PEFT)
(3) compare   logits of the written folder with those of the base with unmerged adapters
(4) describe  README.md and lineage.json beside the weights
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from emoverse.config.schema import Config
from emoverse.data.encode import open_tokenizer
from emoverse.export import layouts
from emoverse.export.model_card import write_card
from emoverse.models.adapters import write_adapter
from emoverse.models.architecture import base_folder, load_architecture, parameter_counts
from emoverse.models.foreign_adapters import WEIGHTS_FILE, read_adapter, read_settings
from emoverse.models.internvl.checkpoint import Released, open_checkpoint
from emoverse.models.merge import Adapter
from emoverse.report.summary import load_run_config
from emoverse.run_dir.checkpoint import read_state
from emoverse.run_dir.lineage import adapters_below, handed_over, label_of, read_stage_adapter
from emoverse.run_dir.provenance import base_fingerprint, package_versions
from emoverse.training.stages import DONE

Layout = Literal["internvl2", "transformers", "adapter"]
StoredType = Literal["keep", "bf16", "fp32"]  # keep: as in the base

# Larger models are compared in bf16, so that base and copy fit one after the other.
COMPARE_FP32_BELOW: Final = 10**9
# Largest relative RMS difference: rounding of one sum (fp32), or of weights in bf16 and fp16.
BOUNDS: Final = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What is to be exported."""

    name: str
    base: Path
    base_name: str
    below: list[Adapter]  # merged into the base before the state trained
    own: Adapter
    r: int
    alpha: int
    facts: dict[str, Any]


def export(
    source: Path,
    out: Path,
    *,
    layout: Layout,
    stage: str | None = None,
    base: str | None = None,
    dtype: StoredType = "keep",
    check: bool = True,
) -> dict[str, Any]:
    """Export and return what was done; `ok` is False if the copy computes other logits.

    Args:
        source: a run directory, or an adapter folder.
        out: the folder to write; new or empty.
        stage: of a run; None: the last one that is trained.
        base: the base model of an adapter folder, or the new place of the base of a run.
        dtype: type of the stored weights.
        check: load the copy and compare its logits.

    Raises:
        FileNotFoundError, ValueError: input that the user can correct.
    """
    is_run = (source / "config.yaml").is_file()
    if not is_run and not (source / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{source} is neither a run directory (config.yaml) nor an adapter folder "
            "(adapter_config.json); give the folder that `train` or PEFT wrote"
        )
    _require_empty(out)
    state = _state_of_run(source, stage, base) if is_run else _state_of_adapter(source, base)
    return write_export(state, layout=layout, out=out, dtype=dtype, check=check)


def _require_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; choose a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder} is not empty; choose a new folder, or remove this one")


def _state_of_run(run_dir: Path, stage: str | None, base: str | None) -> State:
    config = load_run_config(run_dir)
    trained = [name for name in config.stages if (run_dir / name / "checkpoints").is_dir()]
    which = stage or (trained[-1] if trained else next(iter(config.stages)))
    if which not in config.stages:
        raise ValueError(
            f"--which {which}: the run has no such stage; it has {', '.join(config.stages)}"
        )
    checkpoint = handed_over(run_dir / which)
    facts = _run_facts(config, run_dir, which, checkpoint)
    facts["state"] = label_of(checkpoint)
    if not (run_dir / which / DONE).is_file():
        facts["state"] += " (the stage is not finished)"
    base_name = base or config.model.base
    folder = base_folder(base_name)
    trained_on = read_state(checkpoint)["identity"]["base"]
    if base_fingerprint(folder) != trained_on:
        raise ValueError(
            f"{folder} is not the base that {which} was trained on (fingerprint "
            f"{base_fingerprint(folder)[:12]}, trained on {trained_on[:12]}); give the folder of "
            "that base with --base"
        )
    return State(
        name=f"{config.run.name}-{which}",
        base=folder,
        base_name=base_name,
        below=adapters_below(config, which, run_dir),
        own=read_stage_adapter(run_dir / which, config.model.lora),
        r=config.model.lora.r,
        alpha=config.model.lora.alpha,
        facts=facts,
    )


def _run_facts(config: Config, run_dir: Path, which: str, checkpoint: Path) -> dict[str, Any]:
    """Stages up to `which`, fingerprints of the data, and the checkpoint's metrics, if there."""
    stages = []
    for name, stage in config.stages.items():
        if (run_dir / name / "checkpoints").is_dir():
            stages.append(
                {
                    "stage": name,
                    "checkpoint": label_of(handed_over(run_dir / name)),
                    "starts from": stage.start_from,
                    "adapter": stage.adapter,
                    "learning rates": f"{stage.optim.lr_lora:g} / {stage.optim.lr_projector:g}",
                    "rates": " ".join(f"{task}={rate}" for task, rate in stage.rates.items()),
                }
            )
        if name == which:
            break
    facts: dict[str, Any] = {"stages": stages, "model": config.model.model_dump(mode="json")}
    plan, metrics = run_dir / "plan" / "plan.json", run_dir / "eval" / which / "metrics.json"
    if plan.is_file():
        planned = json.loads(plan.read_text())
        facts["data"] = {"plan": planned["fingerprint"], "index": planned["index"]}
    measured = json.loads(metrics.read_text()) if metrics.is_file() else {}
    # A stage can be evaluated before its end: only metrics of this checkpoint are used.
    if (run_dir / measured.get("checkpoint", "")).resolve() == checkpoint.resolve():
        facts["metrics"] = measured
        facts["leakage"] = measured["protocol"].get("leakage")
    return facts


def _state_of_adapter(source: Path, base: str | None) -> State:
    base_name = base or read_settings(source).get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        raise ValueError(f"{source} does not name its base model; give --base FOLDER")
    folder = base_folder(base_name)
    adapter, settings = read_adapter(source, load_architecture(folder))
    return State(
        name=source.resolve().name,
        base=folder,
        base_name=base_name,
        below=[],
        own=adapter,
        r=settings["r"],
        alpha=settings["lora_alpha"],
        facts={"state": f"adapter folder, sha256 {_sha256(source / WEIGHTS_FILE)}"},
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_export(
    state: State, *, layout: Layout, out: Path, dtype: StoredType, check: bool
) -> dict[str, Any]:
    """Write the folder under a temporary name, compare, and publish it by one rename."""
    out = out.resolve()  # an empty folder behind a link is replaced, not the link
    released = open_checkpoint(state.base)
    if layout == "adapter" and state.below:
        raise ValueError(
            f"{state.name} was trained on a base into which "
            f"{', '.join(Path(adapter.origin).name for adapter in state.below)} had been merged, "
            "so its adapter does not fit the released base; export --layout internvl2"
        )
    temporary = out.with_name(f".exporting-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    _write(state, released, layout, temporary, dtype)
    result: dict[str, Any] = {"ok": True, "out": str(out), "layout": layout, "state": state.name}
    facts: dict[str, Any] = {
        "name": state.name,
        "layout": layout,
        "base": {"name": state.base_name, "fingerprint": base_fingerprint(state.base)},
        "stored_as": _stored_as(released, layout, dtype),
        "versions": package_versions(),
        **state.facts,
    }
    if check:
        comparison = _compare(state, released, layout, temporary, dtype)
        result["check"] = facts["check"] = comparison
        result["ok"] = comparison["relative_rms"] <= comparison["bound"]
    write_card(temporary, facts)
    if out.exists():
        out.rmdir()
    temporary.rename(out)
    result["bytes"] = sum(path.stat().st_size for path in out.iterdir())
    return result


def _stored_as(released: Released, layout: Layout, dtype: StoredType) -> str:
    if layout == "adapter" or dtype != "keep":
        return "fp32" if layout == "adapter" else dtype
    return ", ".join(sorted({header.dtype.lower() for header in released.weights.headers.values()}))


def _write(
    state: State, released: Released, layout: Layout, folder: Path, dtype: StoredType
) -> None:
    if layout == layouts.ADAPTER:
        write_adapter(state.own.tensors, folder, r=state.r, alpha=state.alpha, base=state.base_name)
        return
    stored = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    adapters = [*state.below, state.own]
    if layout == layouts.INTERNVL2:
        layouts.write_internvl2(released, adapters, folder, stored)
    else:
        stops = open_tokenizer(state.base).stop_ids
        layouts.write_transformers(released, adapters, folder, stored, stop_ids=stops)


def _compare(
    state: State, released: Released, layout: Layout, folder: Path, dtype: StoredType
) -> dict[str, Any]:
    """Compare the logits of the base with unmerged adapters with those of the written folder."""
    small = parameter_counts(released.architecture, None, "frozen")["total"] < COMPARE_FP32_BELOW
    name = "fp32" if small else "bf16"
    working = torch.float32 if small else torch.bfloat16
    unmerged = layouts.load_unmerged(released, state.below, state.own, working)
    expected = layouts.probe_logits(unmerged)
    del unmerged  # before the copy is loaded: large models fit only once
    actual = layouts.probe_logits(layouts.load_exported(folder, layout, released, working))
    stored = {header.dtype for header in released.weights.headers.values()}
    exact = layout == layouts.ADAPTER or dtype == "fp32" or (dtype == "keep" and stored == {"F32"})
    bound = BOUNDS["fp32" if small and exact else "bf16"]
    return {**layouts.compare(actual, expected), "dtype": name, "bound": bound}
