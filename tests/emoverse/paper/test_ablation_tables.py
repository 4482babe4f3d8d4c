"""The paper's tables beside ours: transcription, cells, effects, conditions, page and text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data_shards.tasks import EMOTIONS, Answer, Pair, Task, format_answer
from emoverse.evaluation.metrics import Row
from emoverse.evaluation.predictions import Prediction, write_predictions
from emoverse.evaluation.registry import METRICS
from emoverse.paper.ablation_page import render_ablations
from emoverse.paper.ablation_tables import ablation_json, ablation_text
from emoverse.paper.tables import EFFECTS, MAIN, TABLES, paper_value, states_of, variants

REFERENCE = Path(__file__).resolve().parents[3].parent / "shared" / "reference" / "metrics.md"
STATES = [(name, state) for name in variants() for state in states_of(name)]


# --- the transcription ---


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the reference is not on this machine")
@pytest.mark.parametrize("number", ["III", "V", "VI", "VII", "VIII"])
def test_every_figure_stands_in_the_reference(number: str) -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    start = text.index(f"**Table {number}")
    ends = [text.find(mark, start + 5) for mark in ("\n**", "\nReading notes")]
    block = text[start : min(end for end in ends if end > 0)]
    table = next(one for one in TABLES if one.number == number)
    for row in table.rows:
        for value in row.values:
            if value is not None:
                assert any(shown in block for shown in (f"{value:.2f}", f"{value:.1f}")), value


def test_every_effect_is_the_difference_of_two_printed_cells() -> None:
    tables = {table.number: table for table in TABLES}
    for effect in EFFECTS:
        table = tables[effect.table]
        place = next(
            i
            for i, column in enumerate(table.columns)
            if (column.task, column.metric) == (effect.task, effect.metric)
        )
        cells = {row.ours: row.values[place] for row in table.rows}
        better, worse = cells[effect.better], cells[effect.worse]
        assert better is not None and worse is not None
        assert effect.paper == pytest.approx(better - worse, abs=5e-3), effect.claim
        assert effect.paper > 0


def test_columns_name_metrics_that_exist_and_runs_name_overlays() -> None:
    overlays = Path(__file__).resolve().parents[3] / "configs" / "ablations"
    assert {path.stem for path in overlays.glob("*.yaml")} == {*variants(), "small"}
    assert variants()[0] == MAIN and states_of(MAIN) == ("base", "stage1", "stage2")
    assert states_of("fer_low") == ("stage1",) and states_of("t1", ("VI",)) == ()
    for table in TABLES:
        for column in table.columns:
            assert column.metric in {one.name for one in METRICS[column.task]}
        for row in table.rows:
            assert len(row.values) == len(table.columns)
    assert paper_value(Task.ER, "weighted_f1") == 66.74
    assert paper_value(Task.FER, "exact") is None


# --- ours beside it ---


def predictions(skill: float, seed: int) -> list[Prediction]:
    rng, found = random.Random(seed), []
    truths: dict[Task, list[Answer]] = {
        Task.MSA: ["positive", "negative"],
        Task.ER: list(EMOTIONS),
        Task.ECPE: [(Pair(2, "joy", 1),), (Pair(2, "fear", 2),)],
    }
    for task, answers in truths.items():
        for i in range(60):
            truth = answers[i % len(answers)]
            right = rng.random() < skill
            said = truth if right else answers[(i + 1) % len(answers)]
            row = Row(
                key=f"k{i}",
                task=task,
                reference=truth,
                value=said,
                response=format_answer(task, said),
                sentiment=1.0 if truth == "positive" else -1.0,
            )
            found.append(
                Prediction(
                    row=row,
                    label=format_answer(task, truth),
                    rule="exact",
                    finished=True,
                    baseline=None,
                    question="?",
                    shard=0,
                    slot=i,
                    source="test",
                )
            )
    return found


def write_state(home: Path, variant: str, state: str, skill: float, **protocol: Any) -> None:
    folder = home / variant / "eval" / state
    # One seed: a more skilled system is right wherever a less skilled one is.
    write_predictions(folder / "predictions.jsonl", predictions(skill, seed=1))
    metrics = {
        "run": "tiny",
        "clips": 60,
        "parser": "tolerant",
        "protocol": {"give_emotion": False, "leakage": "no_meld_test", "visual": "video"}
        | protocol,
        "data": {"shards": "data/x", "fingerprint": "abc"},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))


SKILLS = {"base": 0.1, "stage1": 0.6, "stage2": 0.9}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for variant, state in STATES:
        low = {"t1": 0.3, "fer_low": 0.6, "ecpe_only": 0.2}.get(variant, SKILLS[state])
        write_state(tmp_path, variant, state, low)
    return tmp_path


def test_cells_hold_the_paper_and_ours_with_interval(home: Path) -> None:
    result = ablation_json(home)
    table = next(one for one in result["tables"] if one["number"] == "VI")
    main = next(row for row in table["rows"] if row["label"] == "M2SE")
    assert main["paper"][0] == 85.51 and main["run"] == "m2se/stage2"
    cell = main["ours"][0]
    assert cell["low"] < cell["value"] < cell["high"] and cell["n"] == 60
    rows = [one.row for one in predictions(0.9, 1) if one.row.task is Task.MSA]
    right = sum(row.value == row.reference for row in rows)
    assert cell["value"] == pytest.approx(100 * right / 60, abs=0.005)
    three = next(one for one in result["tables"] if one["number"] == "III")
    assert [row["ours"] for row in three["rows"] if row["label"] == "TFN"] == [[None, None]]


def test_effects_appear_turn_round_or_are_not_resolved(home: Path) -> None:
    verdicts = {one["claim"]: one for one in ablation_json(home)["effects"]}
    assert verdicts["M2SE beats zero-shot on MELD"]["verdict"] == "appears"
    assert verdicts["M2SE beats zero-shot on MELD"]["ours"] > 50
    assert verdicts["ECPE alone beats M2SE on ECF2"]["verdict"] == "opposite"
    same = verdicts["a high FER rate lifts MOSEI N/N"]
    assert (same["verdict"], same["ours"], same["standard_error"]) == ("not resolved", 0, 0)


def test_what_was_not_run_says_so(tmp_path: Path) -> None:
    write_state(tmp_path, MAIN, "stage2", 0.9)
    result = ablation_json(tmp_path, ["VI"])
    assert [table["number"] for table in result["tables"]] == ["VI"]
    assert {one["verdict"] for one in result["effects"]} == {"not run"}
    assert "not run" in ablation_text(result) and "not run" in render_ablations(result)
    with pytest.raises(FileNotFoundError, match=r"no evaluated variant; `emoverse ablate CONFIG"):
        ablation_json(tmp_path / "nothing")


def test_conditions_of_both_sides_and_a_warning_where_ours_differ(home: Path) -> None:
    result = ablation_json(home)
    lines = {one["what"]: one for one in result["conditions"]["lines"]}
    assert lines["leakage"]["ours"] == "no_meld_test"
    assert "re-annotates" in lines["leakage"]["paper"]
    assert result["conditions"]["unequal_protocols"] == []
    write_state(home, "t1", "stage2", 0.3, give_emotion=True)
    result = ablation_json(home)
    assert result["conditions"]["unequal_protocols"] == ["give_emotion"]
    assert "the runs differ in give_emotion" in ablation_text(result)
    assert "differ from each other in give_emotion" in render_ablations(result)


def test_other_data_another_parser_and_unfinished_stages_are_told(home: Path) -> None:
    assert ablation_json(home)["conditions"]["unfinished"] == []
    path = home / "t1" / "eval" / "stage2" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics |= {"parser": "strict", "stage_done": False, "data": {"fingerprint": "another"}}
    path.write_text(json.dumps(metrics))
    result = ablation_json(home)
    assert result["conditions"]["unequal_protocols"] == ["data", "parser"]
    for text in (ablation_text(result), render_ablations(result)):
        assert "differ" in text and "data, parser" in text
        assert "Evaluated before the stage was finished: t1/stage2" in text
    page = render_ablations({**result, "failed": {"t3": "exit code 1 <b>"}})
    assert "t3 failed, its rows are missing or from an earlier run: exit code 1 &lt;b&gt;" in page


def test_a_single_clip_resolves_nothing_but_was_run(tmp_path: Path) -> None:
    for state in ("base", "stage2"):
        write_state(tmp_path, MAIN, state, 0.9)
        path = tmp_path / MAIN / "eval" / state / "predictions.jsonl"
        path.write_text(path.read_text().partition("\n")[0] + "\n")
    found = {one["claim"]: one for one in ablation_json(tmp_path)["effects"]}
    one = found["M2SE beats zero-shot on MOSEI"]
    assert (one["verdict"], one["n"]) == ("not resolved", 1)
    assert found["M2SE beats zero-shot on MELD"]["verdict"] == "not run"
    assert "not resolved" in ablation_text(ablation_json(tmp_path))


def test_page_and_text_show_every_table(home: Path) -> None:
    result = ablation_json(home)
    page, text = render_ablations(result), ablation_text(result)
    for table in TABLES:
        assert f"Table {table.number}: " in page and f"Table {table.number}: " in text
    assert page.count("Not transcribed: only the EmoVerse-4B row") == 1
    assert "85.51 | " in text and "+-" in text
    assert "<script>" in page and "http" not in page.partition("<script>")[0]


def test_an_unreadable_state_never_enters(home: Path) -> None:
    (home / "t3" / "eval" / "stage2" / "metrics.json").unlink()
    found = {one["claim"]: one["verdict"] for one in ablation_json(home)["effects"]}
    assert found["ERI and ECPE bring ECF2"] == "not run"
