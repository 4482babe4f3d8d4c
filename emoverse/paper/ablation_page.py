"""The page of the ablations: the paper's tables with our values, the effects, the conditions.

The dict of `ablation_tables.py` goes in, one static HTML document comes out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_shards.pages.render import Section, render_page
from emoverse.report.page import TEMPLATES


def render_ablations(result: Mapping[str, Any]) -> str:
    """The whole document. `failed` of the result, where present: variant -> why it failed."""
    return render_page(
        "ablations.html",
        folder=TEMPLATES,
        title="Ablations",
        command="ablate",
        sections=[Section(name, name.capitalize()) for name in ("tables", "effects", "conditions")],
        verdicts=Counter(effect["verdict"] for effect in result["effects"]),
        **{"failed": {}, **result},
    )
