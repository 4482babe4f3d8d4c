"""FER labels: the peak frame of a clip and the phrases of its face (equations 1 to 3 of the paper).

In: the faces of a clip (`openface.py`) and its emotion. Out: a `FerAnnotation`, or the
reason why there is none. Pure functions; what the paper leaves open is a field of `FerOptions`.
Flow: openface -> here -> fer.
"""

import hashlib
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_shards.annotate.au_phrases import EMOTION_TABLES, PHRASE_TABLES
from data_shards.annotate.openface import INTENSITY_AUS, PRESENCE_AUS, Faces
from data_shards.tasks import EMOTIONS

PresenceRule = Literal["c", "r_positive", "r_threshold"]
Au28Rule = Literal["by_rule", "c"]
Ties = Literal["first", "last"]
OnEmpty = Literal["skip", "frame", "neutral"]
PhraseChoice = Literal["first", "random"]
Reason = Literal["no-face", "emotion-without-aus", "no-common-au"]

NEUTRAL_PHRASE: Final = "Neutral expression"
KNOWN_EMOTIONS: Final = tuple(
    dict.fromkeys([*EMOTIONS, *(e for t in EMOTION_TABLES.values() for e in t)])
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FerOptions:
    """What the paper leaves open; the defaults follow its text where it has a rule.

    min_confidence: rows below are dropped; None = no filter (paper), 0.8 is Emotion-LLaMA's.
    success_only: drop rows where tracking failed; otherwise a failed frame can be the peak.
    face_id: only this face; None = every face of every frame (paper, equation 2).
    score_aus: the units that equation 1 sums; all 17 (paper), or all but AU45, to ignore blinks.
    frequent_aus: sum only that many units, the most frequent of the clip; None = all (paper).
    presence: when a unit is in AU_frame: its _c is 1, its _r is above 0, or _r >= threshold.
    threshold: intensity from 0 to 5 for 'r_threshold'.
    au28: AU28 has no _r. 'by_rule': never present under an _r rule; 'c': its _c always counts.
    ties: which of several rows with the highest score is the peak, the first or the last in time.
    on_empty: without a common unit: no annotation, all units of the peak, or the neutral phrase.
    phrase: which phrase of a unit: the first, or one drawn from (seed, key, unit).
    seed: of that draw.
    emotion_table, phrase_table: names in `au_phrases`.
    """

    min_confidence: float | None = None
    success_only: bool = False
    face_id: int | None = None
    score_aus: tuple[str, ...] = INTENSITY_AUS
    frequent_aus: int | None = None
    presence: PresenceRule = "c"
    threshold: float = 0.8
    au28: Au28Rule = "by_rule"
    ties: Ties = "first"
    on_empty: OnEmpty = "skip"
    phrase: PhraseChoice = "first"
    seed: int = 0
    emotion_table: str = "mer_factory"
    phrase_table: str = "expression"

    def __post_init__(self) -> None:
        choices = (
            ("presence", get_args(PresenceRule)),
            ("au28", get_args(Au28Rule)),
            ("ties", get_args(Ties)),
            ("on_empty", get_args(OnEmpty)),
            ("phrase", get_args(PhraseChoice)),
            ("emotion_table", tuple(EMOTION_TABLES)),
            ("phrase_table", tuple(PHRASE_TABLES)),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                _refuse(name, f"must be one of {', '.join(allowed)}", getattr(self, name))
        if not self.score_aus or len(set(self.score_aus) & set(INTENSITY_AUS)) != len(
            self.score_aus
        ):
            _refuse(
                "score_aus", f"must be distinct units of {', '.join(INTENSITY_AUS)}", self.score_aus
            )
        if self.frequent_aus is not None and not 1 <= self.frequent_aus <= len(self.score_aus):
            _refuse("frequent_aus", f"must be 1..{len(self.score_aus)}", self.frequent_aus)
        if self.min_confidence is not None and not 0 <= self.min_confidence <= 1:
            _refuse("min_confidence", "must be from 0 to 1", self.min_confidence)
        if not 0 <= self.threshold <= 5:
            _refuse("threshold", "must be an intensity from 0 to 5", self.threshold)


def _refuse(name: str, rule: str, value: object) -> None:
    raise ValueError(f"fer option {name}: {rule}, found {value!r}")


DEFAULT_OPTIONS: Final = FerOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The most expressive face of a clip."""

    row: int  # of the Faces
    frame: int  # 0-based rank by presentation time
    face_id: int
    score: float  # equation 1: sum of intensities


@dataclass(frozen=True, kw_only=True, slots=True)
class FerAnnotation:
    """The FER label of a clip."""

    peak_frame: int  # 0-based rank by presentation time
    aus: tuple[str, ...]  # common units, ascending; empty with the neutral phrase
    phrases: tuple[str, ...]  # one per unit


@dataclass(frozen=True, kw_only=True, slots=True)
class NotAnnotated:
    """Why a clip has no FER label."""

    reason: Reason


def find_peak(faces: Faces, options: FerOptions = DEFAULT_OPTIONS) -> Peak | None:
    """The row with the highest composite score (equations 1, 2); None if all are filtered out."""
    keep_R = np.ones(faces.num_rows, dtype=np.bool_)
    if options.min_confidence is not None:
        keep_R &= faces.confidence_R >= options.min_confidence
    if options.success_only:
        keep_R &= faces.success_R
    if options.face_id is not None:
        keep_R &= faces.face_id_R == options.face_id
    if not keep_R.any():
        return None
    rows = np.flatnonzero(keep_R)
    columns = _score_columns(faces, rows, options)
    # Integers: the sum of two-decimal numbers must not break a tie by a rounding error.
    micro_RI = np.rint(faces.intensity_RI[rows][:, columns] * 1e6).astype(np.int64)
    score_R = micro_RI.sum(axis=1)
    best = rows[score_R == score_R.max()]
    order = best[np.argsort(faces.frame_R[best], kind="stable")]
    row = int(order[0] if options.ties == "first" else order[-1])
    return Peak(
        row=row,
        frame=int(faces.frame_R[row]),
        face_id=int(faces.face_id_R[row]),
        score=float(score_R.max()) / 1e6,
    )


def _score_columns(faces: Faces, rows: NDArray[np.intp], options: FerOptions) -> list[int]:
    """The intensity columns that equation 1 sums."""
    aus = options.score_aus
    if options.frequent_aus is not None:
        counts = {au: int(np.count_nonzero(_active(faces, au, options)[rows])) for au in aus}
        aus = tuple(sorted(aus, key=lambda au: (-counts[au], au))[: options.frequent_aus])
    return [INTENSITY_AUS.index(au) for au in aus]


def _active(faces: Faces, au: str, options: FerOptions) -> NDArray[np.bool_]:
    """Whether the unit is in AU_frame, per row."""
    if options.presence == "c" or (au == "AU28" and options.au28 == "c"):
        return faces.presence_RC[:, PRESENCE_AUS.index(au)]
    if au not in INTENSITY_AUS:
        return np.zeros(faces.num_rows, dtype=np.bool_)
    intensity_R = faces.intensity_RI[:, INTENSITY_AUS.index(au)]
    if options.presence == "r_positive":
        return intensity_R > 0
    return intensity_R >= options.threshold


def active_aus(faces: Faces, row: int, options: FerOptions = DEFAULT_OPTIONS) -> tuple[str, ...]:
    """AU_frame of equation 3: the units that one row shows, ascending."""
    return tuple(au for au in PRESENCE_AUS if _active(faces, au, options)[row])


def annotate_fer(
    faces: Faces, emotion: str, options: FerOptions = DEFAULT_OPTIONS, *, key: str = ""
) -> FerAnnotation | NotAnnotated:
    """The FER label of one clip: its peak frame and the phrases of the common units (equation 3).

    emotion: one of KNOWN_EMOTIONS. key: the record's, used by the random choice of phrases alone.
    Raises ValueError for an unknown emotion.
    """
    if emotion not in KNOWN_EMOTIONS:
        rule = f"must be one of {', '.join(KNOWN_EMOTIONS)}"
        raise ValueError(f"record {key or '(no key)'}: emotion: {rule}, found {emotion!r}")
    peak = find_peak(faces, options)
    if peak is None:
        return NotAnnotated(reason="no-face")
    phrases = PHRASE_TABLES[options.phrase_table]
    of_emotion = EMOTION_TABLES[options.emotion_table].get(emotion, ())
    shown = tuple(au for au in active_aus(faces, peak.row, options) if au in phrases)
    common = tuple(au for au in shown if au in of_emotion)
    if not common and options.on_empty == "frame":
        common = shown
    if not common and options.on_empty == "neutral":
        return FerAnnotation(peak_frame=peak.frame, aus=(), phrases=(NEUTRAL_PHRASE,))
    if not common:
        return NotAnnotated(reason="no-common-au" if of_emotion else "emotion-without-aus")
    texts = tuple(_choose(phrases[au], au, key, options) for au in common)
    return FerAnnotation(peak_frame=peak.frame, aus=common, phrases=texts)


def _choose(phrases: tuple[str, ...], au: str, key: str, options: FerOptions) -> str:
    if options.phrase == "first":
        return phrases[0]
    digest = hashlib.sha256(f"{options.seed}/{key}/{au}".encode()).digest()
    return phrases[int.from_bytes(digest[:8], "big") % len(phrases)]
