"""From a sample to an example: prompt, token ids, labels and frames.

In: `data_shards.stream.Sample` (a record with one task, and its frames or their number), or a plain
pair of texts. Out: `Example`, as numpy arrays. `collate.py` packs examples into batches; generation
takes the examples of `encode_query`, which end where the answer begins. Runs in the data workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_shards.media.pixels import blank_pixels
from data_shards.shards.record import Record, Turn
from data_shards.stream import Damage, Sample, ViewOptions
from data_shards.tasks import Task, build_query, format_answer
from emoverse.config.schema import DataSection
from emoverse.data.prompt import (
    SYSTEM_TEXT,
    Segment,
    View,
    build_answer,
    build_prompt,
    chat_template,
)
from emoverse.data.tokenizer import CONFIG_FILE, IMG_CONTEXT, Tokenizer
from emoverse.models.architecture import Architecture, base_folder, read_config_json

IGNORED = -100  # label of a token that is not supervised
# Replaces the words of a turn that was cut; its number and speaker stay.
CUT_TEXT = "..."

FeatureSource = Callable[[str, str], NDArray[Any] | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """A sample as arrays. T tokens, F frames (or tiles of one image), C channels.

    pixels_F, features: at most one of them. Both are absent in a text-only example (no frames) and
        where the sample's frames are not decoded yet.
    filler: not a sample, but frames that make every rank run the same work (`zero_example`).
    cut_turns: turns of the conversation whose words were cut to fit `max_tokens`.
    quarantine: the damaged records that this one replaces.
    """

    position: int
    task: Task
    key: str
    ids_T: NDArray[np.int64]
    labels_T: NDArray[np.int64]
    pixels_F: NDArray[np.uint8] | None = None  # F, H, W, 3
    features: NDArray[Any] | None = None  # F, tokens per frame, C
    view: View
    num_frames: int
    filler: bool = False
    cut_turns: int = 0
    quarantine: tuple[Damage, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions:
    """How samples become examples; the first three come from the base model.

    max_tokens: most tokens of one sample with its answer.
    frames_per_clip: frames of a clip that is not decoded (blank frames).
    blank_frames: keep the prompt but replace every frame by a grey one (the text-only baseline).
    features: (record key, view) -> frozen vision features [F, tokens per frame, C] to use instead
        of pixels, or None where pixels are to be used.
    blank_feature: the features [tokens per frame, C] of one grey frame; without it, grey pixels.
    """

    template: str
    tokens_per_frame: int
    image_size: int
    max_tokens: int = 4096
    frames_per_clip: int = 8
    give_emotion: bool = False
    blank_frames: bool = False
    features: FeatureSource | None = None
    blank_feature: NDArray[Any] | None = None
    system: str = SYSTEM_TEXT


def view_options(data: DataSection, architecture: Architecture) -> ViewOptions:
    """Which frames a model is shown, in training and in evaluation."""
    return ViewOptions(
        num_frames=data.frames_per_clip,
        image_size=architecture.vision.image_size,
        visual=data.visual,
        resize=data.resize,
        peak_tiles=data.peak_tiles,
    )


def encode_options(
    data: DataSection,
    architecture: Architecture,
    *,
    blank_frames: bool = False,
    features: FeatureSource | None = None,
    blank_feature: NDArray[Any] | None = None,
) -> EncodeOptions:
    """How samples become examples, in training and in evaluation."""
    return EncodeOptions(
        template=architecture.template,
        tokens_per_frame=architecture.visual_tokens_per_frame,
        image_size=architecture.vision.image_size,
        max_tokens=data.max_tokens,
        frames_per_clip=data.frames_per_clip,
        give_emotion=data.give_emotion,
        blank_frames=blank_frames,
        features=features,
        blank_feature=blank_feature,
    )


def open_tokenizer(base: str | Path, *, max_tokens: int = 0) -> Tokenizer:
    """The tokenizer of a base model; its vocabulary must match config.json.

    Args:
        max_tokens: most tokens of a sample. Longrope chooses its factors by the longest sample of a
            batch, so one sample beyond the switch would change the logits of all others.

    Raises:
        FileNotFoundError: the folder is incomplete.
        ValueError: files of different models, or samples beyond the switch.
    """
    folder = base_folder(base)
    tokenizer, config_json = Tokenizer.load(folder), read_config_json(folder)
    architecture = Architecture.from_config_json(config_json, origin=str(folder / "config.json"))
    llm, stated = config_json["llm_config"], config_json.get("img_context_token_id")
    end, rows = chat_template(architecture.template).end, architecture.llm.vocab
    context = tokenizer.image_context_id
    # More rows than tokens are padding; fewer would be read past their end.
    checks = [
        (tokenizer.family == architecture.llm.family, f"a tokenizer of {tokenizer.family}"),
        (tokenizer.end_token == end, f"answers end with {tokenizer.end_token}, not {end}"),
        (tokenizer.vocab_size <= rows, f"{tokenizer.vocab_size} tokens for {rows} embedding rows"),
        (stated in (None, context), f"{IMG_CONTEXT} is {context}, config.json says {stated}"),
    ]
    problems = [what for fits, what in checks if not fits]
    if problems:
        raise ValueError(
            f"{folder}: {CONFIG_FILE} and config.json ({architecture.llm.family}, "
            f"{architecture.template}) belong to different models: {'; '.join(problems)}; copy all "
            "files of one checkpoint"
        )
    switch = llm.get("original_max_position_embeddings")
    if llm.get("rope_scaling") and architecture.llm.family == "phi3" and max_tokens > switch:
        raise ValueError(
            f"data.max_tokens must be at most {switch}, where the rope factors of {folder} switch "
            f"for a whole batch, found {max_tokens}"
        )
    return tokenizer


def encode_sample(sample: Sample, tokenizer: Tokenizer, options: EncodeOptions) -> Example:
    """The training example of a sample: supervised are the answer and its end token.

    Raises ValueError, naming the record, if it is too long or its text holds a special token.
    """
    response = format_answer(sample.task, sample.record.answer(sample.task))
    return _encode(sample, response, tokenizer, options, limit=options.max_tokens)


def encode_query(
    sample: Sample, tokenizer: Tokenizer, options: EncodeOptions, *, max_new_tokens: int = 0
) -> Example:
    """The example that generation continues: everything before the answer, nothing supervised.

    `max_new_tokens` of `max_tokens` are reserved for the answer.
    """
    return _encode(sample, None, tokenizer, options, limit=options.max_tokens - max_new_tokens)


def encode_pair(
    query: str,
    response: str | None,
    tokenizer: Tokenizer,
    options: EncodeOptions,
    *,
    num_frames: int,
    view: Literal["clip", "peak", "none"],
    what: str,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(ids_T, labels_T) of one question and its answer, or of the question alone.

    Every segment is tokenised on its own. `what` names the pair in the message of the ValueError
    that literal special tokens raise.
    """
    tokenizer.check_user_text(query, f"{what}: the query")
    segments = build_prompt(
        query,
        num_frames=num_frames,
        tokens_per_frame=options.tokens_per_frame,
        view=view,
        template=options.template,
        system=options.system,
    )
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for segment in segments:
        ids.extend(_segment_ids(segment, tokenizer))
    labels = [IGNORED] * len(ids)
    if response is not None:
        tokenizer.check_user_text(response, f"{what}: the answer")
        answer = tokenizer.encode(build_answer(response, template=options.template))
        ids += answer
        labels += answer
    return np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)


def _encode(
    sample: Sample,
    response: str | None,
    tokenizer: Tokenizer,
    options: EncodeOptions,
    *,
    limit: int,
) -> Example:
    """Encode the text, cut to `limit` tokens if that is possible, and attach the frames."""
    record = sample.record
    what = f"record {record.key}, task {sample.task}"
    pixels_F, features, num_frames = _visuals(sample, options, what)

    def encode(shown: Record) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        query = build_query(shown, sample.task, give_emotion=options.give_emotion)
        return encode_pair(
            query,
            response,
            tokenizer,
            options,
            num_frames=num_frames,
            view=sample.view,
            what=what,
        )

    ids_T, labels_T = encode(record)
    full_length, cut_turns = len(ids_T), 0
    if full_length > limit and sample.task is Task.ECPE:
        # A cause that the answer names must stay readable, or training would teach guessing.
        causes = {pair.cause for pair in record.pairs or ()} if response is not None else set()
        for turn in _cuttable_turns(record, keep=causes):
            record = _cut_turn(record, turn)
            cut_turns += 1
            ids_T, labels_T = encode(record)
            if len(ids_T) <= limit:
                break
    if len(ids_T) > limit:
        cut = f" ({len(ids_T)} without the words of {cut_turns} turns)" if cut_turns else ""
        raise ValueError(
            f"{what}: {full_length} tokens{cut}, {num_frames * options.tokens_per_frame} of them "
            f"visual, but data.max_tokens leaves room for {limit}; raise data.max_tokens, lower "
            "data.frames_per_clip, or shorten the text"
        )
    return Example(
        position=sample.position,
        task=sample.task,
        key=record.key,
        ids_T=ids_T,
        labels_T=labels_T,
        pixels_F=pixels_F,
        features=features,
        view="blank" if options.blank_frames else sample.view,
        num_frames=num_frames,
        cut_turns=cut_turns,
        quarantine=sample.quarantine,
    )


def _segment_ids(segment: Segment, tokenizer: Tokenizer) -> list[int]:
    if isinstance(segment, int):
        return [tokenizer.image_context_id] * segment
    return tokenizer.encode(segment)


def _visuals(
    sample: Sample, options: EncodeOptions, what: str
) -> tuple[NDArray[np.uint8] | None, NDArray[Any] | None, int]:
    """(pixels, features, number of frames).

    One of the first two is None; both are if the frames are not decoded yet.
    """
    if options.blank_frames:
        num_frames = 1 if sample.view == "peak" else options.frames_per_clip
        if sample.frames is not None:  # tiles of a peak, whose number depends on the picture
            num_frames = len(sample.frames)
        if options.blank_feature is None:
            return blank_pixels(num_frames, options.image_size), None, num_frames
        grey = options.blank_feature
        return None, np.broadcast_to(grey, (num_frames, *grey.shape)), num_frames
    features = (
        None if options.features is None else options.features(sample.record.key, sample.view)
    )
    if features is not None:
        if features.ndim != 3 or features.shape[1] != options.tokens_per_frame:
            raise ValueError(
                f"{what}: cached features must be [frames, {options.tokens_per_frame}, channels], "
                f"found {list(features.shape)}; they belong to another base model, compute them "
                "again"
            )
        return None, features, len(features)
    if sample.undecoded:
        return None, None, sample.undecoded
    frames, size = sample.frames, options.image_size
    if frames is None:
        raise ValueError(
            f"{what}: neither frames nor cached features; frames may only be left undecoded for "
            "records whose features are cached"
        )
    if frames.dtype != np.uint8 or frames.shape[1:] != (size, size, 3):
        raise ValueError(
            f"{what}: frames must be uint8 [frames, {size}, {size}, 3] for the base model, "
            f"found {frames.dtype} {list(frames.shape)}"
        )
    return frames, None, len(frames)


def _cuttable_turns(record: Record, *, keep: set[int]) -> list[int]:
    """Numbers of the turns whose words may be cut, in the order of cutting.

    The oldest turns first; after the whole past, the turns after the target, the last one first.
    """
    past = list(range(1, record.target))
    future = list(range(len(record.conversation), record.target, -1))
    return [turn for turn in past + future if turn not in keep]


def _cut_turn(record: Record, turn: int) -> Record:
    """The record with `CUT_TEXT` for the words of one turn, counted from 1.

    The numbers of turns stay, because the answer refers to them.
    """
    turns = list(record.conversation)
    turns[turn - 1] = Turn(speaker=turns[turn - 1].speaker, text=CUT_TEXT)
    return dataclasses.replace(record, conversation=tuple(turns))
