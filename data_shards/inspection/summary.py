"""Small summaries that reports share: counts in a fixed order, five numbers of a list.

In: plain values. Out: JSON values. Used by stats and corpus_stats.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np


def summary(values: Sequence[float]) -> dict[str, float]:
    """Smallest, mean, median, 95th percentile and largest of some numbers; empty for none."""
    if not values:
        return {}
    table = np.asarray(values, dtype=np.float64)
    return {
        "min": round(float(table.min()), 3),
        "mean": round(float(table.mean()), 2),
        "median": round(float(np.median(table)), 3),
        "p95": round(float(np.percentile(table, 95)), 2),
        "max": round(float(table.max()), 3),
    }


def counted(values: Iterable[str] | Counter[str]) -> dict[str, int]:
    """The count of each value: the most frequent first, equal counts by name."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def cause_position(target: int, cause: int) -> str:
    """Position of a cause relative to its target: 'self', '1 before', '2 after', ..."""
    if target == cause:
        return "self"
    return f"{target - cause} before" if cause < target else f"{cause - target} after"
