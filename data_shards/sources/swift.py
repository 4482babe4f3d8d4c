"""ms-swift training data as records: rows of query, response and videos or images.

In: JSON or JSONL and the media it names. Out: items of a build; rows that cannot be read are
skipped with a reason. Rows about the same media and words become one record with several tasks.
The task identifier of a query decides its task; the instruction may have any wording. A sentiment
answer only has a polarity, which becomes 1 or -1. A picture becomes a video of one frame.
"""

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from data_shards.build.clip_record import encode_still, hash_file
from data_shards.build.source_item import FileItem, Skipped, SourceItem
from data_shards.jsonl import read_rows, read_utf8
from data_shards.media.video import count_frames
from data_shards.shards.record import KEY_MAX, KEY_MAX_FRAMES, Record, Turn, Video, shorten_key
from data_shards.sources.registry import Source
from data_shards.tasks import (
    IDENTIFIER,
    TASKS,
    Task,
    parse_answer,
    unescape_speaker,
    unescape_tags,
)

TEXTS_FIELD: Final = "texts"  # of a row: the exact utterance and conversation, or null
_MEDIA_TAG: Final = re.compile(r"\s*(<video>(</video>)?|<image>(</image>)?|<img>|</img>)\s*")
_MEDIUM: Final = re.compile(r"<(?:video|image|img)>")
_PREFIX: Final = re.compile(r"^the person(?: in (?:the )?video)? says:\s*", re.IGNORECASE)
_TURN: Final = re.compile(r"(\d+)\. ((?:[^:\\]|\\.)*): ?(.*)")
_TARGET: Final = re.compile(r"Target (\d+):")


class SwiftRow(NamedTuple):
    """One row whose form was checked, not its content."""

    where: str  # FILE:LINE, or FILE[index] of a JSON list
    query: str
    response: str
    media: tuple[str, ...]  # paths as written
    is_video: bool
    texts: Any = None  # the exact texts, where `convert export` wrote them: see `exact_texts`


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedQuery:
    """The task and the words of a query."""

    task: Task
    utterance: str
    conversation: tuple[Turn, ...] = ()
    target: int = 0


@dataclass(kw_only=True, slots=True)
class _Clip:
    """The rows about one clip."""

    key: str
    media: tuple[str, ...]
    is_video: bool
    query: ParsedQuery
    labels: dict[Task, Any] = field(default_factory=dict)


def read_swift(path: Path) -> Iterator[SwiftRow]:
    """The rows of a JSON list or a JSONL file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row has another form; names file and line.
    """
    if path.suffix == ".json":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the data of ms-swift")
        try:
            rows = json.loads(read_utf8(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: must be JSON: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"{path}: must be a list of rows, found {type(rows).__name__}")
        located: Iterable[tuple[str, Any]] = ((f"{path}[{n}]", row) for n, row in enumerate(rows))
    else:
        located = ((row.place, row.fields) for row in read_rows(path, "the data of ms-swift"))
    for where, fields in located:
        yield _swift_row(where, fields)


def _swift_row(where: str, fields: Any) -> SwiftRow:
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: must be an object, found {fields!r:.80}")
    for name in ("query", "response"):
        if not isinstance(fields.get(name), str):
            raise ValueError(f"{where}: {name}: must be text, found {fields.get(name)!r:.80}")
    if fields.get("history"):
        raise ValueError(f"{where}: history: several rounds are not supported, found some")
    media = {name: fields.get(name) or [] for name in ("videos", "images")}
    for name, paths in media.items():
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise ValueError(f"{where}: {name}: must be a list of paths, found {paths!r:.80}")
    if len(media["videos"]) + len(media["images"]) == 0 or (media["videos"] and media["images"]):
        raise ValueError(f"{where}: must have videos or images, found {media!r:.120}")
    is_video = bool(media["videos"])
    paths = media["videos"] if is_video else media["images"]
    return SwiftRow(
        where, fields["query"], fields["response"], tuple(paths), is_video, fields.get(TEXTS_FIELD)
    )


def read_query(query: str, *, num_media: int = 1) -> ParsedQuery:
    """The task and the words of a query. Escaped tags in the words become what they were.

    Args:
        num_media: number of files that the row names; each may have one media tag in the query.

    Raises:
        ValueError: not exactly one identifier, a media tag without a file, or a conversation that
            cannot be read.
    """
    if (tags := len(_MEDIUM.findall(query))) > num_media:
        raise ValueError(
            f"must have at most one media tag per file, found {tags} for {num_media}; write a tag "
            r"that is a word of a person with a backslash: <\image>"
        )
    text = _MEDIA_TAG.sub(" ", query).strip()
    tasks = [task for task in TASKS for _ in range(text.count(IDENTIFIER[task]))]
    if len(tasks) != 1:
        known = ", ".join(IDENTIFIER.values())
        raise ValueError(f"must hold one identifier of {known}, found {len(tasks)}")
    task = tasks[0]
    before, _, after = text.partition(IDENTIFIER[task])
    if task is Task.ECPE:
        return _conversation(before, after)
    words = " ".join(_PREFIX.sub("", before.strip(), count=1).split())
    return ParsedQuery(task=task, utterance=unescape_tags(unquote(words)))


def unquote(words: str) -> str:
    """The words without the pair of quotation marks that encloses them all, if there is one.

    `"Really?"` loses its marks, `"Yes," he said, "and no."` keeps them.
    """
    inner = words[1:-1]
    if len(words) < 2 or not words[0] == words[-1] == '"':
        return words
    encloses_quote = len(inner) >= 2 and inner[0] == inner[-1] == '"'
    return inner.strip() if '"' not in inner or encloses_quote else words


def exact_texts(query: ParsedQuery, texts: Any) -> ParsedQuery:
    """The query with the texts of the record, whose white space a query does not keep.

    Texts that do not say what the query says are not used: the query was edited.
    """
    try:
        utterance = str(texts["utterance"])
        turns = tuple(
            Turn(speaker=str(turn["speaker"]), text=str(turn["text"]))
            for turn in texts["conversation"]
        )
    except (KeyError, TypeError):
        return query
    exact = replace(query, utterance=utterance)
    if query.conversation:
        exact = replace(exact, conversation=turns)
    return exact if _squeezed(exact) == _squeezed(query) else query


def _squeezed(query: ParsedQuery) -> list[list[str]]:
    texts = [
        query.utterance,
        *(text for turn in query.conversation for text in (turn.speaker, turn.text)),
    ]
    return [text.split() for text in texts]


def _conversation(before: str, after: str) -> ParsedQuery:
    turns: list[Turn] = []
    for line in filter(None, map(str.strip, before.split("\n"))):
        match = _TURN.fullmatch(line)
        if match is None or int(match[1]) != len(turns) + 1:
            raise ValueError(f"turn {len(turns) + 1} must look like '1. Ann: Hey!', found {line!r}")
        speaker, text = unescape_speaker(match[2].strip()), unescape_tags(match[3].strip())
        turns.append(Turn(speaker=speaker, text=text))
    target = _TARGET.search(after)
    if target is None or not 1 <= int(target[1]) <= len(turns):
        raise ValueError(f"must name its target as 'Target 1: ...' up to {len(turns)}")
    return ParsedQuery(
        task=Task.ECPE,
        utterance=turns[int(target[1]) - 1].text,
        conversation=tuple(turns),
        target=int(target[1]),
    )


def swift_items(
    rows: Iterable[SwiftRow], media_root: Path, *, source: str, split: str, key_max: int = KEY_MAX
) -> Iterator[SourceItem]:
    """One item per clip, in the order of the clips' first rows; unreadable rows are Skipped."""
    rows = list(rows)
    keys = media_keys([row.media[0] for row in rows], key_max)
    clips: dict[tuple[Any, ...], _Clip] = {}
    taken: set[str] = set()
    for row in rows:
        origin = {"key": keys[row.media[0]], "source": source, "split": split}
        try:
            query = exact_texts(read_query(row.query, num_media=len(row.media)), row.texts)
            label = _label(query.task, row.response)
        except ValueError as error:
            yield Skipped(**origin, reason="row-unreadable", detail=f"{row.where}: {error}")
            continue
        if len(row.media) > 1:
            detail = f"{row.where}: {len(row.media)} files; only one is supported"
            yield Skipped(**origin, reason="several-media", detail=detail)
            continue
        content = (row.media, query.utterance, query.conversation, query.target)
        if content not in clips:
            key = _free_key(origin["key"], taken, key_max)
            clips[content] = _Clip(key=key, media=row.media, is_video=row.is_video, query=query)
        labels = clips[content].labels
        if labels.setdefault(query.task, label) != label:
            detail = f"{row.where}: {query.task} was {labels[query.task]!r}, now {label!r}"
            yield Skipped(**origin, reason="label-conflict", detail=detail)
    for clip in clips.values():
        yield FileItem(
            make=partial(_make, clip, media_root, source, split), path=media_root / clip.media[0]
        )


def _label(task: Task, response: str) -> Any:
    parsed = parse_answer(task, unescape_tags(response))
    if parsed.value is None:
        raise ValueError(f"the {task} response cannot be read: {response!r:.80}")
    return parsed.value


def _key_of(path: str) -> str:
    """A record key from a path: `128258/9.png` is 128258-9."""
    plain = path.removeprefix("media/").rpartition(".")[0] or path
    return re.sub(r"[^A-Za-z0-9_-]+", "-", plain).lstrip("-") or "clip"


def media_keys(paths: Iterable[str], key_max: int) -> dict[str, str]:
    """The key of each path: all of it, or, where that is longer than `key_max`, its end and a hash.

    The end has as many folders as it takes to differ from all other paths, if there is room.
    """
    keys = {path: _key_of(path) for path in paths}
    tails = Counter(tail for path in keys for tail in set(_tails(path)))
    for path, key in keys.items():
        if len(key) > key_max:
            distinct = (tail for tail in _tails(path) if tails[tail] == 1)
            keys[path] = shorten_key(_key_of(next(distinct, path)), key_max, of=path)
    return keys


def _tails(path: str) -> list[str]:
    """The last one, two, ... parts of a path, at most eight."""
    parts = re.split(r"[/\\]", path)
    return ["/".join(parts[-count:]) for count in range(1, min(len(parts), 8) + 1)]


def _free_key(key: str, taken: set[str], key_max: int) -> str:
    names = (f"{key}-{n}" for n in itertools.count(2))
    candidates = itertools.chain([key], (shorten_key(name, key_max) for name in names))
    free = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(free)
    return free


def _make(clip: _Clip, media_root: Path, source: str, split: str) -> Record | Skipped:
    path = media_root / clip.media[0]
    origin = {"key": clip.key, "source": source, "split": split}
    try:
        mp4 = path.read_bytes() if clip.is_video else _picture_as_video(path)
        num_frames = count_frames(mp4)
    except (OSError, ValueError) as error:
        reason = "media-damaged" if path.is_file() else "media-missing"
        return Skipped(**origin, reason=reason, detail=f"{path}: {error}")
    labels = clip.labels
    sentiment = {"positive": 1.0, "negative": -1.0}
    tasks = tuple(task for task in TASKS if task in labels)
    try:
        return Record(
            **origin,
            utterance=clip.query.utterance,
            speaker="",
            conversation=clip.query.conversation,
            target=clip.query.target,
            sentiment=sentiment[labels[Task.MSA]] if Task.MSA in labels else None,
            emotion=labels.get(Task.ER),
            expressions=labels.get(Task.FER),
            reason=labels.get(Task.ERI),
            pairs=labels.get(Task.ECPE),
            tasks=tasks,
            num_frames=num_frames,
            # A picture is its own peak frame. For a video the format does not name it.
            peak_frame=None if clip.is_video else 0,
            notes={"media": clip.media[0]},
            media=Video(mp4=mp4),
        )
    except ValueError as error:
        return Skipped(**origin, reason="record-invalid", detail=str(error))


def _picture_as_video(path: Path) -> bytes:
    with Image.open(path) as image:
        return encode_still(np.asarray(image.convert("RGB"), dtype=np.uint8))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `emoverse build swift`."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="JSON list or JSONL of query, response and media")
    add("--media-root", type=Path, help="folder of relative paths (default: that of FILE)")
    add("--name", default="swift", help="source of the records (default: %(default)s)")
    add("--split", default="train", help="their split (default: %(default)s)")


def open_source(args: argparse.Namespace) -> Source:
    """The clips of a file; rows about the same clip and words are one item."""
    root = args.media_root or args.file.parent
    items = list(
        swift_items(
            read_swift(args.file),
            root,
            source=args.name,
            split=args.split,
            key_max=KEY_MAX if args.frames == "video" else KEY_MAX_FRAMES,
        )
    )
    return Source(
        items=items,
        total=len(items),
        provenance={
            "source": args.name,
            "split": args.split,
            "format": "ms-swift",
            "files": [hash_file(args.file)],
        },
    )
