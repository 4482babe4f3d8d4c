"""CMU-MOSEI: the real label table and folds, and files made like the other editions."""

import collections
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_shards.build.clip_record import make_record
from data_shards.media.video import encode_mp4
from data_shards.shards.record import Record
from data_shards.sources.mosei import (
    EmotionRule,
    MoseiClips,
    MoseiCorpus,
    Segment,
    Ties,
    emotion_of,
    join_by_rank,
    join_by_time,
    load_mosei,
    mosei_record,
)
from data_shards.sources.mosei_files import (
    Interval,
    LabelRow,
    Line,
    read_csd,
    read_folds,
    read_label_csv,
    read_table,
    read_transcript,
)
from data_shards.tasks import Task

HAPPY, SAD, ANGRY = 0, 1, 2
ODD_IDS = ("-3g5yACwYnA", "a_b__c_", "00123")  # '-' first, '_' inside, digits with leading zeros


@pytest.fixture(scope="module")
def table(real_data: Path) -> MoseiCorpus:
    return load_mosei(real_data / "MOSEI")


def test_counts_of_the_real_table(table: MoseiCorpus) -> None:
    assert table.edition == "table"
    splits = collections.Counter(segment.split for segment in table.segments)
    assert splits == {"train": 16_327, "dev": 1871, "test": 4662}
    assert table.joined["segments_in_no_fold"] == 399
    assert len({segment.key for segment in table.segments}) == 22_860


def test_quirks_of_the_real_table(real_data: Path, table: MoseiCorpus) -> None:
    intervals = read_table(real_data / "MOSEI" / "CMU_MOSEI_Labels.csv")
    assert len(intervals) == 23_259
    videos = {interval.video for interval in intervals}
    assert len(videos) == 3293
    assert sum(video.startswith("-") for video in videos) == 63
    assert sum("_" in video for video in videos) == 347
    assert sum(video.isdecimal() for video in videos) == 459
    below = [interval.start_s for interval in intervals if interval.start_s < 0]
    assert len(below) == 239 and min(below) == pytest.approx(-0.49, abs=0.01)
    unordered = collections.defaultdict(list)
    for interval in intervals:
        unordered[interval.video].append(interval.end_s)
    assert sum(ends != sorted(ends) for ends in unordered.values()) == 1318


def test_signs_of_the_real_table(table: MoseiCorpus) -> None:
    def signs(split: str) -> list[int]:
        values = [s.sentiment for s in table.segments if s.split == split]
        return [sum(v < 0 for v in values), sum(v == 0 for v in values), sum(v > 0 for v in values)]

    assert signs("train") == [4739, 3538, 8050]
    assert signs("test") == [1350, 1025, 2287]


def test_the_tables_happy_is_not_believed(table: MoseiCorpus, tmp_path: Path) -> None:
    """Its label6 makes every segment without emotion happy."""
    assert all(segment.intensities is None for segment in table.segments)
    pending = mosei_record(table.segments[0], MoseiClips(tmp_path))
    assert pending is not None and pending.tasks == (Task.MSA,) and pending.emotion is None


def test_real_folds(real_data: Path) -> None:
    folds = read_folds(real_data / "MOSEI" / "standard_folds.json")
    assert collections.Counter(folds.values()) == {"train": 2249, "dev": 300, "test": 678}


# --- one segment, several emotions


@pytest.mark.parametrize(
    ("values", "rule", "ties", "expected"),
    [
        ((0, 0, 0, 0, 0, 0), "strongest", "first", "neutral"),
        ((0, 0, 0, 0, 0, 0), "single", "skip", "neutral"),
        ((0.67, 0, 0, 0, 1.33, 0), "strongest", "first", "disgust"),
        ((0, 1, 1, 0, 0, 0), "strongest", "first", "sadness"),
        ((0, 1, 1, 0, 0, 0), "strongest", "skip", None),
        ((0.67, 0, 0, 0, 1.33, 0), "single", "first", None),
        ((0, 0, 0, 0.33, 0, 0), "single", "first", "surprise"),
    ],
)
def test_one_emotion_of_several(
    values: Sequence[float], rule: EmotionRule, ties: Ties, expected: str | None
) -> None:
    assert emotion_of(values, rule, ties) == expected


# --- MMSA's form


COLUMNS = "video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode"


def write_labels(path: Path, rows: Sequence[Mapping[str, object]], columns: str = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns.split(","), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def label(video: str, clip: int | str, sentiment: float, mode: str = "train") -> dict[str, object]:
    text = f"words {clip}, said"
    return {"video_id": video, "clip_id": clip, "text": text, "label": sentiment, "mode": mode}


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    other = "video_id,clip_id,text,label,annotation,mode,label_T,label_A,label_V"
    rows = [label(video, 0, 1.5, "valid") for video in ODD_IDS]
    for number, columns in enumerate((COLUMNS, other)):
        found = read_label_csv(write_labels(tmp_path / f"{number}.csv", rows, columns))
        assert [row.video for row in found] == list(ODD_IDS)  # no zero is lost, nothing is split
        assert {(row.clip, row.text, row.sentiment, row.split) for row in found} == {
            ("0", "words 0, said", 1.5, "dev")
        }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([label("a", 0, 4)], r":2: label: must be a number from -3 to 3, found '4'"),
        ([label("a", 0, 1, "all")], r":2: mode: must be one of train, .*'all'"),
        ([label("a", "x", 1)], r":2: clip_id: must be a whole number, found 'x'"),
        ([label("a", 0, 1), label("a", 0, 1)], r":3: the clip a\$_\$0 comes twice"),
    ],
)
def test_wrong_labels_are_named(
    tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_label_csv(write_labels(tmp_path / "label.csv", rows))


def interval(video: str, index: int, end: float, sentiment: float, **more: object) -> Interval:
    base = {"start_s": end - 2, "intensities": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0)} | more
    return Interval(video=video, index=index, end_s=end, sentiment=sentiment, **base)  # type: ignore[arg-type]


def labelled(video: str, clip: int, sentiment: float) -> LabelRow:
    return LabelRow(video=video, clip=str(clip), text="", sentiment=sentiment, split="train")


def test_clips_are_paired_by_the_order_of_time() -> None:
    """The csd's own order is another one, and clip 10 comes after clip 9."""
    rows = [labelled("v", clip, clip / 10) for clip in (10, 9, 2)]
    csd = [interval("v", 0, 30.0, 1.0), interval("v", 1, 8.0, 0.2), interval("v", 2, 20.0, 0.9)]
    segments, joined = join_by_rank(rows, csd)
    assert [(s.clip, s.end_s) for s in segments] == [("10", 30.0), ("9", 20.0), ("2", 8.0)]
    assert joined == {"segments": 3, "segments_with_emotions": 3}


def test_videos_that_do_not_fit_get_no_emotions() -> None:
    rows = [labelled("short", 0, 1.0), labelled("wrong", 0, 1.0), labelled("good", 0, 1.0)]
    csd = [
        interval("short", 0, 2.0, 1.0),
        interval("short", 1, 4.0, 1.0),
        interval("wrong", 0, 2.0, 0.5),
        interval("good", 0, 2.0, 1.0 + 1e-7),
    ]
    segments, joined = join_by_rank(rows, csd)
    assert [s.intensities is not None for s in segments] == [False, False, True]
    assert joined == {
        "segments": 3,
        "videos_counts_differ": 1,
        "videos_sentiment_differs": 1,
        "segments_with_emotions": 1,
    }


def test_labels_without_a_csd_have_no_emotions(tmp_path: Path) -> None:
    write_labels(tmp_path / "label.csv", [label("a", 0, -1.0)])
    corpus = load_mosei(tmp_path)
    assert corpus.edition == "mmsa" and corpus.joined["segments_with_emotions"] == 0
    assert corpus.segments[0].intensities is None


# --- the SDK's form


def test_words_are_found_by_time(tmp_path: Path) -> None:
    video = ODD_IDS[1]
    folder = tmp_path / "Transcript" / "Segmented" / "Combined"
    folder.mkdir(parents=True)
    lines = [f"{video}___0___10.01___12.0___late___r", f"{video}___1___-0.3___4.0___It\x92s early"]
    (folder / f"{video}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_transcript(folder / f"{video}.txt")[1] == Line(
        index="1", start_s=-0.3, end_s=4.0, text="It\u2019s early"
    )
    spans = [
        interval(video, 0, 4.2, 1.0, start_s=-0.1),
        interval(video, 1, 12.0, 1.0),
        interval(video, 2, 40.0, 0.0),
        interval(video, 3, 12.1, 1.0),  # its line is taken
        interval("unlisted", 0, 4.0, 1.0),
    ]
    found = read_transcript(folder / f"{video}.txt")
    segments, joined = join_by_time(spans, lambda _: found, {video: "train"})
    assert [(s.clip, s.text) for s in segments] == [
        ("1", "It\u2019s early"),
        ("0", "late___r"),
        ("i2", ""),
        ("i3", ""),
    ]
    assert joined == {
        "segments": 4,
        "segments_without_words": 2,
        "segments_start_below_zero": 1,
        "segments_in_no_fold": 1,
    }


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "label.csv"
    path.write_bytes(b"video_id,clip_id,text,label,mode\nv,1,caf\xe9,1,train\n")
    with pytest.raises(ValueError, match=r"label\.csv:2: must be UTF-8: "):
        read_label_csv(path)
    path.write_text('video_id,clip_id,text,label,mode\nv,1,"' + "never closed " * 20_000)
    with pytest.raises(ValueError, match=r"label\.csv:\d: must be a whole csv file; .*field"):
        read_label_csv(path)
    folds = tmp_path / "standard_folds.json"
    for text in ("[1]", '{"standard_train_fold": [["a"]]}'):
        folds.write_text(text)
        with pytest.raises(ValueError, match=r"standard_folds\.json: must hold"):
            read_folds(folds)


def test_a_wrong_transcript_is_named(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_text("v___0___1.0\n")
    with pytest.raises(ValueError, match=r"v\.txt:1: must be video___index___start___end___text"):
        read_transcript(path)
    path.write_text("v___0___1.0___x___words\n")
    with pytest.raises(ValueError, match=r"v\.txt:1: time: must be a number, found 'x'"):
        read_transcript(path)


def test_folds_of_the_sdk_are_read_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "cmu_mosei_std_folds.py"
    path.write_text(
        "raise SystemExit\nstandard_train_fold=['a','-b']\n"
        "standard_valid_fold=['c']\nstandard_test_fold=['01']\n"
    )
    assert read_folds(path) == {"a": "train", "-b": "train", "c": "dev", "01": "test"}
    path.write_text("standard_train_fold=['a']\n")
    with pytest.raises(ValueError, match="must hold a list standard_valid_fold"):
        read_folds(path)
    path.write_text("standard_train_fold=['a']\nstandard_valid_fold=['a']\nstandard_test_fold=[]")
    with pytest.raises(ValueError, match="video a is in two folds"):
        read_folds(path)


def test_a_csd(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "CMU_MOSEI_Labels.csd"
    with h5py.File(path, "w") as file:
        for video in ODD_IDS:
            group = file.create_group(f"All Labels/data/{video}")
            group["features"] = [[-1.0, 0, 2.0, 0, 0, 0, 0], [3.0, 0.33, 0, 0, 0, 0, 0]]
            group["intervals"] = [[10.0, 12.5], [-0.2, 9.0]]
    (tmp_path / "cmu_mosei_std_folds.py").write_text(
        f"standard_train_fold={list(ODD_IDS)}\nstandard_valid_fold=[]\nstandard_test_fold=[]"
    )
    corpus = load_mosei(tmp_path)
    assert corpus.edition == "csd" and len(corpus.segments) == 6
    assert corpus.segments[0].intensities == (0, 2.0, 0, 0, 0, 0)
    assert corpus.joined["segments_start_below_zero"] == 3
    with h5py.File(path, "w") as file:
        file["All Labels/data/v/features"] = [[9.0] * 7]
        file["All Labels/data/v/intervals"] = [[0.0, 1.0]]
    with pytest.raises(
        ValueError, match=r"not a csd of MOSEI's labels: v: labels are out of range"
    ):
        read_csd(path)
    path.write_text("text")
    with pytest.raises(ValueError, match="not a csd"):
        read_csd(path)


def test_a_folder_without_labels_says_what_it_could_hold(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file label\.csv \(MMSA\), CMU_MOSEI_Labels"):
        load_mosei(tmp_path)


# --- clips


def segment(video: str, clip: str = "3", **changes: object) -> Segment:
    base = {"text": "Hi.", "sentiment": 0.0, "split": "train", "start_s": -0.2, "end_s": 0.5}
    return Segment(video=video, clip=clip, **(base | changes))  # type: ignore[arg-type]


def test_a_clip_file_or_a_span_of_the_whole_video(tmp_path: Path, clip_bytes: bytes) -> None:
    for video in ODD_IDS:
        (tmp_path / "Raw" / video).mkdir(parents=True)
    (tmp_path / "Raw" / ODD_IDS[0] / "3.mp4").write_bytes(clip_bytes)
    whole = tmp_path / "Raw" / "Videos" / "Full" / "Combined"
    whole.mkdir(parents=True)
    film = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    (whole / f"{ODD_IDS[2]}.mp4").write_bytes(encode_mp4(film, fps=10))
    clips = MoseiClips(tmp_path)
    first, second, third = (clips.clip(segment(video)) for video in ODD_IDS)
    assert first.path is not None and first.end_s is None
    assert second.path is None and second.expected.endswith(f"{ODD_IDS[1]}/3.mp4")
    assert third.path == whole / f"{ODD_IDS[2]}.mp4" and third.start_s == -0.2
    pending = mosei_record(segment(ODD_IDS[2]), clips)
    assert pending is not None
    record = make_record(pending)
    assert isinstance(record, Record) and record.num_frames == 5  # from 0, not from -0.2


def test_tasks_of_a_segment(tmp_path: Path) -> None:
    clips = MoseiClips(tmp_path)
    both = segment("v", intensities=(0, 0, 1.0, 0, 0, 0))
    pending = mosei_record(both, clips)
    assert pending is not None and pending.tasks == (Task.MSA, Task.ER)
    assert pending.emotion == "anger" and pending.notes["anger"] == 1.0
    assert pending.key == "mosei_v_3" and pending.speaker == ""
    only_er = mosei_record(both, clips, neutral_msa=False)
    assert only_er is not None and only_er.tasks == (Task.ER,)
    assert mosei_record(segment("v"), clips, neutral_msa=False) is None
