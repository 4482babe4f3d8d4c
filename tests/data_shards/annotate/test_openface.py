"""OpenFace csv: the quirks of real files, the round trip, errors with file, line and column."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.annotate.openface import (
    INTENSITY_AUS,
    PRESENCE_AUS,
    Faces,
    format_openface,
    read_openface,
    write_openface,
)


def make_faces(frames: list[int], *, seed: int = 0) -> Faces:
    """Random faces in whole hundredths, so that the file holds them exactly."""
    rng = np.random.default_rng(seed)
    rows = len(frames)
    return Faces(
        frame_R=np.array(frames, dtype=np.int64).reshape(rows),
        face_id_R=rng.integers(0, 3, rows),
        timestamp_R=np.array(frames).reshape(rows) / 8,
        confidence_R=rng.integers(0, 101, rows) / 100,
        success_R=rng.integers(0, 2, rows) == 1,
        intensity_RI=rng.integers(0, 501, (rows, 17)) / 100,
        presence_RC=rng.integers(0, 2, (rows, 18)) == 1,
    )


def assert_same(left: Faces, right: Faces) -> None:
    for name in Faces.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
        assert getattr(left, name).dtype == getattr(right, name).dtype, name


@given(
    frames=st.lists(st.integers(0, 400), max_size=12),
    seed=st.integers(0, 99),
    spaced=st.booleans(),
)
def test_round_trip(frames: list[int], seed: int, spaced: bool) -> None:
    faces = make_faces(frames, seed=seed)
    assert_same(read_openface(format_openface(faces, spaced=spaced)), faces)


@pytest.mark.parametrize("spaced", [True, False])
def test_file_and_header(tmp_path: Path, spaced: bool) -> None:
    faces = make_faces([0, 1, 1, 3])
    path = tmp_path / "clip.csv"
    write_openface(path, faces, spaced=spaced)
    lines = path.read_bytes().decode().split("\n")
    names = lines[0].split(",")
    assert names[0] == "frame"
    assert all(name.startswith(" ") == spaced for name in names[1:])
    assert len(names) == 5 + 17 + 18
    assert [line.split(",")[0] for line in lines[1:-1]] == ["1", "2", "2", "4"]  # counts from 1
    assert_same(read_openface(path), faces)


def test_the_units() -> None:
    assert (len(INTENSITY_AUS), len(PRESENCE_AUS)) == (17, 18)
    assert set(PRESENCE_AUS) - set(INTENSITY_AUS) == {"AU28"}
    assert list(PRESENCE_AUS) == sorted(PRESENCE_AUS)


def test_other_columns_order_and_line_ends_do_not_matter() -> None:
    faces = make_faces([0, 1, 2])
    table = [line.split(",") for line in format_openface(faces, spaced=False).splitlines()]
    shuffled = [[" gaze_0_x" if n == 0 else "0.1", *reversed(row)] for n, row in enumerate(table)]
    text = "\ufeff" + "\r\n".join(",".join(row) for row in shuffled) + "\r\n\r\n"
    assert_same(read_openface(text), faces)


def test_failed_frames_keep_their_values() -> None:
    faces = make_faces([0, 1])
    failed = Faces(
        **{
            name: getattr(faces, name) for name in Faces.__dataclass_fields__ if name != "success_R"
        },
        success_R=np.array([False, False]),
    )
    back = read_openface(format_openface(failed))
    assert not back.success_R.any()
    np.testing.assert_array_equal(back.intensity_RI, faces.intensity_RI)


def drop_columns(text: str, *names: str) -> str:
    rows = [line.split(",") for line in text.splitlines()]
    keep = [n for n, name in enumerate(rows[0]) if name not in names]
    return "\n".join(",".join(row[n] for n in keep) for row in rows)


def test_missing_face_id_and_timestamp_are_zero() -> None:
    faces = make_faces([0, 4])
    back = read_openface(drop_columns(format_openface(faces, spaced=False), "face_id", "timestamp"))
    assert back.face_id_R.tolist() == [0, 0] and back.timestamp_R.tolist() == [0.0, 0.0]
    np.testing.assert_array_equal(back.presence_RC, faces.presence_RC)


def test_no_faces_at_all() -> None:
    assert read_openface(format_openface(make_faces([]))).num_rows == 0


def set_cell(column: str, value: str) -> str:
    rows = [line.split(",") for line in format_openface(make_faces([0, 1]), spaced=False).split()]
    rows[2][rows[0].index(column)] = value
    return "\n".join(",".join(row) for row in rows)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("frame", "0", "must be a whole number from 1, found 0"),
        ("frame", "1.5", "must be a whole number from 1, found 1.5"),
        ("frame", "inf", "must be a whole number from 1, found inf"),
        ("face_id", "0.5", "must be a whole number, found 0.5"),
        ("timestamp", "late", "must be a finite number, found nan"),
        ("confidence", "-nan", "must be a finite number, found nan"),
        ("success", "2", "must be 0 or 1, found 2"),
        ("AU12_r", "5.01", "must be an intensity from 0 to 5, found 5.01"),
        ("AU12_r", "", "must be an intensity from 0 to 5, found nan"),
        ("AU28_c", "0.50", "must be 0 or 1, found 0.5"),
    ],
)
def test_bad_cell(tmp_path: Path, column: str, value: str, message: str) -> None:
    path = tmp_path / "clip.csv"
    path.write_text(set_cell(column, value))
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: column {column}: {message}")):
        read_openface(path)


def test_bad_structure(tmp_path: Path) -> None:
    text = format_openface(make_faces([0, 1]), spaced=False)
    with pytest.raises(ValueError, match=r"<text>:1: must start with OpenFace's header"):
        read_openface("")
    with pytest.raises(ValueError, match=r"<text>:1: column AU06_c: must be in .* with -aus"):
        read_openface(drop_columns(text, "AU06_c"))
    with pytest.raises(ValueError, match=r"<text>:1: column success: .* is this OpenFace 2\.x"):
        read_openface(drop_columns(text, "success"))
    with pytest.raises(
        ValueError, match=r"<text>:1: column AU06_r: must occur once, found 2 times"
    ):
        read_openface(text.replace("AU07_r", "AU06_r"))
    with pytest.raises(ValueError, match=r"<text>:3: a row must have 40 fields .* found 41"):
        read_openface(text.rstrip("\n") + ",1\n")
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such OpenFace csv"):
        read_openface(tmp_path / "none.csv")


def test_shapes_are_checked() -> None:
    good = make_faces([0, 1])
    fields = {name: getattr(good, name) for name in Faces.__dataclass_fields__}
    with pytest.raises(ValueError, match=r"faces: success_R: must have shape \(2,\), found \(1,\)"):
        Faces(**(fields | {"success_R": good.success_R[:1]}))
    with pytest.raises(
        ValueError, match=r"intensity_RI: must have shape \(2, 17\), found \(2, 16\)"
    ):
        Faces(**(fields | {"intensity_RI": good.intensity_RI[:, 1:]}))
