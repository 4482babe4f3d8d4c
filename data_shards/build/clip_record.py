"""`PendingRecord`: a record whose clip has not been read yet; `make_record` reads the clip.

In: what the annotation of a corpus says about one clip. Out: a Record with its media inside, or a
`Skipped` that names the reason. `make_record` is a pure function of the pending record, the options
and the file: workers may call it in any order. Flow: sources -> here -> build.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_shards.build.source_item import Skipped
from data_shards.media.video import clip_indices, count_frames, cut_clip, decode_frames, encode_mp4
from data_shards.shards.record import Note, Record, Turn, Video
from data_shards.tasks import Pair, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Where the media of a record are: a file, or a span of a longer one."""

    path: Path | None  # None: there is no such file
    expected: str = ""  # the missing file, for messages
    start_s: float | None = None  # in the file; None = from its beginning
    end_s: float | None = None  # None = to its end; both None = the file as it is


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingRecord:
    """A Record without media; the fields mean what they mean there."""

    key: str
    source: str
    split: str
    utterance: str
    speaker: str
    conversation: tuple[Turn, ...] = ()
    target: int = 0
    sentiment: float | None = None
    emotion: str | None = None
    expressions: tuple[str, ...] | None = None
    reason: str | None = None
    pairs: tuple[Pair, ...] | None = None
    tasks: tuple[Task, ...]
    peak_frame: int | None = None
    notes: dict[str, Note] = field(default_factory=dict)
    clip: Clip
    still: bool = False  # store one frame only: the peak, or the middle one if there is no peak


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaOptions:
    """How clips are read.

    cut: a span of a longer video is decoded and encoded again ('encode', exact to the frame in any
        player), or its packets are copied ('copy', lossless; an edit list hides the frames between
        the last keyframe and the start, which a reader that ignores edit lists would show).
    crf: x264's quality where clips are encoded; 18 is visually lossless.
    check: 'frames' decodes the peak and the eight frames that training uses, 'packets' only reads
        the packets (about 30 times faster, but damage inside a packet is not noticed).
    """

    cut: Literal["encode", "copy"] = "encode"
    crf: int = 18
    check: Literal["frames", "packets"] = "frames"

    def __post_init__(self) -> None:
        if self.cut not in ("encode", "copy"):
            raise ValueError(f"cut: must be 'encode' or 'copy', found {self.cut!r}")
        if self.check not in ("frames", "packets"):
            raise ValueError(f"check: must be 'frames' or 'packets', found {self.check!r}")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf: must be from 0 (lossless) to 51, found {self.crf}")


DEFAULT_MEDIA = MediaOptions()
_CHECKED_FRAMES = 8
_BLACK = 24  # of 255; black frames stay below this value after lossy coding


def make_record(pending: PendingRecord, options: MediaOptions = DEFAULT_MEDIA) -> Record | Skipped:
    """Read the clip; Skipped if it is missing, damaged or black, or if the peak is outside."""
    path = pending.clip.path
    if path is None or not path.is_file():
        return _skipped(pending, "media-missing", f"no file {path or pending.clip.expected}")
    try:
        mp4 = _read_clip(pending, path, options)
        num_frames = count_frames(mp4)
        if (
            pending.peak_frame is not None
            and pending.peak_frame >= num_frames
            and not pending.still
        ):
            detail = f"{path}: the peak frame is {pending.peak_frame}, the clip has {num_frames}"
            return _skipped(
                pending, "peak-outside", f"{detail}; run annotate fer on this clip again"
            )
        if options.check == "frames":
            wanted = {*clip_indices(num_frames, _CHECKED_FRAMES), pending.peak_frame or 0}
            frames = decode_frames(mp4, sorted(wanted & set(range(num_frames))))
            if int(frames.max()) < _BLACK:
                return _skipped(pending, "media-black", f"{path}: every checked frame is black")
    except (OSError, ValueError) as error:
        return _skipped(pending, "media-damaged", f"{path}: {error}")
    try:
        return Record(
            key=pending.key,
            source=pending.source,
            split=pending.split,
            utterance=pending.utterance,
            speaker=pending.speaker,
            conversation=pending.conversation,
            target=pending.target,
            sentiment=pending.sentiment,
            emotion=pending.emotion,
            expressions=pending.expressions,
            reason=pending.reason,
            pairs=pending.pairs,
            tasks=pending.tasks,
            num_frames=num_frames,
            peak_frame=0 if pending.still else pending.peak_frame,
            notes=pending.notes,
            media=Video(mp4=mp4),
        )
    except ValueError as error:
        return _skipped(
            pending, "record-invalid", str(error).removeprefix(f"record {pending.key}: ")
        )


def _read_clip(pending: PendingRecord, path: Path, options: MediaOptions) -> bytes:
    clip = pending.clip
    if clip.start_s is None and clip.end_s is None:
        mp4 = path.read_bytes()
    else:
        mp4 = cut_clip(
            path, clip.start_s or 0.0, clip.end_s, copy=options.cut == "copy", crf=options.crf
        )
    if not pending.still:
        return mp4
    num_frames = count_frames(mp4)
    peak = num_frames // 2 if pending.peak_frame is None else pending.peak_frame
    frames = decode_frames(mp4, [peak])
    return encode_still(frames[0], crf=options.crf)


def encode_still(frame_HW3: NDArray[np.uint8], *, crf: int = 18) -> bytes:
    """A picture as an mp4 of one frame; an odd edge is cut off, since yuv420p halves both axes."""
    even_H, even_W = (size - size % 2 for size in frame_HW3.shape[:2])
    return encode_mp4(frame_HW3[None, :even_H, :even_W], fps=1, crf=crf)


def _skipped(pending: PendingRecord, reason: str, detail: str) -> Skipped:
    return Skipped(
        key=pending.key, source=pending.source, split=pending.split, reason=reason, detail=detail
    )


def hash_file(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of an annotation file, for the provenance."""
    data = path.read_bytes()
    return {
        "name": path.name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
