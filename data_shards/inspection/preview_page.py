"""A static page of records for people who check them: clips to play, queries, answers, decisions.

In: records. Out: a folder with `index.html` and the media beside it; no server, no request outside
the folder. The page keeps decisions (keep, drop, correct) in the browser and exports them as
`curation.jsonl`, which `emoverse build --curation` reads. Flow: preview -> here -> curation.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from data_shards.build.curation import FIELDS, Decision
from data_shards.shards.record import Frames, Record, Video, to_members
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
        The page and the keys it shows.

    Raises:
        ValueError: the folder holds anything but an earlier page.
    """
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not found <= {"index.html", MEDIA_FOLDER}:
        raise ValueError(
            "preview: the page's folder must be new, empty or an earlier page, found other files "
            f"in {folder}; name another one"
        )
    media = folder / MEDIA_FOLDER
    media.mkdir(parents=True, exist_ok=True)
    keys, articles = [], []
    for record in records:
        for name, content in media_files(record).items():
            (media / name).write_bytes(content)
        keys.append(record.key)
        articles.append(_article(record, give_emotion))
    before = {key: [d.to_json() for d in found] for key, found in (decisions or {}).items()}
    page = _page(title, keys, articles, {key: before[key] for key in keys if key in before})
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html", keys


def media_files(record: Record) -> dict[str, bytes]:
    """File name -> content of a record's media."""
    if isinstance(record.media, Video):
        return {f"{record.key}.mp4": record.media.mp4}
    files = {f"{record.key}.f{n}.jpg": jpeg for n, jpeg in enumerate(record.media.jpegs)}
    peak = record.media.peak_jpeg
    return files if peak is None else files | {f"{record.key}.peak.jpg": peak}


def _article(record: Record, give_emotion: bool) -> str:
    tasks = "".join(_task(record, task, give_emotion) for task in record.tasks)
    values = json.loads(to_members(record)["json"])
    kept = escape(json.dumps({name: values[name] for name in FIELDS}), quote=True)
    notes = ", ".join(f"{name}={value}" for name, value in record.notes.items())
    place = f"{record.source}/{record.split}, {record.num_frames} frames"
    offered = " ".join(record.tasks)
    return f"""<article data-key="{record.key}" data-tasks="{offered}" data-values="{kept}">
<div class="media">{_media(record)}</div>
<div class="words"><h2>{record.key}</h2><p class="soft">{escape(place)}</p>
<dl>{tasks}</dl><p class="soft">{escape(notes)}</p></div>
<form class="decide" aria-label="Decision about {record.key}">
<fieldset><legend>Decision</legend>{"".join(_choice(record.key, a) for a in _ACTIONS)}</fieldset>
<div class="fixes" hidden><div class="list"></div>
<button type="button" class="more">Another field</button></div>
<label>Reason <input class="why" type="text" autocomplete="off"></label>
<p class="error" role="alert"></p>
</form>
</article>"""


_ACTIONS = ("keep", "drop", "correct")


def _choice(key: str, action: str) -> str:
    return (
        f'<label><input type="radio" name="action-{key}" value="{action}"> '
        f"{action.capitalize()}</label> "
    )


def _task(record: Record, task: Task, give_emotion: bool) -> str:
    query = build_query(record, task, give_emotion=give_emotion)
    answer = format_answer(task, record.answer(task)) or "(no pair)"
    return (
        f'<dt class="{task}">{task.upper()}</dt><dd><p class="query">{escape(query)}</p>'
        f'<p class="answer">{escape(answer)}</p></dd>'
    )


def _media(record: Record) -> str:
    names = list(media_files(record))
    if isinstance(record.media, Frames):
        return "".join(
            f'<img src="{MEDIA_FOLDER}/{name}" alt="{name}" loading="lazy">' for name in names
        )
    video = (
        f'<video src="{MEDIA_FOLDER}/{names[0]}" controls loop muted preload="metadata"></video>'
    )
    if record.peak_frame is None:
        return video
    # The middle of the frame's time: its edges belong to the neighbours.
    share = (record.peak_frame + 0.5) / record.num_frames
    return (
        f'{video}<button type="button" class="peak" data-share="{share:.6f}">'
        f"Peak frame {record.peak_frame}</button>"
    )


def _page(
    title: str, keys: Sequence[str], articles: Sequence[str], before: Mapping[str, Any]
) -> str:
    assets = resources.files("data_shards") / "pages" / "templates"
    css, script = (
        (assets / name).read_text(encoding="utf-8") for name in ("preview.css", "preview.js")
    )
    # Decisions belong to these records; another page in the same browser must not see them.
    state = hashlib.sha256("\n".join((title, *keys)).encode()).hexdigest()[:16]
    data = json.dumps({"state": state, "fields": FIELDS, "before": before}).replace("<", "\\u003c")
    tasks = "".join(
        f'<option value="{task}">{task.upper()}</option>'
        for task in Task
        if any(f'dt class="{task}"' in article for article in articles)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} - records</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
<p><span id="count">0</span> of {len(keys)} decided</p>
<label>Task <select id="task"><option value="">all</option>{tasks}</select></label>
<label><input type="checkbox" id="open"> undecided only</label>
<button type="button" id="export">Export curation.jsonl</button>
<p id="message" role="status"></p>
</header>
<main>
{"".join(articles)}
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
