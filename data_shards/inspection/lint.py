"""Checks of a shard folder: its files, and the bytes, structure and content of every record.

In: a shard folder. Out: a `LintReport` with all problems, not only the first, and all warnings
(suspicious, but usable); the bad records as a quarantine list that `build --curation` reads.
Training verifies checksums too; this check comes before a run, after a build or a copy.
Flow: build -> here; `emoverse lint DIR [--decode] [--quarantine FILE]`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.annotate.action_units import NEUTRAL_PHRASE
from data_shards.annotate.au_phrases import PHRASE_TABLES
from data_shards.build.curation import Decision
from data_shards.media.mp4 import mp4_seconds
from data_shards.media.pixels import jpeg_decode
from data_shards.media.video import count_frames, decode_frames
from data_shards.shards.index import INDEX_FILE, LENGTH_MAX, ShardIndex, ShardInfo
from data_shards.shards.reader import DamagedRecord, ShardReader
from data_shards.shards.record import Frames, Record, Video
from data_shards.shards.writer import shard_files
from data_shards.tasks import Task, build_query, format_answer, parse_answer, tasks_in
from data_shards.text_checks import text_findings

_END_OF_TAR: Final = 1024  # two empty blocks
_ORIGIN_NOTES: Final = ("season", "episode", "video")  # where in the source a clip is from
_PHRASES: Final = {NEUTRAL_PHRASE} | {
    phrase for table in PHRASE_TABLES.values() for phrases in table.values() for phrase in phrases
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A defect or a suspicious finding; fields that do not apply are empty."""

    shard: str  # file name of the tar
    key: str
    offset: int | None  # of the record in the tar, bytes
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LintReport:
    """What `lint` checked, with all problems and warnings."""

    folder: str
    shards: int  # listed in index.json
    records: int  # read and checked
    decoded: int  # clips decoded in full; 0 unless requested
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()  # suspicious, but usable: a person should look

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """A JSON object: the fields and `ok`."""
        lists = {
            name: [asdict(p) for p in getattr(self, name)] for name in ("problems", "warnings")
        }
        return {"ok": self.ok, **asdict(self), **lists}

    def quarantine(self, *, strict: bool = False) -> list[Decision]:
        """A decision to drop each bad record, with all causes; `strict`: suspicious ones too."""
        causes: dict[str, list[str]] = {}
        for problem in (*self.problems, *(self.warnings if strict else ())):
            if problem.key:
                causes.setdefault(problem.key, []).append(problem.cause)
        return [
            Decision(key=key, action="drop", reason="; ".join(of_record))
            for key, of_record in causes.items()
        ]


# ----------------------------------------------------------------------------- content of records


class Finding(NamedTuple):
    """An error or a warning about one record."""

    is_error: bool
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentLimits:
    """Usual durations; other clips are reported as suspicious."""

    min_seconds: float = 0.2
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ValueError(
                "lint: min-seconds must be from 0 to max-seconds, found "
                f"{self.min_seconds:g} and {self.max_seconds:g}"
            )


class ContentChecks:
    """The checks, with the state for duplicates: all records that were checked before."""

    def __init__(self, limits: ContentLimits) -> None:
        self._limits = limits
        self._by_content: dict[tuple[str, bytes], str] = {}
        self._by_time: dict[tuple[object, ...], str] = {}

    def findings(self, record: Record) -> Iterator[Finding]:
        """All errors and warnings about a record."""
        yield from _frame_findings(record)
        yield from _text_findings(record)
        yield from _answer_findings(record)
        yield from self._duration_findings(record)
        yield from self._duplicate_findings(record)

    def _duration_findings(self, record: Record) -> Iterator[Finding]:
        if not isinstance(record.media, Video) or record.num_frames == 1:
            return
        seconds = mp4_seconds(record.media.mp4)
        low, high = self._limits.min_seconds, self._limits.max_seconds
        if seconds is None:
            yield Finding(False, "the video states no duration")
        elif not low <= seconds <= high:
            yield Finding(False, f"lasts {seconds:.2f} s, usual are {low:g} to {high:g} s")

    def _duplicate_findings(self, record: Record) -> Iterator[Finding]:
        """Within one source: a clip may serve two corpora (ECF re-annotates MELD's)."""
        content = (record.source, _media_digest(record))
        first = self._by_content.setdefault(content, record.key)
        if first != record.key:
            yield Finding(False, f"has the same media as {first}")
        if "start_s" not in record.notes:
            return
        origin = tuple(record.notes.get(name) for name in _ORIGIN_NOTES)
        moment = (record.source, *origin, record.notes["start_s"], record.utterance)
        first = self._by_time.setdefault(moment, record.key)
        if first != record.key:
            yield Finding(False, f"has the same words at the same time as {first}")


def _media_digest(record: Record) -> bytes:
    media = record.media
    digest = hashlib.blake2b(digest_size=16)
    for content in media.jpegs if isinstance(media, Frames) else (media.mp4,):
        digest.update(hashlib.blake2b(content, digest_size=16).digest())
    return digest.digest()


def _frame_findings(record: Record) -> Iterator[Finding]:
    """Compare the packets of the video with the record's number of frames, without decoding."""
    if not isinstance(record.media, Video):
        return
    try:
        num_frames = count_frames(record.media.mp4)
    except ValueError as error:
        yield Finding(True, str(error))
        return
    if num_frames != record.num_frames:
        cause = f"the record says {record.num_frames} frames, the video has {num_frames}"
        yield Finding(True, cause)


def _text_findings(record: Record) -> Iterator[Finding]:
    if not record.utterance.strip():
        yield Finding(False, "the utterance is empty")
    for index, turn in enumerate(record.conversation, start=1):
        if not turn.text.strip():
            yield Finding(False, f"turn {index} of the conversation is empty")
    for cause in text_findings(record):
        yield Finding(False, cause)
    for phrase in record.expressions or ():
        if phrase not in _PHRASES:
            yield Finding(False, f"the phrase {phrase!r} is in no phrase table")


def _answer_findings(record: Record) -> Iterator[Finding]:
    for task in record.tasks:
        answer = record.answer(task)
        text = format_answer(task, answer)
        parsed = parse_answer(task, text, strict=True)
        if parsed.value != answer:
            yield Finding(True, f"the {task} answer {text!r} does not parse back ({parsed.rule})")
        try:
            build_query(record, task, give_emotion=False)
        except ValueError as error:
            yield Finding(True, str(error).removeprefix(f"record {record.key}: "))
        if task is Task.ECPE and record.emotion is not None:
            others = {pair.emotion for pair in record.pairs or ()} - {record.emotion}
            if others:
                yield Finding(
                    False, f"the pairs say {', '.join(sorted(others))}, the label {record.emotion}"
                )


# --------------------------------------------------------------------------- files and structure


def lint(
    folder: Path | str,
    *,
    decode: bool = False,
    limits: ContentLimits | None = None,
    progress: Callable[[int], None] | None = None,
) -> LintReport:
    """Check a shard folder.

    Args:
        decode: also decode every frame of every clip.
        limits: usual durations.
        progress: called with the number of records done so far, once per record.

    Raises:
        FileNotFoundError: no folder, or no index.json in it.
    """
    folder = Path(folder)
    index, problems = _open(folder)
    if index is None:
        return LintReport(
            folder=str(folder), shards=0, records=0, decoded=0, problems=tuple(problems)
        )
    problems += _unlisted(folder, index)
    reader = ShardReader(folder, index, max_open=1)
    seen: set[str] = set()
    content = ContentChecks(limits or ContentLimits())
    warnings: list[Problem] = []
    records = decoded = 0
    for shard, info in enumerate(index.shards):
        broken = list(_file_problems(folder, info))
        problems += broken
        if not all(path.is_file() for path in shard_files(folder / info.name)):
            continue
        try:
            entries, keys = index.entries(shard), index.keys(shard)
        except ValueError as error:
            problems.append(_problem(info.name, "", None, str(error)))
            continue
        if not broken:
            problems += _gap_problems(folder / info.name, entries)
        for key, (_, slot, record) in zip(keys, reader.records([shard]), strict=True):
            where = (info.name, key, int(entries[slot]["offset"]))
            if key in seen:
                problems.append(_problem(*where, "the key comes twice in the dataset"))
            seen.add(key)
            if isinstance(record, DamagedRecord):
                problems.append(_problem(*where, record.cause))
            else:
                causes = list(_record_causes(record, entries[slot], index.options))
                findings = list(content.findings(record))
                causes += [finding.cause for finding in findings if finding.is_error]
                warnings += [_problem(*where, f.cause) for f in findings if not f.is_error]
                if decode and not any(finding.is_error for finding in findings):
                    decoded += 1
                    causes += _decode_causes(record)
                problems += [_problem(*where, cause) for cause in causes]
            records += 1
            if progress is not None:
                progress(records)
    reader.close()
    return LintReport(
        folder=str(folder),
        shards=index.num_shards,
        records=records,
        decoded=decoded,
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def _problem(shard: str, key: str, offset: int | None, cause: str) -> Problem:
    return Problem(shard=shard, key=key, offset=offset, cause=cause)


def _open(folder: Path) -> tuple[ShardIndex | None, list[Problem]]:
    """The index; None with the cause if index.json itself is unusable."""
    try:
        return ShardIndex.load(folder), []
    except (FileNotFoundError, ValueError) as error:
        if not (folder / INDEX_FILE).is_file():
            raise
        cause = str(error)
    # `load` stops at the first file that is missing or short; lint names all of them.
    try:
        document = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        shards = tuple(ShardInfo.from_json(item) for item in document["shards"])
        index = ShardIndex(folder, shards, document["options"], document["provenance"])
    except (ValueError, KeyError, TypeError):
        return None, [_problem("", "", None, cause)]
    in_files = any(True for info in shards for _ in _file_problems(folder, info))
    return index, [] if in_files else [_problem("", "", None, cause)]


def _unlisted(folder: Path, index: ShardIndex) -> list[Problem]:
    listed = {info.name for info in index.shards}
    names = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    return [_problem(name, "", None, f"is not listed in {INDEX_FILE}") for name in names]


def _file_problems(folder: Path, info: ShardInfo) -> Iterator[Problem]:
    for path in shard_files(folder / info.name):
        if not path.is_file():
            yield _problem(info.name, "", None, f"{path.name} is missing")
        elif path.suffix == ".tar" and path.stat().st_size != info.bytes:
            cause = f"{path.name} must have {info.bytes} bytes, found {path.stat().st_size}"
            yield _problem(info.name, "", None, cause)


def _gap_problems(tar: Path, entries: NDArray[np.void]) -> list[Problem]:
    """Records must follow each other without a gap, and the tar must end with empty blocks."""
    problems = []
    end = 0
    for entry in entries:
        offset = int(entry["offset"])
        if offset != end:
            cause = f"bytes {end} to {offset} of the tar belong to no record"
            problems.append(_problem(tar.name, "", end, cause))
        end = offset + int(entry["size"])
    with tar.open("rb") as stream:
        stream.seek(end)
        tail = stream.read()
    if len(tail) < _END_OF_TAR or any(tail):
        problems.append(_problem(tar.name, "", end, "the tar does not end with empty blocks"))
    return problems


def _record_causes(record: Record, entry: np.void, options: Mapping[str, Any]) -> Iterator[str]:
    """Differences between a readable record and its index entry or the options of the folder."""
    if record.mask != entry["tasks"]:
        listed = ", ".join(tasks_in(int(entry["tasks"])))
        yield f"the index lists the tasks {listed}, the record has {', '.join(record.tasks)}"
    if min(record.num_frames, LENGTH_MAX) != entry["frames"]:
        yield f"the index lists {entry['frames']} frames, the record has {record.num_frames}"
    stored = options.get("frames")
    if stored == "video" and not isinstance(record.media, Video):
        yield f"{INDEX_FILE} says frames: video, the record has extracted frames"
    if stored == "extracted":
        count = len(record.media.jpegs) if isinstance(record.media, Frames) else 0
        if count != options.get("frames_per_clip"):
            wanted = options.get("frames_per_clip")
            yield f"{INDEX_FILE} says {wanted} extracted frames, the record has {count}"


def _decode_causes(record: Record) -> list[str]:
    """Decode all frames of a clip."""
    try:
        if isinstance(record.media, Frames):
            for jpeg in (*record.media.jpegs, record.media.peak_jpeg):
                if jpeg is not None:
                    jpeg_decode(jpeg)
            return []
        decode_frames(record.media.mp4, range(record.num_frames))
    except ValueError as error:
        return [str(error)]
    return []
