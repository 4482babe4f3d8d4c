"""Reuse a stage that another run has trained in exactly the same way.

In: the config of a run, and the run directory of another. Out: RUN/STAGE with the last checkpoint
of the other run under the identity of this run, or nothing if any sample, knob or weight differs.
Used by `emoverse ablate`, whose variants often differ in their second stage only.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.shards.open import open_index
from emoverse.config.schema import Config
from emoverse.run_dir import storage
from emoverse.run_dir.checkpoint import read_checkpoint, save_checkpoint
from emoverse.run_dir.lineage import handed_over
from emoverse.run_dir.run_files import decisive_knobs, run_identity
from emoverse.run_dir.run_lock import acquire
from emoverse.training.sample_audit import planned_audit
from emoverse.training.stages import BASE, DONE, run_plan, stage_dir, starting_stage

LOG, PLAN = "metrics.jsonl", Path("plan", "plan.json")
WEIGHT_KEYS = ("base", "start", "merged")  # keys of an identity: the weights a stage starts from


def reuse_stage(config: Config, stage: str, donor: Path) -> bool:
    """Copy `stage` from the run in `donor`; False if it was trained differently.

    Equal are: records and tasks at every position, shards, knobs of the stage, starting weights;
    and no step was skipped, no record replaced. The other stages may differ. A stage that has
    begun here is left unchanged.

    Raises:
        OtherRun, DamagedCheckpoint: the donor's checkpoint is not the one that DONE names.
        RunInUse: another process trains this run.
    """
    own, marker, plan_json = stage_dir(config, stage), donor / stage / DONE, donor / PLAN
    if own.exists() or not (marker.is_file() and plan_json.is_file()):
        return False
    start = config.stages[stage].start_from
    if start != BASE and not (stage_dir(config, start) / DONE).is_file():
        return False
    done, knobs = json.loads(marker.read_text(encoding="utf-8")), decisive_knobs(config, stage)
    if done["skipped"] or _of_stage(done["knobs"], stage) != _of_stage(knobs, stage):
        return False
    index = open_index(config.data.shards, config.data.cache)
    plan = run_plan(config, index)
    shards = json.loads(plan_json.read_text(encoding="utf-8"))["index"]
    # The audit hash covers keys; the fingerprint shows that they name the same records.
    if shards != index.fingerprint or done["audit"] != planned_audit(plan.stages[stage], index):
        return False
    saved = read_checkpoint(handed_over(donor / stage))
    identity = run_identity(config, stage, plan, starting_stage(config, stage))
    donor_identity = saved.state["identity"]
    if saved.state["accepted"] or any(
        donor_identity.get(key) != identity.get(key) for key in WEIGHT_KEYS
    ):
        return False
    fingerprint = plan.stages[stage].fingerprint
    lock = acquire(config.run.run_dir)
    try:
        with lock.writing() as work:
            save_checkpoint(
                own / "checkpoints",
                params=saved.params,
                exp_avg=saved.exp_avg,
                exp_avg_sq=saved.exp_avg_sq,
                state={
                    **saved.state,
                    "identity": identity,
                    "data": {**saved.state["data"], "fingerprint": fingerprint},
                },
                keep=1,
                work=work,
            )
            if (donor / stage / LOG).is_file():
                shutil.copyfile(donor / stage / LOG, own / LOG)
            marked = {**done, "knobs": knobs, "adopted_from": str(donor)}
            storage.publish_text(own / DONE, json.dumps(marked, indent=1) + "\n", work=work)
    finally:
        lock.release()
    return True


def _of_stage(knobs: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Knobs without the data settings of other stages: the audit hash compares their effect."""
    other = [key for key in knobs if key.startswith("stages.") and key.split(".")[1] != stage]
    return {key: value for key, value in knobs.items() if key not in other}
