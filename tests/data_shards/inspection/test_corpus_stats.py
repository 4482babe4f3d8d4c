"""Table I beside the real annotation files, without any media."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.inspection.corpus_stats import corpus_stats, report_text
from data_shards.inspection.counts import (
    MELD_PART,
    MMSA_TRAIN,
    MOSEI_PART,
    TABLE_ONE,
    table_rows,
)
from data_shards.inspection.stats_page import page
from launch import cli

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def real_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs the real annotation files in {SHARED}")
    return SHARED


@pytest.fixture(scope="module")
def report(real_data: Path) -> dict[str, Any]:
    return corpus_stats(
        meld=real_data / "MELD",
        ecf=[real_data / "ECF2", real_data / "ECF1"],
        mosei=real_data / "MOSEI",
    )


def test_table_one_decomposes() -> None:
    assert TABLE_ONE["msa"] == TABLE_ONE["er"] == MOSEI_PART + MELD_PART
    assert TABLE_ONE["fer"] == TABLE_ONE["msa"] - MELD_PART == MOSEI_PART
    assert TABLE_ONE["records"] == TABLE_ONE["msa"] + TABLE_ONE["ecpe"]
    assert sum(TABLE_ONE.values()) - TABLE_ONE["records"] == 79_508
    assert MMSA_TRAIN - MOSEI_PART == 456


def test_what_the_real_files_give(report: dict[str, Any]) -> None:
    assert report["meld"]["rows"]["train"] == 9989
    assert report["ecf"]["splits"]["train"]["targets"] == 7081
    assert report["mosei"]["segments"]["train"] == 16_327
    rows = {row["name"]: row for row in report["table_one"]}
    assert [rows[name]["paper"] for name in rows] == [25859, 25859, 15870, 4839, 7081, 32940]
    assert rows["msa"]["parts"] == {"mosei": 16_327, "meld": 9989, "ecf": 0}
    assert (rows["msa"]["found"], rows["msa"]["difference"]) == (26_316, 457)
    # The table has no emotions that can be believed, so er is MELD's alone.
    assert rows["er"]["parts"]["mosei"] is None and rows["er"]["found"] == 9989
    assert (rows["ecpe"]["found"], rows["ecpe"]["difference"]) == (7081, 0)
    assert rows["eri"]["parts"]["meld"] is None
    assert (rows["records"]["found"], rows["records"]["difference"]) == (33_397, 457)


def test_what_nothing_explains(report: dict[str, Any]) -> None:
    segments, reasons = report["unexplained"]
    assert (segments["paper"], segments["mmsa"], segments["difference"]) == (15_870, 16_326, 456)
    assert (segments["found"], segments["difference_found"]) == (16_327, 457)
    assert reasons["paper"] == 4839
    nearest = reasons["nearest_sum_of_meld_train_emotions"]["sum"]
    assert nearest != 4839 and abs(nearest - 4839) >= 12
    lengths = report["mosei"]["train_by_length"]
    assert (lengths["below 2 s"], lengths["above 20 s"], lengths["above 18 s"]) == (386, 403, 615)


def test_text_and_page_show_the_numbers(report: dict[str, Any]) -> None:
    text = report_text(report)
    for expected in (
        r"MELD rows: train 9,989, dev 1,109, test 2,610",
        r"ECF 2 train: 1,374 conversations, 13,619 utterances, 9,794 pairs, 7,081 targets",
        r"msa +25,859 +26,316 +\+457 +16,327 +9,989 +0",
        r"eri +4,839 +- +-",
        r"ecpe +7,081 +7,081 +\+0",
        r"records: 25,859 \+ 7,081",
        r"mosei train segments: Table I 15,870, mmsa 16,326, found 16,327",
        r"2,535 of MELD test's 2,610 utterances are in it; 1,000 targets have",
        r"MELD test +2,535 / 1,322 / 1,843",
        r"no_meld_test +1,112 / 5,729 / 7,908, 262 conversations dropped .*the default",
        r"no_meld_dev_test +1,000 / 5,115 / 7,042, 374 conversations dropped",
    ):
        assert re.search(expected, text), expected
    html = page(report)
    numbers = ("25,859", "26,316", "16,326", "9,989", "7,081", "2,535", "5,729", "4,839")
    labels = ("4,710", "2,945", "8,050", "5,929", "2,814")  # of MELD, MOSEI, ECF and its pairs
    for expected in (*numbers, *labels):
        assert f">{expected}<" in html, expected
    assert html.count("<section") == html.count("</section>") >= 6


def test_labels_and_lengths_of_the_real_files(report: dict[str, Any]) -> None:
    meld, mosei, ecf = report["meld"], report["mosei"], report["ecf"]["splits"]
    assert list(meld["emotions"]["train"].items())[:3] == [
        ("neutral", 4710),
        ("joy", 1743),
        ("surprise", 1205),
    ]
    assert meld["sentiments"]["test"] == {"neutral": 1256, "negative": 833, "positive": 521}
    assert meld["repeated_moments"] == {"train": 11, "train+test": 1}
    assert mosei["signs"]["train"] == {"positive": 8050, "negative": 4739, "zero": 3538}
    assert ecf["train"]["emotions"]["joy"] == 2301
    assert ecf["train"]["cause_place"]["self"] == 4892
    assert ecf["test"]["causes_per_target"] == {"1": 1163, "2": 471, "3": 93, "4": 17, "5": 2}
    assert (meld["seconds"]["train"]["median"], meld["seconds"]["test"]["max"]) == (2.46, 304.94)
    assert (mosei["seconds"]["train"]["median"], mosei["seconds"]["train"]["min"]) == (6.398, 0.12)
    assert (ecf["train"]["turns"]["max"], ecf["test"]["turns"]["max"]) == (33, 27)
    assert meld["words"]["train"]["median"] == 6
    assert mosei["words"]["train"] == {}  # the table has no words: unknown, not zero
    text = report_text(report)
    for expected in (
        r"meld train, emotions: neutral 4,710, joy 1,743, surprise 1,205, anger 1,109, sadness 683",
        r"meld test, sentiment: neutral 1,256, negative 833, positive 521",
        r"mosei train, sentiment: positive 8,050, negative 4,739, zero 3,538",
        r"ecf train, position of the cause: self 4,892, 1 before 2,945, .*, and 16 more",
        r"ecf test, targets by causes: 1 1,163, 2 471, 3 93, 4 17, 5 2",
        r"lengths +min +mean +median +p95 +max",
        r"meld test seconds +0 +3.31 +2.46 +7.76 +304.94",
        r"meld train words +1 +7.95 +6 +20 +69",
        r"ecf train turns +1 +9.91 +9 +20 +33",
    ):
        assert re.search(expected, text), expected
    assert "mosei train words" not in text


@pytest.mark.parametrize("mosei", [True, False])
def test_command_on_annotation_folders_alone(
    real_data: Path, capsys: pytest.CaptureFixture[str], mosei: bool
) -> None:
    words = ["stats", "--meld", real_data / "MELD", "--ecf", real_data / "ECF2", real_data / "ECF1"]
    words += ["--mosei", real_data / "MOSEI"] if mosei else []
    assert cli.main([str(word) for word in [*words, "--json"]]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["table_one"]}
    assert rows["msa"]["parts"].get("mosei") == (16_327 if mosei else None)
    assert rows["msa"]["found"] == (26_316 if mosei else 9989)
    assert (rows["ecpe"]["found"], rows["ecpe"]["difference"]) == (7081, 0)
    assert rows["msa"]["decomposition"].startswith("15,870 of MOSEI + 9,989 of MELD")
    segments, reasons = found["unexplained"]
    assert (segments["mmsa"], segments["paper"], segments["difference"]) == (16_326, 15_870, 456)
    assert segments["found"] == (16_327 if mosei else None)
    assert (reasons["paper"], reasons["found"]) == (4839, None)
    assert found["overlap"]["rules"]["no_meld_test"]["targets"] == 5729
    assert found["overlap"]["utterances"]["test"] == 2535


def test_command_on_the_real_files(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["stats", "--meld", real_data / "MELD", "--ecf", real_data / "ECF2", "--json"]
    assert cli.main([str(word) for word in [*words, "--html", tmp_path / "s.html"]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["meld"]["rows"]["train"] == 9989
    assert found["ecf"]["splits"]["train"]["targets"] == 7081
    assert "all_data_pair_ECFvsMELD.txt" in found["overlap"]["missing"]
    assert (tmp_path / "s.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("words", [(), ("some", "--meld", "other")])
def test_one_kind_of_folder_is_asked_for(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["stats", *words]) == 2
    assert "give either a shard folder or annotation folders" in capsys.readouterr().err


def test_a_page_needs_a_folder(
    tmp_path: Path, make_index: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make_index(tmp_path / "s", {("msa", "er"): 3})
    page = str(tmp_path / "no" / "x.html")
    assert cli.main(["stats", str(tmp_path / "s"), "--index-only", "--html", page]) == 2
    assert "--html: no folder" in capsys.readouterr().err


def test_unknown_parts_make_no_total() -> None:
    rows = {row["name"]: row for row in table_rows({"a": {"msa": 3, "er": None}}, 3)}
    assert rows["er"]["found"] is None and rows["er"]["difference"] is None
    assert rows["msa"]["difference"] == 3 - 25_859
