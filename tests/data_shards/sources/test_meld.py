"""MELD: the quirks of the real files, and of old copies and downloads made like them."""

import collections
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_shards.sources.meld import (
    SPLITS,
    MeldClipId,
    MeldClips,
    MeldRow,
    is_left_out,
    known_issue,
    meld_record,
    read_meld,
    repeats,
)
from data_shards.sources.raw_files import find_files, find_one, parse_time, repair_text
from data_shards.tasks import Task

HEADER = (
    "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
    "StartTime,EndTime"
)
ROW = '5,{text},Ann,{emotion},{sentiment},{dialogue},{utterance},1,2,"0:04:42,198","00:04:43,5"'


def line(**changes: object) -> str:
    values = {"text": "Hello", "emotion": "joy", "sentiment": "positive"}
    return ROW.format(**(values | {"dialogue": 0, "utterance": 1} | changes))


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str, split: str = "train", end: str = "\r\n", header: str = HEADER) -> Path:
        path = tmp_path / f"{split}_sent_emo.csv"
        path.write_bytes((end.join([header, *lines]) + end).encode())
        return tmp_path

    return write


@pytest.fixture(scope="module")
def rows(real_data: Path) -> list[MeldRow]:
    return read_meld(real_data / "MELD")


def of(rows: Sequence[MeldRow], split: str) -> list[MeldRow]:
    return [row for row in rows if row.split == split]


def test_counts_of_the_real_files(rows: Sequence[MeldRow]) -> None:
    assert [len(of(rows, split)) for split in SPLITS] == [9989, 1109, 2610]
    dialogues = [len({row.dialogue for row in of(rows, split)}) for split in SPLITS]
    assert dialogues == [1038, 114, 280]
    train = of(rows, "train")
    assert 60 not in {row.dialogue for row in train} and max(r.dialogue for r in train) == 1038
    emotions = collections.Counter(row.emotion for row in train)
    assert emotions["neutral"] == 4710 and emotions["fear"] == 268
    sentiments = collections.Counter(row.sentiment for row in of(rows, "test"))
    assert sentiments == {"neutral": 1256, "negative": 833, "positive": 521}
    surprise = collections.Counter(row.sentiment for row in train if row.emotion == "surprise")
    assert surprise == {"positive": 591, "negative": 614}  # not a function of the emotion


def test_ids_are_the_files_own(rows: Sequence[MeldRow]) -> None:
    assert [r.utterance_id for r in of(rows, "train") if r.dialogue == 57] == [1, 2, 3]
    gaps = 0
    for split in SPLITS:
        numbers = collections.defaultdict(list)
        for row in of(rows, split):
            numbers[row.dialogue].append(row.utterance_id)
        gaps += sum(ids != list(range(len(ids))) for ids in numbers.values())
    assert gaps == 76


def test_keys_carry_the_split(rows: Sequence[MeldRow]) -> None:
    assert len({row.key for row in rows}) == len(rows)
    assert len({row.name for row in rows}) < len(rows)
    assert rows[0].key == "meld_train_dia0_utt0"


def test_times_of_the_real_files(rows: Sequence[MeldRow]) -> None:
    lengths = sorted(row.end_s - row.start_s for row in of(rows, "train"))
    assert lengths[len(lengths) // 2] == pytest.approx(2.46, abs=0.01)
    zero = [row.key for row in rows if row.end_s == row.start_s]
    assert zero == ["meld_test_dia155_utt3"]
    longest = {row.name: row.end_s - row.start_s for row in of(rows, "test")}
    assert longest["dia38_utt4"] == pytest.approx(304.9, abs=0.1)


def test_real_text_has_no_control_characters_and_keeps_its_quotes(rows: Sequence[MeldRow]) -> None:
    texts = "".join(row.text + row.speaker for row in rows)
    assert not any("\x80" <= character <= "\xa0" for character in texts)
    assert "\u2019" in texts and "\u2026" in texts
    assert "Richard\u2019s Date" in {row.speaker for row in rows}


def test_groups_have_no_single_face(rows: Sequence[MeldRow]) -> None:
    groups = collections.Counter(row.speaker for row in rows if row.is_group)
    assert groups["All"] == 33 + 10 + 8
    assert {"Both", "The Guys", "Joey and Chandler", "Joey/Drake"} <= set(groups)
    assert "Allesandro" not in groups and "Chandler" not in groups


def test_rows_that_come_twice(rows: Sequence[MeldRow]) -> None:
    found = repeats(rows)
    # Ten are equal byte for byte, dia541_utt9 differs from its twin by a space at the end.
    assert len(found["train"]) == 11 and found["train"][-1].name == "dia541_utt9"
    assert [row.key for row in found["train+test"]] == ["meld_test_dia85_utt0"]


def test_an_old_copy_is_repaired(write_csv: Callable[..., Path]) -> None:
    old = "It\x92s\x85 \x93so\x94\xa0good \x97 or\x96"
    folder = write_csv(line(text=f'"{old}"'), end="\n")
    (row,) = read_meld(folder, ["train"])
    assert row.text == "It\u2019s\u2026 \u201cso\u201d good \u2014 or\u2013"
    assert (row.start_s, row.end_s) == (282.198, 283.5)
    assert repair_text("caf\xe9 \x81") == "caf\xe9 \x81"  # no meaning in cp1252: kept


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(emotion="bliss")], r"train_sent_emo\.csv:2: Emotion: must be one of .*'bliss'"),
        ([line(sentiment="mixed")], r":2: Sentiment: must be one of positive.*'mixed'"),
        ([line(dialogue="x")], r":2: invalid literal"),
        ([line(), line()], r":3: dia0_utt1 comes twice in train"),
        (["5,Hello"], r":2: "),
    ],
)
def test_wrong_rows_are_named(
    write_csv: Callable[..., Path], lines: list[str], message: str
) -> None:
    folder = write_csv(*lines)
    with pytest.raises(ValueError, match=message):
        read_meld(folder, ["train"])


def test_wrong_files_are_named(write_csv: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_csv(line(), header=HEADER.replace("Emotion", "Feeling"))
    with pytest.raises(ValueError, match=r"column Emotion: must be in the header"):
        read_meld(folder, ["train"])
    with pytest.raises(FileNotFoundError, match=r"MELD dev annotation: no file dev_sent_emo\.csv"):
        read_meld(folder, ["dev"])
    with pytest.raises(FileNotFoundError, match=r"no such folder; give the corpus as downloaded"):
        read_meld(tmp_path / "none")
    (folder / "old").mkdir()
    (folder / "old" / "train_sent_emo.csv").write_text("other")
    with pytest.raises(ValueError, match=r"must be one file, found .*name its own folder"):
        read_meld(folder, ["train"])
    (folder / "dev_sent_emo.csv").write_bytes(HEADER.encode() + b"\r\n1,\x92,")
    with pytest.raises(ValueError, match=r"dev_sent_emo\.csv:2: must be UTF-8: "):
        read_meld(folder, ["dev"])
    (folder / "dev_sent_emo.csv").write_text(f'{HEADER}\n1,"Hel')  # a download that broke off
    with pytest.raises(ValueError, match=r"dev_sent_emo\.csv:\d: must be a whole csv file"):
        read_meld(folder, ["dev"])


def test_times() -> None:
    assert parse_time("0:04:42,198") == 282.198
    assert parse_time("00:04:42.19") == 282.19  # two digits are hundredths
    assert parse_time("1:00:00") == 3600
    for wrong in ("4:42", "00:61:00,000", "", "aa:bb:cc"):
        with pytest.raises(ValueError, match="a time must look like"):
            parse_time(wrong)


def test_csv_is_read_as_published(write_csv: Callable[..., Path]) -> None:
    quoted = next(csv.reader([line(text='"Well, ""yes"" \u2013 no"')]))[1]
    (row,) = read_meld(write_csv(line(text='"Well, ""yes"" \u2013 no"')), ["train"])
    assert row.text == quoted == 'Well, "yes" \u2013 no'


# --- clips


@pytest.fixture
def download(tmp_path: Path, clip_bytes: bytes) -> Path:
    """Folders as in MELD.Raw, with files that nobody annotated."""
    for name in (
        "train/train_splits/dia0_utt0.mp4",
        "dev/dev_splits_complete/dia0_utt0.mp4",
        "dev/dev_splits_complete/dia66_utt9.mp4",
        "test/output_repeated_splits_test/dia0_utt0.mp4",
        "test/output_repeated_splits_test/final_videos_testdia0_utt0.mp4",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip_bytes)
    return tmp_path


def test_one_name_in_three_splits(download: Path, rows: Sequence[MeldRow]) -> None:
    clips = MeldClips(download)
    folders = {split: clips.clip(MeldClipId(split, 0, 0)).path for split in SPLITS}
    assert len(set(folders.values())) == 3 and len(clips) == 4
    missing = clips.clip(MeldClipId("train", 1, 4))
    assert missing.path is None and missing.expected.endswith("train_splits/dia1_utt4.mp4")
    names = [path.name for path in clips.without_annotation(rows)]
    assert names == ["dia66_utt9.mp4", "final_videos_testdia0_utt0.mp4"]


def test_known_bad_clips(rows: Sequence[MeldRow]) -> None:
    named = {row.key: known_issue(row) for row in rows if known_issue(row)}
    assert "corrupt" in named["meld_train_dia125_utt3"]
    assert "badly cut" in named["meld_test_dia38_utt4"]
    assert "out of sync" in named["meld_train_dia757_utt0"]
    by_rule = {
        rule: [row.key for row in rows if is_left_out(row, rule)]  # type: ignore[arg-type]
        for rule in ("skip-train", "skip", "keep")
    }
    assert by_rule["skip-train"] == ["meld_train_dia125_utt3", "meld_train_dia309_utt0"]
    assert len(by_rule["skip"]) == 6 and by_rule["keep"] == []


def test_the_record_of_a_row(download: Path, rows: Sequence[MeldRow]) -> None:
    clips = MeldClips(download)
    pending = meld_record(rows[0], clips)
    assert pending.tasks == (Task.MSA, Task.ER)
    assert (pending.sentiment, pending.emotion, pending.notes["season"]) == (0.0, "neutral", 8)
    assert meld_record(rows[0], clips, neutral_msa=False).tasks == (Task.ER,)
    bad = next(row for row in rows if row.key == "meld_train_dia309_utt0")
    assert "badly cut" in str(meld_record(bad, clips).notes["media_issue"])


def test_a_file_may_lie_deeper(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    path = tmp_path / "a" / "b" / "x.txt"
    path.write_text("1")
    assert find_files([tmp_path], "x.txt") == [path]
    assert find_one([tmp_path], ["y.txt", "x.txt"], what="x") == path
    (tmp_path / "x.txt").write_text("1")  # the same content twice is one file
    assert find_one([tmp_path], ["x.txt"], what="x") == tmp_path / "a" / "b" / "x.txt"
