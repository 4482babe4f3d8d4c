"""A static page for people who check records: clips to play, queries, answers, decisions.

In: records. Out: a folder with `index.html` and the media beside it; no server, no request outside
the folder. The page keeps decisions (keep, drop, correct) in the browser and exports them as
`curation.jsonl`, which `emoverse build --curation` reads. Flow: preview -> here -> curation.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_shards.build.curation import FIELDS, Decision
from data_shards.files import write_atomically
from data_shards.pages.render import render_page
from data_shards.shards.record import Record, Video, to_members
from data_shards.tasks import Task, build_query, format_answer

MEDIA_FOLDER = "media"


def write_page(
    records: Iterable[Record],
    folder: Path,
    *,
    title: str,
    give_emotion: bool = False,
    decisions: Mapping[str, Sequence[Decision]] | None = None,
) -> tuple[Path, list[str]]:
    """Write the page and its media.

    Args:
        decisions: of an earlier session, by key; the page begins with them.

    Returns:
        The page's path and the keys that it shows.

    Raises:
        ValueError: the folder holds anything but an earlier page.
    """
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not present <= {"index.html", MEDIA_FOLDER}:
        raise ValueError(
            "preview: the page's folder must be new, empty or an earlier page; "
            f"{folder} contains other files, name another folder"
        )
    media = folder / MEDIA_FOLDER
    media.mkdir(parents=True, exist_ok=True)
    shown = []
    for record in records:
        for name, content in media_files(record).items():
            (media / name).write_bytes(content)
        shown.append(_values(record, give_emotion))
    keys = [values["key"] for values in shown]
    data = {
        # Decisions belong to these records; another page in the same browser must not see them.
        "state": hashlib.sha256("\n".join((title, *keys)).encode()).hexdigest()[:16],
        "fields": FIELDS,
        "before": {
            key: [decision.to_json() for decision in decisions[key]]
            for key in keys
            if decisions and key in decisions
        },
    }
    page = render_page(
        "preview.html",
        title=title,
        command="preview",
        records=shown,
        tasks=[task for task in Task if any(task in values["answers"] for values in shown)],
        data=data,
    )
    write_atomically(folder / "index.html", page)
    return folder / "index.html", keys


def media_files(record: Record) -> dict[str, bytes]:
    """File name -> content of a record's media."""
    if isinstance(record.media, Video):
        return {f"{record.key}.mp4": record.media.mp4}
    files = {f"{record.key}.f{n}.jpg": jpeg for n, jpeg in enumerate(record.media.jpegs)}
    peak = record.media.peak_jpeg
    return files if peak is None else files | {f"{record.key}.peak.jpg": peak}


def _values(record: Record, give_emotion: bool) -> dict[str, Any]:
    """What the template shows of a record; media as addresses relative to the page."""
    fields = json.loads(to_members(record)["json"])
    addresses = [f"{MEDIA_FOLDER}/{name}" for name in media_files(record)]
    is_video = isinstance(record.media, Video)
    peak = record.peak_frame
    return {
        "key": record.key,
        "summary": f"{record.source}/{record.split}, {record.num_frames} frames",
        "notes": ", ".join(f"{name}={value}" for name, value in record.notes.items()),
        "fields": {name: fields[name] for name in FIELDS},
        "answers": {
            task: (
                build_query(record, task, give_emotion=give_emotion),
                format_answer(task, record.answer(task)),
            )
            for task in record.tasks
        },
        "video": addresses[0] if is_video else None,
        "images": [] if is_video else addresses,
        "peak_frame": peak,
        # The middle of the frame's time: its edges belong to the neighbours.
        "peak_share": None if peak is None else (peak + 0.5) / record.num_frames,
    }
