"""Values, 95% intervals and paired differences of the metrics of `scoring.py`.

Rows of one system, or of two systems on the same clips, go in; `Score` and `Difference` come out.
Means over clips have exact standard errors; every other metric those of a bootstrap over clips
with a fixed seed, so that the same rows give the same numbers. Clips (or, for official ECPE
metrics, conversations) are taken as independent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_shards.tasks import Task
from emoverse.evaluation.metrics import Floats, Metric, Row
from emoverse.evaluation.registry import METRICS

NUM_RESAMPLES = 2000
BOOTSTRAP_SEED = 20250101


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One metric on n clips: value, its standard error and the 95% bootstrap interval."""

    value: float
    standard_error: float
    low: float
    high: float
    n: int


NO_SCORE = Score(value=math.nan, standard_error=math.nan, low=math.nan, high=math.nan, n=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Metric of system A minus system B on the n clips both answered, with its standard error."""

    value: float
    standard_error: float
    n: int


@functools.lru_cache(maxsize=4)
def _resample_counts(n: int) -> NDArray[np.float32]:
    """[R, n]: how often clip i is drawn in resample r; the same for every system (pairing)."""
    rng = np.random.Generator(np.random.PCG64(BOOTSTRAP_SEED))
    drawn = rng.integers(0, n, size=(NUM_RESAMPLES, n))
    drawn += np.arange(NUM_RESAMPLES)[:, None] * n
    counts = np.bincount(drawn.ravel(), minlength=NUM_RESAMPLES * n)
    return counts.reshape(NUM_RESAMPLES, n).astype(np.float32)


def _resampled(metric: Metric, parts_nK: Floats) -> Floats:
    """The metric of each bootstrap resample, [R]; sums are exact in float64."""
    sums_RK = _resample_counts(len(parts_nK)).astype(np.float64) @ parts_nK
    return metric.finish(sums_RK)


def _spread(values: Floats) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.std(ddof=1)) if len(kept) > 1 else math.nan


def _counted(metric: Metric, parts_nK: Floats) -> NDArray[np.bool_]:
    """Which clips the metric counts: one that it leaves out contributes nothing but zeros.

    A conversation counts always: also one without any pair is a part of the official protocol.
    """
    if metric.whole is not None:
        return np.ones(len(parts_nK), dtype=np.bool_)
    return np.asarray(parts_nK.any(axis=1))


def score(metric: Metric, rows: Sequence[Row]) -> Score:
    """Value, standard error and 95% percentile interval of one metric.

    A mean over clips has the exact standard error sd/sqrt(n); every other metric the bootstrap's.
    `n` counts the clips that the metric counts (N/P leaves out sentiment 0, the target-given pair
    metrics targets without a true pair), or the conversations of an official ECPE metric. No rows,
    or a metric that does not exist for them: all nan.
    """
    if not rows or not metric.applies(rows):
        return NO_SCORE
    contributions = metric.contributions(rows)
    contributions = contributions[_counted(metric, contributions)]
    if not len(contributions):
        return NO_SCORE
    resampled = _resampled(metric, contributions)
    finite = resampled[np.isfinite(resampled)]
    low, high = np.quantile(finite, (0.025, 0.975)) if len(finite) else (math.nan, math.nan)
    exact = (
        _spread(contributions[:, 0]) / math.sqrt(len(contributions))
        if metric.per_clip
        else _spread(resampled)
    )
    return Score(
        value=float(metric.finish(contributions.sum(0))),
        standard_error=exact,
        low=float(low),
        high=float(high),
        n=len(contributions),
    )


def scores(task: Task, rows: Sequence[Row]) -> dict[str, Score]:
    """Every metric of the task that exists for these rows, by name; without rows all of them."""
    found = [one for one in METRICS[task] if not rows or one.applies(rows)]
    return {metric.name: score(metric, rows) for metric in found}


def paired_difference(metric: Metric, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> Difference:
    """A minus B on the clips that both answered, with the paired standard error.

    Pairing matters: both systems fail on the same hard clips, so the error of the difference is
    smaller than that of two independent samples. Means over clips: exact; others: one bootstrap
    whose resamples are the same for A and B. Raises ValueError when no clip is common.
    """
    by_key = {row.key: row for row in rows_b}
    common = [(row, by_key[row.key]) for row in rows_a if row.key in by_key]
    if not common:
        raise ValueError(
            f"paired difference of {metric.name}: the two systems answered no clip in common "
            f"({len(rows_a)} and {len(rows_b)} clips); evaluate both on the same shards"
        )
    a, b = (metric.contributions([pair[side] for pair in common]) for side in (0, 1))
    # A mean needs a value on both sides (a verdict may be missing on one); in pooled counts a clip
    # of which one side says nothing and the other something wrong makes a difference.
    both = np.logical_and if metric.per_clip else np.logical_or
    counted = both(_counted(metric, a), _counted(metric, b))
    a, b = a[counted], b[counted]
    if metric.per_clip or not len(a):
        error = _spread(a[:, 0] - b[:, 0]) / math.sqrt(max(len(a), 1))
    else:
        error = _spread(_resampled(metric, a) - _resampled(metric, b))
    value = float(metric.finish(a.sum(0)) - metric.finish(b.sum(0)))
    return Difference(value=value, standard_error=error, n=len(a))
