"""Records as ms-swift training data: query, response and videos or images per task entry.

In: a shard folder. Out: a folder with `data.jsonl` (or `data.json`, one list) and the media it
names, in the format of the paper's stage files. The source `swift` reads it back. The format has no
place for the strength of a sentiment, speaker, split and notes, so these are lost.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from data_shards.media.pixels import jpeg_encode
from data_shards.media.video import decode_frames
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import iter_records
from data_shards.shards.record import Frames, Record
from data_shards.sources.swift import TEXTS_FIELD, unquote
from data_shards.tasks import TASKS, Task, build_query, escape_tags, format_answer

Visual = Literal["video", "peak_frame"]
Form = Literal["jsonl", "json"]

MEDIA_FOLDER: Final = "media"
_PEAK_QUALITY: Final = 95  # JPEG; high, because the model must see small changes of the face


def export_swift(
    folder: Path | str,
    out: Path,
    *,
    form: Form = "jsonl",
    visual: Visual = "video",
    tasks: tuple[Task, ...] = TASKS,
    give_emotion: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write one row per task entry, in the order of records and tasks.

    Args:
        visual: FER always shows the peak frame; 'peak_frame' shows it for the other tasks too,
            where a record has one.
        tasks: only entries of these tasks.
        give_emotion: state the gold emotion in ECPE queries.

    Raises:
        ValueError: the output folder is not empty, or a record is damaged.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"convert: the output folder must be new or empty, found {out}")
    (out / MEDIA_FOLDER).mkdir(parents=True, exist_ok=True)
    index = ShardIndex.load(folder)
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for done, record in enumerate(iter_records(index), start=1):
        for task in record.tasks:
            if task in tasks:
                counts[task] += 1
                rows.append(
                    {
                        "query": _query(record, task, give_emotion),
                        "response": escape_tags(format_answer(task, record.answer(task))),
                        **_media(record, task, out, visual),
                        **_texts(record),
                    }
                )
        if progress is not None:
            progress(done)
    if any(TEXTS_FIELD in row for row in rows):
        for row in rows:  # readers of tables want the same fields in every row
            row.setdefault(TEXTS_FIELD, None)
    path = out / f"data.{form}"
    if form == "json":
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return {"out": str(path), "records": index.num_records, "rows": len(rows), "tasks": counts}


def _query(record: Record, task: Task, give_emotion: bool) -> str:
    """The query of training; words in quotation marks get a second pair, which import removes."""
    words = " ".join(record.utterance.split())
    if task is not Task.ECPE and unquote(words) != words:
        record = replace(record, utterance=f'"{words}"')
    return build_query(record, task, give_emotion=give_emotion)


def _texts(record: Record) -> dict[str, Any]:
    """The exact texts, where a query cannot hold them because their white space is unusual."""
    conversation = [{"speaker": turn.speaker, "text": turn.text} for turn in record.conversation]
    texts = [record.utterance, *(text for turn in conversation for text in turn.values())]
    if all(text == " ".join(text.split()) for text in texts):
        return {}
    return {TEXTS_FIELD: {"utterance": record.utterance, "conversation": conversation}}


def _media(record: Record, task: Task, out: Path, visual: Visual) -> dict[str, list[str]]:
    """The row's `videos` or `images`, relative to the file of rows; missing files are written."""
    media = record.media
    has_peak = record.peak_frame is not None
    if isinstance(media, Frames):
        has_peak = media.peak_jpeg is not None
    if has_peak and (task is Task.FER or visual == "peak_frame"):
        return {"images": [_write(out, f"{record.key}.peak.jpg", lambda: _peak(record))]}
    if isinstance(media, Frames):
        names = [f"{record.key}.f{n}.jpg" for n in range(len(media.jpegs))]
        for name, jpeg in zip(names, media.jpegs, strict=True):
            (out / MEDIA_FOLDER / name).write_bytes(jpeg)
        return {"images": [f"{MEDIA_FOLDER}/{name}" for name in names]}
    return {"videos": [_write(out, f"{record.key}.mp4", lambda: media.mp4)]}


def _write(out: Path, name: str, content: Callable[[], bytes]) -> str:
    path = out / MEDIA_FOLDER / name
    if not path.exists():
        path.write_bytes(content())
    return f"{MEDIA_FOLDER}/{name}"


def _peak(record: Record) -> bytes:
    if isinstance(record.media, Frames):
        assert record.media.peak_jpeg is not None, "asked for records with a peak only"
        return record.media.peak_jpeg
    assert record.peak_frame is not None, "asked for records with a peak only"
    return jpeg_encode(decode_frames(record.media.mp4, [record.peak_frame])[0], _PEAK_QUALITY)
