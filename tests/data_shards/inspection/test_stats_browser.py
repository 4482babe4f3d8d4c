"""The page of `stats --html` in a real browser, on a narrow screen."""

import shutil
from pathlib import Path

import pytest

from data_shards.inspection.stats_page import write_page

pytestmark = pytest.mark.browser


def test_a_note_does_not_stretch_its_row_on_a_narrow_screen(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    note = "the MOSEI part alone (25,859 - 9,989), though the text describes MELD's faces too"
    row = {"paper": 15870, "found": 140, "parts": 140, "difference": -15730, "decomposition": note}
    write_page({"folder": "data", "table_one": {"fer": row}}, tmp_path / "stats.html")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 360, "height": 800})
        page.goto((tmp_path / "stats.html").as_uri())
        box = page.locator("#table_one tr").last.bounding_box()
        width = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert box is not None and box["height"] < 110  # four lines, not eight
    assert width == 360  # the table scrolls, the page does not
