"""Files that describe a run: resolved config, provenance, plan; and the identity of a run.

In: the config, the plan, the stage that it starts from. Out: RUN/{config.yaml, provenance.json,
plan/plan.json}, RUN/STAGE/deepspeed.json, and the flat {knob: value} that a resumed run must match.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.plan.plan import Plan
from data_shards.shards.index import ShardIndex
from emoverse.config.schema import Config, to_yaml
from emoverse.models.architecture import base_folder
from emoverse.run_dir import storage
from emoverse.run_dir.checkpoint import OtherRun, read_state
from emoverse.run_dir.lineage import handed_over, label_of
from emoverse.run_dir.provenance import append_launch, base_fingerprint, describe_launch
from emoverse.training.stages import merged_into, stage_dir

# Knobs that may change between two launches: they decide where and how fast, not what is learned.
# Paths may change as well; their content is compared by the fingerprints of plan and base.
FREE_SECTIONS = ("evaluation", "train")
FREE_KNOBS = frozenset(
    {
        "run.name",
        "run.run_dir",
        "model.base",
        "model.attention",
        "model.lean",
        "model.cache_features",
        "data.shards",
        "data.pack_tokens",
        "data.workers",
        "data.batch_timeout_s",
        "data.cache_dir",
        "data.cache_gib",
        "data.max_damaged",
    }
)
# Settings that concern one stage alone; all others of every stage enter the common plan.
STAGE_ONLY_KNOBS = ("optim", "start_from", "adapter", "optimizer")
DECISIVE_TRAIN = ("train.global_batch_size", "train.loss")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def decisive_knobs(config: Config, stage: str) -> dict[str, Any]:
    """The knobs that decide the numbers of this stage, as JSON values.

    They include the data settings of the other stages: all stages are planned together.
    """
    knobs = {}
    for path, value in flatten(config.model_dump(mode="json")).items():
        section, *rest = path.split(".")
        if section in FREE_SECTIONS and path not in DECISIVE_TRAIN:
            continue
        if path in FREE_KNOBS:
            continue
        if section == "stages" and rest[0] != stage and rest[1] in STAGE_ONLY_KNOBS:
            continue
        knobs[path] = value
    return knobs


def run_identity(
    config: Config,
    stage: str,
    plan: Plan,
    parent: Path | None,
    accepted: list[str] | None = None,
) -> dict[str, Any]:
    """The decisive knobs, and the fingerprints of plan, base and starting weights.

    `accepted` collects differences to the stage to start from; without it they are an error.

    Raises:
        OtherRun: the stage to start from was trained under another plan.
    """
    base = base_fingerprint(base_folder(config.model.base))
    identity = {**decisive_knobs(config, stage), "plan": plan.fingerprint, "base": base}
    if parent is None:
        return {**identity, "start": "base"}
    folder = handed_over(parent)
    saved = read_state(folder)["identity"]
    for name in ("plan", "base"):
        if saved[name] != identity[name]:
            if accepted is not None:
                accepted.append(f"{name} of {parent.name}: {saved[name]}, now {identity[name]}")
                continue
            raise OtherRun(
                f"stages.{stage}.start_from: {parent.name} was trained with another {name} "
                f"({saved[name][:12]}, now {identity[name][:12]}); stages are planned together, "
                f"so undo the change to data or stages, or choose another run.run_dir and train "
                f"{parent.name} again, or give --accept-changes to start from it anyway"
            )
    stages = merged_into(config.stages, stage)
    merged = [label_of(handed_over(stage_dir(config, name))) for name in stages]
    return {**identity, "start": label_of(folder), **({"merged": merged} if merged else {})}


def write_run_files(
    config: Config,
    stage: str,
    index: ShardIndex,
    plan: Plan,
    settings: Mapping[str, Any],
    *,
    work: Path,
) -> None:
    """Publish the files that describe the run, from `work`; by one rank, after all checks."""
    run_dir, folder = config.run.run_dir, stage_dir(config, stage)
    folder.mkdir(parents=True, exist_ok=True)
    (run_dir / "plan").mkdir(exist_ok=True)
    storage.publish_text(run_dir / "config.yaml", to_yaml(config), work=work)
    text = json.dumps(settings, indent=1)
    storage.publish_text(folder / "deepspeed.json", text + "\n", work=work)
    plan_json = {
        "fingerprint": plan.fingerprint,
        "index": index.fingerprint,
        "stages": {
            name: {
                "samples": planned.num_samples,
                "samples_per_epoch": planned.samples_per_epoch,
                "steps": planned.num_steps(config.train.global_batch_size),
                "tasks": {
                    count.task.value: {
                        "asked": count.asked,
                        "available": count.available,
                        "given": count.given,
                        "total": count.total,
                    }
                    for count in planned.counts
                },
            }
            for name, planned in plan.stages.items()
        },
    }
    text = json.dumps(plan_json, indent=1)
    storage.publish_text(run_dir / "plan" / "plan.json", text + "\n", work=work)
    launch = describe_launch(
        stage=stage,
        shards=str(config.data.shards),
        index=index.fingerprint,
        plan=plan.fingerprint,
        base=base_fingerprint(base_folder(config.model.base)),
    )
    append_launch(run_dir, launch, work=work)
