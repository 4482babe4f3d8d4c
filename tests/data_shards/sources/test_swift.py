"""ms-swift data: out and in again, the authors' published sample, and rows that cannot be read."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_shards.build.build import BuildOptions, build_shards
from data_shards.inspection.lint import lint
from data_shards.media.pixels import jpeg_decode
from data_shards.media.video import decode_frames, encode_mp4
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Record, Turn, Video
from data_shards.sources.swift import read_query, read_swift
from data_shards.sources.swift_export import export_swift
from data_shards.tasks import INSTRUCTION, Pair, Task
from launch import cli


@functools.cache
def clip(number: int) -> bytes:
    levels = np.arange(6, dtype=np.uint8).reshape(-1, 1, 1, 1) * 20 + number
    return encode_mp4(np.broadcast_to(levels, (6, 32, 32, 3)).copy(), 8)


TURNS = (Turn(speaker="Ann", text="We won: 3 to 1!"), Turn(speaker="Bob", text="No way."))


def make_records() -> list[Record]:
    word = Record(
        key="clip-0",
        source="test",
        split="train",
        utterance='He said "hi", well.',
        speaker="Ann",
        sentiment=-2.5,
        emotion="joy",
        reason="She smiles, so she is glad.",
        expressions=("Jaw Drop", "Eyes widened"),
        peak_frame=2,
        tasks=(Task.MSA, Task.ER, Task.FER, Task.ERI),
        num_frames=6,
        media=Video(mp4=clip(0)),
    )
    pairs = replace(
        word,
        key="clip-1",
        utterance="No way.",
        conversation=TURNS,
        target=2,
        pairs=(Pair(2, "surprise", 1), Pair(2, "surprise", 2)),
        tasks=(Task.ECPE,),
        media=Video(mp4=clip(1)),
    )
    silent = replace(word, key="clip-2", utterance="", tasks=(Task.ER,), media=Video(mp4=clip(2)))
    return [word, pairs, silent]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_shards(make_records(), tmp_path / "shards", provenance={})
    return tmp_path / "shards"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def records(folder: Path) -> list[Record]:
    index = ShardIndex.load(folder)
    reader = ShardReader(folder, index)
    found = [
        reader.read(shard, slot)
        for shard, info in enumerate(index.shards)
        for slot in range(info.records)
    ]
    reader.close()
    return found


def test_export(folder: Path, tmp_path: Path) -> None:
    report = export_swift(folder, tmp_path / "out")
    assert report["rows"] == 6 and report["tasks"] == {
        "msa": 1,
        "er": 2,
        "fer": 1,
        "eri": 1,
        "ecpe": 1,
    }
    found = rows(tmp_path / "out" / "data.jsonl")
    assert found[0] == {
        "query": f'The person says: He said "hi", well. <sentiment> {INSTRUCTION[Task.MSA]}',
        "response": "Negative.",
        "videos": ["media/clip-0.mp4"],
    }
    assert found[2]["images"] == ["media/clip-0.peak.jpg"] and "videos" not in found[2]
    assert found[4]["response"] == "2_surprise,1;2_surprise,2"
    media = tmp_path / "out" / "media"
    assert (media / "clip-1.mp4").read_bytes() == clip(1)
    peak = jpeg_decode((media / "clip-0.peak.jpg").read_bytes())
    np.testing.assert_allclose(peak.mean(), decode_frames(clip(0), [2]).mean(), atol=2)
    with pytest.raises(ValueError, match="convert: the output folder must be new or empty"):
        export_swift(folder, tmp_path / "out")


def test_export_of_a_choice(folder: Path, tmp_path: Path) -> None:
    export_swift(
        folder, tmp_path / "out", form="json", visual="peak_frame", tasks=(Task.MSA, Task.ECPE),
        give_emotion=True,
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "data.json").read_text())
    assert [row["images"] for row in found] == [
        ["media/clip-0.peak.jpg"],
        ["media/clip-1.peak.jpg"],
    ]
    assert found[1]["query"].endswith("Emotion: joy")


def test_export_of_extracted_frames(tmp_path: Path) -> None:
    options = BuildOptions(frames="extracted", frames_per_clip=3, frame_size=28)
    build_shards(make_records()[:1], tmp_path / "s", options=options, provenance={})
    export_swift(tmp_path / "s", tmp_path / "out")
    found = rows(tmp_path / "out" / "data.jsonl")
    assert found[0]["images"] == [f"media/clip-0.f{n}.jpg" for n in range(3)]
    assert found[2]["images"] == ["media/clip-0.peak.jpg"]
    assert all((tmp_path / "out" / name).is_file() for name in found[0]["images"])


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_out_and_in_again(folder: Path, tmp_path: Path, form: str) -> None:
    assert (
        cli.main(["convert", "export", str(folder), "--out", str(tmp_path / "o"), "--form", form])
        == 0
    )
    words = [
        "convert",
        "import",
        str(tmp_path / "o" / f"data.{form}"),
        "--out",
        str(tmp_path / "in"),
    ]
    assert cli.main([*words, "--name", "back", "--strict"]) == 0
    word, face, pairs, silent = records(tmp_path / "in")
    was, was_pairs, _ = make_records()
    assert (word.key, word.source, word.media) == ("clip-0", "back", was.media)
    assert word.tasks == (Task.MSA, Task.ER, Task.ERI) and word.sentiment == -1.0
    for name in ("utterance", "emotion", "reason"):
        assert getattr(word, name) == getattr(was, name)
    assert (face.tasks, face.expressions) == ((Task.FER,), was.expressions)
    assert (face.num_frames, face.peak_frame) == (1, 0)
    for name in ("utterance", "conversation", "target", "pairs"):
        assert getattr(pairs, name) == getattr(was_pairs, name)
    assert silent.utterance == "" and silent.emotion == "joy"
    assert lint(tmp_path / "in", decode=True).ok


def test_the_published_sample(tmp_path: Path) -> None:
    (tmp_path / "128258").mkdir()
    Image.new("RGB", (33, 20), (200, 10, 10)).save(tmp_path / "128258" / "9.png")
    row = {
        "images": ["128258/9.png"],
        "query": 'The person says: "It was  dull." <sentiment> Please determine which sentiment '
        "label in the video represents: positive or negative.",
        "response": "Negative.",
    }
    (tmp_path / "d.json").write_text(json.dumps([row]))
    assert cli.main(["build", "swift", str(tmp_path / "d.json"), "--out", str(tmp_path / "s")]) == 0
    (record,) = records(tmp_path / "s")
    assert (record.key, record.utterance, record.sentiment) == ("128258-9", "It was dull.", -1.0)
    assert isinstance(record.media, Video)
    assert decode_frames(record.media.mp4, [0]).shape == (1, 20, 32, 3)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rows_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clip(0))
    (tmp_path / "b.mp4").write_bytes(b"broken")
    base = {"query": "The person says: Well. <emotion> Which?", "videos": ["a.mp4"]}
    path = write(
        tmp_path / "d.jsonl",
        {**base, "response": "Happy."},
        {**base, "response": "Anger."},
        {**base, "response": "Purple."},
        {**base, "response": "sad", "query": "<video> The person says: Other. <emotion> Which?"},
        {**base, "response": "sad", "query": "No identifier"},
        {**base, "response": "sad", "query": "<emotion cause-pair> Which? Target 1: x"},
        {**base, "response": "3_happy, 1", "query": "1. A: Hi\n<emotion cause-pair> Target 1: Hi"},
        {**base, "response": "sad", "videos": ["a.mp4", "b.mp4"]},
        {**base, "response": "sad", "videos": ["b.mp4"]},
        {**base, "response": "sad", "videos": ["c.mp4"]},
    )
    assert cli.main(["build", "swift", str(path), "--out", str(tmp_path / "s")]) == 0
    found = {record.key: (record.utterance, record.emotion) for record in records(tmp_path / "s")}
    assert found == {"a": ("Well.", "joy"), "a-2": ("Other.", "sadness")}
    listed = rows(tmp_path / "s" / "skipped.jsonl")
    assert [row["reason"] for row in listed] == [
        "label-conflict",
        "row-unreadable",
        "row-unreadable",
        "row-unreadable",
        "several-media",
        "record-invalid",
        "media-damaged",
        "media-missing",
    ]
    assert listed[0]["detail"] == f"{path}:2: er was 'joy', now 'anger'"
    assert f"{path}:5: must hold one identifier of <sentiment>" in listed[2]["detail"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "must be an object"),
        ({"query": 1}, "query: must be text, found 1"),
        ({"query": "x", "response": "y"}, "must have videos or images"),
        ({"query": "x", "response": "y", "videos": ["a"], "images": ["b"]}, "must have videos"),
        ({"query": "x", "response": "y", "videos": "a"}, "videos: must be a list of paths"),
        ({"query": "x", "response": "y", "videos": ["a"], "history": [["q", "a"]]}, "history: "),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=rf"d\.json\[0\]: {message}"):
        list(read_swift(path))
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a list of rows, found dict"):
        list(read_swift(path))
    path.write_text("[{")
    with pytest.raises(ValueError, match=r"d\.json: must be JSON: "):
        list(read_swift(path))
    with pytest.raises(FileNotFoundError, match="give the data of ms-swift"):
        list(read_swift(tmp_path / "none.json"))


def test_queries() -> None:
    asked = read_query("<video></video>The person in video says: Oh!   no <reason> Why?")
    assert (asked.task, asked.utterance) == (Task.ERI, "Oh! no")
    with pytest.raises(ValueError, match=r"turn 2 must look like '1. Ann: Hey!', found '3. B: x'"):
        read_query("1. A: x\n3. B: x\n<emotion cause-pair> Target 1: x")
