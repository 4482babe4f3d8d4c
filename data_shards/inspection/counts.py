"""What the reports on shard folders and on annotation folders share: summaries, and Table I.

In: plain values, counts per task and source. Out: JSON values, lines of text. The decomposition of
the paper's Table I is inferred from the corpora's own counts; the paper does not give it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

# Records per task, and distinct ones; the paper calls MSA 'SA' and the last row 'Total (Summed)'.
TABLE_ONE: Final[dict[str, int]] = {
    "msa": 25_859,
    "er": 25_859,
    "fer": 15_870,
    "eri": 4_839,
    "ecpe": 7_081,
    "records": 32_940,
}
MOSEI_PART: Final = 15_870
MELD_PART: Final = 9_989
MMSA_TRAIN: Final = 16_326  # thuiar/MMSA@a94e65d; the per-segment table has one more
DECOMPOSITION: Final[dict[str, str]] = {
    "msa": "15,870 of MOSEI + 9,989 of MELD (every row of its training set)",
    "er": "the same records as msa",
    "fer": "the MOSEI part alone (25,859 - 9,989), though the text describes MELD's faces too",
    "eri": "no sum of labels gives it; the paper says curated by hand",
    "ecpe": "the utterances of ECF 2.0's training set with at least one cause, one record each",
    "records": "25,859 + 7,081: a record of ECF serves ecpe alone (the rows sum to 79,508)",
}


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


def table_rows(
    by_source: Mapping[str, Mapping[str, int | None]], records: int | None
) -> list[dict[str, Any]]:
    """One row per line of Table I.

    Args:
        by_source: source -> task -> records that serve it; None = not known from these files.
        records: distinct records.

    Returns:
        rows with `name`, `paper`, `found` (our count, None if not known), `parts` per source,
        `difference` = found - paper, `decomposition`.
    """
    rows: list[dict[str, Any]] = []
    for name, paper in TABLE_ONE.items():
        parts = {source: tasks.get(name) for source, tasks in by_source.items()}
        known = [count for count in parts.values() if count is not None]
        is_unknown = None in parts.values() and not any(known)
        count = records if name == "records" else None if is_unknown else sum(known)
        rows.append(
            {
                "name": name,
                "paper": paper,
                "found": count,
                "parts": {} if name == "records" else parts,
                "difference": None if count is None else count - paper,
                "decomposition": DECOMPOSITION[name],
            }
        )
    return rows


def table_text(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of text; '-' for a count that is not known."""
    sources = list(rows[0]["parts"])
    head = f"{'':<10}{'Table I':>9}{'found':>9}{'diff':>8}"
    lines = ["beside Table I of the paper", head + "".join(f"{name:>11}" for name in sources)]
    for row in rows:
        cells = "".join(f"{_cell(row['parts'].get(name)):>11}" for name in sources)
        difference = "-" if row["difference"] is None else f"{row['difference']:+,}"
        count = _cell(row["found"])
        lines.append(f"{row['name']:<10}{row['paper']:>9,}{count:>9}{difference:>8}{cells}")
    return lines


def _cell(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"
