"""The loss guard: skips a step whose loss or gradient norm is not finite, or a spike.

In: loss and gradient norm of a step before its update, equal on all ranks. Out: the reason to skip
the update, or None; and for a skipped step, a file that lists its samples.
The state is a list of numbers, so a resumed run decides as the uninterrupted one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from data_shards.plan.plan import Placement
from data_shards.shards.index import ShardIndex
from emoverse.engine.step_types import check_finite
from emoverse.run_dir import storage

WINDOW = 64  # a spike is measured by the median of this many steps
MIN_STEPS = 16  # before these nothing counts as a spike: at first the loss falls steeply


class LossGuard:
    """Checks each step. Every rank has one, and all of them see the same numbers."""

    def __init__(self, *, spike_factor: float | None) -> None:
        """`spike_factor`: multiple of the median that counts as a spike; None for no limit."""
        self._factor = spike_factor
        self._recent: dict[str, list[float]] = {"loss": [], "gradient norm": []}
        self.skipped: list[int] = []  # 1-based steps

    def check(self, loss: float, grad_norm: float) -> str | None:
        """The reason to skip a step with these numbers, None to use it."""
        reason = check_finite(loss, grad_norm)
        if reason is not None:
            return reason
        values = {"loss": loss, "gradient norm": grad_norm}
        for name, value in values.items():
            recent = self._recent[name]
            if self._factor is not None and len(recent) >= MIN_STEPS:
                usual = median(recent)
                if value > self._factor * usual:
                    return (
                        f"{name} {value:.4g} is above train.spike_factor = {self._factor:g} times "
                        f"the median {usual:.4g} of the last {len(recent)} steps"
                    )
        for name, value in values.items():
            self._recent[name] = [*self._recent[name], value][-WINDOW:]
        return None

    def state(self) -> dict[str, Any]:
        """JSON values, without loss of precision."""
        return {"recent": self._recent, "skipped": self.skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self._recent = {name: list(values) for name, values in state["recent"].items()}
        self.skipped = list(state["skipped"])


def describe_samples(
    index: ShardIndex, placed: Sequence[tuple[int, str, Placement, int, int]]
) -> list[dict[str, Any]]:
    """Where each sample of a step is stored; `placed`: position, key, placement, rank, pack."""
    rows = []
    for position, key, placement, rank, pack in sorted(placed, key=lambda row: row[0]):
        entry = index.entries(placement.shard)[placement.slot]
        rows.append(
            {
                "position": position,
                "key": key,
                "task": placement.task.value,
                "shard": index.shards[placement.shard].name,
                "offset": int(entry["offset"]),
                "bytes": int(entry["size"]),
                "rank": rank,
                "pack": pack,
            }
        )
    return rows


def write_dump(path: Path, facts: Mapping[str, Any], *, work: Path) -> None:
    """Publish what is known about a bad step; NaN and infinity are written as text.

    Raises:
        OSError: the disk is full or not writable.
    """
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(_plain(facts), indent=1, allow_nan=False)
    storage.publish_text(path, text + "\n", work=work)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
