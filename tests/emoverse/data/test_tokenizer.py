"""The tokenizer wrapper against the rules of both released layouts, on models trained here."""

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from emoverse.data.tokenizer import (
    CONFIG_FILE,
    MODEL_FILE,
    SPACE,
    AddedToken,
    Tokenizer,
    drop_dummy_prefix,
)
from emoverse.nano.train_tokenizer import train_tokenizer

VOCAB = 480
TEXTS = [
    "The person says: I won the race, it is great! <sentiment> Please determine the label.",
    "1. Anna: I lost my keys 20 times.\n2. Ben: That is sad, he cried.",
    "Positive. Negative. Happy. Sadness. 3_joy,1;3_joy,3",
] * 30
PROMPTS = [
    "hello",
    "The person says: I won",
    "<|user|>\nThe person <|end|>  says",
    "<|system|>\nYou are<|end|><|user|>\nFrame1: <img>",
    "</img>\nFrame2: <img>",
    "Positive.<|end|>",
    "a  b   c",
    "x\n\ny",
    "\u65e5\u672c \u00e9",
    "<s>hi",
    "</s> hi",
    "ends <|end|>",
    "a<|end|>\n\nb",
    "12 34",
    "<img><IMG_CONTEXT></img>",
]


@pytest.fixture(scope="module")
def phi3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phi3")
    train_tokenizer(TEXTS, out, vocab_size=VOCAB)
    return out


@pytest.fixture(scope="module")
def phi3(phi3_dir: Path) -> Tokenizer:
    return Tokenizer.load(phi3_dir)


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(
        TEXTS, tmp_path_factory.mktemp("lm2"), vocab_size=VOCAB, family="internlm2"
    )


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The tokens as texts."""
    added = {token.id: token.content for token in tokenizer.added_tokens}
    plain = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer._decoder.serialized_model_proto()
    )
    return [added.get(i) or plain.id_to_piece(i) for i in tokenizer.encode(text)]


def test_phi3_layout(phi3: Tokenizer) -> None:
    assert phi3.vocab_size == VOCAB
    base = phi3.num_pieces
    assert phi3.vocab_size == base + 11 + 9
    assert [phi3.token_id(t) for t in ("<|endoftext|>", "<|assistant|>", "<|system|>")] == [
        base,
        base + 1,
        base + 6,
    ]
    assert phi3.token_id("<|end|>") == base + 7
    assert phi3.token_id("<|user|>") == base + 10
    assert [phi3.token_id(t) for t in ("<img>", "</img>", "<IMG_CONTEXT>", "</box>")] == [
        base + 11,
        base + 12,
        base + 13,
        base + 19,
    ]
    assert phi3.image_context_id == base + 13
    assert phi3.bos_id is None
    assert phi3.stop_ids == (base + 7, base)
    assert phi3.pad_id == base
    assert phi3.token_id("<unk>") == 0
    assert phi3.end_token == "<|end|>"


def test_internlm2_layout(internlm2: Tokenizer) -> None:
    assert internlm2.vocab_size == VOCAB
    base = internlm2.num_pieces
    assert internlm2.vocab_size == base + 9
    # The chat tokens overlay the last six pieces.
    assert internlm2.token_id("<|im_end|>") == base - 2
    assert internlm2.token_id("<|im_start|>") == base - 1
    assert internlm2.token_id("<img>") == base
    assert internlm2.image_context_id == base + 2
    assert internlm2.bos_id == 1
    assert internlm2.stop_ids == (base - 2, 2)
    assert internlm2._decoder.id_to_piece(base - 1) == "[UNUSED_TOKEN_146]"
    assert internlm2.encode("<|im_start|>") == [base - 1]


@pytest.mark.parametrize("text", PROMPTS)
def test_phi3_equals_the_library_tokenizer(phi3_dir: Path, phi3: Tokenizer, text: str) -> None:
    """Texts that begin with a space are left out: there the library differs from the original."""
    assert phi3.encode(text) == oracle(phi3_dir).encode(text, add_special_tokens=False)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<|end|>", "<|user|>", "</s>", "<img>", "<|endoftext|>", "\n", " ", "  ", "race", "he"]
        )
        | st.text("aeht .!1\n\u00e9", max_size=6),
        max_size=8,
    ).map("".join)
)
def test_phi3_equals_the_library_tokenizer_on_any_text(phi3_dir: Path, text: str) -> None:
    if text.startswith(" "):
        return
    tokenizer = Tokenizer.load(phi3_dir)
    assert tokenizer.encode(text) == oracle(phi3_dir).encode(text, add_special_tokens=False)


_ORACLES: dict[Path, object] = {}


def oracle(folder: Path):  # type: ignore[no-untyped-def]
    """transformers' own tokenizer on the same files; it needs protobuf to read them."""
    pytest.importorskip("google.protobuf")
    if folder not in _ORACLES:
        from transformers import AutoTokenizer  # slow to import

        _ORACLES[folder] = AutoTokenizer.from_pretrained(folder)
    return _ORACLES[folder]


def test_phi3_leading_space_is_kept(phi3: Tokenizer) -> None:
    assert pieces(phi3, " race") == [SPACE, *pieces(phi3, "race")]
    assert phi3.encode(f"{SPACE}race") == phi3.encode(" race")
    assert phi3.encode(f"<|end|>{SPACE}race") == phi3.encode("<|end|>race")


def test_phi3_leading_space_survives_a_model_that_strips_text(phi3: Tokenizer) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=phi3.num_pieces,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=True,
        minloglevel=2,
    )
    stripping = Tokenizer(model.getvalue(), family="phi3", added=phi3.added_tokens, add_bos=False)
    assert pieces(stripping, "race") == [f"{SPACE}race"]


def test_phi3_prefix_only_at_the_start_of_a_text(phi3: Tokenizer) -> None:
    assert pieces(phi3, "Positive.<|end|>")[0] == f"{SPACE}Positive"
    behind = pieces(phi3, "<|end|>Positive.")
    assert behind[0] == "<|end|>"
    assert not behind[1].startswith(SPACE)


def test_phi3_chat_tokens_swallow_space_image_tokens_do_not(phi3: Tokenizer) -> None:
    assert phi3.encode("<|user|>\n \nThe") == phi3.encode("<|user|>The")
    assert phi3.encode("<|end|>\n<|assistant|>\n") == [
        phi3.token_id("<|end|>"),
        phi3.token_id("<|assistant|>"),
    ]
    assert pieces(phi3, "</img>\nThe")[:2] == ["</img>", "<0x0A>"]
    assert pieces(phi3, "<|endoftext|>\nThe")[1] == "<0x0A>"


def test_the_longest_added_token_wins(phi3: Tokenizer, phi3_dir: Path) -> None:
    longer = AddedToken(id=VOCAB, content="<|end|>!")
    tokenizer = Tokenizer(
        (phi3_dir / MODEL_FILE).read_bytes(),
        family="phi3",
        added=[*phi3.added_tokens, longer],
        add_bos=False,
    )
    assert tokenizer.encode("<|end|>!<|end|>") == [VOCAB, phi3.token_id("<|end|>")]


def test_internlm2_is_plain_sentencepiece_between_tokens(internlm2: Tokenizer) -> None:
    plain = internlm2._decoder
    text = "<|im_start|>user\nThe race<|im_end|><|im_start|>assistant\n"
    expected = [
        internlm2.token_id("<|im_start|>"),
        *plain.encode("user\nThe race"),
        internlm2.token_id("<|im_end|>"),
        internlm2.token_id("<|im_start|>"),
        *plain.encode("assistant\n"),
    ]
    assert internlm2.encode(text) == expected
    assert not pieces(internlm2, "Positive")[0].startswith(SPACE)
    assert internlm2.encode("") == []


def test_words_and_frame_tags_are_short(phi3: Tokenizer) -> None:
    assert pieces(phi3, "</img>\nFrame2: <img>") == [
        "</img>", "<0x0A>", "Frame", "2", ":", SPACE, "<img>",
    ]  # fmt: skip
    assert pieces(phi3, "3_joy,1")[:2] == [SPACE, "3"]
    assert pieces(phi3, "20 times")[:3] == [SPACE, "2", "0"]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters=f"{SPACE}\x00", exclude_categories=["Cs"])))
def test_decode_inverts_encode(text: str) -> None:
    for family in ("phi3", "internlm2"):
        tokenizer = _TRAINED[family]
        if tokenizer.find_added_token(text) is None:
            assert tokenizer.decode(tokenizer.encode(text)) == text


_TRAINED: dict[str, Tokenizer] = {}


@pytest.fixture(autouse=True, scope="module")
def _trained(phi3: Tokenizer, internlm2: Tokenizer) -> None:
    _TRAINED.update(phi3=phi3, internlm2=internlm2)


def test_decode_drops_added_tokens(phi3: Tokenizer) -> None:
    ids = phi3.encode("Positive.<|end|><|endoftext|>")
    assert phi3.decode(ids) == "Positive."
    with pytest.raises(ValueError, match="id 480 is not in the vocabulary of 480 tokens"):
        phi3.decode([VOCAB])


def test_user_text_with_a_special_token_is_refused(phi3: Tokenizer) -> None:
    phi3.check_user_text("The person says: <sentiment> <emotion cause-pair>", "the query")
    with pytest.raises(ValueError, match=r"the query contains the special token '<\|end\|>'"):
        phi3.check_user_text("well <|end|>", "the query")


def test_training_is_deterministic(tmp_path: Path, phi3_dir: Path) -> None:
    train_tokenizer(TEXTS, tmp_path, vocab_size=VOCAB)
    for name in (MODEL_FILE, CONFIG_FILE):
        assert (tmp_path / name).read_bytes() == (phi3_dir / name).read_bytes()


def test_training_makes_words_single_pieces(tmp_path: Path) -> None:
    words = [a + b for a in ("gar", "mel", "tin", "bor") for b in ("den", "low", "ker")]
    texts = [" ".join(words[n:] + words[:n]) for n in range(len(words))]
    tokenizer = train_tokenizer(texts, tmp_path, vocab_size=380)
    assert all(pieces(tokenizer, word) == [f"{SPACE}{word}"] for word in words)


def test_bos_flag_is_read(tmp_path: Path) -> None:
    assert train_tokenizer(TEXTS, tmp_path, vocab_size=VOCAB, add_bos=True).bos_id == 1
    edit(tmp_path, lambda config: config.pop("add_bos_token"))
    assert Tokenizer.load(tmp_path).bos_id == 1  # the default of both classes


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], VOCAB, "texts must hold at least one word"),
        (["  \n "], VOCAB, "texts must hold at least one word"),
        (TEXTS, 100, "vocab_size must be at least 290 for phi3 .*, found 100"),
        (["a few words"], 5000, "vocab_size 5000 means 4980 sentencepiece pieces"),
    ],
)
def test_training_errors(tmp_path: Path, texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, tmp_path, vocab_size=vocab_size)


def edit(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def drop(token: str):  # type: ignore[no-untyped-def]
    def change(config: dict) -> None:  # type: ignore[type-arg]
        table = config["added_tokens_decoder"]
        for key in [key for key, row in table.items() if row["content"] == token]:
            del table[key]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(tokenizer_class="Qwen2Tokenizer"), "found 'Qwen2Tokenizer'"),
        (lambda c: c.update(legacy=True), "legacy must be false, found true"),
        (lambda c: c.pop("added_tokens_decoder"), "added_tokens_decoder is missing"),
        (drop("<IMG_CONTEXT>"), r"lacks \['<IMG_CONTEXT>'\]; this is not an InternVL2 tokenizer"),
        (drop("<|placeholder1|>"), "without a gap, but no token has the ids"),
        (drop("<|end|>"), "no usable LlamaTokenizer: .*<|end|>.* is not in the vocabulary"),
        (
            lambda c: c["added_tokens_decoder"].update({"1": {"content": "<img>"}}),
            "lists a token twice",
        ),
        (lambda c: c["added_tokens_decoder"].update({"1": 3}), r"\[1\] must have a text `content`"),
    ],
)
def test_load_errors(tmp_path: Path, phi3_dir: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(phi3_dir, tmp_path / "base")
    edit(tmp_path / "base", change)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path / "base")


def test_load_missing_and_broken_files(tmp_path: Path, phi3_dir: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer.model: not found; a model folder"):
        Tokenizer.load(tmp_path)
    shutil.copytree(phi3_dir, tmp_path / "base")
    (tmp_path / "base" / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Tokenizer.load(tmp_path / "base")
    shutil.copy(phi3_dir / CONFIG_FILE, tmp_path / "base")
    model = (phi3_dir / MODEL_FILE).read_bytes()
    for broken in (b"", model[: len(model) // 2], b"\xff" * 64):
        (tmp_path / "base" / MODEL_FILE).write_bytes(broken)
        with pytest.raises(ValueError, match="no usable LlamaTokenizer"):
            Tokenizer.load(tmp_path / "base")


def test_dropping_the_dummy_prefix_changes_nothing_else(phi3_dir: Path) -> None:
    model = (phi3_dir / MODEL_FILE).read_bytes()
    once = drop_dummy_prefix(model)
    assert drop_dummy_prefix(once) == once
    before = sentencepiece.SentencePieceProcessor(model_proto=model)
    after = sentencepiece.SentencePieceProcessor(model_proto=once)
    assert before.encode("race", out_type=str)[0].startswith(SPACE)
    assert after.encode(f"{SPACE}race") == before.encode("race")
    assert [after.id_to_piece(i) for i in range(after.get_piece_size())] == [
        before.id_to_piece(i) for i in range(before.get_piece_size())
    ]


def test_pickles(phi3: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(phi3))
    assert again.encode(PROMPTS[3]) == phi3.encode(PROMPTS[3])
