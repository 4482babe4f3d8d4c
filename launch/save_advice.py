"""How often to save: what a checkpoint costs against what a failure costs; for the verb `plan`.

In: what earlier launches measured (RUN/STAGE/metrics.jsonl) and how often failures come. Out: the
interval that wastes least by Young and Daly, and what it wastes. Young (1974): with a save of C
seconds and a failure every M seconds, T = sqrt(2 C M) between saves is best to first order, and the
waste is C / T + T / (2 M). No torch.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

BYTES_PER_PARAMETER = 12  # fp32 master and two fp32 moments
FAILURE_HOURS = (6, 24, 168)


def best_interval_s(save_s: float, failure_s: float) -> float:
    """Young's first-order optimum, never shorter than the save itself."""
    return max(save_s, math.sqrt(2 * save_s * failure_s))


def waste(interval_s: float, save_s: float, failure_s: float) -> float:
    """Expected share of the time lost to saving and to work done again."""
    return save_s / interval_s + interval_s / (2 * failure_s)


def measured_costs(run_dir: Path, global_batch_size: int) -> dict[str, float] | None:
    """Median seconds of a save and of a step in this run directory; None before the first save."""
    saves: list[float] = []
    steps: list[float] = []
    for path in run_dir.glob("*/metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that a crash cut off
            if record.get("kind") == "save":
                saves.append(record["seconds"])
            elif record.get("kind") == "interval":
                steps.append(global_batch_size / record["samples_per_s"])
    return {"save_s": median(saves), "step_s": median(steps)} if saves and steps else None


def save_advice(
    run_dir: Path, *, trainable: int, global_batch_size: int, save_every: int
) -> dict[str, Any]:
    """The advice as JSON values; `measured` and `best` are None before the first save."""
    costs = measured_costs(run_dir, global_batch_size)
    best = None
    if costs is not None:
        best = [
            {
                "failure_hours": hours,
                "minutes": interval / 60,
                "steps": max(1, round(interval / costs["step_s"])),
                "waste": waste(interval, costs["save_s"], 3600 * hours),
            }
            for hours in FAILURE_HOURS
            for interval in [best_interval_s(costs["save_s"], 3600 * hours)]
        ]
    return {
        "checkpoint_bytes": BYTES_PER_PARAMETER * trainable,
        "save_every": save_every,
        "measured": costs,
        "overhead": costs and costs["save_s"] / (save_every * costs["step_s"] + costs["save_s"]),
        "best": best,
    }


def advice_text(advice: Mapping[str, Any]) -> str:
    """One or two lines for the page that `plan` prints."""
    size = f"saving: a checkpoint is about {advice['checkpoint_bytes'] / 1e6:,.1f} MB"
    costs = advice["measured"]
    if costs is None:
        return (
            f"{size}; after the first one is written, plan says from its time how often to save "
            "(best interval = root of 2 x seconds of a save x seconds between failures)"
        )
    rows = ", ".join(
        f"{row['steps']:,} steps ({row['minutes']:.1f} min, {row['waste']:.2%} lost) at one per "
        f"{row['failure_hours']} h"
        for row in advice["best"]
    )
    return (
        f"{size} and took {costs['save_s']:.2f} s, a step {costs['step_s']:.2f} s: save_every "
        f"{advice['save_every']} costs {advice['overhead']:.2%}\n"
        f"        best interval by the time between failures: {rows}"
    )
