"""The log line of an interval, and the sentence about a rank that holds the others up.

In: records of telemetry.py. Out: text for a log: one grep-able line, fields in a fixed order.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from data_shards.progress import format_duration as format_duration

# A rank is named when it needs this much more than the others do, and it matters to the step.
SLOWER, OF_STEP = 1.2, 0.05


def format_line(stage: str, num_steps: int, record: Mapping[str, Any]) -> str:
    """One grep-able line per interval."""
    step = record["step"]
    rows = record["task"]
    losses = " ".join(f"{task} {_number(row['loss'])}" for task, row in rows.items())
    mix = "/".join(f"{100 * row['mix']:.1f}" for row in rows.values())
    rates = "/".join(f"{100 * row['rate']:.1f}" for row in rows.values())
    speed = f"{_short(record['samples_per_s'])} smp/s {_short(record['tokens_per_s'])} tok/s"
    mfu = f" mfu {record['mfu']:.0%}" if record["mfu"] is not None else ""
    rate = "/".join(f"{value:.1e}" for value in _distinct(record["lr"].values()))
    total = record["memory_total_bytes"]
    parts = [
        f"{stage} step {step}/{num_steps} {100 * step / num_steps:.1f}%",
        f"loss {record['loss']:.3f} ({losses})",
        f"mix {mix} of {rates}",
        f"lr {rate} gn {record['grad_norm']:.2f}",
        f"{speed}{mfu} data {record['data_wait']:.0%}",
        f"mem {record['memory_bytes'] / 2**30:.1f}{f'/{total / 2**30:.1f}' if total else ''}G",
        f"eta {format_duration(record['eta_s'])}",
        f"ckpt {step - record['checkpoint_step']} steps ago",
    ]
    if record["skipped"]:
        parts.append(f"skipped {record['skipped']}")
    return " | ".join(parts)


def straggler(ranks: Sequence[Mapping[str, float]], seconds: float) -> str | None:
    """Who holds the others up, and by what; None if nobody does.

    Args:
        ranks: per rank its own seconds in an interval, waiting for data and in forward passes;
            what it waits for others is not in them.
        seconds: of the interval.
    """
    if len(ranks) < 2:
        return None
    own = [rank["data_s"] + rank["forward_s"] for rank in ranks]
    slow = max(range(len(own)), key=own.__getitem__)
    usual = median(own[:slow] + own[slow + 1 :])
    if own[slow] < SLOWER * usual or own[slow] - usual < OF_STEP * seconds:
        return None
    found = ranks[slow]
    return (
        f"rank {slow} holds the others up: {found['data_s'] / seconds:.0%} of the time waiting for "
        f"data, {found['forward_s'] / seconds:.0%} in forward passes; the others "
        f"{usual / seconds:.0%} for both"
    )


def _distinct(values: Iterable[float]) -> list[float]:
    return list(dict.fromkeys(values))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.1f}"
