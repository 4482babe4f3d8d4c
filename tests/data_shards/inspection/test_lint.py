"""Lint finds every kind of damage, names shard, key, byte and cause, and goes on to the next."""

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.build.build import BuildOptions, build_shards
from data_shards.build.curation import Amendments, read_curation
from data_shards.inspection.lint import ContentLimits, lint
from data_shards.media.video import encode_mp4
from data_shards.shards.index import ENTRY_DTYPE, ShardIndex, sidecar
from data_shards.shards.record import Record, Turn, Video, to_members
from data_shards.tasks import Pair, Task, parse_answer
from launch import cli
from tests.builders import make_clip, make_record


def fer_record(number: int) -> Record:
    return make_record(
        number,
        utterance="Well.",
        sentiment=None,
        expressions=("Smile",),
        tasks=(Task.ER, Task.FER),
        peak_frame=2,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of three records each."""
    path = tmp_path / "shards"
    records = [fer_record(n) for n in range(6)]
    build_shards(records, path, provenance={}, max_records_per_shard=3)
    return path


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def replace_record(folder: Path, slot: int, change: Callable[[dict[str, bytes]], None]) -> None:
    """Rewrite one record of shard 0 so that checksum and index fit: only its content is wrong."""
    tar = folder / "shard-000000.tar"
    index = ShardIndex.load(folder)
    key = index.key(0, slot)
    members = to_members(fer_record(slot))
    change(members)
    buffer = io.BytesIO()
    for extension, content in members.items():
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(content)
        buffer.write(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
    blocks = buffer.getvalue()
    entries = np.fromfile(sidecar(tar, ".idx"), dtype=ENTRY_DTYPE)
    start, size = int(entries[slot]["offset"]), int(entries[slot]["size"])
    old = tar.read_bytes()
    tar.write_bytes(old[:start] + blocks + old[start + size :])
    later = slice(slot + 1, None)
    entries["offset"][later] = entries["offset"][later].astype(np.int64) + len(blocks) - size
    entries["size"][slot] = len(blocks)
    entries["crc32"][slot] = zlib.crc32(blocks)
    write_entries(folder, entries)


def write_entries(folder: Path, entries: np.ndarray) -> None:
    """Write the entries of shard 0 and make index.json fit."""
    sidecar(folder / "shard-000000.tar", ".idx").write_bytes(entries.tobytes())
    edit_index(
        folder,
        idx_sha256=hashlib.sha256(entries.tobytes()).hexdigest(),
        bytes=(folder / "shard-000000.tar").stat().st_size,
    )


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "index.json"
    document = json.loads(path.read_text())
    document["shards"][0] |= changes
    path.write_text(json.dumps(document))


def edit_json(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members["json"] = json.dumps(json.loads(members["json"]) | changes).encode()

    return change


def causes(folder: Path, **options: Any) -> list[tuple[str, str, str]]:
    report = lint(folder, **options)
    assert report.ok == (not report.problems)
    return [(problem.shard, problem.key, problem.cause) for problem in report.problems]


@pytest.mark.parametrize("frames", ["video", "extracted"])
def test_a_whole_folder_is_ok(tmp_path: Path, frames: Any) -> None:
    options = BuildOptions(frames=frames, frames_per_clip=4, frame_size=28)
    records = (fer_record(n) for n in range(6))
    build_shards(records, tmp_path / "s", options=options, provenance={}, max_records_per_shard=3)
    done: list[int] = []
    report = lint(tmp_path / "s", decode=True, progress=done.append)
    assert report.problems == () and report.ok
    assert (report.shards, report.records, report.decoded) == (2, 6, 6)
    assert done == [1, 2, 3, 4, 5, 6]
    assert lint(tmp_path / "s").decoded == 0


def test_flipped_bytes(folder: Path) -> None:
    index = ShardIndex.load(folder)
    offsets = {}
    for shard, slot in ((0, 1), (1, 2)):
        offsets[index.key(shard, slot)] = offset = int(index.entries(shard)[slot]["offset"])
        overwrite(folder / index.shards[shard].name, offset + 700, b"\xff\xff\xff\xff")
    report = lint(folder)
    assert report.records == 6
    assert {problem.key: problem.offset for problem in report.problems} == offsets
    assert all(re.match("checksum must be", problem.cause) for problem in report.problems)


def test_shards_that_are_cut_or_missing_are_all_named(folder: Path) -> None:
    first = folder / "shard-000000.tar"
    size = first.stat().st_size
    index = ShardIndex.load(folder)
    end = int(index.entries(0)[2]["offset"]) + 100
    with first.open("r+b") as stream:
        stream.truncate(end)
    (folder / "shard-000001.keys").unlink()
    found = causes(folder)
    assert found[0] == ("shard-000000.tar", "", f"shard-000000.tar must have {size} bytes, "
                        f"found {end}")  # fmt: skip
    assert found[1][:2] == ("shard-000000.tar", "clip-2")
    assert found[1][2].startswith("the tar is cut short")
    assert found[2] == ("shard-000001.tar", "", "shard-000001.keys is missing")
    assert len(found) == 3


def test_side_files_that_do_not_fit(folder: Path) -> None:
    (folder / "shard-000000.keys").write_text("a\nb\nc\n")
    overwrite(folder / "shard-000001.idx", 12, b"\x01")
    found = causes(folder)
    assert [shard for shard, _, _ in found] == ["shard-000000.tar", "shard-000001.tar"]
    assert "does not fit keys_sha256" in found[0][2] and "does not fit idx_sha256" in found[1][2]


def test_idx_of_another_length(folder: Path) -> None:
    path = folder / "shard-000000.idx"
    path.write_bytes(path.read_bytes()[:-21])
    found = causes(folder)
    assert any("must have 63 bytes according to index.json, found 42" in c for _, _, c in found)
    assert lint(folder).records == 3  # the other shard is checked all the same


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (edit_json(emotion="glad"), "emotion: must be one of neutral"),
        (edit_json(version=9), "version: this program reads version 1"),
        (edit_json(tasks=["er"]), "the index lists the tasks er, fer, the record has er"),
        (edit_json(num_frames=7), "the index lists 6 frames, the record has 7"),
        (lambda members: members.pop("mp4"), "members: must be json, mp4, found"),
    ],
)
def test_records_that_are_wrong_inside(
    folder: Path, change: Callable[[dict[str, bytes]], None], cause: str
) -> None:
    replace_record(folder, 1, change)
    found = causes(folder)
    assert {at[:2] for at in found} == {("shard-000000.tar", "clip-1")}
    assert found[0][2].startswith(cause)


def test_a_clip_that_is_cut_is_found_without_decoding(folder: Path) -> None:
    def cut(members: dict[str, bytes]) -> None:
        members["mp4"] = members["mp4"][: len(members["mp4"]) // 2]

    replace_record(folder, 2, cut)
    (found,) = causes(folder)
    assert found[1] == "clip-2" and "cannot read the video" in found[2]


def test_decode_finds_what_only_the_decoder_sees(folder: Path) -> None:
    def corrupt(members: dict[str, bytes]) -> None:
        mp4 = members["mp4"]
        at = mp4.index(b"mdat") + 100
        members["mp4"] = mp4[:at] + bytes(1500) + mp4[at + 1500 :]

    replace_record(folder, 2, corrupt)
    assert causes(folder) == []  # checksum, structure and packets are right
    assert [key for _, key, _ in causes(folder, decode=True)] == ["clip-2"]


def test_the_number_of_frames_is_compared(folder: Path) -> None:
    def shorter(members: dict[str, bytes]) -> None:
        rng = np.random.default_rng(1)
        members["mp4"] = encode_mp4(rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), fps=8)

    replace_record(folder, 0, shorter)
    wanted = [("shard-000000.tar", "clip-0", "the record says 6 frames, the video has 5")]
    assert causes(folder) == causes(folder, decode=True) == wanted


def test_decode_of_extracted_frames(tmp_path: Path) -> None:
    options = BuildOptions(frames="extracted", frames_per_clip=2, frame_size=28)
    build_shards([fer_record(0)], tmp_path / "s", options=options, provenance={})
    folder = tmp_path / "s"

    def change(members: dict[str, bytes]) -> None:
        del members["mp4"]
        media = {"kind": "frames", "count": 1, "peak": True}
        members |= {"f0.jpg": b"no jpeg", "peak.jpg": b"no jpeg"}
        edit_json(media=media)(members)

    replace_record(folder, 0, change)
    found = causes(folder, decode=True)
    assert found[0][2] == "index.json says 2 extracted frames, the record has 1"
    assert len(found) == 2 and "JPEG" in found[1][2]


def test_media_of_the_wrong_kind(folder: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        del members["mp4"]
        members |= {"f0.jpg": b"j", "peak.jpg": b"j"}
        edit_json(media={"kind": "frames", "count": 1, "peak": True})(members)

    replace_record(folder, 0, change)
    assert causes(folder)[0][2] == (
        "index.json says frames: video, the record has extracted frames"
    )


def test_gaps_and_the_end_of_the_tar(folder: Path) -> None:
    tar = folder / "shard-000000.tar"
    entries = np.fromfile(sidecar(tar, ".idx"), dtype=ENTRY_DTYPE)
    content = tar.read_bytes()
    second = int(entries[1]["offset"])
    end = int(entries[2]["offset"] + entries[2]["size"])
    tar.write_bytes(content[:second] + bytes(512) + content[second:end] + b"\x01" * 1024)
    entries["offset"][1:] += np.uint64(512)
    write_entries(folder, entries)
    assert causes(folder) == [
        (
            "shard-000000.tar",
            "",
            f"bytes {second} to {second + 512} of the tar belong to no record",
        ),
        ("shard-000000.tar", "", "the tar does not end with empty blocks"),
    ]


def test_keys_twice_and_unlisted_tars(tmp_path: Path, folder: Path) -> None:
    (folder / "stray.tar").write_bytes(b"")
    other = tmp_path / "other"
    build_shards([replace(fer_record(0), key="clip-4")], other, provenance={})
    document = json.loads((other / "index.json").read_text())
    for suffix in (".tar", ".idx", ".keys"):
        target = folder / f"extra{suffix}"
        (other / f"shard-000000{suffix}").rename(target)
    ours = json.loads((folder / "index.json").read_text())
    ours["shards"].append(document["shards"][0] | {"name": "extra.tar"})
    (folder / "index.json").write_text(json.dumps(ours))
    assert causes(folder) == [
        ("stray.tar", "", "is not listed in index.json"),
        ("extra.tar", "clip-4", "the key comes twice in the dataset"),
    ]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "must be JSON"),
        ('{"schema_version": 7}', "schema_version: this program reads version 1, found 7"),
        (
            '{"schema_version": 1, "shards": [], "options": {}, "provenance": {}}',
            "must list at least one shard",
        ),
    ],
)
def test_an_unusable_index_is_a_problem(folder: Path, text: str, cause: str) -> None:
    (folder / "index.json").write_text(text)
    report = lint(folder)
    assert len([p for p in report.problems if cause in p.cause]) == 1 and not report.ok


def test_no_folder_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        lint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"index\.json: missing"):
        lint(tmp_path)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["lint", str(folder)]
    assert cli.main([*words, "--decode", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "ok": True,
        "folder": str(folder),
        "shards": 2,
        "records": 6,
        "decoded": 6,
        "problems": [],
        "warnings": report["warnings"],
    }
    assert cli.main([*words, "--decode"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{folder}: 2 shards, 6 records, 6 decoded: ok, 5 suspicious"
    assert cli.main([*words, "--strict"]) == 1
    capsys.readouterr()
    overwrite(folder / "shard-000000.tar", 700, b"\xff\xff")
    (folder / "stray.tar").write_bytes(b"")
    assert cli.main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stray.tar: is not listed in index.json"
    assert lines[1].startswith("shard-000000.tar clip-0 at byte 0: checksum must be")
    assert lines[2].startswith("suspicious: shard-000000.tar clip-2")
    assert lines[-1] == f"{folder}: 2 shards, 6 records: 2 problem(s), 4 suspicious"
    (folder / "index.json").write_text("{")
    assert cli.main(words) == 1
    assert "must be JSON" in capsys.readouterr().out.splitlines()[0]


# ----------------------------------------------------------------------------- content of records


def word_record(number: int, **changes: Any) -> Record:
    notes = {"season": 1, "episode": 2, "start_s": float(number)}
    media = Video(mp4=make_clip(number))
    return make_record(
        number, **{"utterance": f"Word {number}.", "notes": notes, "media": media, **changes}
    )


TURNS = (Turn(speaker="Ann", text="Hey!"), Turn(speaker="Bob", text="Word 1."))
PAIR = {"conversation": TURNS, "target": 2, "tasks": (Task.ECPE,)}


def warnings_of(tmp_path: Path, *records: Record, **limits: float) -> list[tuple[str, str]]:
    build_shards(records, tmp_path / "s", provenance={})
    report = lint(tmp_path / "s", limits=ContentLimits(**limits))
    assert report.problems == () and report.ok
    return [(warning.key, warning.cause) for warning in report.warnings]


def test_a_good_record_has_no_warning(tmp_path: Path) -> None:
    fear = word_record(
        1, **PAIR, emotion="fear", pairs=(Pair(2, "fear", 1),), expressions=("Jaw Drop",)
    )
    assert warnings_of(tmp_path, word_record(0), fear) == []


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"utterance": " "}, "the utterance is empty"),
        ({"expressions": ("Ears wiggle",)}, "the phrase 'Ears wiggle' is in no phrase table"),
        ({"media": Video(mp4=make_clip(0))}, "has the same media as clip-0"),
        (
            {"utterance": "Word 0.", "notes": word_record(0).notes},
            "has the same words at the same time as clip-0",
        ),
        (
            {"conversation": (TURNS[0], Turn(speaker="Bob", text=" ")), "target": 1},
            "turn 2 of the conversation is empty",
        ),
        (
            {**PAIR, "pairs": (Pair(2, "fear", 1),)},
            "the pairs say fear, the label joy",
        ),
    ],
)
def test_suspicious_content(tmp_path: Path, changes: dict[str, Any], cause: str) -> None:
    assert warnings_of(tmp_path, word_record(0), word_record(1, **changes)) == [("clip-1", cause)]


def test_durations(tmp_path: Path) -> None:
    found = warnings_of(tmp_path, word_record(0), max_seconds=0.5)
    assert found == [("clip-0", "lasts 0.75 s, usual are 0.2 to 0.5 s")]
    with pytest.raises(ValueError, match="min-seconds must be from 0 to max-seconds, found 3 and"):
        ContentLimits(min_seconds=3, max_seconds=2)


def test_the_same_clip_may_serve_two_sources(tmp_path: Path) -> None:
    other = word_record(1, source="other", media=Video(mp4=make_clip(0)))
    same_words = word_record(2, utterance="Word 0.")
    assert warnings_of(tmp_path, word_record(0), other, same_words) == []


def test_quarantine_is_a_curation_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [word_record(n) for n in range(3)] + [
        word_record(3, utterance=""),
        word_record(4, media=Video(mp4=make_clip(0))),
    ]
    build_shards(records, tmp_path / "s", provenance={})
    tar = tmp_path / "s" / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 255
    tar.write_bytes(content)
    out = tmp_path / "quarantine.jsonl"
    words = ["lint", str(tmp_path / "s"), "--quarantine", str(out)]
    assert cli.main(words) == 1
    assert [row["key"] for row in map(json.loads, out.read_text().splitlines())] == ["clip-0"]
    assert cli.main([*words, "--strict", "--json"]) == 1
    capsys.readouterr()
    decisions = read_curation([out])
    assert set(decisions) == {"clip-0", "clip-3"}  # clip-4's twin could not be read
    assert decisions["clip-3"][0].reason == "the utterance is empty"
    index = build_shards(
        records, tmp_path / "t", provenance={}, amend=Amendments(decisions=decisions)
    )
    assert index.keys(0) == ("clip-1", "clip-2", "clip-4")
    assert index.provenance["skipped"] == {"test": {"curation": 2}}
    assert cli.main(["lint", str(tmp_path / "t"), "--strict"]) == 0
    assert cli.main(["lint", str(tmp_path / "t"), "--strict", "--max-seconds", "0.5"]) == 1


def test_an_answer_that_does_not_parse_back_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record has one: the constructor refuses it. So the parser is made stricter here."""
    build_shards([word_record(0)], tmp_path / "s", provenance={})
    monkeypatch.setattr(
        "data_shards.inspection.lint.parse_answer",
        lambda task, text, strict: parse_answer(task, "Odd.", strict=True),
    )
    report = lint(tmp_path / "s")
    assert not report.ok
    assert report.problems[0].cause == (
        "the msa answer 'Positive.' does not parse back (not-exact)"
    )
