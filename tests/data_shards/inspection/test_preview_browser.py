"""The page in a real browser: clips play, decisions are kept, build reads their export."""

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.build.build import build_shards
from data_shards.build.curation import Amendments, read_curation
from data_shards.build.source_item import Skipped
from data_shards.inspection.preview_page import write_page
from data_shards.shards.record import Record
from data_shards.sources.synthetic import SyntheticOptions, make_record
from data_shards.tasks import Task

pytestmark = pytest.mark.browser


@functools.cache
def records() -> tuple[Record, ...]:
    options = SyntheticOptions(clips=5, seed=3)
    return tuple(make_record(options, index) for index in range(5))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    file, _ = write_page(records(), tmp_path / "page", title="corpus")
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda sent: complaints.append(sent.url) if _outside(sent.url) else None)
    opened.goto(file.as_uri())
    yield opened
    opened.close()
    assert complaints == []


def _outside(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:"))


def article(page: Any, index: int) -> Any:
    return page.locator("article").nth(index)


def export(page: Any, path: Path) -> Path:
    with page.expect_download() as caught:
        page.get_by_text("Export curation.jsonl").click()
    assert caught.value.suggested_filename == "curation.jsonl"
    caught.value.save_as(path)
    return path


def test_clips_play_and_show_their_peak(page: Any) -> None:
    page.wait_for_function(
        "[...document.querySelectorAll('video')].every(v => v.readyState >= 1 && !v.error)"
    )
    page.evaluate("document.querySelector('video').play()")
    page.wait_for_function("document.querySelector('video').currentTime > 0.2")
    index, record = next((n, r) for n, r in enumerate(records()) if r.peak_frame is not None)
    article(page, index).locator(".peak").click()
    video = f"document.querySelectorAll('video')[{index}]"
    page.wait_for_function(f"{video}.paused && {video}.currentTime > 0")
    share = page.evaluate(f"{video}.currentTime / {video}.duration")
    assert int(share * record.num_frames) == record.peak_frame


def test_all_tasks_are_there_and_can_be_chosen(page: Any) -> None:
    for index, record in enumerate(records()):
        shown = article(page, index).inner_text()
        assert all(task.upper() in shown for task in record.tasks)
    page.locator("#task").select_option("eri")
    offered = sum(Task.ERI in record.tasks for record in records())
    assert page.locator("article:visible").count() == offered


def test_decisions_are_exported_and_build_reads_them(page: Any, tmp_path: Path) -> None:
    article(page, 0).get_by_label("Keep").check()
    article(page, 1).get_by_label("Drop").check()
    article(page, 1).get_by_label("Reason").fill('two faces, "dark"')
    third = article(page, 2)
    third.get_by_label("Correct").check()
    third.get_by_label("Field").select_option("emotion")
    third.get_by_label("New value").fill("fear")
    third.get_by_text("Another field").click()
    third.get_by_label("Field").nth(1).select_option("sentiment")
    third.get_by_label("New value").nth(1).fill("-1.5")
    assert page.locator("#count").inner_text() == "3"
    decisions = read_curation([export(page, tmp_path / "curation.jsonl")])
    assert {key: made[0].action for key, made in decisions.items()} == {
        records()[0].key: "keep",
        records()[1].key: "drop",
        records()[2].key: "correct",
    }
    amended = [Amendments(decisions=decisions)(record) for record in records()]
    assert amended[0] == records()[0] and amended[3] == records()[3]
    assert isinstance(amended[1], Skipped) and amended[1].detail == 'two faces, "dark"'
    assert isinstance(amended[2], Record)
    assert (amended[2].emotion, amended[2].sentiment) == ("fear", -1.5)
    index = build_shards(
        records(), tmp_path / "s", provenance={}, amend=Amendments(decisions=decisions)
    )
    assert index.num_records == 4


def test_decisions_survive_leaving_the_page(page: Any, tmp_path: Path) -> None:
    article(page, 1).get_by_label("Drop").check()
    article(page, 2).get_by_label("Correct").check()
    article(page, 2).get_by_label("Field").select_option("expressions")
    article(page, 2).get_by_label("New value").fill("Jaw Drop\nLips part")
    first = export(page, tmp_path / "1.jsonl").read_text()
    page.reload()
    assert page.locator("#count").inner_text() == "2"
    assert export(page, tmp_path / "2.jsonl").read_text() == first
    page.get_by_label("undecided only").check()
    assert page.locator("article:visible").count() == 3


def test_what_cannot_be_exported_is_reported(page: Any) -> None:
    third = article(page, 2)
    third.get_by_label("Correct").check()
    third.get_by_label("Field").select_option("pairs")
    third.get_by_label("New value").fill("[[1, ")
    assert third.locator(".error").inner_text().startswith("pairs: ")
    page.get_by_text("Export curation.jsonl").click()
    assert "cannot be exported" in page.locator("#message").inner_text()
    third.get_by_text("Remove").click()
    assert third.locator(".error").inner_text() == "nothing is corrected"


@pytest.mark.parametrize("width", [360, 900, 1600])
def test_the_page_never_scrolls_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
