"""A record: one clip with its labels and the tasks that it offers, and its format on disk.

In: labels and media of a clip (from `data_shards.sources`). Out: the members of one WebDataset
sample, `json` plus `mp4` or the clip's frames as JPEG, and the inverse. The format is versioned
(docs/data_format.md). A Record is valid by construction, so readers need not check it again.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, NoReturn

from data_shards.tasks import (
    EMOTIONS,
    TASKS,
    Answer,
    Pair,
    Task,
    format_answer,
    mask_of,
    polarity,
)

SCHEMA_VERSION: Final = 1
Note = str | int | float | bool

# Longest keys: a tar stores names of 100 characters, of which `.json` or `.f9999.jpg` are a part.
KEY_MAX: Final = 95
KEY_MAX_FRAMES: Final = 90

_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One utterance of a conversation."""

    speaker: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """Media of a record: the clip as an mp4 file."""

    mp4: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """Media of a record: the clip's sampled frames as JPEG, and the peak frame if there is one."""

    jpegs: tuple[bytes, ...]
    peak_jpeg: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One clip: an utterance, or an ECPE target with its conversation, and the tasks it offers.

    The constructor raises ValueError with the key, the field, the rule and the value.
    """

    key: str  # WebDataset key, unique in the dataset: letters, digits, '_' and '-'
    source: str  # corpus, e.g. 'synthetic'
    split: str  # 'train', 'dev', 'test', ...
    utterance: str  # transcript; may be empty
    speaker: str  # name of the speaker; may be empty
    conversation: tuple[Turn, ...] = ()  # all turns in order of time; empty without conversation
    target: int = 0  # 1-based index of this utterance in the conversation, 0 = no conversation
    sentiment: float | None = None  # -3 (very negative) .. 3 (very positive)
    emotion: str | None = None  # one of tasks.EMOTIONS
    expressions: tuple[str, ...] | None = None  # phrases that describe the face at the peak frame
    reason: str | None = None  # cause of the emotion, one line of text
    pairs: tuple[Pair, ...] | None = None  # the target's emotion-cause pairs, sorted; may be empty
    tasks: tuple[Task, ...]  # the tasks that it offers, in canonical order
    num_frames: int  # frames of the whole clip, also when only some are stored
    peak_frame: int | None = None  # 0-based, in presentation order
    notes: dict[str, Note] = field(default_factory=dict)  # of the source; never used in training
    media: Video | Frames

    def __post_init__(self) -> None:
        _check(self)

    @property
    def mask(self) -> int:
        """The task mask, bit i for tasks.TASKS[i]."""
        return mask_of(self.tasks)

    def answer(self, task: Task) -> Answer:
        """The label of one task. Raises ValueError if the record does not offer the task."""
        if task not in self.tasks:
            offered = ", ".join(self.tasks)
            raise ValueError(f"record {self.key}: task {task} is not offered; it offers {offered}")
        answer = _label(self, task)
        assert answer is not None, "a constructed record has the labels of its tasks"
        return answer


def validate_key(key: str) -> None:
    """Raise ValueError unless the key is letters, digits, '_' and '-' (no dot, no slash)."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(
            f"record key: must be letters, digits, '_' and '-' only, found {key!r}; rename it"
        )


def shorten_key(key: str, key_max: int = KEY_MAX_FRAMES, *, of: str = "") -> str:
    """The key, or, if it is longer than `key_max`, its end and a hash of all of it.

    Args:
        of: what the hash is taken of, if not of the key; the key is shortened then in any case.
    """
    if len(key) <= key_max and not of:
        return key
    digest = hashlib.sha256((of or key).encode("utf-8", "surrogatepass")).hexdigest()[:10]
    end = key[-(key_max - len(digest) - 1) :].lstrip("-")
    return f"{end}-{digest}"


def _label(record: Record, task: Task) -> Answer | None:
    match task:
        case Task.MSA:
            return None if record.sentiment is None else polarity(record.sentiment)
        case Task.ER:
            return record.emotion
        case Task.FER:
            return record.expressions
        case Task.ERI:
            return record.reason
        case Task.ECPE:
            return record.pairs


_LABEL_FIELD: Final[dict[Task, str]] = {
    Task.MSA: "sentiment",
    Task.ER: "emotion",
    Task.FER: "expressions",
    Task.ERI: "reason",
    Task.ECPE: "pairs",
}


# ------------------------------------------------------------------------------------------- checks


def _fail(key: str, name: str, rule: str, value: object) -> NoReturn:
    raise ValueError(f"record {key}: {name}: {rule}, found {value!r}")


def _check(r: Record) -> None:
    validate_key(r.key)
    for name in ("source", "split"):
        if not getattr(r, name):
            _fail(r.key, name, "must not be empty", getattr(r, name))
    if not 1 <= r.num_frames < 2**31:
        _fail(r.key, "num_frames", "must be 1 or more, below 2**31", r.num_frames)
    if r.peak_frame is not None and not 0 <= r.peak_frame < r.num_frames:
        _fail(r.key, "peak_frame", f"must be 0..{r.num_frames - 1} (0-based)", r.peak_frame)
    if not 0 <= r.target <= len(r.conversation) or (r.conversation and r.target == 0):
        rule = f"must be 1..{len(r.conversation)}, or 0 without conversation"
        _fail(r.key, "target", rule, r.target)
    _check_texts(r)
    _check_labels(r)
    _check_tasks(r)
    _check_notes(r)
    _check_media(r)


def _check_texts(r: Record) -> None:
    texts = [("utterance", r.utterance), ("speaker", r.speaker), ("reason", r.reason or "")]
    texts += [
        ("conversation", text) for turn in r.conversation for text in (turn.speaker, turn.text)
    ]
    for name, text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            _fail(r.key, name, "must be valid Unicode without lone surrogates", text)


def _check_labels(r: Record) -> None:
    if r.sentiment is not None and not -3 <= r.sentiment <= 3:  # also refuses nan
        _fail(r.key, "sentiment", "must be a number from -3 to 3", r.sentiment)
    if r.emotion is not None and r.emotion not in EMOTIONS:
        _fail(r.key, "emotion", f"must be one of {', '.join(EMOTIONS)}", r.emotion)
    if r.pairs is not None:
        for pair in r.pairs:
            if pair.target != r.target:
                _fail(r.key, "pairs", f"must have the record's target {r.target}", pair)
            if pair.emotion == "neutral":
                _fail(r.key, "pairs", "must not have the emotion neutral", pair)
            if not 1 <= pair.cause <= len(r.conversation):
                _fail(r.key, "pairs", f"must have a cause in 1..{len(r.conversation)}", pair)
    for task, name in _LABEL_FIELD.items():
        label = _label(r, task)
        if label is None:
            continue
        try:
            format_answer(task, label)
        except ValueError as error:
            raise ValueError(f"record {r.key}: {name}: {error}") from error


def _check_tasks(r: Record) -> None:
    if not r.tasks or list(r.tasks) != [task for task in TASKS if task in r.tasks]:
        order = ", ".join(TASKS)
        _fail(r.key, "tasks", f"must be one to five tasks in the order {order}", r.tasks)
    for task in r.tasks:
        if _label(r, task) is None:
            _fail(r.key, _LABEL_FIELD[task], f"must be given because the tasks name {task}", None)
    if Task.FER in r.tasks and r.peak_frame is None:
        _fail(r.key, "peak_frame", "must be given because the tasks name fer", None)
    if Task.ECPE in r.tasks and not r.conversation:
        _fail(r.key, "conversation", "must be given because the tasks name ecpe", r.conversation)


def _check_notes(r: Record) -> None:
    for name, value in r.notes.items():
        if not isinstance(name, str) or not isinstance(value, (str, int, float, bool)):
            _fail(r.key, f"notes.{name}", "must be text, a number or true/false", value)
        if isinstance(value, float) and not math.isfinite(value):
            _fail(r.key, f"notes.{name}", "must be a finite number", value)


def _check_media(r: Record) -> None:
    if isinstance(r.media, Video):
        if not r.media.mp4:
            _fail(r.key, "media", "must have a non-empty mp4", r.media.mp4)
        return
    if not r.media.jpegs or not all(r.media.jpegs):
        _fail(r.key, "media", "must have one or more non-empty frames", r.media.jpegs)
    if Task.FER in r.tasks and not r.media.peak_jpeg:
        _fail(r.key, "media", "must have the peak frame because the tasks name fer", None)


# ------------------------------------------------------------------------------------------ on disk


def to_members(record: Record) -> dict[str, bytes]:
    """The tar members of a record: extension -> content, `json` first.

    Deterministic: equal records give equal bytes. A member is `{key}.{extension}` in the tar.
    """
    media: dict[str, Any] = {"kind": "video"}
    members: dict[str, bytes] = {}
    if isinstance(record.media, Video):
        members["mp4"] = record.media.mp4
    else:
        members |= {f"f{n}.jpg": jpeg for n, jpeg in enumerate(record.media.jpegs)}
        if record.media.peak_jpeg is not None:
            members["peak.jpg"] = record.media.peak_jpeg
        media = {
            "kind": "frames",
            "count": len(record.media.jpegs),
            "peak": record.media.peak_jpeg is not None,
        }
    document = {
        "version": SCHEMA_VERSION,
        "key": record.key,
        "source": record.source,
        "split": record.split,
        "utterance": record.utterance,
        "speaker": record.speaker,
        "conversation": [{"speaker": t.speaker, "text": t.text} for t in record.conversation],
        "target": record.target,
        "sentiment": record.sentiment,
        "emotion": record.emotion,
        "expressions": record.expressions,
        "reason": record.reason,
        "pairs": record.pairs,
        "tasks": record.tasks,
        "num_frames": record.num_frames,
        "peak_frame": record.peak_frame,
        "notes": record.notes,
        "media": media,
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return {"json": text.encode("utf-8"), **members}
    except UnicodeEncodeError as error:
        rule = "text must be valid Unicode without lone surrogates"
        _fail(record.key, "json", rule, text[error.start : error.end])


def from_members(key: str, members: Mapping[str, bytes]) -> Record:
    """The record of some tar members (extension -> content); the inverse of `to_members`.

    Strict: raises ValueError with key and field for an unknown version, a missing, unknown or
    wrongly typed field, a label outside its vocabulary, and for members that do not fit the json.
    """
    validate_key(key)
    if "json" not in members:
        _fail(key, "json", "must be among the members", sorted(members))
    try:
        document = json.loads(members["json"], parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"record {key}: json: cannot be read: {error}") from error
    reader = _FieldReader(key, document)
    version = reader.get("version", int)
    if version != SCHEMA_VERSION:
        rule = f"this program reads version {SCHEMA_VERSION}; build the shards again"
        _fail(key, "version", rule, version)
    reader.refuse_unknown()
    if reader.get("key", str) != key:
        _fail(key, "key", "must equal the name of the tar members", document["key"])
    return Record(
        key=key,
        source=reader.get("source", str),
        split=reader.get("split", str),
        utterance=reader.get("utterance", str),
        speaker=reader.get("speaker", str),
        conversation=reader.turns(),
        target=reader.get("target", int),
        sentiment=reader.number_or_none("sentiment"),
        emotion=reader.get("emotion", str, optional=True),
        expressions=reader.phrases(),
        reason=reader.get("reason", str, optional=True),
        pairs=reader.pairs(),
        tasks=reader.tasks(),
        num_frames=reader.get("num_frames", int),
        peak_frame=reader.get("peak_frame", int, optional=True),
        notes=reader.get("notes", dict),
        media=_media(key, reader.get("media", dict), members),
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_FIELDS: Final = frozenset({f.name for f in fields(Record)} | {"version"})


class _FieldReader:
    """Typed access to the fields of one record's json; errors name key and field."""

    def __init__(self, key: str, fields: object) -> None:
        if not isinstance(fields, dict):
            _fail(key, "json", "must be an object", type(fields).__name__)
        self._key = key
        self._fields: dict[str, Any] = fields

    def refuse_unknown(self) -> None:
        unknown = sorted(set(self._fields) - _FIELDS)
        if unknown:
            _fail(self._key, unknown[0], "is not a field of a record", self._fields[unknown[0]])

    def get(self, name: str, kind: type, *, optional: bool = False) -> Any:
        if name not in self._fields:
            raise ValueError(f"record {self._key}: {name}: must be given, found no such field")
        value = self._fields[name]
        if value is None and optional:
            return None
        # bool is a subclass of int, but a JSON true is not a number
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            _fail(self._key, name, f"must be of type {kind.__name__}", value)
        return value

    def number_or_none(self, name: str) -> float | None:
        value = self.get(name, object, optional=True)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e9:
            _fail(self._key, name, "must be of type float", value)
        return float(value)

    def turns(self) -> tuple[Turn, ...]:
        turns = []
        for item in self.get("conversation", list):
            if not (
                isinstance(item, dict)
                and set(item) == {"speaker", "text"}
                and all(isinstance(value, str) for value in item.values())
            ):
                _fail(self._key, "conversation", "must be a list of {speaker, text}", item)
            turns.append(Turn(speaker=item["speaker"], text=item["text"]))
        return tuple(turns)

    def phrases(self) -> tuple[str, ...] | None:
        values = self.get("expressions", list, optional=True)
        if values is None:
            return None
        for value in values:
            if not isinstance(value, str):
                _fail(self._key, "expressions", "must be a list of texts", value)
        return tuple(values)

    def pairs(self) -> tuple[Pair, ...] | None:
        values = self.get("pairs", list, optional=True)
        if values is None:
            return None
        for value in values:
            if not (isinstance(value, list) and [type(item) for item in value] == [int, str, int]):
                _fail(self._key, "pairs", "must be a list of [target, emotion, cause]", value)
        return tuple(Pair(*value) for value in values)

    def tasks(self) -> tuple[Task, ...]:
        names = self.get("tasks", list)
        for name in names:
            if not isinstance(name, str) or name not in set(TASKS):
                _fail(self._key, "tasks", f"must be among {', '.join(TASKS)}", name)
        return tuple(Task(name) for name in names)


def _media(key: str, media: dict[str, Any], members: Mapping[str, bytes]) -> Video | Frames:
    kind = media.get("kind")
    if kind == "video":
        _expect_members(key, members, ["mp4"])
        return Video(mp4=bytes(members["mp4"]))
    if kind != "frames":
        _fail(key, "media.kind", "must be 'video' or 'frames'", kind)
    count, peak = media.get("count"), media.get("peak")
    if not isinstance(count, int) or isinstance(count, bool) or not isinstance(peak, bool):
        _fail(key, "media", "must give the frames' count and whether there is a peak", media)
    if not 1 <= count <= len(members):
        _fail(key, "media.count", f"must be 1..{len(members)}, the number of members", count)
    names = [f"f{n}.jpg" for n in range(count)]
    _expect_members(key, members, [*names, "peak.jpg"] if peak else names)
    jpegs = tuple(bytes(members[name]) for name in names)
    return Frames(jpegs=jpegs, peak_jpeg=bytes(members["peak.jpg"]) if peak else None)


def _expect_members(key: str, members: Mapping[str, bytes], media: list[str]) -> None:
    if set(members) != {"json", *media}:
        _fail(key, "members", f"must be {', '.join(['json', *media])}", sorted(members))
