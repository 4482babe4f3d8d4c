"""Bad numbers: a loss or a gradient norm that is not finite, or far above what it has been.

In: loss and gradient norm of a step before its update, equal on all ranks. Out: a reason not to
update, or None; and for a step that was not used, a file that names all that was in it.
The state is a list of numbers, so a resumed run judges as the uninterrupted one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from data_shards.plan.plan import Placement
from data_shards.shards.index import ShardIndex
from emoverse.run_dir import storage

WINDOW = 64  # steps whose median is the measure of a spike
LEAST = 16  # steps before anything counts as a spike: the first ones of a stage fall steeply


def finite(loss: float, grad_norm: float) -> str | None:
    """The least that is asked of a step: a reason not to use it, or None."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"{name} is not finite: {value}"
    return None


class Guard:
    """Judges steps; every rank has one, and all of them see the same numbers."""

    def __init__(self, *, spike_factor: float | None) -> None:
        """`spike_factor`: how often the median of the last steps is too much; None is no limit."""
        self._factor = spike_factor
        self._recent: dict[str, list[float]] = {"loss": [], "gradient norm": []}
        self.skipped: list[int] = []  # steps that were not used, counted from 1

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why a step with these numbers must not be used, None if it may."""
        reason = finite(loss, grad_norm)
        if reason is not None:
            return reason
        found = {"loss": loss, "gradient norm": grad_norm}
        for name, value in found.items():
            recent = self._recent[name]
            if self._factor is not None and len(recent) >= LEAST:
                usual = median(recent)
                if value > self._factor * usual:
                    return (
                        f"{name} {value:.4g} is above train.spike_factor = {self._factor:g} times "
                        f"the median {usual:.4g} of the last {len(recent)} steps"
                    )
        for name, value in found.items():
            self._recent[name] = [*self._recent[name], value][-WINDOW:]
        return None

    def state(self) -> dict[str, Any]:
        """JSON values, exact."""
        return {"recent": self._recent, "skipped": self.skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        self._recent = {name: list(values) for name, values in state["recent"].items()}
        self.skipped = list(state["skipped"])


def describe_samples(
    index: ShardIndex, placed: Sequence[tuple[int, str, Placement, int, int]]
) -> list[dict[str, Any]]:
    """Where each sample of a step lies; `placed`: position, key, placement, rank and pack."""
    rows = []
    for position, key, place, rank, pack in sorted(placed, key=lambda row: row[0]):
        entry = index.entries(place.shard)[place.slot]
        rows.append(
            {
                "position": position,
                "key": key,
                "task": place.task.value,
                "shard": index.shards[place.shard].name,
                "offset": int(entry["offset"]),
                "bytes": int(entry["size"]),
                "rank": rank,
                "pack": pack,
            }
        )
    return rows


def write_dump(path: Path, facts: Mapping[str, Any], *, work: Path) -> None:
    """Publishes what is known about a bad step; what JSON has no number for is written as text.

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
