"""The report in a real browser, from disk: no error, no request, videos play, controls work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emoverse.paper.ablation_page import render_ablations
from emoverse.report.report import write_report

pytestmark = pytest.mark.browser
MakeRun = Callable[..., Path]


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


@pytest.fixture(scope="module")
def report(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    return write_report(make_run(root / "run"), text_only_run=make_run(root / "text_only"))


@pytest.fixture(params=["light", "dark"])
def page(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=request.param)
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda sent: complaints.append(sent.url) if _outside(sent.url) else None)
    opened.goto(report.as_uri())
    yield opened
    opened.close()
    assert complaints == []


def _outside(url: str) -> bool:
    return not url.startswith(("file:", "data:"))


def test_the_video_plays(page: Any) -> None:
    page.locator(".play").first.click()
    page.wait_for_function("document.querySelector('video').currentTime > 0.3", timeout=10_000)
    state = page.evaluate(
        "[...document.querySelectorAll('video')].map(v => [v.readyState, v.videoWidth, v.paused])"
    )
    assert state[0][:2] == [4, 96] and state[0][2] is False
    page.locator(".play:visible").first.click()  # the next clip; one plays at a time
    page.wait_for_function("!document.querySelectorAll('video')[1].paused")
    page.wait_for_function("document.querySelector('video').paused")


def test_every_table_is_filled(page: Any) -> None:
    """No table without rows, no cell that holds nothing where a number belongs, no broken word."""
    content = page.evaluate(
        """() => ({
          tables: document.querySelectorAll("table").length,
          empty: [...document.querySelectorAll("table")].filter(
            (t) => !t.querySelector("tbody tr")).map((t) => t.className),
          blank: [...document.querySelectorAll("tbody td.num")].filter(
            (cell) => !cell.textContent.trim()).length,
          words: /\\b(NaN|undefined|null|None)\\b/.exec(
            document.querySelector("main").innerText)?.[0] ?? "",
          sections: [...document.querySelectorAll("main section")].map((s) => s.id),
        })"""
    )
    assert content["tables"] > 30 and content["empty"] == [] and content["blank"] == 0
    assert content["words"] == ""
    assert content["sections"] == [
        *("results", "training", "throughput", "metrics", "errors", "calibration"),
        *("hardest", "clips", "incidents", "setup"),
    ]


def test_the_page_works_by_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#results")
    page.locator("#hardest .play").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        "document.querySelector('#hardest video').currentTime > 0.1", timeout=10_000
    )
    page.locator("[data-filter=er]").focus()
    page.keyboard.press("Space")
    assert page.locator("[data-filter=er]").get_attribute("aria-pressed") == "true"
    details = page.locator("#training details.values").first
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    assert details.locator("tbody tr").first.is_visible()


def test_a_screen_reader_finds_names_and_headings(page: Any) -> None:
    """Every control, picture and video has a name, headings do not jump, ids are unique."""
    outline = page.evaluate(
        """() => {
          const named = (e) => (e.getAttribute("aria-label") || e.getAttribute("alt")
            || e.textContent).trim();
          const levels = [...document.querySelectorAll("h1,h2,h3,h4")].map((h) => +h.tagName[1]);
          return {
            nameless: [...document.querySelectorAll("button,a,img,video,svg[role=img],summary")]
              .filter((e) => !named(e)).map((e) => e.outerHTML.slice(0, 80)),
            jumps: levels.filter((level, i) => i && level > levels[i - 1] + 1).length,
            first: levels[0],
            lang: document.documentElement.lang,
            heads: [...document.querySelectorAll("thead th")].filter(
              (th) => !th.hasAttribute("scope")).length,
          };
        }"""
    )
    assert outline == {"nameless": [], "jumps": 0, "first": 1, "lang": "en", "heads": 0}


def test_every_clip_can_be_decoded(page: Any) -> None:
    page.wait_for_function(
        "[...document.querySelectorAll('video')].every(v => v.readyState >= 2 && !v.error)",
        timeout=20_000,
    )


def test_filter_theme_and_chart_readout(page: Any) -> None:
    page.locator("[data-filter=ecpe]").click()
    assert page.locator(".clip:visible").count() == page.locator("[data-task=ecpe]").count()
    page.locator("[data-filter='']").click()
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.locator("#theme").click()
    assert page.evaluate(background) != before
    page.locator(".plot svg").first.hover()
    assert "step" in page.locator(".readout:visible").inner_text()


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_the_page_never_scrolls_sideways(browser: Any, report: Path, width: int) -> None:
    opened = browser.new_page(viewport={"width": width, "height": 800})
    opened.goto(report.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.close()


def test_text_has_enough_contrast(page: Any) -> None:
    """WCAG AA: 4.5 to 1 for the text colours on the surfaces they stand on."""
    script = """() => {
      const css = getComputedStyle(document.documentElement);
      const light = (name) => {
        const hex = css.getPropertyValue(name).trim().slice(1);
        const parts = [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255);
        const [r, g, b] = parts.map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ratios = {};
      for (const ink of ["--ink", "--soft", "--good", "--bad", "--mid", "--accent"])
        for (const ground of ["--bg", "--card"]) {
          const [low, high] = [light(ink), light(ground)].sort((a, b) => a - b);
          ratios[ink + ground] = (high + 0.05) / (low + 0.05);
        }
      return ratios;
    }"""
    too_faint = {pair: ratio for pair, ratio in page.evaluate(script).items() if ratio < 4.5}
    assert too_faint == {}


def test_the_page_of_the_ablations_opens_filled_and_quiet(browser: Any, tmp_path: Path) -> None:
    effect = {"table": "VI", "claim": "a <b> c", "better": "x/y", "worse": "z/y", "paper": 1.5}
    effect |= {"ours": 2.0, "standard_error": 0.5, "verdict": "appears", "n": 9}
    row = {"label": "M2SE", "paper": [85.51, None], "run": "m2se/stage2"}
    row["ours"] = [{"value": 80.0, "low": 70.0, "high": 90.0, "n": 9}, None]
    table = {"number": "VI", "title": "t", "columns": ["a", "b"], "rows": [row], "note": "n"}
    line = {"what": "data", "paper": "p", "ours": "o"}
    conditions = {"lines": [line], "unequal_protocols": [], "unfinished": ["m2se/stage2"]}
    result = {"tables": [table], "effects": [effect], "conditions": conditions}
    result |= {"failed": {"x": "<i>out of memory</i>"}}
    path = tmp_path / "ablations.html"
    path.write_text(render_ablations(result), encoding="utf-8")
    page = browser.new_page(viewport={"width": 900, "height": 700})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: complaints.append(sent.url) if _outside(sent.url) else None)
    page.goto(path.as_uri())
    assert page.locator("#tables tbody tr").count() == 1
    assert "80.00" in page.locator("#tables").inner_text()
    assert "a <b> c" in page.locator("#effects").inner_text()
    warnings = page.locator("#tables .warning").all_inner_texts()
    assert "<i>out of memory</i>" in warnings[0] and "m2se/stage2" in warnings[1]
    page.locator("#theme").click()
    page.close()
    assert complaints == []
