"""Is a record good material? Its frames, words, answers, length, and whether it was there before.

In: records in the order of the folder. Out: per record what is wrong (an error: training would meet
it) and what is odd (a warning: a person should look). Flow: lint -> here.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from data_shards.annotate.action_units import NEUTRAL_PHRASE
from data_shards.annotate.au_phrases import PHRASE_TABLES
from data_shards.media.mp4 import mp4_seconds
from data_shards.media.video import count_frames
from data_shards.shards.record import Frames, Record, Video
from data_shards.tasks import Task, build_query, format_answer, parse_answer

_PLACE_NOTES: Final = ("season", "episode", "video")  # where in the source a clip is from
_PHRASES: Final = {NEUTRAL_PHRASE} | {
    phrase for table in PHRASE_TABLES.values() for phrases in table.values() for phrase in phrases
}


class Finding(NamedTuple):
    """One thing about one record."""

    is_error: bool
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentLimits:
    """What is usual; outside of it a clip is reported as odd."""

    min_seconds: float = 0.2
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ValueError(
                "lint: min-seconds must be from 0 to max-seconds, found "
                f"{self.min_seconds:g} and {self.max_seconds:g}"
            )


class ContentChecks:
    """The checks, and what they have seen so far: duplicates need all records before."""

    def __init__(self, limits: ContentLimits) -> None:
        self._limits = limits
        self._by_content: dict[tuple[str, bytes], str] = {}
        self._by_time: dict[tuple[object, ...], str] = {}

    def findings(self, record: Record) -> Iterator[Finding]:
        """All there is to say about a record."""
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
        place = tuple(record.notes.get(name) for name in _PLACE_NOTES)
        when = (record.source, *place, record.notes["start_s"], record.utterance)
        first = self._by_time.setdefault(when, record.key)
        if first != record.key:
            yield Finding(False, f"has the same words at the same time as {first}")


def _media_digest(record: Record) -> bytes:
    parts = record.media.jpegs if isinstance(record.media, Frames) else (record.media.mp4,)
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(hashlib.blake2b(part, digest_size=16).digest())
    return digest.digest()


def _frame_findings(record: Record) -> Iterator[Finding]:
    """The packets of the video promise as many frames as the record says; none is decoded."""
    if not isinstance(record.media, Video):
        return
    try:
        found = count_frames(record.media.mp4)
    except ValueError as error:
        yield Finding(True, str(error))
        return
    if found != record.num_frames:
        yield Finding(True, f"the record says {record.num_frames} frames, the video has {found}")


def _text_findings(record: Record) -> Iterator[Finding]:
    if not record.utterance.strip():
        yield Finding(False, "the utterance is empty")
    for number, turn in enumerate(record.conversation, start=1):
        if not turn.text.strip():
            yield Finding(False, f"turn {number} of the conversation is empty")
    for phrase in record.expressions or ():
        if phrase not in _PHRASES:
            yield Finding(False, f"the phrase {phrase!r} is of no phrase table")


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
