"""FER labels: equations 1 to 3, and each setting that the paper leaves open."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.annotate.action_units import (
    NEUTRAL_PHRASE,
    FerAnnotation,
    FerOptions,
    NotAnnotated,
    active_aus,
    annotate_fer,
    find_peak,
)
from data_shards.annotate.au_phrases import EMOTION_TABLES, PHRASE_TABLES
from data_shards.annotate.openface import INTENSITY_AUS, PRESENCE_AUS, Faces
from data_shards.tasks import EMOTIONS, Task, format_answer

Row = dict[str, Any]


def faces_of(*rows: Row) -> Faces:
    """Rows such as {"frame": 3, "AU12": 2.5, "c": ["AU12"]}; values left out are 0."""
    return Faces(
        frame_R=np.array([row["frame"] for row in rows], dtype=np.int64),
        face_id_R=np.array([row.get("face", 0) for row in rows], dtype=np.int64),
        timestamp_R=np.zeros(len(rows)),
        confidence_R=np.array([row.get("confidence", 1.0) for row in rows], dtype=np.float64),
        success_R=np.array([row.get("success", True) for row in rows], dtype=np.bool_),
        intensity_RI=np.array(
            [[row.get(au, 0.0) for au in INTENSITY_AUS] for row in rows], dtype=np.float64
        ).reshape(len(rows), 17),
        presence_RC=np.array(
            [[au in row.get("c", ()) for au in PRESENCE_AUS] for row in rows], dtype=np.bool_
        ).reshape(len(rows), 18),
    )


SMILE = {"frame": 4, "AU06": 2.0, "AU12": 3.0, "AU25": 1.0, "c": ["AU06", "AU12", "AU25"]}


def peak_frame(faces: Faces, **options: Any) -> int | None:
    peak = find_peak(faces, FerOptions(**options))
    return None if peak is None else peak.frame


def test_the_peak_is_the_row_with_the_highest_sum() -> None:
    faces = faces_of({"frame": 0, "AU12": 5.0}, SMILE, {"frame": 7, "AU01": 5.0, "AU02": 0.99})
    peak = find_peak(faces)
    assert peak is not None
    assert (peak.row, peak.frame, peak.score) == (1, 4, 6.0)


def test_several_faces_take_the_highest_of_all() -> None:
    faces = faces_of(
        {"frame": 0, "face": 0, "AU12": 1.0},
        {"frame": 0, "face": 1, "AU12": 2.0},
        {"frame": 2, "face": 0, "AU12": 1.5},
        {"frame": 2, "face": 1, "AU04": 4.0, "c": ["AU04"]},
    )
    peak = find_peak(faces)
    assert peak is not None and (peak.frame, peak.face_id) == (2, 1)
    assert peak_frame(faces, face_id=0) == 2
    assert peak_frame(faces, face_id=5) is None
    # AU_frame is of the winning face alone
    assert annotate_fer(faces, "anger") == FerAnnotation(
        peak_frame=2, aus=("AU04",), phrases=("Brow Lowerer",)
    )


def test_annotation_of_a_smile() -> None:
    assert annotate_fer(faces_of(SMILE), "joy") == FerAnnotation(
        peak_frame=4, aus=("AU06", "AU12"), phrases=("Cheek Raiser", "Lip Corner Puller")
    )


def test_reasons() -> None:
    assert annotate_fer(faces_of(), "joy") == NotAnnotated(reason="no-face")
    assert annotate_fer(faces_of(SMILE), "anger") == NotAnnotated(reason="no-common-au")
    assert annotate_fer(faces_of(SMILE), "neutral") == NotAnnotated(reason="emotion-without-aus")
    docs = FerOptions(emotion_table="emotion_llama_docs")
    assert annotate_fer(faces_of(SMILE), "disgust", docs).reason == "emotion-without-aus"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"record k1: emotion: must be one of neutral, .*'happy'"):
        annotate_fer(faces_of(SMILE), "happy", key="k1")


def test_filters() -> None:
    failed = {"frame": 1, "AU12": 5.0, "AU06": 5.0, "success": False, "confidence": 0.3}
    faces = faces_of(SMILE, failed)
    assert peak_frame(faces) == 1  # the paper has no filter: a failed frame can win
    assert peak_frame(faces, success_only=True) == 4
    assert peak_frame(faces, min_confidence=0.8) == 4
    assert peak_frame(faces, min_confidence=0.3) == 1


def test_ties_and_row_order() -> None:
    faces = faces_of({"frame": 9, "AU12": 0.3}, {"frame": 2, "AU01": 0.1, "AU02": 0.2})
    assert 0.1 + 0.2 != 0.3  # the sum must not break the tie
    assert peak_frame(faces) == 2
    assert peak_frame(faces, ties="last") == 9


def test_score_columns() -> None:
    faces = faces_of({"frame": 0, "AU45": 4.0}, SMILE | {"AU12": 0.5})
    assert peak_frame(faces) == 0
    assert peak_frame(faces, score_aus=INTENSITY_AUS[:-1]) == 4


def test_frequent_units_only() -> None:
    rows: list[Row] = [{"frame": n, "AU12": 0.2, "c": ["AU12"]} for n in range(3)]
    rows += [{"frame": 3, "AU12": 1.02, "c": ["AU12"]}, {"frame": 4, "AU26": 1.25, "c": ["AU26"]}]
    assert peak_frame(faces_of(*rows)) == 4
    assert peak_frame(faces_of(*rows), frequent_aus=1) == 3


def test_presence_rules_and_au28() -> None:
    faces = faces_of(
        {"frame": 0, "AU06": 0.5, "AU12": 0.8, "AU26": 2.0, "c": ["AU06", "AU28", "AU45"]}
    )
    shown = {
        rule: active_aus(faces, 0, FerOptions(presence=rule))  # type: ignore[arg-type]
        for rule in ("c", "r_positive", "r_threshold")
    }
    assert shown == {
        "c": ("AU06", "AU28", "AU45"),
        "r_positive": ("AU06", "AU12", "AU26"),
        "r_threshold": ("AU12", "AU26"),
    }
    assert active_aus(faces, 0, FerOptions(presence="r_threshold", threshold=1.0)) == ("AU26",)
    with_28 = FerOptions(presence="r_threshold", au28="c")
    assert active_aus(faces, 0, with_28) == ("AU12", "AU26", "AU28")


def test_empty_intersection() -> None:
    faces = faces_of(SMILE | {"c": ["AU06", "AU45"]})
    frame = annotate_fer(faces, "neutral", FerOptions(on_empty="frame"))
    assert frame == FerAnnotation(peak_frame=4, aus=("AU06",), phrases=("Cheek Raiser",))
    neutral = annotate_fer(faces, "neutral", FerOptions(on_empty="neutral"))
    assert neutral == FerAnnotation(peak_frame=4, aus=(), phrases=(NEUTRAL_PHRASE,))
    bare = faces_of({"frame": 0})
    assert isinstance(annotate_fer(bare, "joy", FerOptions(on_empty="frame")), NotAnnotated)


def test_random_phrases_depend_on_seed_and_key_alone() -> None:
    faces = faces_of(SMILE)

    def phrases(seed: int, key: str) -> tuple[str, ...]:
        options = FerOptions(phrase="random", seed=seed)
        found = annotate_fer(faces, "joy", options, key=key)
        assert isinstance(found, FerAnnotation)
        return found.phrases

    assert phrases(1, "a") == phrases(1, "a")
    seen = {phrases(seed, key) for seed in range(6) for key in "abcdef"}
    table = PHRASE_TABLES["expression"]
    assert len(seen) > 15
    assert seen <= set(itertools.product(table["AU06"], table["AU12"]))


def test_facs_table() -> None:
    found = annotate_fer(faces_of(SMILE), "joy", FerOptions(phrase_table="facs"))
    assert isinstance(found, FerAnnotation)
    assert found.phrases == ("Cheek raiser", "Lip corner puller (smile)")


def test_tables_are_sound() -> None:
    for table in EMOTION_TABLES.values():
        for aus in table.values():
            assert list(aus) == sorted(set(aus)) and set(aus) <= set(PRESENCE_AUS)
    assert set(EMOTIONS) - set(EMOTION_TABLES["mer_factory"]) == {"neutral"}
    for phrases in PHRASE_TABLES.values():
        assert set(phrases) >= set(PRESENCE_AUS) - {"AU45"}
        # any choice of phrases of any units must be a valid answer
        everything = tuple(text for texts in phrases.values() for text in texts)
        assert format_answer(Task.FER, everything)


@given(
    cells=st.lists(
        st.tuples(st.integers(0, 20), st.lists(st.integers(0, 500), min_size=17, max_size=17)),
        min_size=1,
        max_size=8,
    ),
    present=st.integers(0, 2**18 - 1),
    emotion=st.sampled_from(EMOTIONS),
)
def test_equations(cells: list[tuple[int, list[int]]], present: int, emotion: str) -> None:
    on = [au for n, au in enumerate(PRESENCE_AUS) if present >> n & 1]
    rows = [
        {"frame": frame, "c": on, **dict(zip(INTENSITY_AUS, np.array(r) / 100, strict=True))}
        for frame, r in cells
    ]
    best = max(sum(r) for _, r in cells)
    expected = min(frame for frame, r in cells if sum(r) == best)
    assert peak_frame(faces_of(*rows)) == expected
    found = annotate_fer(faces_of(*rows), emotion)
    common = set(on) & set(EMOTION_TABLES["mer_factory"].get(emotion, ()))
    assert set(found.aus if isinstance(found, FerAnnotation) else ()) == common


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presence": "r"}, "fer option presence: must be one of c, r_positive, r_threshold"),
        ({"emotion_table": "x"}, "fer option emotion_table: must be one of mer_factory"),
        ({"phrase_table": "x"}, "fer option phrase_table: must be one of expression, facs"),
        ({"score_aus": ()}, "fer option score_aus: must be distinct units of AU01, "),
        ({"score_aus": ("AU28",)}, "fer option score_aus: must be distinct units"),
        ({"score_aus": ("AU01", "AU01")}, "fer option score_aus: must be distinct units"),
        ({"frequent_aus": 18}, "fer option frequent_aus: must be 1..17, found 18"),
        ({"min_confidence": 80}, "fer option min_confidence: must be from 0 to 1, found 80"),
        ({"threshold": 9.0}, "fer option threshold: must be an intensity from 0 to 5, found 9.0"),
    ],
)
def test_options_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FerOptions(**changes)
