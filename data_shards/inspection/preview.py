"""The first records of a shard folder or of a plain WebDataset tar, as the model would get them.

In: a folder or a tar. Out: per record its key, tasks with query and answer, frames and duration;
with `save` also the media as files. Flow: build -> here; `emoverse preview DIR`.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data_shards.build.curation import read_curation
from data_shards.inspection.preview_page import media_files, write_page
from data_shards.media.mp4 import mp4_seconds
from data_shards.shards.open import open_index
from data_shards.shards.reader import iter_records
from data_shards.shards.record import Record, Video
from data_shards.tasks import Task, build_query, format_answer


def preview(
    source: Path | str,
    count: int = 5,
    *,
    task: Task | None = None,
    give_emotion: bool = False,
    save: Path | None = None,
) -> list[dict[str, Any]]:
    """Describe the first `count` records, in the order of the shards.

    Args:
        source: what `data.shards` may say (a shard folder, a folder of tars without index, an
            address), or one tar; read as training reads it, checksums verified.
        task: only records that serve this task, and only this task of them.
        give_emotion: state the gold emotion in ECPE queries.
        save: folder for the media: KEY.mp4, or KEY.f0.jpg, ...; made if missing.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: `count` below 1, or a record that cannot be read; names key and cause.
    """
    if count < 1:
        raise ValueError(f"preview: the number of records must be at least 1, found {count}")
    shown: list[dict[str, Any]] = []
    for record in iter_records(open_index(source)):
        if task is not None and task not in record.tasks:
            continue
        shown.append(describe(record, task=task, give_emotion=give_emotion))
        if save is not None:
            _save(record, save)
        if len(shown) == count:
            break
    return shown


def describe(
    record: Record, *, task: Task | None = None, give_emotion: bool = False
) -> dict[str, Any]:
    """One record as a JSON object; the tasks with their query and answer texts."""
    tasks = record.tasks if task is None else (task,)
    media = record.media
    return {
        "key": record.key,
        "source": record.source,
        "split": record.split,
        "tasks": {
            str(each): {
                "query": build_query(record, each, give_emotion=give_emotion),
                "answer": format_answer(each, record.answer(each)),
            }
            for each in tasks
        },
        "num_frames": record.num_frames,
        "peak_frame": record.peak_frame,
        "duration_s": mp4_seconds(media.mp4) if isinstance(media, Video) else None,
        "stored": "video" if isinstance(media, Video) else f"{len(media.jpegs)} frames",
        "media_bytes": sum(len(content) for content in media_files(record).values()),
        "notes": record.notes,
    }


def _save(record: Record, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in media_files(record).items():
        (folder / name).write_bytes(content)


def write_preview_page(
    source: Path,
    folder: Path,
    count: int,
    *,
    task: Task | None = None,
    give_emotion: bool = False,
    curation: Sequence[Path] = (),
) -> dict[str, Any]:
    """A page of the first `count` records (see `preview_page`), with decisions made so far.

    Raises FileNotFoundError and ValueError as `preview` does.
    """
    if count < 1:
        raise ValueError(f"preview: the number of records must be at least 1, found {count}")
    records = iter_records(open_index(source))
    chosen = (record for record in records if task is None or task in record.tasks)
    page, keys = write_page(
        islice(chosen, count),
        folder,
        title=source.name,
        give_emotion=give_emotion,
        decisions=read_curation(curation),
    )
    return {"page": str(page), "shown": len(keys)}
