"""The report of whole, partial and empty runs: its numbers, its page, its text table."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards.shards.record import Frames, Record
from data_shards.tasks import TASKS, Task
from emoverse.evaluation.intervals import score
from emoverse.evaluation.predictions import read_predictions, rows_of_task
from emoverse.evaluation.registry import METRICS, primary
from emoverse.report.charts import Series, line_chart, nice_ticks, share_chart, thin_out
from emoverse.report.clips import HARD_PER_TASK, NUM_CLIPS, playable_mp4
from emoverse.report.report import write_report
from emoverse.report.summary import Evaluation, majority_rows_of, summary_text

MakeRun = Callable[..., Path]
WEAK = {"base": 0.1, "stage1": 0.35, "stage2": 0.4}


def summary_of(run: Path) -> dict[str, dict[str, object]]:
    summary = json.loads((run / "summary.json").read_text())
    assert isinstance(summary, dict)
    return summary


class Outline(html.parser.HTMLParser):
    """Tags with attributes, ids, and whether every opened tag is closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def whole(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    run, text_only = make_run(root / "run"), make_run(root / "text_only", skill=WEAK)
    page = write_report(run, text_only_run=text_only, seconds=754.2, peak_memory_bytes=3 * 2**30)
    assert page == run / "report.html"
    return run


def test_summary_holds_every_system_and_the_margin(whole: Path) -> None:
    summary = summary_of(whole)
    assert list(summary["tasks"]) == [str(task) for task in TASKS]
    assert (summary["seconds"], summary["peak_memory_bytes"]) == (754.2, 3 * 2**30)
    for task in TASKS:
        line = summary["tasks"][str(task)]
        scored = "stage1" if task is Task.FER else "stage2"  # the last stage that trains it
        rows = rows_of_task(read_predictions(whole / "eval" / scored / "predictions.jsonl"), task)
        assert line["scored"] == scored
        assert line["metric"] == primary(task).name
        assert line[scored] == pytest.approx(score(primary(task), rows).value, abs=1e-6)
        better = max(line["majority"], line["text_only"])
        assert line["difference"] == pytest.approx(line[scored] - better, abs=2e-6)
        assert line["n"] == len(rows) and line["standard_error"] > 0
        beats = [line[scored] - line[name] >= 0.05 for name in ("majority", "text_only")]
        assert not line["beats_baselines"] or all(beats)


def test_the_rules_answers_keep_their_conversation(whole: Path) -> None:
    """The official ECPE metrics are over conversations, those of the rule beside it too."""
    predictions = [
        dataclasses.replace(p, row=dataclasses.replace(p.row, conversation="the only one"))
        for p in read_predictions(whole / "eval" / "stage2" / "predictions.jsonl")
    ]
    state = Evaluation(which="stage2", metrics={}, predictions=predictions)
    official = next(metric for metric in METRICS[Task.ECPE] if metric.whole is not None)
    assert score(official, state.rows(Task.ECPE)).n == 1
    assert score(official, majority_rows_of(state, Task.ECPE)).n == 1


def test_page_is_well_formed_self_contained_and_labelled(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.open == []
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in outline.tags:
        for name in ("src", "href"):
            target = attrs.get(name) or "#"
            assert target.startswith(("#", "data:")), target
    assert not re.search(r"@import|url\(", text)
    videos = outline.named("video")
    hard = len(videos) - NUM_CLIPS
    assert 2 * len(TASKS) - 2 <= hard <= HARD_PER_TASK * len(TASKS)  # few answers are wrong
    assert all("controls" in video and video["aria-label"] for video in videos)
    assert all(svg.get("aria-label") for svg in outline.named("svg"))
    assert "</script>" not in text[: text.rindex("<script>")]  # what a run says stays text
    assert "&lt;/script&gt;" in text
    assert "no_meld_test" in text


def test_every_task_has_example_clips_with_all_answers(whole: Path) -> None:
    outline = Outline((whole / "report.html").read_text(encoding="utf-8"))
    shown = [attrs["data-task"] for attrs in outline.named("article")]
    hard = shown[: len(shown) - NUM_CLIPS]  # their section comes first
    assert {hard.count(str(task)) for task in TASKS} <= {1, HARD_PER_TASK}
    rest = shown[len(hard) :]
    assert {rest.count(str(task)) for task in TASKS} <= {2, 3}
    assert len(outline.named("img")) == len(shown)  # every record here has a peak frame
    text = (whole / "report.html").read_text(encoding="utf-8")
    article = text[text.index("<article") : text.index("</article>")]
    for name in ("reference", "text only", "before", "after stage 1", "after stage 2"):
        assert f'<th scope="row">{name}</th>' in article


def test_writing_again_changes_nothing_and_keeps_the_measured_time(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    write_report(run, seconds=10.0, peak_memory_bytes=7)
    first = (run / "report.html").read_bytes(), (run / "summary.json").read_bytes()
    write_report(run)
    assert first == ((run / "report.html").read_bytes(), (run / "summary.json").read_bytes())
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("states", [(), ("base",), ("base", "stage1"), ("stage1",)])
def test_a_partial_run_shows_what_it_has(
    make_run: MakeRun, tmp_path: Path, states: tuple[str, ...]
) -> None:
    run = make_run(tmp_path / "run", states=states, logs=bool(states))
    page = write_report(run)
    Outline(page.read_text(encoding="utf-8"))
    for line in summary_of(run)["tasks"].values():
        assert (line["before"] is None) == ("base" not in states)
        assert (line["stage1"] is None) == ("stage1" not in states)
        assert line["stage2"] is None and line["text_only"] is None
        assert line["scored"] == ("stage1" if "stage1" in states else None)
        assert (line["difference"] is None) == ("stage1" not in states)
    table = summary_text(summary_of(run))
    assert len(table.splitlines()) == 2 + len(TASKS)
    assert "nan" not in table and " - " in table


def test_without_shards_the_clips_are_text(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", shards=tmp_path / "gone")
    outline = Outline(write_report(run).read_text(encoding="utf-8"))
    assert outline.named("video") == [] and outline.named("img") == []
    assert len(outline.named("article")) > NUM_CLIPS


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.yaml: not found; .*emoverse train"):
        write_report(tmp_path)


def test_a_broken_prediction_names_file_and_line(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", states=("base",))
    path = run / "eval" / "base" / "predictions.jsonl"
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"predictions\.jsonl:181: not a prediction .*evaluate"):
        write_report(run)


def test_extracted_frames_become_a_playable_clip(records: list[Record]) -> None:
    import dataclasses

    import numpy as np

    from data_shards.media.pixels import jpeg_encode
    from data_shards.media.video import count_frames

    jpeg = jpeg_encode(np.zeros((57, 45, 3), dtype=np.uint8))
    stored = dataclasses.replace(records[0], media=Frames(jpegs=(jpeg,) * 4, peak_jpeg=jpeg))
    assert count_frames(playable_mp4(stored)) == 4
    assert playable_mp4(records[0]) == records[0].media.mp4  # type: ignore[union-attr]


def test_ticks_are_round_and_cover_the_range() -> None:
    assert nice_ticks(0, 3.2) == [0, 1, 2, 3, 4]
    assert nice_ticks(0, 0.37) == [0, 0.1, 0.2, 0.3, 0.4]
    assert nice_ticks(5, 5)[0] <= 5 < nice_ticks(5, 5)[-1]


def test_charts_thin_out_long_curves_and_survive_empty_ones() -> None:
    long = Series(name="a", color="msa", xs=range(10_000), ys=[1.0] * 10_000)
    assert len(thin_out(long).xs) == 240 and set(thin_out(long).ys) == {1.0}
    assert line_chart("t", [], x_label="x", y_label="y") is None
    assert share_chart("t", [], [], x_label="x", y_label="y") is None
    point = line_chart(
        "t", [Series(name="a", color="msa", xs=[10], ys=[0.5])], x_label="x", y_label="y"
    )
    assert point is not None and "NaN" not in point.svg
    assert (point.head, point.rows) == (["x", "a"], [["10", "0.5"]])


def test_the_report_needs_no_torch() -> None:
    code = "import sys, emoverse.report.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
