"""The leak of the paper's recipe in numbers, from the real files, and what the rules keep."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.sources.ecf import Conversation, EcfCorpus, Utterance, UtteranceId, load_ecf
from data_shards.sources.meld import MeldClipId, MeldRow, read_meld
from data_shards.sources.overlap import (
    DEFAULT_LEAKAGE,
    is_clean,
    kept,
    overlap_report,
    require_map,
)


@pytest.fixture(scope="module")
def corpus(real_data: Path) -> EcfCorpus:
    return load_ecf([real_data / "ECF1", real_data / "ECF2"])


@pytest.fixture(scope="module")
def rows(real_data: Path) -> list[MeldRow]:
    return read_meld(real_data / "MELD")


def test_how_much_of_meld_is_in_ecf(corpus: EcfCorpus, rows: Sequence[MeldRow]) -> None:
    assert corpus.meld_of is not None
    report = overlap_report(corpus.splits["train"], corpus.meld_of, rows)
    assert report["utterances"] == {"train": 9776, "dev": 1078, "test": 2535, "none": 230}
    assert report["targets"] == {"train": 5020, "dev": 608, "test": 1322, "none": 131}
    assert report["pairs"]["test"] == 1843
    assert report["meld_share"]["test"] == {"in_ecf": 2535, "of": 2610, "same_emotion": 2086}
    assert sum(part["same_emotion"] for part in report["meld_share"].values()) == 11_014
    assert report["test_targets_same_label"] == 1000
    assert list(report["label_changes"].items())[:2] == [
        ("neutral -> joy", 394),
        ("joy -> neutral", 279),
    ]


def test_what_each_rule_keeps(corpus: EcfCorpus) -> None:
    assert corpus.meld_of is not None
    rules = overlap_report(corpus.splits["train"], corpus.meld_of)["rules"]
    assert rules == {
        "paper": {
            "conversations": 1374,
            "targets": 7081,
            "pairs": 9794,
            "conversations_dropped": 0,
            "targets_dropped": 0,
            "pairs_dropped": 0,
        },
        "no_meld_test": {
            "conversations": 1112,
            "targets": 5729,
            "pairs": 7908,
            "conversations_dropped": 262,
            "targets_dropped": 1352,
            "pairs_dropped": 1886,
        },
        "no_meld_dev_test": {
            "conversations": 1000,
            "targets": 5115,
            "pairs": 7042,
            "conversations_dropped": 374,
            "targets_dropped": 1966,
            "pairs_dropped": 2752,
        },
    }
    assert DEFAULT_LEAKAGE == "no_meld_test"


def test_after_the_default_rule_no_utterance_of_meld_test_is_left(corpus: EcfCorpus) -> None:
    assert corpus.meld_of is not None
    left = kept(corpus.splits["train"], corpus.meld_of, DEFAULT_LEAKAGE)
    places = {(c.id, u.number) for c in left for u in c.utterances}
    splits = {corpus.meld_of[place].split for place in places if place in corpus.meld_of}
    assert splits == {"train", "dev"}


def test_ecf_test_has_no_utterance_of_meld(corpus: EcfCorpus) -> None:
    assert corpus.meld_of is not None
    ids = {c.id for c in corpus.splits["test"]}
    assert not ids & {conversation for conversation, _ in corpus.meld_of}


def test_one_turn_of_the_test_set_drops_the_whole_conversation() -> None:
    turns = tuple(Utterance(number=n, speaker="Ann", emotion="joy", text="Yes.") for n in (1, 2, 3))
    conversation = Conversation(id=7, utterances=turns, pairs=((1, 1), (3, 1)))
    first, second = UtteranceId(7, 1), UtteranceId(7, 2)
    meld_of = {first: MeldClipId("train", 0, 0), second: MeldClipId("dev", 0, 1)}
    assert is_clean(conversation, meld_of, "no_meld_test")
    assert not is_clean(conversation, meld_of, "no_meld_dev_test")
    meld_of[second] = MeldClipId("test", 0, 1)
    assert is_clean(conversation, meld_of, "paper")
    assert not is_clean(conversation, meld_of, "no_meld_test")
    # Another conversation's numbers mean nothing here.
    assert is_clean(replace(conversation, id=8), meld_of, "no_meld_dev_test")


def test_a_rule_without_the_map_is_refused() -> None:
    corpus = EcfCorpus(edition="2", splits={}, meld_of=None, files=())
    assert require_map(corpus, "paper") == {}
    with pytest.raises(ValueError, match=r"leakage: no_meld_test needs all_data_pair_ECFvsMELD"):
        require_map(corpus, "no_meld_test")
