"""Expressions over time: action-unit (AU) tracks with onset, apex and offset.

In: the AUs, their strength, the person's gain. Out: intensities (0..5) [frames, AUs] in the order
of ACTION_UNITS, and simulated OpenFace measurements of them.
"""

from collections.abc import Sequence

import numpy as np

from data_shards.annotate.au_phrases import EMOTION_TABLES
from data_shards.annotate.openface import INTENSITY_AUS, PRESENCE_AUS, Faces
from data_shards.world.face import ACTION_UNITS, MAX_INTENSITY

COLUMN = {unit: i for i, unit in enumerate(ACTION_UNITS)}
_EMOTION_AUS = EMOTION_TABLES["mer_factory"]
# The AUs that distinguish an expression from the others: they are always shown.
_SIGNATURE: dict[str, tuple[str, ...]] = {
    "joy": ("AU12",), "sadness": ("AU01", "AU15"), "surprise": ("AU02", "AU26"),
    "fear": ("AU01", "AU20"), "anger": ("AU04", "AU23"), "disgust": ("AU09",),
}  # fmt: skip
_SHOWN = 0.65  # probability that each further AU of the emotion's set takes part


def choose_units(rng: np.random.Generator, emotion: str) -> tuple[str, ...]:
    """Random AUs of an emotion: its signature, and each other AU of it with probability _SHOWN."""
    signature = _SIGNATURE.get(emotion, ())
    return tuple(
        unit for unit in _EMOTION_AUS.get(emotion, ()) if unit in signature or rng.random() < _SHOWN
    )


def _envelope(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """0 at the start, 1 around the apex, partly down at the end. Shape [frames]."""
    onset, full = rng.uniform(0.0, 0.12), rng.uniform(0.22, 0.38)
    release, rest = rng.uniform(0.68, 0.82), rng.uniform(0.35, 0.75)
    time = np.linspace(0, 1, num_frames)
    shape = np.interp(time, [0, onset, full, release, 1], [0, 0, 0.96, 0.9, rest])
    apex = rng.uniform(full, release)
    return shape + 0.1 * np.exp(-(((time - apex) / 0.08) ** 2))


def act(
    rng: np.random.Generator,
    units: Sequence[str],
    *,
    strength: float,
    gain: float,
    num_frames: int,
    speaking: bool,
) -> np.ndarray:
    """AU intensities of one clip: float32 [frames, 18], 0..5.

    `strength` is the apex intensity before the personal `gain`; `speaking` moves lips and jaw a
    little. Idle AUs stay below 0.8, so that an apex of 2.5 or more is seen against them.
    """
    track = rng.uniform(0, 0.35, size=(1, len(ACTION_UNITS))) + rng.normal(
        0, 0.12, size=(num_frames, len(ACTION_UNITS))
    )
    envelope = _envelope(rng, num_frames)
    for unit in units:
        peak = min(MAX_INTENSITY, strength * gain * rng.uniform(0.85, 1.15))
        track[:, COLUMN[unit]] += peak * envelope
    if speaking:
        syllables = 0.5 + 0.5 * np.sin(
            np.arange(num_frames) * rng.uniform(1.6, 2.6) + rng.uniform(0, 6)
        )
        track[:, COLUMN["AU25"]] += 1.3 * syllables
        track[:, COLUMN["AU26"]] += 0.6 * syllables
    track[:, COLUMN["AU45"]] = 0.0
    if rng.random() < 0.3:  # a blink before the expression sets in
        track[0, COLUMN["AU45"]] = 4.0
    track[:, COLUMN["AU28"]] = np.where(np.isin("AU28", list(units)), track[:, COLUMN["AU28"]], 0.0)
    return np.clip(track, 0, MAX_INTENSITY).astype(np.float32)


def measure(rng: np.random.Generator, tracks: Sequence[np.ndarray], *, fps: int) -> Faces:
    """Simulated OpenFace output of a clip: one row per frame and face, faces numbered as `tracks`.

    Each track is [frames, 18]. Measurement noise has a standard deviation of 0.15; presence means
    an intensity of 1 or more; one row in thirty fails and carries small values, as in real files.
    """
    num_frames, num_faces = len(tracks[0]), len(tracks)
    exact = np.stack(tracks, axis=1).reshape(num_frames * num_faces, len(ACTION_UNITS))
    measured = np.clip(exact + rng.normal(0, 0.15, size=exact.shape), 0, MAX_INTENSITY)
    success = rng.random(len(measured)) >= 1 / 30
    measured[~success] *= 0.1
    frame = np.repeat(np.arange(num_frames), num_faces)
    return Faces(
        frame_R=frame,
        face_id_R=np.tile(np.arange(num_faces), num_frames),
        timestamp_R=frame / fps,
        confidence_R=np.where(success, rng.uniform(0.85, 0.98, size=len(measured)), 0.2),
        success_R=success,
        intensity_RI=measured[:, [COLUMN[unit] for unit in INTENSITY_AUS]],
        presence_RC=measured[:, [COLUMN[unit] for unit in PRESENCE_AUS]] >= 1.0,
    )
