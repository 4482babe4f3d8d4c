"""A stage that another run has trained in the very same way is adopted, not trained again.

In: the config of a run, and the run directory of another. Out: RUN/STAGE with the other's last
checkpoint under the identity of this run, or nothing where any sample, knob or weight differs. Used
by `emoverse ablate`, whose variants often differ in their second stage alone.
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
BEHIND_PATHS = ("base", "start", "merged")  # of an identity: what the stage was built on


def adopt_stage(config: Config, stage: str, donor: Path) -> bool:
    """Makes `stage` of this run from that of the run in `donor`; False if it is another training.

    The same means: the same records with the same tasks in the same places of the same shards, the
    same knobs of the stage, the same weights to start from, and nothing skipped or replaced. The
    other stages may differ. A stage that has begun here is left as it is.

    Raises:
        OtherRun, DamagedCheckpoint: the donor's checkpoint is not what its marker says.
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
    # The hash of what was trained speaks of keys; that they stand for the same records is the
    # fingerprint's business.
    if shards != index.fingerprint or done["audit"] != planned_audit(plan.stages[stage], index):
        return False
    found = read_checkpoint(handed_over(donor / stage))
    identity = run_identity(config, stage, plan, starting_stage(config, stage))
    theirs = found.state["identity"]
    if found.state["accepted"] or any(theirs.get(k) != identity.get(k) for k in BEHIND_PATHS):
        return False
    fingerprint = plan.stages[stage].fingerprint
    lease = acquire(config.run.run_dir)
    try:
        with lease.writing() as work:
            save_checkpoint(
                own / "checkpoints",
                params=found.params,
                exp_avg=found.exp_avg,
                exp_avg_sq=found.exp_avg_sq,
                state={
                    **found.state,
                    "identity": identity,
                    "data": {**found.state["data"], "fingerprint": fingerprint},
                },
                keep=1,
                work=work,
            )
            if (donor / stage / LOG).is_file():
                shutil.copyfile(donor / stage / LOG, own / LOG)
            adopted = {**done, "knobs": knobs, "adopted_from": str(donor)}
            storage.publish_text(own / DONE, json.dumps(adopted, indent=1) + "\n", work=work)
    finally:
        lease.release()
    return True


def _of_stage(knobs: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Without the other stages' data settings: they matter through the plan, which is compared."""
    other = [key for key in knobs if key.startswith("stages.") and key.split(".")[1] != stage]
    return {key: value for key, value in knobs.items() if key not in other}
