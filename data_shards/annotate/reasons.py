"""ERI labels: why a person feels what they feel, from two models behind OpenAI-compatible servers.

In: the records of a shard folder that have an emotion. Per clip two calls: a vision model describes
person and scene from frames, a language model infers the cause from the description, the words and
the label. Out: JSONL of key, reason, description, models and prompt version, sorted by key, for
`emoverse build ... --reasons`. Answers are kept as they come: a killed run goes on.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from data_shards.annotate.answer_cache import AnswerCache, question_id
from data_shards.annotate.endpoint import ChatClient, Endpoint, Patience, Refused, Unanswered
from data_shards.annotate.reason_prompts import (
    PROMPT_VERSION,
    describe_messages,
    infer_messages,
)
from data_shards.media.pixels import jpeg_encode, resize_frame
from data_shards.media.video import clip_indices, decode_frames
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Frames, Record

READY: Final = "file"  # the model of a text that came from a file
_GIVE_UP_AFTER: Final = 20  # clips in a row without an answer: the server is gone


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasonOptions:
    """How reasons are made.

    describe, infer: the two models; None where ready texts are given for every clip.
    frames, size: frames of a clip by InternVL's rule, and their side in pixels.
    concurrency: clips in work at the same time.
    limit: only the first records with an emotion; None = all.
    descriptions, reasons: ready texts by key, used instead of the calls.
    """

    describe: Endpoint | None = None
    infer: Endpoint | None = None
    patience: Patience = field(default_factory=Patience)
    frames: int = 8
    size: int = 448
    concurrency: int = 8
    limit: int | None = None
    descriptions: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.frames, self.size, self.concurrency) < 1:
            raise ValueError(
                "annotate reasons: frames, size and concurrency must be at least 1, found "
                f"{self.frames}, {self.size} and {self.concurrency}"
            )
        if self.infer is None and not self.reasons:
            raise ValueError(
                "annotate reasons: a text model must be given (--text-url and --text-model), or a "
                "file of ready reasons (--reasons)"
            )
        if self.infer is not None and self.describe is None and not self.descriptions:
            raise ValueError(
                "annotate reasons: a vision model must be given (--vision-url and --vision-model), "
                "or a file of ready descriptions (--descriptions)"
            )


@dataclass(kw_only=True, slots=True)
class _Outcome:
    """What a run has found so far."""

    rows: dict[str, dict[str, str]] = field(default_factory=dict)  # by key
    failed: dict[str, str] = field(default_factory=dict)  # key -> cause
    without_emotion: int = 0
    asked: int = 0  # questions that went to a server
    kept: int = 0  # answers from the cache
    in_a_row: int = 0  # clips without an answer since the last one with

    @property
    def has_given_up(self) -> bool:
        return self.in_a_row >= _GIVE_UP_AFTER


def annotate_reasons(
    folder: Path | str,
    out: Path,
    options: ReasonOptions,
    *,
    cache: Path | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """Write the JSONL of reasons; clips that got none are named in the report.

    Args:
        cache: where answers are kept (default: OUT.answers beside it).
        progress: called with the number of records done and a note on failures.

    Raises:
        FileNotFoundError, ValueError: no shard folder, or settings that no server accepts.
    """
    index = ShardIndex.load(folder)
    known = {key for shard in range(index.num_shards) for key in index.keys(shard)}
    for name, texts in (("descriptions", options.descriptions), ("reasons", options.reasons)):
        unknown = sorted(set(texts) - known)
        if texts and len(unknown) == len(texts):
            raise ValueError(
                f"{name}: none of its {len(texts)} keys is in {folder}, for example "
                f"{unknown[0]!r}; is it of another dataset?"
            )
    outcome = _Outcome()
    path = cache or out.with_name(f"{out.name}.answers")
    with AnswerCache(path) as answers:
        asyncio.run(_annotate_all(index, options, answers, outcome, progress))
    _write(out, outcome.rows)
    return {
        "ok": not outcome.failed,
        "out": str(out),
        "records": index.num_records,
        "reasons": len(outcome.rows),
        "without_emotion": outcome.without_emotion,
        "asked": outcome.asked,
        "from_cache": outcome.kept,
        "unknown_keys": len((set(options.reasons) | set(options.descriptions)) - known),
        "gave_up": outcome.has_given_up,
        "failed": dict(sorted(outcome.failed.items())),
    }


def _write(out: Path, rows: Mapping[str, Mapping[str, str]]) -> None:
    """The rows by key; written beside and renamed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    lines = (json.dumps(rows[key], ensure_ascii=False) + "\n" for key in sorted(rows))
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, out)


async def _annotate_all(
    index: ShardIndex,
    options: ReasonOptions,
    answers: AnswerCache,
    outcome: _Outcome,
    progress: Callable[[int, str], None] | None,
) -> None:
    running: set[asyncio.Task[None]] = set()
    done = 0

    def settle(finished: set[asyncio.Task[None]]) -> None:
        nonlocal done
        for task in finished:
            task.result()  # an error here is an error of the settings: it ends the run
            done += 1
            if progress is not None:
                failed = f"{len(outcome.failed)} failed" if outcome.failed else ""
                progress(done + outcome.without_emotion, failed)

    async with (
        ChatClient(options.patience, connections=options.concurrency) as client,
        _all_or_none(running),
    ):
        chosen = 0
        for record in _records(index):
            if record.emotion is None:
                outcome.without_emotion += 1
                continue
            if outcome.has_given_up or chosen == options.limit:
                break
            chosen += 1
            running.add(asyncio.create_task(_annotate(record, client, options, answers, outcome)))
            if len(running) >= options.concurrency:
                finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                running -= finished
                settle(finished)
        if running:
            finished, _ = await asyncio.wait(running)
            running.clear()
            settle(finished)


@asynccontextmanager
async def _all_or_none(running: set[asyncio.Task[None]]) -> AsyncIterator[None]:
    """No clip stays in work when the run ends by an error or by Ctrl-C."""
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _records(index: ShardIndex) -> Iterator[Record]:
    reader = ShardReader(index.folder, index, max_open=1)
    try:
        for shard, info in enumerate(index.shards):
            for slot in range(info.records):
                yield reader.read(shard, slot)
    finally:
        reader.close()


async def _annotate(
    record: Record,
    client: ChatClient,
    options: ReasonOptions,
    answers: AnswerCache,
    outcome: _Outcome,
) -> None:
    """One clip: description, then reason; a clip that fails is noted and passed over."""
    work = _Clip(record, client, options, answers, outcome)
    try:
        row = await work.row()
    except (Refused, Unanswered) as error:
        outcome.failed[record.key] = str(error)
        outcome.in_a_row += isinstance(error, Unanswered)
        return
    if row is not None:
        outcome.rows[record.key] = row
    outcome.in_a_row = 0


@dataclass(frozen=True, slots=True)
class _Clip:
    """The two questions about one record."""

    record: Record
    client: ChatClient
    options: ReasonOptions
    answers: AnswerCache
    outcome: _Outcome

    async def row(self) -> dict[str, str] | None:
        """The line of the result; None if only ready reasons are used and there is none."""
        key, emotion = self.record.key, self.record.emotion
        assert emotion is not None, "only records with an emotion are annotated"
        ready = self.options.reasons.get(key)
        if ready is not None:
            reason = one_line(ready)
            return {"key": key, "emotion": emotion, "reason": reason, "reason_model": READY}
        if self.options.infer is None:
            return None
        description, describe_model = await self._description()
        messages = infer_messages(description, self.record.utterance, emotion)
        question = _question(self.options.infer, messages=messages)
        reason = await self._ask(self.options.infer, question, lambda: messages)
        return {
            "key": key,
            "emotion": emotion,
            "reason": one_line(reason),
            "reason_model": self.options.infer.model,
            "description": description,
            "description_model": describe_model,
            "prompt_version": PROMPT_VERSION,
        }

    async def _description(self) -> tuple[str, str]:
        """The description and the model that gave it."""
        ready = self.options.descriptions.get(self.record.key)
        if ready is not None:
            return one_line(ready), READY
        endpoint = self.options.describe
        if endpoint is None:
            raise Refused("no description in the file, and no vision model to ask")
        # The clip's bytes and not those of the JPEGs: they depend on the installed encoder, and a
        # question that was answered before needs no decoding.
        question = _question(
            endpoint,
            clip=_media_hash(self.record),
            frames=self.options.frames,
            size=self.options.size,
        )
        text = await self._ask(endpoint, question, self._frame_messages)
        return one_line(text), endpoint.model

    def _frame_messages(self) -> list[dict[str, Any]]:
        try:
            jpegs = clip_jpegs(self.record, self.options.frames, self.options.size)
        except ValueError as error:
            raise Refused(f"the clip cannot be decoded: {error}") from error
        return describe_messages(jpegs)

    async def _ask(
        self, endpoint: Endpoint, question: str, messages: Callable[[], list[dict[str, Any]]]
    ) -> str:
        kept = self.answers.get(question)
        if kept is not None:
            self.outcome.kept += 1
            return kept
        built = await asyncio.to_thread(messages)  # decoding must not hold up the other clips
        self.outcome.asked += 1
        answer = await self.client.ask(endpoint, built)
        self.answers.put(question, answer, model=endpoint.model, key=self.record.key)
        return answer


def _question(endpoint: Endpoint, **parts: Any) -> str:
    return question_id(
        prompt_version=PROMPT_VERSION,
        model=endpoint.model,
        max_tokens=endpoint.max_tokens,
        temperature=endpoint.temperature,
        **parts,
    )


def _media_hash(record: Record) -> str:
    media = record.media
    parts = media.jpegs if isinstance(media, Frames) else (media.mp4,)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def clip_jpegs(record: Record, count: int, size: int) -> tuple[bytes, ...]:
    """Frames of a clip as JPEG: `count` by InternVL's rule at `size` pixels, or the stored ones.

    Raises:
        DamagedVideo: the clip cannot be decoded.
    """
    if isinstance(record.media, Frames):
        return record.media.jpegs
    frames = decode_frames(record.media.mp4, clip_indices(record.num_frames, count))
    return tuple(jpeg_encode(resize_frame(frame, size)) for frame in frames)


def one_line(text: str) -> str:
    """The text as a label is stored: one line, single spaces."""
    return " ".join(text.split())
