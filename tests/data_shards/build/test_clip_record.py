"""Pending records become records, or Skipped: missing, damaged, cut from a video, stills."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_shards.build.clip_record import Clip, MediaOptions, PendingRecord, hash_file, make_record
from data_shards.build.source_item import Skipped
from data_shards.media.video import DamagedVideo, count_frames, cut_clip, decode_frames, encode_mp4
from data_shards.shards.record import Record, Video
from data_shards.tasks import Task

FPS, FRAMES, GOP = 10, 60, 12


def frame(number: int) -> np.ndarray:
    """A picture from which its number can be read: seven stripes, one per bit."""
    bits = np.array([220 if number >> bit & 1 else 20 for bit in range(7)], np.uint8)
    return np.broadcast_to(np.repeat(bits, 10)[None, :, None], (40, 70, 3)).copy()


def numbers(mp4: bytes) -> list[int]:
    frames = decode_frames(mp4, range(count_frames(mp4)))
    return [sum(1 << bit for bit in range(7) if f[20, bit * 10 + 5].mean() > 120) for f in frames]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "S01E01.mp4"
    path.write_bytes(encode_mp4(map(frame, range(FRAMES)), FPS, gop=GOP))
    return path


def pending(path: Path | None, **changes: object) -> PendingRecord:
    base = PendingRecord(
        key="a_1",
        source="test",
        split="train",
        utterance="Hello.",
        speaker="Ann",
        sentiment=1.0,
        emotion="joy",
        tasks=(Task.MSA, Task.ER),
        clip=Clip(path=path, expected="some/place.mp4"),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def mp4_of(result: Record | Skipped) -> bytes:
    assert isinstance(result, Record) and isinstance(result.media, Video), result
    return result.media.mp4


def test_a_whole_file_is_kept_byte_for_byte(film: Path) -> None:
    record = make_record(pending(film))
    assert mp4_of(record) == film.read_bytes()
    assert isinstance(record, Record) and record.num_frames == FRAMES


@pytest.mark.parametrize(
    ("start", "end", "shown"),
    [
        (0.0, 1.0, range(10)),
        (1.3, 2.5, range(13, 25)),
        (-0.4, 0.3, range(3)),
        (5.5, None, range(55, 60)),
    ],
)
def test_a_clip_is_cut_to_the_frame(
    film: Path, start: float, end: float | None, shown: range
) -> None:
    span = pending(film, clip=Clip(path=film, start_s=start, end_s=end))
    mp4 = mp4_of(make_record(span))
    assert numbers(mp4) == list(shown)
    assert mp4 == mp4_of(make_record(span))  # the same bytes every time
    copied = numbers(mp4_of(make_record(span, MediaOptions(cut="copy"))))
    assert copied[: len(shown)] == list(shown)
    assert len(copied) <= len(shown) + 2


def test_a_span_without_a_frame_is_damaged_media(film: Path) -> None:
    for start, end in ((9.0, 10.0), (1.0, 1.0), (1.04, 1.06)):
        result = make_record(pending(film, clip=Clip(path=film, start_s=start, end_s=end)))
        assert isinstance(result, Skipped) and result.reason == "media-damaged"
        assert f"{start:.3f} to {end:.3f} s: no frame is shown in the span" in result.detail
        with pytest.raises(DamagedVideo, match="no frame is shown"):
            cut_clip(film, start, end, copy=True)


def test_odd_sizes_are_cropped_to_even(tmp_path: Path, film: Path) -> None:
    path = tmp_path / "odd.mp4"
    path.write_bytes(film.read_bytes())
    assert decode_frames(cut_clip(path, 0, 0.3, copy=False), [0]).shape == (1, 40, 70, 3)


def test_missing_media_name_the_expected_file(tmp_path: Path) -> None:
    result = make_record(pending(None))
    assert str(result) == "a_1: media-missing: no file some/place.mp4"
    gone = make_record(pending(tmp_path / "gone.mp4"))
    assert isinstance(gone, Skipped) and gone.reason == "media-missing"
    assert str(tmp_path / "gone.mp4") in gone.detail


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "holes"])
def test_damaged_media_say_why(film: Path, tmp_path: Path, damage: str) -> None:
    data = film.read_bytes()
    path = tmp_path / "bad.mp4"
    if damage == "holes":  # only decoding shows it
        at = data.index(b"mdat") + 700
        data = data[:at] + bytes(400) + data[at + 400 :]
    path.write_bytes({"empty": b"", "text": b"<html>", "cut": data[:900], "holes": data}[damage])
    result = make_record(pending(path))
    assert isinstance(result, Skipped) and result.reason == "media-damaged"
    assert result.detail.startswith(str(path))
    if damage == "holes":
        assert isinstance(make_record(pending(path), MediaOptions(check="packets")), Record)


def test_a_black_clip_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "black.mp4"
    path.write_bytes(encode_mp4(np.full((5, 32, 32, 3), 6, np.uint8), FPS))
    result = make_record(pending(path))
    assert isinstance(result, Skipped) and result.reason == "media-black"
    path.write_bytes(encode_mp4([np.full((32, 32, 3), 90 * n, np.uint8) for n in (0, 1)], FPS))
    assert isinstance(make_record(pending(path)), Record)  # it begins black


def test_a_peak_outside_the_clip_is_not_trained_on(film: Path) -> None:
    face = {"expressions": ("Smile",), "tasks": (Task.MSA, Task.ER, Task.FER)}
    record = make_record(pending(film, peak_frame=59, **face))
    assert isinstance(record, Record) and record.peak_frame == 59
    result = make_record(pending(film, peak_frame=60, **face))
    assert isinstance(result, Skipped) and result.reason == "peak-outside"
    assert "the peak frame is 60, the clip has 60" in result.detail


def test_a_still_is_the_peak_or_the_middle(film: Path) -> None:
    record = make_record(pending(film, peak_frame=41, still=True))
    assert isinstance(record, Record) and (record.num_frames, record.peak_frame) == (1, 0)
    assert numbers(mp4_of(record)) == [41]
    assert numbers(mp4_of(make_record(pending(film, still=True)))) == [FRAMES // 2]
    outside = make_record(pending(film, peak_frame=99, still=True))
    assert isinstance(outside, Skipped) and "frame 99 requested" in outside.detail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cut": "paste"}, "cut: must be 'encode' or 'copy', found 'paste'"),
        ({"check": "none"}, "check: must be 'frames' or 'packets', found 'none'"),
        ({"crf": 60}, "crf: must be from 0"),
    ],
)
def test_wrong_options_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MediaOptions(**change)  # type: ignore[arg-type]


def test_files_are_hashed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"abc")
    found = hash_file(path)
    assert found["name"] == "a.csv" and found["bytes"] == 3
    assert found["sha256"].startswith("ba7816bf")
