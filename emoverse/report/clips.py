"""Example clips for the report: which ones, what every system said, and the video itself.

Predictions go in, `Clip` values with embeddable mp4 bytes come out. The choice is by rule, not by
taste: per task alternately a right and a wrong answer, in the order of a hash of the key.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_shards.media.pixels import jpeg_decode, jpeg_encode
from data_shards.media.video import clip_indices, decode_frames, encode_mp4
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Frames, Record
from data_shards.tasks import Task
from emoverse.config.schema import Config
from emoverse.evaluation.metrics import Row
from emoverse.evaluation.predictions import Prediction
from emoverse.evaluation.registry import primary
from emoverse.report.summary import BASE, Evaluation, TaskSummary

NUM_CLIPS = 12
HARD_PER_TASK = 2
MAX_CLIP_BYTES = 1_500_000  # a longer clip is shown by SLIDES of its frames, SLIDES_FPS a second
SLIDES = 8
SLIDES_FPS = 2

Verdict = Literal["right", "partly", "wrong"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What one system answered to a clip's question."""

    system: str
    text: str
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One example; `mp4` is None when the record cannot be read, `note` then says why.

    hard: chosen because most systems are wrong. peak: the peak frame as JPEG, where one is known.
    """

    task: Task
    key: str
    question: str
    truth: str
    answers: tuple[Said, ...]
    mp4: bytes | None
    note: str
    hard: bool = False
    peak: bytes | None = None
    peak_text: str = ""


def verdict(row: Row) -> Verdict:
    """Right, partly or wrong by the task's primary metric on this clip alone."""
    metric = primary(row.task)
    alone = metric.value([row])
    if math.isnan(alone):  # nothing is true: only saying nothing is right
        alone = float(row.value == row.reference)
    return "right" if alone >= 1 - 1e-9 else "wrong" if alone == 0 else "partly"


def playable_mp4(record: Record) -> bytes:
    """The record's clip as mp4: its own bytes, or a slide show of a few frames.

    Raises DamagedVideo when it cannot be decoded.
    """
    media = record.media
    if isinstance(media, Frames):
        frames = [jpeg_decode(jpeg) for jpeg in media.jpegs]
    elif len(media.mp4) <= MAX_CLIP_BYTES:
        return media.mp4
    else:
        frames = list(decode_frames(media.mp4, clip_indices(record.num_frames, SLIDES)))
    even = [frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2] for frame in frames]
    return encode_mp4(np.stack(even), fps=SLIDES_FPS)


def alternate(predictions: Sequence[Prediction], seen: set[str]) -> Iterator[Prediction]:
    """Right, wrong, right, ... in hash order; new clips before clips that are already shown."""
    ordered = sorted(
        predictions,
        key=lambda one: (one.row.key in seen, hashlib.sha256(one.row.key.encode()).digest()),
    )
    queues = [
        [p for p in ordered if (verdict(p.row) == "right") is right] for right in (True, False)
    ]
    turn = 0
    while any(queues):
        queue = queues[turn % 2] or queues[(turn + 1) % 2]
        yield queue.pop(0)
        turn += 1


def choose(evaluated: Mapping[str, Evaluation], lines: Sequence[TaskSummary]) -> list[Prediction]:
    """NUM_CLIPS predictions of the scored states, the tasks' shares as equal as can be."""
    tasks = [line for line in lines if line.scored is not None]
    chosen: list[Prediction] = []
    seen: set[str] = set()
    for i, line in enumerate(tasks):
        assert line.scored is not None
        wanted = NUM_CLIPS * (i + 1) // len(tasks) - NUM_CLIPS * i // len(tasks)
        predictions = [
            one for one in evaluated[line.scored].predictions if one.row.task is line.task
        ]
        for one, _ in zip(alternate(predictions, set(seen)), range(wanted), strict=False):
            chosen.append(one)
            seen.add(one.row.key)
    return chosen


def hardest(
    evaluated: Mapping[str, Evaluation],
    lines: Sequence[TaskSummary],
    systems: Mapping[str, Mapping[tuple[Task, str], Row]],
) -> list[Prediction]:
    """HARD_PER_TASK wrong answers of each scored state: the clips that most systems get wrong.

    Among equals first the one of whose wrong answer the model was surest, then by a hash.
    """
    chosen = []
    for line in lines:
        if line.scored is None:
            continue
        wrong = [
            one
            for one in evaluated[line.scored].predictions
            if one.row.task is line.task and verdict(one.row) == "wrong"
        ]

        def rank(one: Prediction) -> tuple[int, float, bytes]:
            rows = (rows.get((one.row.task, one.row.key)) for rows in systems.values())
            missed = sum(row is not None and verdict(row) == "wrong" for row in rows)
            return -missed, -(one.confidence or 0), hashlib.sha256(one.row.key.encode()).digest()

        chosen += sorted(wrong, key=rank)[:HARD_PER_TASK]
    return chosen


def _answers(
    one: Prediction, systems: Mapping[str, Mapping[tuple[Task, str], Row]]
) -> tuple[Said, ...]:
    found = ((name, rows.get((one.row.task, one.row.key))) for name, rows in systems.items())
    return tuple(
        Said(system=name, text=row.response, verdict=verdict(row))
        for name, row in found
        if row is not None
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Media:
    """What can be shown of a record."""

    mp4: bytes | None = None
    note: str = ""
    peak: bytes | None = None
    peak_text: str = ""


def _media(reader: ShardReader | None, one: Prediction) -> _Media:
    """The clip's video and peak frame; a damaged or missing record is no reason to stop."""
    if reader is None:
        note = "The shards of this evaluation are not on the machine that wrote the report."
        return _Media(note=note)
    try:
        record = reader.read(one.shard, one.slot)
        if record.key != one.row.key:
            return _Media(note="The shards have changed since the evaluation.")
        mp4, peak = playable_mp4(record), peak_jpeg(record)
    except ValueError as error:
        return _Media(note=f"The clip cannot be shown: {error}")
    text = ""
    if peak is not None and record.peak_frame is not None:
        text = f"Peak frame, {record.peak_frame + 1} of {record.num_frames}"
    note = "The model saw only the peak frame." if peak and one.row.task is Task.FER else ""
    return _Media(mp4=mp4, note=note, peak=peak, peak_text=text)


def peak_jpeg(record: Record) -> bytes | None:
    """The peak frame as JPEG, None where the record knows none. Raises DamagedVideo."""
    if record.peak_frame is None:
        return None
    if isinstance(record.media, Frames):
        return record.media.peak_jpeg
    return jpeg_encode(decode_frames(record.media.mp4, [record.peak_frame])[0])


def pick_clips(
    config: Config,
    evaluated: Mapping[str, Evaluation],
    text_only: Mapping[str, Evaluation],
    lines: Sequence[TaskSummary],
    others: Mapping[str, Sequence[Prediction]] | None = None,
) -> list[Clip]:
    """The example clips of a report and the hardest ones, with every system's answer.

    others: answers of further systems, by name. Needs the evaluation's shards for the videos;
    without them the clips are shown as text.
    """
    by_system = {
        name: {(p.row.task, p.row.key): p.row for p in one.predictions}
        for name, one in evaluated.items()
    }
    twin = {
        (line.task, row.key): row
        for line in lines
        if line.scored in text_only
        for row in text_only[line.scored].rows(line.task)
    }
    foreign = {
        name: {(p.row.task, p.row.key): p.row for p in answers}
        for name, answers in (others or {}).items()
    }
    states = {"before" if name == BASE else name: rows for name, rows in by_system.items()}
    systems = {**foreign, "text_only": twin, **states}
    folder = config.evaluation.shards
    reader = None
    if (folder / "index.json").is_file():
        reader = ShardReader(folder, ShardIndex.load(folder))
    picked = [(one, False) for one in choose(evaluated, lines)]
    picked += [(one, True) for one in hardest(evaluated, lines, systems)]
    clips = []
    for one, hard in picked:
        media = _media(reader, one)
        clips.append(
            Clip(
                task=one.row.task,
                key=one.row.key,
                question=one.question,
                truth=one.label,
                answers=_answers(one, systems),
                mp4=media.mp4,
                note=media.note,
                hard=hard,
                peak=media.peak,
                peak_text=media.peak_text,
            )
        )
    return clips
