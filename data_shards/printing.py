"""Text of unknown origin, made safe to print.

Corpora hold what people and programs wrote: terminal escapes, characters that reverse the direction
of text, lone surrogates that no terminal can encode. Everything that a command prints passes
through `printable`; files keep the text as it is.
"""

import re
from typing import Final

# C0 and C1 controls but tab and line feed; line and paragraph separators; marks, embeddings,
# overrides and isolates of the bidirectional algorithm; invisible joiners and fillers; interlinear
# annotations; tag characters; lone surrogates.
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""The text with an escape such as \x1b or \u202e for each control or bidirectional character.

    Line feeds and tabs stay. The result can be encoded as UTF-8.
    """
    return _UNSAFE.sub(_escape, text)


def printable_json(text: str) -> str:
    """A JSON document, safe to print and still the same JSON value.

    For text of `json.dumps` with `ensure_ascii`, whose only unsafe character is DEL.
    """
    return text.replace("\x7f", "\\u007f")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
