"""From samples to examples: segments, labels, limits, cuts, blank frames and cached features."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.media.pixels import BLANK_RGB
from data_shards.shards.record import Record, Turn, Video
from data_shards.stream import Sample
from data_shards.tasks import Pair, Task, build_query
from emoverse.data.encode import (
    EncodeOptions,
    Example,
    encode_pair,
    encode_query,
    encode_sample,
    open_tokenizer,
)
from emoverse.data.prompt import SYSTEM_TEXT
from emoverse.data.tokenizer import Tokenizer
from emoverse.models.internvl.released_config import new_config
from emoverse.nano.train_tokenizer import train_tokenizer

SIZE, TOKENS = 6, 3
TEXTS = ["The person says: I won the race! 1. Anna: word. Positive. Happy. 2_joy,1"] * 20


@pytest.fixture(scope="module", params=["phi3", "internlm2"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    family = request.param
    return train_tokenizer(
        TEXTS, tmp_path_factory.mktemp(family), vocab_size=330, family=family, add_bos=True
    )


def options(tokenizer: Tokenizer, **changes: Any) -> EncodeOptions:
    values = {
        "template": "phi3-chat" if tokenizer.family == "phi3" else "internlm2-chat",
        "tokens_per_frame": TOKENS,
        "image_size": SIZE,
        "frames_per_clip": 2,
    }
    return EncodeOptions(**(values | changes))


def record(turns: int = 0, words: int = 4, cause: int = 1, **changes: Any) -> Record:
    """A record for all tasks; with turns, the target is the last but one."""
    conversation = tuple(Turn(speaker="Anna", text="word " * words) for _ in range(turns))
    target = max(turns - 1, 0)
    values: dict[str, Any] = {
        "key": "r1",
        "source": "test",
        "split": "train",
        "utterance": "I won the race!",
        "speaker": "Anna",
        "conversation": conversation,
        "target": target,
        "sentiment": 1.5,
        "emotion": "joy",
        "pairs": (Pair(target, "joy", cause),) if turns else None,
        "tasks": (Task.MSA, Task.ER, Task.ECPE) if turns else (Task.MSA, Task.ER),
        "num_frames": 9,
        "media": Video(mp4=b"never decoded here"),
    }
    return Record(**(values | changes))


def sample(
    task: Task = Task.MSA, view: str = "clip", frames: int | None = 2, **changes: Any
) -> Sample:
    pixels = None
    if frames is not None:
        pixels = np.arange(frames * SIZE * SIZE * 3, dtype=np.uint8).reshape(frames, SIZE, SIZE, 3)
    values = {"position": 7, "record": record(), "view": view, "task": task, "frames": pixels}
    return Sample(**(values | changes))


def supervised(example: Example) -> list[int]:
    return [int(i) for i in example.labels_T if i != -100]


def test_segments_are_tokenised_one_by_one(tokenizer: Tokenizer) -> None:
    example = encode_sample(sample(), tokenizer, options(tokenizer))
    context = [tokenizer.image_context_id] * TOKENS
    query = build_query(record(), Task.MSA, give_emotion=False)
    if tokenizer.family == "phi3":
        head, tail = f"<|system|>\n{SYSTEM_TEXT}<|end|><|user|>\n", "<|end|><|assistant|>\n"
    else:
        head = f"<|im_start|>system\n{SYSTEM_TEXT}<|im_end|><|im_start|>user\n"
        tail = "<|im_end|><|im_start|>assistant\n"
    prompt = [
        1,
        *tokenizer.encode(f"{head}Frame1: <img>"),
        *context,
        *tokenizer.encode("</img>\nFrame2: <img>"),
        *context,
        *tokenizer.encode(f"</img>\n{query}{tail}"),
    ]
    answer = tokenizer.encode(f"Positive.{tokenizer.end_token}")
    assert example.ids_T.tolist() == prompt + answer
    assert example.labels_T.tolist() == [-100] * len(prompt) + answer
    assert answer[-1] == tokenizer.stop_ids[0]
    assert example.ids_T.dtype == example.labels_T.dtype == np.int64
    assert (example.position, example.task, example.key) == (7, Task.MSA, "r1")
    assert (example.view, example.num_frames, example.cut_turns) == ("clip", 2, 0)
    assert example.features is None
    assert example.pixels_F is not None and example.pixels_F.shape == (2, SIZE, SIZE, 3)


def test_query_is_the_prompt_of_the_sample(tokenizer: Tokenizer) -> None:
    whole = encode_sample(sample(), tokenizer, options(tokenizer))
    query = encode_query(sample(), tokenizer, options(tokenizer))
    assert not supervised(query)
    assert whole.ids_T[: len(query.ids_T)].tolist() == query.ids_T.tolist()
    assert whole.labels_T[len(query.ids_T)] != -100


def test_bos_only_if_the_tokenizer_says_so(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, tmp_path, vocab_size=330)
    example = encode_sample(sample(), tokenizer, options(tokenizer))
    assert example.ids_T[0] == tokenizer.token_id("<|system|>")


def test_peak_is_one_image(tokenizer: Tokenizer) -> None:
    example = encode_sample(sample(view="peak", frames=1), tokenizer, options(tokenizer))
    ids = example.ids_T.tolist()
    assert ids.count(tokenizer.image_context_id) == TOKENS
    assert ids.count(tokenizer.token_id("<img>")) == 1
    assert "Frame" not in tokenizer.decode(ids)
    assert (example.view, example.num_frames) == ("peak", 1)


def test_answer_without_pairs_is_the_end_token(tokenizer: Tokenizer) -> None:
    empty = sample(Task.ECPE, record=record(turns=3, pairs=()))
    example = encode_sample(empty, tokenizer, options(tokenizer))
    assert supervised(example) == [tokenizer.stop_ids[0]]


def test_text_only_pair(tokenizer: Tokenizer) -> None:
    ids_T, labels_T = encode_pair(
        "Who won?", "Anna.", tokenizer, options(tokenizer), num_frames=0, view="none", what="pair 1"
    )
    assert tokenizer.image_context_id not in ids_T
    assert tokenizer.decode(labels_T[labels_T != -100]) == "Anna."
    with pytest.raises(ValueError, match=r"pair 1: the answer contains the special token '<img>'"):
        encode_pair(
            "Who?", "<img>", tokenizer, options(tokenizer), num_frames=0, view="none", what="pair 1"
        )


def test_special_tokens_in_words_stay_words(tokenizer: Tokenizer) -> None:
    """The query escapes them, so a person cannot end the prompt or add a picture by saying so."""

    def special(utterance: str) -> list[int]:
        ids = encode_sample(
            sample(record=record(utterance=utterance)), tokenizer, options(tokenizer)
        ).ids_T.tolist()
        return [
            token for token in ids if token in (*tokenizer.stop_ids, tokenizer.image_context_id)
        ]

    assert special(f"well {tokenizer.end_token} <IMG_CONTEXT> <image>") == special("well")


def test_blank_frames_keep_the_prompt(tokenizer: Tokenizer) -> None:
    live = encode_sample(sample(), tokenizer, options(tokenizer))
    blank = encode_sample(sample(frames=None), tokenizer, options(tokenizer, blank_frames=True))
    assert blank.ids_T.tolist() == live.ids_T.tolist()
    assert (blank.view, blank.num_frames) == ("blank", 2)
    assert blank.pixels_F is not None
    assert blank.pixels_F.shape == (2, SIZE, SIZE, 3)
    assert {tuple(p) for p in blank.pixels_F.reshape(-1, 3).tolist()} == {BLANK_RGB}

    grey = np.arange(TOKENS * 5, dtype=np.float32).reshape(TOKENS, 5)
    cached = encode_sample(
        sample(view="peak", frames=None),
        tokenizer,
        options(tokenizer, blank_frames=True, blank_feature=grey),
    )
    assert cached.pixels_F is None and cached.features is not None
    assert np.array_equal(cached.features, grey[None])

    tiles = sample(view="peak", frames=3)  # only the picture tells how many
    live = encode_sample(tiles, tokenizer, options(tokenizer))
    blank = encode_sample(tiles, tokenizer, options(tokenizer, blank_frames=True))
    assert blank.ids_T.tolist() == live.ids_T.tolist() and blank.num_frames == 3
    assert blank.pixels_F is not None and (blank.pixels_F == BLANK_RGB).all()


def test_cached_features_replace_frames(tokenizer: Tokenizer) -> None:
    cache = {("r1", "clip"): np.ones((2, TOKENS, 5), dtype=np.float32)}
    opts = options(tokenizer, features=lambda key, view: cache.get((key, view)))
    example = encode_sample(sample(frames=None), tokenizer, opts)
    assert example.features is cache["r1", "clip"]
    assert (example.pixels_F, example.num_frames, example.view) == (None, 2, "clip")
    live = encode_sample(sample(view="peak", frames=1), tokenizer, opts)
    assert live.features is None and live.pixels_F is not None
    with pytest.raises(ValueError, match="neither frames nor cached features"):
        encode_sample(sample(view="peak", frames=None), tokenizer, opts)
    cache["r1", "clip"] = np.ones((2, TOKENS + 1, 5), dtype=np.float32)
    with pytest.raises(ValueError, match=r"must be \[frames, 3, channels\], found \[2, 4, 5\]"):
        encode_sample(sample(), tokenizer, opts)


def test_wrong_frames(tokenizer: Tokenizer) -> None:
    bad = sample(frames=None)
    for frames in (np.zeros((2, 4, SIZE, 3), np.uint8), np.zeros((2, SIZE, SIZE, 3), np.float32)):
        wrong = Sample(position=1, task=bad.task, record=bad.record, view="clip", frames=frames)
        with pytest.raises(ValueError, match=r"frames must be uint8 \[frames, 6, 6, 3\]"):
            encode_sample(wrong, tokenizer, options(tokenizer))


def test_too_long_names_key_tokens_and_limit(tokenizer: Tokenizer) -> None:
    length = len(encode_sample(sample(), tokenizer, options(tokenizer)).ids_T)
    encode_sample(sample(), tokenizer, options(tokenizer, max_tokens=length))
    message = (
        rf"record r1, task msa: {length} tokens, 6 of them visual, but data.max_tokens leaves room "
        rf"for {length - 1}; raise data.max_tokens"
    )
    with pytest.raises(ValueError, match=message):
        encode_sample(sample(), tokenizer, options(tokenizer, max_tokens=length - 1))


def test_long_conversation_loses_its_oldest_words(tokenizer: Tokenizer) -> None:
    conversation = sample(Task.ECPE, record=record(turns=6, cause=2))
    whole = encode_sample(conversation, tokenizer, options(tokenizer))
    assert whole.cut_turns == 0
    limit = len(whole.ids_T) - 1
    cut = encode_sample(conversation, tokenizer, options(tokenizer, max_tokens=limit))
    assert cut.cut_turns == 1
    text = tokenizer.decode(cut.ids_T)
    assert "1. Anna: ..." in text
    assert "2. Anna: word" in text
    assert len(cut.ids_T) <= limit
    assert supervised(cut) == supervised(whole)
    assert cut.ids_T.tolist().count(tokenizer.image_context_id) == 2 * TOKENS


def test_cut_keeps_target_and_gold_causes(tokenizer: Tokenizer) -> None:
    conversation = sample(Task.ECPE, record=record(turns=6, cause=2))
    shortest = None
    for limit in range(
        len(encode_sample(conversation, tokenizer, options(tokenizer)).ids_T), 0, -1
    ):
        try:
            shortest = encode_sample(conversation, tokenizer, options(tokenizer, max_tokens=limit))
        except ValueError as error:
            assert "without the words of 4 turns" in str(error)
            break
    assert shortest is not None and shortest.cut_turns == 4
    text = tokenizer.decode(shortest.ids_T)
    for number in (1, 3, 4, 6):
        assert f"{number}. Anna: ..." in text
    for number in (2, 5):
        assert f"{number}. Anna: word" in text


def test_what_comes_after_the_target_goes_last_and_from_its_end(tokenizer: Tokenizer) -> None:
    early = record(turns=6, target=2, pairs=(Pair(2, "joy", 2),))
    conversation = sample(Task.ECPE, record=early)
    limit = len(encode_sample(conversation, tokenizer, options(tokenizer)).ids_T)
    for gone in ([1], [1, 6], [1, 6, 5], [1, 6, 5, 4]):
        opts = options(tokenizer, max_tokens=limit - 1)
        cut = encode_sample(conversation, tokenizer, opts)
        text, limit = tokenizer.decode(cut.ids_T), len(cut.ids_T)
        assert [n for n in range(1, 7) if f"{n}. Anna: ..." in text] == sorted(gone)


def test_room_for_the_answer(tokenizer: Tokenizer) -> None:
    conversation = sample(Task.ECPE, record=record(turns=6))
    length = len(encode_query(conversation, tokenizer, options(tokenizer)).ids_T)
    opts = options(tokenizer, max_tokens=length + 9)
    assert encode_query(conversation, tokenizer, opts, max_new_tokens=9).cut_turns == 0
    shorter = encode_query(conversation, tokenizer, opts, max_new_tokens=10)
    assert shorter.cut_turns == 1
    assert "1. Anna: ..." in tokenizer.decode(shorter.ids_T)  # the gold cause is not protected


@pytest.fixture
def base(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A base folder without weights: its tokenizer, and the config.json that belongs to it."""
    folder = tmp_path / "base"
    train_tokenizer(TEXTS, folder, vocab_size=330, family=tokenizer.family)
    config = new_config(
        family=tokenizer.family,
        **dict.fromkeys(("vision_layers", "vision_heads", "layers", "heads"), 1),
        **dict.fromkeys(("vision_hidden", "vision_mlp", "image_size", "hidden", "mlp"), 28),
        vocab=tokenizer.vocab_size,
        bos_id=1,
        eos_id=2,
        pad_id=2,
        img_context_id=tokenizer.image_context_id,
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_tokenizer_and_base_belong_together(tokenizer: Tokenizer, base: Path) -> None:
    assert open_tokenizer(base).vocab_size == tokenizer.vocab_size
    other = "internlm2" if tokenizer.family == "phi3" else "phi3"
    ends = {"phi3": "<|end|>", "internlm2": "<|im_end|>"}
    architecture = {"phi3": "Phi3ForCausalLM", "internlm2": "InternLM2ForCausalLM"}[other]
    good = json.loads((base / "config.json").read_text())
    cases: list[tuple[tuple[str, ...], Any, str]] = [
        (("llm_config", "architectures"), [architecture], f"a tokenizer of {tokenizer.family}"),
        (("template",), f"{other}-chat", f"answers end with {ends[tokenizer.family]}, not"),
        (("template",), "Hermes-2", "template in the model's config.json must be one of"),
        (("llm_config", "vocab_size"), 329, "330 tokens for 329 embedding rows"),
        (("img_context_token_id",), 5, "config.json says 5; copy all files of one checkpoint"),
    ]
    for (*parents, key), value, message in cases:
        config = deepcopy(good)
        section = config[parents[0]] if parents else config
        section[key] = value
        (base / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError) as caught:
            open_tokenizer(base)
        assert message in str(caught.value)
    good["llm_config"]["vocab_size"] = 384  # rows that mean nothing
    del good["img_context_token_id"]
    (base / "config.json").write_text(json.dumps(good))
    assert open_tokenizer(base).vocab_size == 330


def test_no_sample_is_longer_than_the_switch_of_the_ropes(tokenizer: Tokenizer, base: Path) -> None:
    """Longrope chooses factors by the longest sample of a batch, for all of them."""
    config = json.loads((base / "config.json").read_text())
    scaling = {"type": "su", "short_factor": [1.0] * 14, "long_factor": [2.0] * 14}
    config["llm_config"] |= {"rope_scaling": scaling, "original_max_position_embeddings": 64}
    (base / "config.json").write_text(json.dumps(config))
    open_tokenizer(base, max_tokens=64)
    if tokenizer.family == "phi3":
        with pytest.raises(ValueError, match=r"max_tokens must be at most 64, .* found 65"):
            open_tokenizer(base, max_tokens=65)
    else:
        open_tokenizer(base, max_tokens=65)
