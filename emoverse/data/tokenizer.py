"""The tokenizer of both backbones: sentencepiece plus the added tokens of the checkpoints.

In: `tokenizer.model` and `tokenizer_config.json` of an InternVL2-4B (Phi-3) or -8B (InternLM2)
folder.
Out: token ids that equal those of the checkpoints' own slow tokenizers, and text from ids.
It uses neither transformers nor protobuf. Prompts are assembled in `prompt.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import sentencepiece

Family = Literal["phi3", "internlm2"]

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
# InternVL2 appends these nine tokens, in this order, to those of the language model.
VISION_TOKENS = (
    IMG_START, IMG_END, IMG_CONTEXT, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
FAMILY_OF_CLASS: Mapping[str, Family] = {
    "LlamaTokenizer": "phi3",
    "LlamaTokenizerFast": "phi3",
    "InternLM2Tokenizer": "internlm2",
    "InternLM2TokenizerFast": "internlm2",
}
# First the token that ends an answer; generation also stops at the end-of-sequence token.
STOP_TOKENS: Mapping[Family, tuple[str, ...]] = {
    "phi3": ("<|end|>", "<|endoftext|>"),
    "internlm2": ("<|im_end|>", "</s>"),
}
PAD_TOKEN: Mapping[Family, str] = {"phi3": "<|endoftext|>", "internlm2": "</s>"}
SPACE = "\u2581"  # sentencepiece's visible space
_NORMALIZER_FIELD, _DUMMY_PREFIX_FIELD = 3, 3  # ModelProto.normalizer_spec.add_dummy_prefix


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AddedToken:
    """One row of `added_tokens_decoder`: a text with an id beyond sentencepiece's."""

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True


class Tokenizer:
    """Text to ids and back, equal to the slow tokenizer of the checkpoint.

    Build it with `Tokenizer.load(folder)`. `encode` turns added tokens in a text into their ids;
    check text that people wrote with `check_user_text` first.
    """

    def __init__(
        self, model: bytes, *, family: Family, added: Sequence[AddedToken], add_bos: bool
    ) -> None:
        self.family: Family = family
        self._decoder = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._encoder = self._decoder
        if family == "phi3":
            self._encoder = sentencepiece.SentencePieceProcessor(
                model_proto=drop_dummy_prefix(model)
            )
        self._unk_length = len(self._encoder.encode("<unk>"))
        self.num_pieces: int = self._decoder.get_piece_size()
        self._added = {token.content: token for token in added}
        self._added_ids = frozenset(token.id for token in added)
        self.vocab_size: int = max([self.num_pieces, *(token.id + 1 for token in added)])
        # Longest first, so that a token is matched before any token that is its prefix.
        longest_first = sorted(self._added, key=lambda text: (-len(text), text))
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.bos_id: int | None = self.token_id("<s>") if add_bos else None
        self.stop_ids: tuple[int, ...] = tuple(self.token_id(name) for name in STOP_TOKENS[family])
        self.end_token: str = STOP_TOKENS[family][0]
        self.pad_id: int = self.token_id(PAD_TOKEN[family])
        self.image_context_id: int = self.token_id(IMG_CONTEXT)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.model` and `tokenizer_config.json` from `folder`.

        Raises FileNotFoundError if one of them is missing, ValueError if they do not fit together.
        """
        folder = Path(folder)
        for name in (MODEL_FILE, CONFIG_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name}: not found; a model folder in InternVL2's layout holds "
                    f"{MODEL_FILE} and {CONFIG_FILE} (is `model.base` the right folder?)"
                )
        config_path = folder / CONFIG_FILE
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{config_path}: not valid JSON ({error}); copy the file again"
            ) from error
        class_name = str(config.get("tokenizer_class"))
        if class_name not in FAMILY_OF_CLASS:
            raise ValueError(
                f"{config_path}: tokenizer_class must be one of {sorted(FAMILY_OF_CLASS)}, found "
                f"{class_name!r}; only Phi-3 and InternLM2 folders of InternVL2 are supported"
            )
        if config.get("legacy") is True:
            raise ValueError(
                f"{config_path}: legacy must be false, found true; the Phi-3 models were trained "
                "with the non-legacy rules, set it to false"
            )
        added = _read_added_tokens(config, config_path)
        model = (folder / MODEL_FILE).read_bytes()
        try:
            tokenizer = cls(
                model,
                family=FAMILY_OF_CLASS[class_name],
                added=added,
                # Both classes add it by default.
                add_bos=bool(config.get("add_bos_token", True)),
            )
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{folder}: {MODEL_FILE} and {CONFIG_FILE} are no usable {class_name}: {error}"
            ) from error
        tokenizer._check_ids(config_path)
        return tokenizer

    def token_id(self, name: str) -> int:
        """Id of an added token or of a sentencepiece piece. Raises KeyError if there is none."""
        if name in self._added:
            return self._added[name].id
        piece_id = int(self._decoder.piece_to_id(name))
        if piece_id == self._decoder.unk_id() and name != "<unk>":
            raise KeyError(f"token {name!r} is not in the vocabulary")
        return piece_id

    @property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """The added tokens, by ascending id."""
        return tuple(sorted(self._added.values(), key=lambda token: token.id))

    def find_added_token(self, text: str) -> str | None:
        """The first added token that occurs literally in `text`, or None."""
        match = self._split.search(text)
        return match.group(0) if match else None

    def check_user_text(self, text: str, what: str) -> None:
        """Raise ValueError if `text`, written by a person, contains an added token literally.

        The model would take such text for a turn or an image. `what` names the text in the message.
        """
        token = self.find_added_token(text)
        if token is not None:
            raise ValueError(
                f"{what} contains the special token {token!r}, which the model would read as "
                "structure and not as words; change or remove it in the corpus"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS. Added tokens in it become their ids."""
        if not text:
            return []
        if self.family == "phi3":
            text = SPACE + text.replace(SPACE, " ")
        pieces = list(self._strip_around_tokens(self._split.split(text)))
        if (
            self.family == "phi3"
            and pieces[0] == SPACE
            and pieces[1:2]
            and pieces[1] in self._added
        ):
            pieces = pieces[1:]  # the leading space belongs to no word
        ids: list[int] = []
        for piece in pieces:
            if piece in self._added:
                ids.append(self._added[piece].id)
            else:
                ids.extend(self._encode_piece(piece))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without added tokens (plain sentencepiece, no clean-up of spaces)."""
        kept = [int(token) for token in ids if int(token) not in self._added_ids]
        beyond = [token for token in kept if not 0 <= token < self.num_pieces]
        if beyond:
            raise ValueError(f"id {beyond[0]} is not in the vocabulary of {self.vocab_size} tokens")
        return str(self._decoder.decode(kept))

    def _strip_around_tokens(self, pieces: list[str]) -> Iterator[str]:
        """Drop whitespace that an added token strips, and pieces that are empty then."""
        for index, piece in enumerate(pieces):
            before = self._added.get(pieces[index - 1]) if index > 0 else None
            after = self._added.get(pieces[index + 1]) if index + 1 < len(pieces) else None
            if before is not None and before.rstrip:
                piece = piece.lstrip()
            if after is not None and after.lstrip:
                piece = piece.rstrip()
            if piece:
                yield piece

    def _encode_piece(self, piece: str) -> list[int]:
        """Ids of a text without added tokens."""
        if self.family == "internlm2" or not piece.startswith((SPACE, " ")):
            return list(self._encoder.encode(piece))
        # Sentencepiece may drop a leading space, but not a space after a word.
        return list(self._encoder.encode("<unk>" + piece))[self._unk_length :]

    def _check_ids(self, config_path: Path) -> None:
        """Raise ValueError unless the added tokens continue the pieces of sentencepiece."""
        added_ids = sorted(id_ for id_ in self._added_ids if id_ >= self.num_pieces)
        expected = list(range(self.num_pieces, self.vocab_size))
        if added_ids != expected:
            gap = sorted(set(expected) - set(added_ids))
            raise ValueError(
                f"{config_path}: added tokens must continue the {self.num_pieces} pieces of "
                f"{MODEL_FILE} without a gap, but no token has the ids {gap[:5]}; the two files "
                "belong to different models"
            )
        for token in VISION_TOKENS[:3]:
            if self.encode(token) != [self.token_id(token)]:
                raise ValueError(f"{config_path}: {token!r} does not encode to one id")


def _read_added_tokens(config: Mapping[str, Any], path: Path) -> tuple[AddedToken, ...]:
    """The added tokens of a tokenizer_config.json, by ascending id."""
    table = config.get("added_tokens_decoder")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path}: added_tokens_decoder is missing; it maps ids to added tokens")
    tokens = []
    for key, row in sorted(table.items(), key=lambda item: int(item[0])):
        if not isinstance(row, dict) or not isinstance(row.get("content"), str):
            raise ValueError(f"{path}: added_tokens_decoder[{key}] must have a text `content`")
        tokens.append(
            AddedToken(
                id=int(key),
                content=row["content"],
                lstrip=bool(row.get("lstrip", False)),
                rstrip=bool(row.get("rstrip", False)),
                special=bool(row.get("special", True)),
            )
        )
    contents = [token.content for token in tokens]
    if len(set(contents)) != len(contents) or "" in contents:
        raise ValueError(f"{path}: added_tokens_decoder lists a token twice or an empty one")
    missing = [token for token in VISION_TOKENS[:3] if token not in contents]
    if missing:
        raise ValueError(
            f"{path}: added_tokens_decoder lacks {missing}; this is not an InternVL2 tokenizer"
        )
    return tuple(tokens)


def drop_dummy_prefix(model: bytes) -> bytes:
    """A serialized sentencepiece model with `normalizer_spec.add_dummy_prefix` off."""
    spec = b""
    kept = bytearray()
    for number, start, end, body in _fields(model):
        if number == _NORMALIZER_FIELD:
            spec += model[body:end]  # protobuf merges repeated fields of one message
        else:
            kept += model[start:end]
    flags = bytearray()
    for number, start, end, _ in _fields(spec):
        if number != _DUMMY_PREFIX_FIELD:
            flags += spec[start:end]
    flags += bytes([_DUMMY_PREFIX_FIELD << 3, 0])
    return bytes(kept) + bytes([_NORMALIZER_FIELD << 3 | 2]) + varint(len(flags)) + bytes(flags)


def varint(value: int) -> bytes:
    """`value` in protobuf's base 128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Value of the varint at offset `at`, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(number, start, end, start of the value) of every field of a protobuf message."""
    at = 0
    while at < len(data):
        start = at
        try:
            tag, at = _read_varint(data, at)
            kind, body = tag & 7, at
            if kind == 0:
                _, at = _read_varint(data, at)
            elif kind == 2:
                length, body = _read_varint(data, at)
                at = body + length
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                raise ValueError(f"unknown wire type {kind}")
        except IndexError:
            at = len(data) + 1
            body = at
        if at > len(data):
            raise ValueError("the sentencepiece model is cut short")
        yield tag >> 3, start, at, body
