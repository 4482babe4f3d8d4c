"""The on-disk contract: write and read are inverse, every rule refuses with key and field."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.shards.record import (
    SCHEMA_VERSION,
    Frames,
    Record,
    Turn,
    Video,
    from_members,
    to_members,
    validate_key,
)
from data_shards.tasks import EMOTIONS, TASKS, Pair, Task

CONVERSATION = (Turn(speaker="Ann", text="We won!"), Turn(speaker="Bob", text="No way."))


def full(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "key": "dia3_utt-2",
        "source": "test",
        "split": "train",
        "utterance": "No way.",
        "speaker": "Bob",
        "conversation": CONVERSATION,
        "target": 2,
        "sentiment": 1.5,
        "emotion": "surprise",
        "expressions": ("Eyes widened", "Jaw Drop"),
        "reason": "His eyes are wide.",
        "pairs": (Pair(2, "surprise", 1), Pair(2, "surprise", 2)),
        "tasks": TASKS,
        "num_frames": 24,
        "peak_frame": 11,
        "notes": {"identity": 7, "conflict": False, "gain": 0.5, "word": "won"},
        "media": Video(mp4=b"\x00mp4"),
    }
    return Record(**(fields | changes))


def document(record: Record) -> dict[str, Any]:
    loaded = json.loads(to_members(record)["json"])
    assert isinstance(loaded, dict)
    return loaded


def read(fields: dict[str, Any], **media: bytes) -> Record:
    members = {"json": json.dumps(fields).encode(), **(media or {"mp4": b"x"})}
    return from_members("dia3_utt-2", members)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
MEDIA = st.one_of(
    st.builds(Video, mp4=st.binary(min_size=1, max_size=8)),
    st.builds(
        Frames,
        jpegs=st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=12).map(tuple),
        peak_jpeg=st.binary(min_size=1, max_size=4),
    ),
)


@given(
    utterance=TEXT,
    speaker=TEXT,
    sentiment=st.floats(-3, 3),
    emotion=st.sampled_from(EMOTIONS),
    tasks=st.sets(st.sampled_from(TASKS), min_size=1).map(
        lambda chosen: tuple(task for task in TASKS if task in chosen)
    ),
    notes=st.dictionaries(
        TEXT, st.one_of(TEXT, st.booleans(), st.integers(), st.floats(-1e9, 1e9)), max_size=3
    ),
    media=MEDIA,
)
def test_members_round_trip(**changes: Any) -> None:
    record = full(**changes)
    members = to_members(record)
    assert next(iter(members)) == "json"
    assert from_members(record.key, members) == record
    assert to_members(from_members(record.key, members)) == members


def test_smallest_record() -> None:
    record = Record(
        key="a",
        source="s",
        split="test",
        utterance="",
        speaker="",
        emotion="neutral",
        tasks=(Task.ER,),
        num_frames=1,
        media=Frames(jpegs=(b"j",)),
    )
    assert list(to_members(record)) == ["json", "f0.jpg"]
    assert from_members("a", to_members(record)) == record
    assert record.mask == 2


def test_member_names_and_version() -> None:
    frames = Frames(jpegs=tuple(bytes([65 + n]) for n in range(11)), peak_jpeg=b"p")
    members = to_members(full(media=frames))
    assert list(members) == ["json", *(f"f{n}.jpg" for n in range(11)), "peak.jpg"]
    read_back = from_members("dia3_utt-2", members)
    assert read_back.media == frames  # f10 comes after f9, not after f1
    assert document(full())["version"] == SCHEMA_VERSION == 1


def test_answers() -> None:
    record = full(sentiment=-0.5)
    assert [record.answer(task) for task in TASKS] == [
        "negative",
        "surprise",
        ("Eyes widened", "Jaw Drop"),
        "His eyes are wide.",
        (Pair(2, "surprise", 1), Pair(2, "surprise", 2)),
    ]
    only = full(tasks=(Task.ER, Task.ERI))
    with pytest.raises(ValueError, match=r"record dia3_utt-2: task fer is not offered; .* er, eri"):
        only.answer(Task.FER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "a.b"}, "record key: must be letters, digits, '_' and '-' only, found 'a.b'"),
        ({"source": ""}, "source: must not be empty, found ''"),
        ({"split": ""}, "split: must not be empty"),
        ({"num_frames": 0}, "num_frames: must be 1 or more, below 2**31, found 0"),
        ({"peak_frame": 24}, "peak_frame: must be 0..23 (0-based), found 24"),
        ({"peak_frame": None}, "peak_frame: must be given because the tasks name fer"),
        ({"target": 3}, "target: must be 1..2, or 0 without conversation, found 3"),
        ({"target": 0, "pairs": None, "tasks": (Task.ER,)}, "target: must be 1..2"),
        ({"sentiment": 3.5}, "sentiment: must be a number from -3 to 3, found 3.5"),
        ({"sentiment": float("nan")}, "sentiment: must be a number from -3 to 3, found nan"),
        ({"sentiment": None}, "sentiment: must be given because the tasks name msa"),
        ({"emotion": "happy"}, "emotion: must be one of neutral, surprise"),
        ({"expressions": ("a;b",)}, "expressions: fer answer: a phrase must be text on one line"),
        ({"reason": "a\nb"}, "reason: eri answer: must be text on one line"),
        ({"pairs": (Pair(1, "joy", 1),)}, "pairs: must have the record's target 2, found Pair("),
        ({"pairs": (Pair(2, "joy", 3),)}, "pairs: must have a cause in 1..2"),
        ({"pairs": (Pair(2, "neutral", 1),)}, "pairs: must not have the emotion neutral"),
        ({"pairs": (Pair(2, "happy", 1),)}, "pairs: ecpe answer: an emotion must be one of"),
        ({"tasks": ()}, "tasks: must be one to five tasks in the order msa, er, fer, eri, ecpe"),
        ({"tasks": (Task.ER, Task.MSA)}, "tasks: must be one to five tasks in the order"),
        ({"tasks": (Task.ER, Task.ER)}, "tasks: must be one to five tasks in the order"),
        ({"notes": {"x": None}}, "notes.x: must be text, a number or true/false, found None"),
        ({"notes": {"x": float("inf")}}, "notes.x: must be a finite number, found inf"),
        ({"media": Video(mp4=b"")}, "media: must have a non-empty mp4"),
        ({"media": Frames(jpegs=())}, "media: must have one or more non-empty frames"),
        ({"media": Frames(jpegs=(b"",))}, "media: must have one or more non-empty frames"),
        ({"media": Frames(jpegs=(b"j",))}, "media: must have the peak frame because"),
        (
            {"conversation": (), "target": 0, "pairs": ()},
            "conversation: must be given because the tasks name ecpe",
        ),
    ],
)
def test_a_record_is_valid_or_refused(changes: dict[str, Any], message: str) -> None:
    key = "" if "key" in changes else "record dia3_utt-2: "
    with pytest.raises(ValueError, match=re.escape(key + message)):
        full(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: this program reads version 1; build the shards again, found 2"),
        ({"version": True}, "version: must be of type int, found True"),
        ({"key": "other"}, "key: must equal the name of the tar members, found 'other'"),
        ({"utterance": 3}, "utterance: must be of type str, found 3"),
        ({"num_frames": 2.0}, "num_frames: must be of type int, found 2.0"),
        ({"sentiment": "1"}, "sentiment: must be of type float, found '1'"),
        ({"sentiment": True}, "sentiment: must be of type float, found True"),
        ({"emotion": ["joy"]}, "emotion: must be of type str"),
        ({"conversation": [{"speaker": "Ann"}]}, "conversation: must be a list of {speaker, text}"),
        ({"conversation": {}}, "conversation: must be of type list"),
        ({"expressions": [1]}, "expressions: must be a list of texts, found 1"),
        ({"pairs": [[2, "joy"]]}, "pairs: must be a list of [target, emotion, cause]"),
        ({"pairs": [[True, "joy", 1]]}, "pairs: must be a list of [target, emotion, cause]"),
        ({"tasks": ["msa", "asr"]}, "tasks: must be among msa, er, fer, eri, ecpe, found 'asr'"),
        ({"tasks": [["er"]]}, "tasks: must be among msa"),
        ({"notes": []}, "notes: must be of type dict, found []"),
        ({"colour": 1}, "colour: is not a field of a record, found 1"),
        ({"media": {"kind": "audio"}}, "media.kind: must be 'video' or 'frames', found 'audio'"),
        ({"media": {"kind": "frames"}}, "media: must give the frames' count and whether"),
        (
            {"media": {"kind": "frames", "count": 9, "peak": False}},
            "media.count: must be 1..2, the number of members, found 9",
        ),
        (
            {"media": {"kind": "frames", "count": 1, "peak": False}},
            "members: must be json, f0.jpg, found ['json', 'mp4']",
        ),
        ({"emotion": "happy"}, "emotion: must be one of neutral"),
    ],
)
def test_reading_is_strict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape("record dia3_utt-2: " + message)):
        read(document(full()) | changes)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Record)] + ["version"])
def test_every_field_must_be_there(name: str) -> None:
    fields = document(full())
    del fields[name]
    message = f"record dia3_utt-2: {name}: must be given, found no such field"
    with pytest.raises(ValueError, match=message):
        read(fields)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "json: cannot be read"),
        (b"\xff\xfe\xff", "json: cannot be read"),
        (b'{"version": NaN}', "json: cannot be read: NaN is not a JSON number"),
        (b"[" * 100_000, "json: cannot be read"),
        (b"[1]", "json: must be an object, found 'list'"),
    ],
)
def test_unreadable_json(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"record k: {message}"):
        from_members("k", {"json": raw, "mp4": b"x"})


def test_members_must_fit() -> None:
    with pytest.raises(ValueError, match=r"record k: json: must be among the members, .*\['mp4'\]"):
        from_members("k", {"mp4": b"x"})
    with pytest.raises(ValueError, match=r"members: must be json, mp4, found \['json', .* 'txt'\]"):
        read(document(full()), mp4=b"x", txt=b"y")


def test_keys() -> None:
    validate_key("Dia-3_utt2")
    for key in ("", "a/b", "a.b", "\xe4", "a b", "a\n"):
        with pytest.raises(ValueError, match="record key: must be letters, digits"):
            validate_key(key)


def test_text_must_be_unicode() -> None:
    with pytest.raises(ValueError, match=r"record dia3_utt-2: utterance: must be valid Unicode"):
        to_members(full(utterance="\ud800"))


def test_the_documented_example_is_a_record() -> None:
    document = Path(__file__).parents[3].joinpath("docs", "data_format.md").read_text()
    example = json.loads(document.split("```json\n")[1].split("```")[0])
    record = from_members(example["key"], {"json": json.dumps(example).encode(), "mp4": b"x"})
    assert json.loads(to_members(record)["json"]) == example
    assert record.tasks == TASKS
