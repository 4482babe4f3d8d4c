"""The identity of a run: which knobs a resumed run may change."""

import re
from pathlib import Path

from emoverse.run_dir.run_files import FREE_KNOBS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reliability.md"


def test_every_knob_that_a_resumed_run_may_change_is_documented() -> None:
    text = PAGE.read_text(encoding="utf-8")
    listed = text[text.index("Free to change:") : text.index("With `--accept-changes`")]
    paths = {"model.base", "data.shards"}  # "paths whose content is the same"
    assert set(re.findall(r"`((?:run|model|data)\.\w+)`", listed)) == FREE_KNOBS - paths
