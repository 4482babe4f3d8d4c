"""Drafts: records whose clip has not been read yet, and what becomes of those that cannot be.

In: what a corpus' annotation says about one clip. Out: a Record with its media inside, or a
`Skipped` that names the reason. `make_record` is a pure function of the draft, the options and the
file it names: workers may call it in any order. Flow: sources -> here -> build.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_shards.build.source_item import Skipped
from data_shards.media.video import clip_indices, count_frames, cut_clip, decode_frames, encode_mp4
from data_shards.shards.record import Note, Record, Turn, Video
from data_shards.tasks import Pair, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Where the media of a draft are: a file, or a span of a longer one."""

    path: Path | None  # None: no file was found; `looked_for` says what was
    looked_for: str = ""
    start_s: float | None = None  # seconds from the file's start; None = from there
    end_s: float | None = None  # None = to the end; both None = the file as it is


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
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
    still: bool = False  # store one frame only: the peak, or the middle where none is known

    @property
    def place(self) -> str:
        """The clip for messages: its path, or what was looked for."""
        return str(self.clip.path or self.clip.looked_for)


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaOptions:
    """How clips are read.

    cut: a span of a longer video is decoded and encoded again ('encode', exact to the frame in any
        player), or its packets are copied ('copy', lossless; an edit list hides the frames between
        the last keyframe and the start, which a reader that ignores edit lists would show).
    crf: x264's quality where clips are encoded; 18 is visually lossless.
    check: 'frames' decodes the eight frames that training looks at and the peak, 'packets' reads
        the packets only (about 30 times faster, blind to damage inside them).
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
_BLACK = 24  # brightest value of 255; black after lossy coding stays below


def make_record(draft: Draft, options: MediaOptions = DEFAULT_MEDIA) -> Record | Skipped:
    """The record of a draft, or why its media give none (missing, damaged, black, peak outside)."""
    path = draft.clip.path
    if path is None or not path.is_file():
        return _skipped(draft, "media-missing", f"no file {draft.place}")
    try:
        mp4 = _read_clip(draft, path, options)
        num_frames = count_frames(mp4)
        if draft.peak_frame is not None and draft.peak_frame >= num_frames and not draft.still:
            detail = f"{path}: the peak frame is {draft.peak_frame}, the clip has {num_frames}"
            return _skipped(draft, "peak-outside", f"{detail}; annotate this very clip again")
        if options.check == "frames":
            wanted = {*clip_indices(num_frames, _CHECKED_FRAMES), draft.peak_frame or 0}
            frames = decode_frames(mp4, sorted(wanted & set(range(num_frames))))
            if int(frames.max()) < _BLACK:
                return _skipped(draft, "media-black", f"{path}: every frame looked at is black")
    except (OSError, ValueError) as error:
        return _skipped(draft, "media-damaged", f"{path}: {error}")
    return Record(
        key=draft.key,
        source=draft.source,
        split=draft.split,
        utterance=draft.utterance,
        speaker=draft.speaker,
        conversation=draft.conversation,
        target=draft.target,
        sentiment=draft.sentiment,
        emotion=draft.emotion,
        expressions=draft.expressions,
        reason=draft.reason,
        pairs=draft.pairs,
        tasks=draft.tasks,
        num_frames=num_frames,
        peak_frame=0 if draft.still else draft.peak_frame,
        notes=draft.notes,
        media=Video(mp4=mp4),
    )


def _read_clip(draft: Draft, path: Path, options: MediaOptions) -> bytes:
    clip = draft.clip
    if clip.start_s is None and clip.end_s is None:
        mp4 = path.read_bytes()
    else:
        mp4 = cut_clip(
            path, clip.start_s or 0.0, clip.end_s, copy=options.cut == "copy", crf=options.crf
        )
    if not draft.still:
        return mp4
    num_frames = count_frames(mp4)
    peak = num_frames // 2 if draft.peak_frame is None else draft.peak_frame
    frames = decode_frames(mp4, [peak])
    even_H, even_W = (size - size % 2 for size in frames.shape[1:3])  # yuv420p halves both axes
    return encode_mp4(frames[:, :even_H, :even_W], fps=1, crf=options.crf)


def _skipped(draft: Draft, reason: str, detail: str) -> Skipped:
    return Skipped(
        key=draft.key, source=draft.source, split=draft.split, reason=reason, detail=detail
    )


def hash_file(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of an annotation file, for the provenance."""
    data = path.read_bytes()
    return {
        "name": path.name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
