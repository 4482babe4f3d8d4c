"""Example clips for the report: which ones, the answer of every system, and the video itself.

Predictions go in, `Clip` values with embeddable mp4 bytes come out. The clips are chosen by a rule:
per task alternately a right and a wrong answer, in the order of a hash of the key.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
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
RowsByClip = Mapping[tuple[Task, str], Row]


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemAnswer:
    """The answer of a system to a clip's question."""

    system: str
    text: str
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One example; `mp4` is None when the record cannot be read, `note` then gives the reason.

    hard: chosen because most systems are wrong. peak: the peak frame as JPEG, where it is known.
    """

    task: Task
    key: str
    question: str
    reference: str
    answers: tuple[SystemAnswer, ...]
    mp4: bytes | None
    note: str
    hard: bool = False
    peak: bytes | None = None
    peak_text: str = ""


def verdict(row: Row) -> Verdict:
    """Right, partly or wrong by the task's primary metric on this clip alone."""
    metric = primary(row.task)
    alone = metric.value([row])
    if math.isnan(alone):  # the label is empty: only an empty answer is right
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
    ordered = sorted(predictions, key=lambda p: (p.row.key in seen, _digest(p.row.key)))
    queues = [
        [p for p in ordered if (verdict(p.row) == "right") is right] for right in (True, False)
    ]
    turn = 0
    while any(queues):
        queue = queues[turn % 2] or queues[(turn + 1) % 2]
        yield queue.pop(0)
        turn += 1


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def choose(evaluated: Mapping[str, Evaluation], lines: Sequence[TaskSummary]) -> list[Prediction]:
    """NUM_CLIPS predictions of the scored states, spread over the tasks as equally as possible."""
    tasks = [line for line in lines if line.scored is not None]
    chosen: list[Prediction] = []
    seen: set[str] = set()
    for i, line in enumerate(tasks):
        assert line.scored is not None
        wanted = NUM_CLIPS * (i + 1) // len(tasks) - NUM_CLIPS * i // len(tasks)
        predictions = [p for p in evaluated[line.scored].predictions if p.row.task is line.task]
        picked = list(islice(alternate(predictions, seen), wanted))
        chosen += picked
        seen |= {prediction.row.key for prediction in picked}
    return chosen


def hardest(
    evaluated: Mapping[str, Evaluation],
    lines: Sequence[TaskSummary],
    systems: Mapping[str, RowsByClip],
) -> list[Prediction]:
    """HARD_PER_TASK wrong answers of each scored state: the clips that most systems get wrong.

    Ties are broken by the model's confidence in its wrong answer, then by a hash.
    """

    def rank(prediction: Prediction) -> tuple[int, float, bytes]:
        key = prediction.row.key
        rows = (rows.get((prediction.row.task, key)) for rows in systems.values())
        missed = sum(row is not None and verdict(row) == "wrong" for row in rows)
        return -missed, -(prediction.confidence or 0), _digest(key)

    chosen: list[Prediction] = []
    for line in lines:
        if line.scored is not None:
            wrong = [
                p
                for p in evaluated[line.scored].predictions
                if p.row.task is line.task and verdict(p.row) == "wrong"
            ]
            chosen += sorted(wrong, key=rank)[:HARD_PER_TASK]
    return chosen


def _answers(prediction: Prediction, systems: Mapping[str, RowsByClip]) -> tuple[SystemAnswer, ...]:
    rows = {
        name: rows.get((prediction.row.task, prediction.row.key)) for name, rows in systems.items()
    }
    return tuple(
        SystemAnswer(system=name, text=row.response, verdict=verdict(row))
        for name, row in rows.items()
        if row is not None
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Media:
    """What can be shown of a record."""

    mp4: bytes | None = None
    note: str = ""
    peak: bytes | None = None
    peak_text: str = ""


def _media(reader: ShardReader | None, prediction: Prediction) -> _Media:
    """The clip's video and peak frame, or the reason why they cannot be shown."""
    if reader is None:
        note = "The shards of this evaluation are not on the machine that wrote the report."
        return _Media(note=note)
    try:
        record = reader.read(prediction.shard, prediction.slot)
        if record.key != prediction.row.key:
            return _Media(note="The shards have changed since the evaluation.")
        mp4, peak = playable_mp4(record), peak_jpeg(record)
    except ValueError as error:
        return _Media(note=f"The clip cannot be shown: {error}")
    text = ""
    if peak is not None and record.peak_frame is not None:
        text = f"Peak frame, {record.peak_frame + 1} of {record.num_frames}"
    note = "The model saw only the peak frame." if peak and prediction.row.task is Task.FER else ""
    return _Media(mp4=mp4, note=note, peak=peak, peak_text=text)


def peak_jpeg(record: Record) -> bytes | None:
    """The peak frame as JPEG, None where it is not known. Raises DamagedVideo."""
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

    others: answers of further systems, by name. The videos come from the evaluation's shards;
    without them the clips are shown as text.
    """
    systems: dict[str, RowsByClip] = {
        name: _by_clip(answers) for name, answers in (others or {}).items()
    }
    systems["text_only"] = {
        (line.task, row.key): row
        for line in lines
        if line.scored is not None and line.scored in text_only
        for row in text_only[line.scored].rows(line.task)
    }
    for name, state in evaluated.items():
        systems["before" if name == BASE else name] = _by_clip(state.predictions)
    folder = config.evaluation.shards
    reader = None
    if (folder / "index.json").is_file():
        reader = ShardReader(folder, ShardIndex.load(folder))
    picked = [(prediction, False) for prediction in choose(evaluated, lines)]
    picked += [(prediction, True) for prediction in hardest(evaluated, lines, systems)]
    clips = []
    for prediction, hard in picked:
        media = _media(reader, prediction)
        clips.append(
            Clip(
                task=prediction.row.task,
                key=prediction.row.key,
                question=prediction.question,
                reference=prediction.label,
                answers=_answers(prediction, systems),
                mp4=media.mp4,
                note=media.note,
                hard=hard,
                peak=media.peak,
                peak_text=media.peak_text,
            )
        )
    return clips


def _by_clip(predictions: Sequence[Prediction]) -> RowsByClip:
    return {(p.row.task, p.row.key): p.row for p in predictions}
