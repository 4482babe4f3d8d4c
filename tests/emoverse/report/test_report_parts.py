"""Sections of the report: paper column, calibration, hardest clips, systems, incidents."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards.tasks import Task
from emoverse.report.curves import read_curves
from emoverse.report.incidents import read_incidents
from emoverse.report.report import write_report
from emoverse.report.summary import load_run_config
from launch.cli import main

MakeRun = Callable[..., Path]


def section(text: str, key: str) -> str:
    start = text.index(f'<section id="{key}"')
    return text[start : text.index("</section>", start)]


def add_lines(path: Path, *lines: object) -> None:
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    path.write_text("".join(f"{line}\n" for line in [*whole, *map(json.dumps, lines)]))


@pytest.fixture(scope="module")
def run(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("parts") / "run")
    add_lines(
        run / "stage1" / "metrics.jsonl",
        {"kind": "end", "step": 300, "reason": "stopped"},
        {"kind": "start", "step": 300, "world_size": 4},
        {"kind": "skip", "step": 301, "reason": "loss is not finite: nan", "dump": "bad/301.json"},
        {"kind": "note", "step": 302, "text": "rank 1 is <slow>"},
        {"kind": "end", "step": 303, "reason": "done", "seconds": 9.0},
    )
    jobs = run / "jobs"
    jobs.mkdir()
    (jobs / "41.jsonl").touch()
    folder = run / "stage2" / "checkpoints" / "step_000300"
    folder.mkdir(parents=True)
    add_lines(
        jobs / "41.jsonl",
        {"event": "start", "time": "10:00", "parts": ["stage1"], "ranks": 4, "nodes": "gpu[1-2]"},
        {"event": "end", "code": 75, "requeued": True, "reason": None},
        {"event": "start", "time": "11:00", "parts": ["stage1"], "ranks": 4, "nodes": "gpu[3-4]"},
        {"event": "end", "code": 0, "requeued": False},
        {"event": "end", "code": 75, "requeued": False, "reason": "max_requeues is <2>"},
    )
    damage = {"key": "clip-1", "shard": 0, "task": "er", "position": 7, "cause": "checksum"}
    (folder / "state.json").write_text(json.dumps({"data": {"quarantine": [damage]}}))
    return run


@pytest.fixture(scope="module")
def text(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    other = tmp_path_factory.mktemp("other") / "other.jsonl"
    lines = []
    for line in (run / "eval" / "stage2" / "predictions.jsonl").read_text().splitlines():
        fields = json.loads(line)
        if fields["task"] == "eri":
            kept = {name: fields[name] for name in ("key", "task", "label")}
            lines.append(kept | {"response": "A person looks confident & assertive."})
    other.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    code = main(["report", str(run), "--system", f"Somebody's model={other}", "--json"])
    assert code == 0
    return (run / "report.html").read_text(encoding="utf-8")


def test_incidents_come_from_the_files_of_the_run(run: Path) -> None:
    incidents = [
        (incident.stage, incident.kind, incident.step, incident.text)
        for incident in read_incidents(run, load_run_config(run))
    ]
    assert incidents == [
        ("stage1", "stop", 300, "stopped"),
        ("stage1", "restart", 300, "launch 2, 4 processes"),
        ("stage1", "skipped step", 301, "loss is not finite: nan; bad/301.json"),
        ("stage1", "note", 302, "rank 1 is <slow>"),
        ("stage2", "replaced record", None, "clip-1 of 0 (er, position 7): checksum"),
        ("stage1", "requeue", None, "start 2 of job 41, 4 ranks on gpu[3-4], 11:00"),
        ("stage1", "job ended", None, "job 41 was not requeued: max_requeues is <2>"),
    ]


def test_incidents_are_shown_as_text(text: str) -> None:
    shown = section(text, "incidents")
    assert "rank 1 is &lt;slow&gt;" in shown and "bad/301.json" in shown
    assert shown.count("<tr>") == 8


def test_a_run_without_incidents_is_reported_as_such(make_run: MakeRun, tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "calm")).read_text(encoding="utf-8")
    assert "No incidents: no restart, no skipped step" in section(page, "incidents")


def test_the_papers_values_are_shown_with_their_conditions(text: str) -> None:
    shown = section(text, "metrics")
    for value in ("0.855", "0.878", "0.678", "0.667", "0.723", "0.722"):
        assert f'<td class="num">{value}</td>' in shown
    assert "ECF 2.0 training data re-annotates" in shown and "no_meld_test" in shown


def test_calibration_has_a_diagram_and_a_table_per_task(text: str) -> None:
    shown = section(text, "calibration")
    assert shown.count("<svg") == 4  # free text is never right as a whole
    for task in (Task.MSA, Task.ER, Task.FER, Task.ECPE):
        assert re.search(rf"{task.upper()}, stage\d: ECE 0\.\d\d\d", shown)


def test_the_hardest_clips_are_wrong_and_show_every_system(text: str) -> None:
    shown = section(text, "hardest")
    articles = shown.split("<article")[1:]
    assert 8 <= len(articles) <= 10  # two per task, where two are wrong
    for article in articles:
        scored = "after stage 1" if 'data-task="fer"' in article else "after stage 2"
        row = article[article.index(f'<th scope="row">{scored}</th>') :]
        assert 'class="verdict wrong"' in row[: row.index("</tr>")]
        assert "<video" in article and "Peak frame, " in article
        assert article.count("Somebody&#39;s model") == ('data-task="eri"' in article)
    assert "looks confident &amp; assertive." in shown


def test_throughput_charts_have_their_values_as_tables(text: str) -> None:
    shown = section(text, "throughput")
    assert shown.count("<svg") == 8 and shown.count('<details class="values">') == 8
    assert "Packed tokens<span>per second</span>" in shown
    assert "Peak memory so far<span>GiB</span>" in shown and "000000" not in shown


def test_a_system_needs_name_and_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--system", "other.jsonl"]) == 2
    assert "--system: give NAME=FILE.jsonl, found 'other.jsonl'" in capsys.readouterr().err
    assert main(["report", str(run), "--system", "x=gone.jsonl"]) == 2
    assert "gone.jsonl: no such file" in capsys.readouterr().err


def test_steps_between_a_stop_and_the_last_interval_are_counted(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """A stage of 4 steps that logs every 2, stopped after step 3: step 3 is in no interval."""
    run = make_run(tmp_path / "run")
    config = load_run_config(run)
    batch = config.train.global_batch_size
    start = {"kind": "start", "num_steps": 4, "num_samples": 3 * batch + 1}  # the last is short
    task = {str(name): {"samples": 1, "loss": 1.0} for name in config.stages["stage1"].rates}
    steps = [{"kind": "step", "step": step, "loss": 1.0} for step in (1, 2, 3, 4)]
    intervals = [
        {"kind": "interval", "step": n, "task": task, "samples_per_s": 1.0} for n in (2, 4)
    ]
    lines = [{**start, "step": 0}, *steps[:2], intervals[0], steps[2]]
    lines += [{"kind": "end", "step": 3, "reason": "stopped"}, {**start, "step": 3}]
    path = run / "stage1" / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, steps[3], intervals[1]]))
    first = next(curve for curve in read_curves(run, config) if curve.name == "stage1")
    assert (first.steps, first.samples) == (4, 3 * batch + 1)
