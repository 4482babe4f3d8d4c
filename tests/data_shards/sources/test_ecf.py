"""ECF in both forms: the real files' counts and quirks, and mistakes in files made like them."""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_shards.build.clip_record import Clip
from data_shards.sources.ecf import (
    EcfClips,
    EcfCorpus,
    Utterance,
    ecf_records,
    episodes,
    load_ecf,
    own_clips,
    read_json,
    read_meld_map,
    read_text,
)
from data_shards.tasks import Pair, Task

BLOCK = """7 3
(2,1),(2,2),(3,2)
1 | Ann | neutral | You got it ? | Friends_S1E12: 00:01:19.037 - 00:01:25.41
2 | Bob | joy | I did ! | Friends_S1E12: 00:01:25.627 - 00:01:27.169
3 | Ann | surprise | No ! | Friends_S1E12: 00:01:27.378 - 00:01:33.343
8 1

1 | All | neutral | Hm . | Friends_S10E1: 00:00:01.000 - 00:00:02.000
"""


@pytest.fixture(scope="module")
def corpus(real_data: Path) -> EcfCorpus:
    return load_ecf([real_data / "ECF1", real_data / "ECF2"])


def totals(corpus: EcfCorpus, split: str) -> tuple[int, ...]:
    part = corpus.splits[split]
    return (
        len(part),
        sum(len(c.utterances) for c in part),
        sum(u.emotion != "neutral" for c in part for u in c.utterances),
        sum(len(c.pairs) for c in part),
        sum(len(c.targets()) for c in part),
        sum(not c.pairs for c in part),
    )


def test_counts_of_edition_2(corpus: EcfCorpus) -> None:
    assert totals(corpus, "train") == (1374, 13_619, 7690, 9794, 7081, 89)
    assert totals(corpus, "test") == (341, 3101, 1821, 2462, 1746, 12)
    train = corpus.splits["train"]
    emotions = collections.Counter(u.emotion for c in train for u in c.utterances)
    assert emotions["neutral"] == 5929 and emotions["joy"] == 2301 and emotions["fear"] == 373
    after = sum(cause > target for c in train for target, cause in c.pairs)
    itself = sum(cause == target for c in train for target, cause in c.pairs)
    assert (after, itself) == (380, 4892)


def test_counts_of_edition_1(real_data: Path) -> None:
    corpus = load_ecf([real_data / "ECF1"], edition="1")
    assert totals(corpus, "train") == (1001, 9966, 5577, 7055, 5123, 66)
    assert totals(corpus, "dev") == (112, 1087, 668, 866, 614, 6)
    assert totals(corpus, "test") == (261, 2566, 1445, 1873, 1344, 17)


def test_both_forms_say_the_same(real_data: Path, corpus: EcfCorpus) -> None:
    from_text = load_ecf([real_data / "ECF1"], splits=["train"]).splits["train"]
    assert [c.id for c in from_text] == list(range(1, 1375))  # the text form is not in this order
    assert [c.pairs for c in from_text] == [c.pairs for c in corpus.splits["train"]]
    for ours, theirs in zip(from_text, corpus.splits["train"], strict=True):
        for a, b in zip(ours.utterances, theirs.utterances, strict=True):
            assert (a.emotion, a.episode, a.speaker) == (b.emotion, b.episode, b.speaker)
            assert (a.start_s, a.end_s) == (b.start_s, b.end_s)


def test_the_map_to_meld(real_data: Path) -> None:
    places = read_meld_map(real_data / "ECF1" / "all_data_pair_ECFvsMELD.txt")
    assert len(places) == 13_619 - 230
    assert places[1, 4] == ("train", 559, 3)  # ECF counts from 1, MELD from 0


def test_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(BLOCK)
    first, second = read_text(path)
    assert first.pairs == ((2, 1), (2, 2), (3, 2)) and first.targets() == (2, 3)
    assert second.pairs == () and second.targets() == ()
    assert first.utterances[0] == Utterance(
        number=1,
        speaker="Ann",
        emotion="neutral",
        text="You got it ?",
        episode="S01E12",
        start_s=79.037,
        end_s=85.41,  # two digits of the fraction are hundredths
    )
    assert first.targets("emotional") == (2, 3) and second.utterances[0].episode == "S10E01"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("7 3", "seven", r"train\.txt:1: a block must start with .*'seven'"),
        ("(2,1),", "(2;1),", r":2: the pairs must look like"),
        ("(3,2)", "(4,2)", r"conversation 7: a pair must name utterances 1 to 3, found \(4, 2\)"),
        ("2 | Bob", "5 | Bob", r":4: must be utterance 2 with five columns"),
        ("| joy |", "| glee |", r"conversation 7: an emotion must be one of .*'glee'"),
        ("Friends_S10E1:", "Friends:", r":8: the last column must be like Friends_S1E1"),
        ("8 1", "8 2", r":6: conversation 8 is cut short|:9: must be utterance 2"),
    ],
)
def test_wrong_text_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "train.txt"
    path.write_text(BLOCK.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_text(path)


def document(**changes: Any) -> dict[str, Any]:
    item = {"text": "I did !", "speaker": "Bob", "emotion": "joy"}
    source = ["S01E12", "00:01:25.627", "00:01:27.16"]
    base = {
        "conversation_ID": 7,
        "conversation": [{"utterance_ID": 1, **item, "video_source": source}],
        "emotion-cause_pairs": [["1_joy", "1"]],
    }
    return base | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [document(**{"emotion-cause_pairs": [["1_fear", "1"]]})],
            "conversation 7: .*pair 1_fear: utterance 1 has the emotion joy",
        ),
        ([{"conversation_ID": 7}], r"conversation 7: not as published: KeyError"),
        ({"a": 1}, r"x\.json: must be a list of conversations"),
        ([document(conversation=[])], r"pair 1_joy: utterance 1 has the emotion None"),
    ],
)
def test_wrong_json_is_named(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_json(path)


def test_json_without_pairs_or_emotions(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    plain = document()
    del plain["emotion-cause_pairs"], plain["conversation"][0]["emotion"]
    path.write_text(json.dumps([plain]))
    (conversation,) = read_json(path)
    assert conversation.pairs == () and conversation.utterances[0].end_s == 87.16


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ECF 2 train: no file Subtask_2_train\.json or"):
        load_ecf([tmp_path])
    with pytest.raises(ValueError, match=r"ECF 2 has the splits train, test, found 'dev'"):
        load_ecf([tmp_path], splits=["dev"])


# --- clips


def clips_of(**changes: Mapping[Any, Any]) -> EcfClips:
    return EcfClips(**{"own": {}, "meld": {}, "episodes": {}, **changes})


def test_a_clip_is_never_taken_by_its_meld_name(tmp_path: Path, clip_bytes: bytes) -> None:
    """ECF's dia1utt2 and MELD's dia1_utt2 are different moments."""
    (tmp_path / "dia1utt2.mp4").write_bytes(clip_bytes)
    assert list(own_clips(tmp_path)) == [(1, 2)]
    (tmp_path / "dia1_utt2.mp4").write_bytes(clip_bytes)
    with pytest.raises(ValueError, match=r"clips of ECF are named dia1utt2\.mp4"):
        own_clips(tmp_path)


def test_the_order_of_places(tmp_path: Path, clip_bytes: bytes) -> None:
    turn = Utterance(
        number=2, speaker="B", emotion="joy", text="!", episode="S01E02", start_s=5, end_s=6.5
    )
    paths = {name: tmp_path / name for name in ("own.mp4", "meld.mp4", "ep.mkv")}
    own, film = {(1, 2): paths["own.mp4"]}, {"S01E02": paths["ep.mkv"]}
    meld = {(1, 2): Clip(path=paths["meld.mp4"])}
    assert clips_of(own=own, meld=meld, episodes=film).clip(1, turn).path == paths["own.mp4"]
    assert clips_of(meld=meld, episodes=film).clip(1, turn).path == paths["meld.mp4"]
    lost = {(1, 2): Clip(path=None, expected="train/dia5_utt1.mp4")}
    cut = clips_of(meld=lost, episodes=film).clip(1, turn)
    assert (cut.path, cut.start_s, cut.end_s) == (paths["ep.mkv"], 5, 6.5)
    none = clips_of(meld=lost).clip(1, turn)
    assert none.path is None
    assert none.expected == "dia1utt2.mp4 or train/dia5_utt1.mp4 or S01E02"


def test_episodes_by_name(tmp_path: Path) -> None:
    for name in ("Friends.S01E02.mkv", "friends s3 e4.mp4", "notes.txt", "S09E01.srt"):
        (tmp_path / name).touch()
    found = episodes(tmp_path)
    assert {name: path.name for name, path in found.items()} == {
        "S01E02": "Friends.S01E02.mkv",
        "S03E04": "friends s3 e4.mp4",
    }
    (tmp_path / "again_S01E02.avi").touch()
    with pytest.raises(ValueError, match="S01E02 must be one file"):
        episodes(tmp_path)


def test_records_of_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(BLOCK)
    conversation = read_text(path)[0]
    two, three = ecf_records(conversation, "train", clips_of())
    assert (two.key, three.key) == ("ecf_train_dia7_utt2", "ecf_train_dia7_utt3")
    assert two.tasks == (Task.ECPE,) and two.target == 2 and len(two.conversation) == 3
    assert two.pairs == (Pair(2, "joy", 1), Pair(2, "joy", 2))
    assert two.utterance == "I did !" and two.emotion == "joy"
