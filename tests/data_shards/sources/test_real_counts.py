"""What is known about the real annotation files, counted by our readers: every label, id and time.

The numbers were counted from the files themselves, not by these readers; a reader that drops, adds
or changes rows cannot give them.
"""

import collections
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_shards.sources.ecf import Conversation, EcfCorpus, load_ecf, read_json
from data_shards.sources.meld import SPLITS, MeldRow, read_meld
from data_shards.sources.mosei import MoseiCorpus, load_mosei
from data_shards.sources.mosei_files import Interval, read_folds, read_table

# --- MELD


@pytest.fixture(scope="module")
def rows(real_data: Path) -> list[MeldRow]:
    return read_meld(real_data / "MELD")


def of(rows: Sequence[MeldRow], split: str) -> list[MeldRow]:
    return [row for row in rows if row.split == split]


def test_labels_of_meld(rows: Sequence[MeldRow]) -> None:
    names = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")
    emotions = {s: collections.Counter(row.emotion for row in of(rows, s)) for s in SPLITS}
    assert {s: [found[name] for name in names] for s, found in emotions.items()} == {
        "train": [4710, 1743, 1205, 1109, 683, 271, 268],
        "dev": [470, 163, 150, 153, 111, 22, 40],
        "test": [1256, 402, 281, 345, 208, 68, 50],
    }
    sentiments = {s: collections.Counter(row.sentiment for row in of(rows, s)) for s in SPLITS}
    signs = ("neutral", "negative", "positive")
    assert {s: [found[name] for name in signs] for s, found in sentiments.items()} == {
        "train": [4710, 2945, 2334],
        "dev": [470, 406, 233],
        "test": [1256, 833, 521],
    }


def test_only_surprise_of_meld_has_two_sentiments(rows: Sequence[MeldRow]) -> None:
    found = collections.Counter((row.emotion, row.sentiment) for row in rows)
    assert {emotion: s for emotion, s in found if emotion != "surprise"} == {
        "neutral": "neutral",
        "joy": "positive",
        **dict.fromkeys(("anger", "disgust", "fear", "sadness"), "negative"),
    }
    of_split = collections.Counter(
        (row.split, row.sentiment) for row in rows if row.emotion == "surprise"
    )
    assert {s: (of_split[s, "positive"], of_split[s, "negative"]) for s in SPLITS} == {
        "train": (591, 614),
        "dev": (70, 80),
        "test": (119, 162),
    }


def test_ids_of_meld_are_no_positions(real_data: Path, rows: Sequence[MeldRow]) -> None:
    ids: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        ids.setdefault((row.split, row.dialogue), []).append(row.utterance_id)
    assert len(ids) == 1432
    odd = [split for (split, _), found in ids.items() if found != list(range(len(found)))]
    assert [odd.count(split) for split in SPLITS] == [72, 2, 2]
    late = [split for (split, _), found in ids.items() if min(found) > 0]
    assert [late.count(split) for split in SPLITS] == [10, 0, 0]
    for split, last in (("train", 10478), ("dev", 1178), ("test", 2764)):
        path = real_data / "MELD" / f"{split}_sent_emo.csv"
        with path.open(encoding="utf-8", newline="") as stream:
            numbers = [int(row["Sr No."]) for row in csv.DictReader(stream)]
        assert (numbers[0], numbers[-1]) == (1, last) and len(numbers) < last


def test_times_of_meld(real_data: Path, rows: Sequence[MeldRow]) -> None:
    short = 0
    for split in SPLITS:
        path = real_data / "MELD" / f"{split}_sent_emo.csv"
        assert b"\r\n" in path.read_bytes()
        with path.open(encoding="utf-8", newline="") as stream:
            short += sum(row["StartTime"][1] == ":" for row in csv.DictReader(stream))
    assert short == 3367
    seconds = {row.key: row.end_s - row.start_s for row in rows}
    assert all(value >= 0 for value in seconds.values())
    train = sorted(seconds[row.key] for row in of(rows, "train"))
    assert train[int(0.99 * len(train))] == pytest.approx(11.8, abs=0.1)
    assert seconds["meld_test_dia220_utt0"] == pytest.approx(235.1, abs=0.1)
    assert seconds["meld_train_dia309_utt0"] == pytest.approx(41.0, abs=0.1)
    long = collections.Counter(row.split for row in rows if seconds[row.key] > 20)
    assert (long["train"], long["dev"]) == (7, 2)


def test_words_and_names_of_meld(rows: Sequence[MeldRow]) -> None:
    assert [len({row.speaker for row in of(rows, s)}) for s in SPLITS] == [260, 47, 100]
    groups = collections.Counter(row.split for row in rows if row.speaker == "All")
    assert [groups[split] for split in SPLITS] == [33, 10, 8]
    texts = collections.Counter(row.text for row in of(rows, "train"))
    assert texts["Hey!"] == 79
    films = {s: {(row.season, row.episode) for row in of(rows, s)} for s in SPLITS}
    assert (len(films["test"]), len(films["test"] & films["train"])) == (143, 142)


def test_files_that_nobody_annotated_have_no_row(rows: Sequence[MeldRow]) -> None:
    """So that a clip of that name is a stranger, not a clip of another row."""
    keys = {row.key for row in rows}
    strangers = ("dev_dia66_utt9", "dev_dia66_utt10", "dev_dia49_utt4", "dev_dia49_utt5")
    assert not keys & {f"meld_{name}" for name in (*strangers, "test_dia108_utt2")}
    assert {"meld_dev_dia110_utt7", "meld_test_dia279_utt15"} <= keys  # known bad, annotated


# --- ECF


@pytest.fixture(scope="module")
def ecf(real_data: Path) -> EcfCorpus:
    return load_ecf([real_data / "ECF1", real_data / "ECF2"])


def emotions_of(conversations: Sequence[Conversation]) -> dict[str, int]:
    return dict(collections.Counter(u.emotion for c in conversations for u in c.utterances))


def test_emotions_of_ecf(ecf: EcfCorpus) -> None:
    names = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")
    train, test = (emotions_of(ecf.splits[split]) for split in ("train", "test"))
    assert [train[name] for name in names] == [5929, 2301, 1840, 1615, 1147, 414, 373]
    assert [test[name] for name in names] == [1280, 700, 363, 235, 249, 123, 151]
    pairs = collections.Counter(
        c.utterances[target - 1].emotion for c in ecf.splits["test"] for target, _ in c.pairs
    )
    assert [pairs[name] for name in names] == [0, 914, 503, 343, 337, 169, 196]


def test_pairs_of_ecf(ecf: EcfCorpus) -> None:
    everything = [(c.id, *pair) for part in ecf.splits.values() for c in part for pair in c.pairs]
    assert len(everything) == len(set(everything)) == 12_256
    test = [pair for c in ecf.splits["test"] for pair in c.pairs]
    assert sum(cause > target for target, cause in test) == 86
    assert sum(cause == target for target, cause in test) == 1217
    assert all(
        c.utterances[target - 1].emotion != "neutral"
        for part in ecf.splits.values()
        for c in part
        for target, _ in c.pairs
    )
    causes = {
        split: collections.Counter(
            collections.Counter((c.id, target) for c in part for target, _ in c.pairs).values()
        )
        for split, part in ecf.splits.items()
    }
    assert causes["train"] == {1: 4914, 2: 1724, 3: 354, 4: 80, 5: 6, 6: 2, 8: 1}
    assert causes["test"] == {1: 1163, 2: 471, 3: 93, 4: 17, 5: 2}
    turns = {s: [len(c.utterances) for c in part] for s, part in ecf.splits.items()}
    assert (min(turns["train"]), max(turns["train"])) == (1, 33)
    assert (min(turns["test"]), max(turns["test"])) == (1, 27)


def test_editions_and_forms_of_ecf(real_data: Path, ecf: EcfCorpus) -> None:
    one = load_ecf([real_data / "ECF1"], edition="1")
    ids = [{c.id for c in one.splits[split]} for split in ("train", "dev", "test")]
    assert set.union(*ids) == {c.id for c in ecf.splits["train"]} == set(range(1, 1375))
    test = {c.id for c in ecf.splits["test"]}
    assert len(test) == 341 and min(test) >= 1375 and max(test) <= 2039
    stamps = re.findall(
        r"\d\d:\d\d:\d\d\.(\d+)", (real_data / "ECF1" / "all_data_pair.txt").read_text("utf-8")
    )
    assert collections.Counter(map(len, stamps)) == {3: 2 * 13_619 - 3, 2: 3}
    # Subtask 1's pairs name spans: 72 come twice, 36 more name another span of the same cause.
    path = real_data / "ECF2" / "Subtask_1_train.json"
    raw = [document["emotion-cause_pairs"] for document in json.loads(path.read_text("utf-8"))]
    assert sum(len(pairs) - len(set(map(tuple, pairs))) for pairs in raw) == 72
    spans = read_json(path)
    assert sum(len(c.pairs) for c in spans) == 9364
    assert sum(len(c.pairs) - len(set(c.pairs)) for c in spans) == 72 + 36
    assert sum(len(c.targets()) for c in spans) == 6761
    assert sum(not c.pairs for c in spans) == 107
    text = load_ecf([real_data / "ECF1"], splits=["train"]).splits["train"]
    assert (
        sum(
            a.text != b.text
            for c, d in zip(sorted(spans, key=lambda c: c.id), text, strict=True)
            for a, b in zip(c.utterances, d.utterances, strict=True)
        )
        == 159
    )


def test_subtask_1_is_never_taken_for_the_training_set(real_data: Path, tmp_path: Path) -> None:
    for name in ("Subtask_1_train.json", "Subtask_1_test.json"):
        (tmp_path / name).write_bytes((real_data / "ECF2" / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"ECF 2 train: no file Subtask_2_train\.json"):
        load_ecf([tmp_path])
    document = json.loads((real_data / "ECF2" / "Subtask_2_test.json").read_text("utf-8"))[0]
    name = document["conversation"][0]["video_name"]
    assert name == f"dia{document['conversation_ID']}utt1.mp4"  # ECF's own numbers


def test_ecf_beside_meld(real_data: Path, ecf: EcfCorpus, rows: Sequence[MeldRow]) -> None:
    assert ecf.meld_of is not None
    by_place = {(row.split, row.dialogue, row.utterance_id): row for row in rows}
    one = load_ecf([real_data / "ECF1"], edition="1")
    other: collections.Counter[tuple[str, str]] = collections.Counter()
    for split, part in one.splits.items():
        for c in part:
            for u in c.utterances:
                place = ecf.meld_of.get((c.id, u.number))
                if place is not None and place.split != split:
                    other[split, place.split] += 1
    assert other == {("train", "test"): 11}
    speakers = [
        (u.speaker, by_place[place].speaker)
        for c in ecf.splits["train"]
        for u in c.utterances
        if (place := ecf.meld_of.get((c.id, u.number))) is not None
    ]
    assert len(speakers) == 13_389 and sum(a != b for a, b in speakers) == 30
    films = {f"S{row.season:02d}E{row.episode:02d}" for row in rows}
    train = {f"S{row.season:02d}E{row.episode:02d}" for row in rows if row.split == "train"}
    test = [u.episode for c in ecf.splits["test"] for u in c.utterances]
    assert (len(set(test)), len(set(test) & films)) == (145, 109)
    assert sum(episode in train for episode in test) == 2364


# --- MOSEI


@pytest.fixture(scope="module")
def intervals(real_data: Path) -> list[Interval]:
    return read_table(real_data / "MOSEI" / "CMU_MOSEI_Labels.csv")


@pytest.fixture(scope="module")
def mosei(real_data: Path) -> MoseiCorpus:
    return load_mosei(real_data / "MOSEI")


def test_sentiment_of_mosei(mosei: MoseiCorpus) -> None:
    classes = {
        split: collections.Counter(s.sentiment for s in mosei.segments if s.split == split)
        for split in ("train", "dev", "test")
    }
    assert {s: [found[c] for c in range(-3, 4)] for s, found in classes.items()} == {
        "train": [613, 1584, 2542, 3538, 5289, 2256, 505],
        "dev": [47, 159, 300, 433, 631, 251, 50],
        "test": [156, 489, 705, 1025, 1512, 665, 110],
    }


def test_folds_of_mosei(real_data: Path, intervals: Sequence[Interval]) -> None:
    folds = read_folds(real_data / "MOSEI" / "standard_folds.json")
    labelled = {interval.video for interval in intervals}
    assert len(folds.keys() - labelled) == 2
    assert len(labelled - folds.keys()) == 68
    assert all(interval.split == folds.get(interval.video, "") for interval in intervals)


def test_lengths_of_mosei(intervals: Sequence[Interval]) -> None:
    seconds = sorted(interval.end_s - interval.start_s for interval in intervals)
    assert (seconds[0], seconds[-1]) == (pytest.approx(0.12, abs=0.01), pytest.approx(109, abs=1))
    assert seconds[len(seconds) // 2] == pytest.approx(6.4, abs=0.1)
    assert seconds[int(0.99 * len(seconds))] == pytest.approx(24, abs=0.5)


def test_the_table_of_mosei_calls_segments_without_emotion_happy(real_data: Path) -> None:
    """The column that we do not read."""
    path = real_data / "MOSEI" / "CMU_MOSEI_Labels.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        happy = sum(
            row["label6"] in ("0", "0.0") and row["split"] == "0" for row in csv.DictReader(stream)
        )
    assert happy == 10_180
