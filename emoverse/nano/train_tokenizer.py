"""Train a small sentencepiece tokenizer in the layout of a released InternVL2 folder.

In: texts of a small world. Out: `tokenizer.model` and `tokenizer_config.json`, as `Tokenizer.load`
reads them, with the chat and image tokens of the 4B (Phi-3) or 8B (InternLM2) model after the
pieces. The same texts and arguments give the same bytes. Used for the nano base and in tests.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from emoverse.data.tokenizer import (
    CONFIG_FILE,
    MODEL_FILE,
    PAD_TOKEN,
    VISION_TOKENS,
    AddedToken,
    Family,
    Tokenizer,
    varint,
)

PHI3_TOKENS = (
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>",
    "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip
INTERNLM2_TOKENS = (
    "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>",
    "<|im_start|>",
)  # fmt: skip
TOKENIZER_CLASS = {"phi3": "LlamaTokenizer", "internlm2": "InternLM2Tokenizer"}
# Not in the texts, but in every prompt with frames: words right after an image tag.
_PROMPT_WORDS = ("Frame",)
_PROMPT_WORD_EVERY = 50  # texts
_UNUSED_PIECE = 5  # sentencepiece's piece type that encoding never yields


def train_tokenizer(
    texts: Iterable[str],
    out_dir: str | Path,
    *,
    vocab_size: int,
    family: Family = "phi3",
    add_bos: bool | None = None,
) -> Tokenizer:
    """Train on `texts`, write both files into `out_dir`, and return the loaded tokenizer.

    vocab_size: all ids, that is embedding rows: pieces, chat tokens and the nine image tokens.
        About 2.5 ids per different word make nearly every word one piece.
    add_bos: whether prompts begin with `<s>`; None is the default of the family: Phi-3 no,
        InternLM2 yes.

    There is no seed because nothing is sampled: one thread, no shuffling, merges by count.
    Raises ValueError if there is no text or `vocab_size` is too small or too large for the texts.
    """
    out_dir = Path(out_dir)
    tokens = PHI3_TOKENS if family == "phi3" else INTERNLM2_TOKENS
    num_pieces = vocab_size - len(tokens) - len(VISION_TOKENS)
    smallest = 3 + 256 + 11  # <unk> <s> </s>, the bytes, ten digits and a letter
    if num_pieces < smallest:
        raise ValueError(
            f"vocab_size must be at least {vocab_size - num_pieces + smallest} for {family} "
            f"(bytes, digits, chat and image tokens), found {vocab_size}; raise it"
        )
    model = _train_pieces(texts, num_pieces=num_pieces, family=family, vocab_size=vocab_size)
    if family == "internlm2":
        model += b"".join(_unused_piece(f"[UNUSED_TOKEN_{n}]") for n in range(141, 147))
        num_pieces += len(INTERNLM2_TOKENS)
    if add_bos is None:
        add_bos = family == "internlm2"
    config = _tokenizer_config(family, _added_tokens(family, num_pieces), add_bos=add_bos)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / MODEL_FILE).write_bytes(model)
    (out_dir / CONFIG_FILE).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return Tokenizer.load(out_dir)


def _train_pieces(
    texts: Iterable[str], *, num_pieces: int, family: Family, vocab_size: int
) -> bytes:
    """The serialized sentencepiece model (BPE with byte fallback, as both released ones)."""
    lines = list(_training_lines(text for text in texts if text.strip()))
    if not lines:
        raise ValueError("texts must hold at least one word, found none")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type="bpe",
            vocab_size=num_pieces,
            byte_fallback=True,
            split_digits=True,
            required_chars="0123456789",
            # As in the Llama family: text is taken as it is, runs of spaces too.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=family == "phi3",
            character_coverage=1.0,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab_size {vocab_size} means {num_pieces} sentencepiece pieces, which these texts "
            f"cannot give: {error}; change vocab_size or the texts"
        ) from error
    return out.getvalue()


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines for the trainer, one per line of text, so that a newline stays a byte as in Llama.

    In a prompt, text after an added token or a newline begins without a space. A digit in front
    gives the trainer such word starts, because no piece spans a digit.
    """
    for index, text in enumerate(texts):
        if index % _PROMPT_WORD_EVERY == 0:
            yield from (f"0{word}" for word in _PROMPT_WORDS)
        for line in text.splitlines():
            if line.strip():
                yield line
                yield f"0{line.split()[0]}"


def _unused_piece(text: str) -> bytes:
    """One more field `pieces` of a serialized model: InternLM2's placeholders for chat tokens."""
    name = text.encode()
    body = b"\x0a" + varint(len(name)) + name + b"\x15" + struct.pack("<f", 0.0)
    body += b"\x18" + varint(_UNUSED_PIECE)
    return b"\x0a" + varint(len(body)) + body


def _added_tokens(family: Family, num_pieces: int) -> tuple[AddedToken, ...]:
    """The added tokens with ids and flags as the released files have them."""
    rows = [AddedToken(id=id_, content=text) for id_, text in enumerate(("<unk>", "<s>", "</s>"))]
    next_id = num_pieces
    if family == "phi3":
        # Microsoft's file: </s> and the chat tokens strip the whitespace after them.
        rows[2] = AddedToken(id=2, content="</s>", rstrip=True, special=False)
        for text in PHI3_TOKENS:
            rows.append(AddedToken(id=next_id, content=text, rstrip=text != "<|endoftext|>"))
            next_id += 1
    else:
        # The chat tokens overlay the last six pieces.
        for id_, text in enumerate(INTERNLM2_TOKENS, start=num_pieces - len(INTERNLM2_TOKENS)):
            rows.append(AddedToken(id=id_, content=text))
    for text in VISION_TOKENS:
        rows.append(AddedToken(id=next_id, content=text))
        next_id += 1
    return tuple(rows)


def _tokenizer_config(
    family: Family, added: Iterable[AddedToken], *, add_bos: bool
) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token.id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": False,
                "rstrip": token.rstrip,
                "single_word": False,
                "special": token.special,
            }
            for token in sorted(added, key=lambda token: token.id)
        },
        "additional_special_tokens": list(VISION_TOKENS),
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": PAD_TOKEN[family],
        "legacy": False,
        "pad_token": PAD_TOKEN[family],
        "tokenizer_class": TOKENIZER_CLASS[family],
        "unk_token": "<unk>",
    }
