"""ERI labels: why a person feels what they feel, from two models behind OpenAI-compatible servers.

In: the records of a shard folder that have an emotion. Per clip there are two calls: a vision model
describes person and scene from frames, then a language model infers the cause from the description,
the words and the label. Out: JSONL of key, reason, description, models and prompt version, sorted
by key, for `emoverse build ... --reasons`. Every answer is cached at once: a killed run resumes.

The paper names the two models and the order of the calls but publishes no prompts: these are ours.
"""

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from data_shards.annotate.answer_cache import AnswerCache, question_id
from data_shards.annotate.endpoint import ChatClient, Endpoint, Patience, Refused, Unanswered
from data_shards.files import write_atomically
from data_shards.media.pixels import jpeg_encode, resize_frame
from data_shards.media.video import clip_indices, decode_frames
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import iter_records
from data_shards.shards.record import Frames, Record

READY: Final = "file"  # stands for the model where a text came from a file
_GIVE_UP_AFTER: Final = 20  # consecutive clips without an answer: the server is gone

PROMPT_VERSION: Final = "1"  # raise it with every change of the texts below

DESCRIBE_TASK: Final = (
    "These are {count} frames of one short video clip in order of time. Describe only what can be "
    "seen. First the person who speaks or is most in view: face, gaze, mouth, brows, gestures and "
    "posture, and how they change. Then the scene: place, other people, and what happens. Four to "
    "six plain sentences. Do not guess at words that are spoken and do not name an emotion."
)
INFER_SYSTEM: Final = "You explain why a person in a video feels what they feel."
INFER_TASK: Final = (
    "What can be seen:\n{description}\n\n{words}\n\nThe person's emotion is known: {emotion}. "
    "Explain in two to four sentences, as one paragraph: begin with the clues of the face, go on "
    "with what the words convey, and conclude with the emotion {emotion} and its most likely "
    "cause. Use only what is given above."
)
_WORDS: Final = "The person says: {utterance}"
_NO_WORDS: Final = "The person says nothing."


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasonOptions:
    """How reasons are made.

    describe, infer: the two models; None if ready texts are given for every clip.
    frames, size: frames of a clip by InternVL's rule, and their side in pixels.
    concurrency: clips that are processed at the same time.
    limit: only that many records with an emotion, from the first; None = all.
    descriptions, reasons: ready texts by key, used instead of calls.
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
    """The results of a run so far."""

    rows: dict[str, dict[str, str]] = field(default_factory=dict)  # by key
    failed: dict[str, str] = field(default_factory=dict)  # key -> cause
    without_emotion: int = 0
    asked: int = 0  # questions that were sent to a server
    from_cache: int = 0  # answers that an earlier run got
    consecutive_unanswered: int = 0  # clips without an answer since the last answered one

    @property
    def has_given_up(self) -> bool:
        return self.consecutive_unanswered >= _GIVE_UP_AFTER


def annotate_reasons(
    folder: Path | str,
    out: Path,
    options: ReasonOptions,
    *,
    cache: Path | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """Write the JSONL of reasons; the report names the clips without a reason.

    Args:
        cache: file of answers (default: OUT.answers).
        progress: called with the number of records done and a note on failures.

    Raises:
        FileNotFoundError, ValueError: no shard folder, or the server rejects the settings.
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
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for _, row in sorted(outcome.rows.items()))
    write_atomically(out, "".join(lines))
    return {
        "ok": not outcome.failed,
        "out": str(out),
        "records": index.num_records,
        "reasons": len(outcome.rows),
        "without_emotion": outcome.without_emotion,
        "asked": outcome.asked,
        "from_cache": outcome.from_cache,
        "unknown_keys": len((set(options.reasons) | set(options.descriptions)) - known),
        "gave_up": outcome.has_given_up,
        "failed": dict(sorted(outcome.failed.items())),
    }


async def _annotate_all(
    index: ShardIndex,
    options: ReasonOptions,
    answers: AnswerCache,
    outcome: _Outcome,
    progress: Callable[[int, str], None] | None,
) -> None:
    running: set[asyncio.Task[None]] = set()
    done = 0

    def collect(finished: set[asyncio.Task[None]]) -> None:
        nonlocal done
        for task in finished:
            task.result()  # raises if the settings are wrong, which ends the run
            done += 1
            if progress is not None:
                failed = f"{len(outcome.failed)} failed" if outcome.failed else ""
                progress(done + outcome.without_emotion, failed)

    async with (
        ChatClient(options.patience, connections=options.concurrency) as client,
        _cancelled_on_exit(running),
    ):
        chosen = 0
        for record in iter_records(index):
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
                collect(finished)
        if running:
            finished, _ = await asyncio.wait(running)
            running.clear()
            collect(finished)


@asynccontextmanager
async def _cancelled_on_exit(running: set[asyncio.Task[None]]) -> AsyncIterator[None]:
    """Cancel the tasks that still run when the block ends, by an error or by Ctrl-C."""
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _annotate(
    record: Record,
    client: ChatClient,
    options: ReasonOptions,
    answers: AnswerCache,
    outcome: _Outcome,
) -> None:
    """Describe one clip, then infer the reason; a failure is recorded in the outcome."""
    try:
        row = await _ClipQuestions(record, client, options, answers, outcome).row()
    except (Refused, Unanswered) as error:
        outcome.failed[record.key] = str(error)
        outcome.consecutive_unanswered += isinstance(error, Unanswered)
        return
    if row is not None:
        outcome.rows[record.key] = row
    outcome.consecutive_unanswered = 0


@dataclass(frozen=True, slots=True)
class _ClipQuestions:
    """The two questions about one record."""

    record: Record
    client: ChatClient
    options: ReasonOptions
    answers: AnswerCache
    outcome: _Outcome

    async def row(self) -> dict[str, str] | None:
        """The output row; None if only ready reasons are used and there is none for the clip."""
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
        """The description and the name of its model."""
        ready = self.options.descriptions.get(self.record.key)
        if ready is not None:
            return one_line(ready), READY
        endpoint = self.options.describe
        if endpoint is None:
            raise Refused("no description in the file, and no vision model to ask")
        # The clip identifies the question, not its JPEGs: these depend on the installed encoder,
        # and a question that was answered before needs no decoding.
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
        cached = self.answers.get(question)
        if cached is not None:
            self.outcome.from_cache += 1
            return cached
        built = await asyncio.to_thread(messages)  # decoding must not block the other clips
        self.outcome.asked += 1
        answer = await self.client.ask(endpoint, built)
        self.answers.put(question, answer, model=endpoint.model, key=self.record.key)
        return answer


def _question(endpoint: Endpoint, **content: Any) -> str:
    """The cache key of a question to a model."""
    return question_id(
        prompt_version=PROMPT_VERSION,
        model=endpoint.model,
        max_tokens=endpoint.max_tokens,
        temperature=endpoint.temperature,
        **content,
    )


def _media_hash(record: Record) -> str:
    media = record.media
    digest = hashlib.sha256()
    for content in media.jpegs if isinstance(media, Frames) else (media.mp4,):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def clip_jpegs(record: Record, count: int, size: int) -> tuple[bytes, ...]:
    """Frames of a clip as JPEG: the stored ones, or `count` by InternVL's rule at `size` pixels.

    Raises:
        DamagedVideo: the clip cannot be decoded.
    """
    if isinstance(record.media, Frames):
        return record.media.jpegs
    frames = decode_frames(record.media.mp4, clip_indices(record.num_frames, count))
    return tuple(jpeg_encode(resize_frame(frame, size)) for frame in frames)


def describe_messages(jpegs: Sequence[bytes]) -> list[dict[str, Any]]:
    """The first call: frames as JPEG data URLs, then the task."""
    images = [
        {
            "type": "image_url",
            "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()},
        }
        for jpeg in jpegs
    ]
    text = {"type": "text", "text": DESCRIBE_TASK.format(count=len(jpegs))}
    return [{"role": "user", "content": [*images, text]}]


def infer_messages(description: str, utterance: str, emotion: str) -> list[dict[str, Any]]:
    """The second call: description, words and label; the cause comes back."""
    words = _WORDS.format(utterance=utterance) if utterance.strip() else _NO_WORDS
    task = INFER_TASK.format(description=description, words=words, emotion=emotion)
    return [{"role": "system", "content": INFER_SYSTEM}, {"role": "user", "content": task}]


def one_line(text: str) -> str:
    """The text in the form of a stored label: one line, single spaces."""
    return " ".join(text.split())
