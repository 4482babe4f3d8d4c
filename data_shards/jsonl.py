"""Reading JSONL files of users, one object per line; errors name file, line and field."""

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# Byte order marks; that of UTF-32 begins like that of UTF-16.
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a JSONL file."""

    path: Path
    line: int  # counted from 1
    fields: Mapping[str, Any]

    @property
    def place(self) -> str:
        """FILE:LINE for messages."""
        return f"{self.path}:{self.line}"

    def text(self, name: str) -> str:
        """A required field of non-empty text. Raises ValueError."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.place}: {name}: must be text, found {value!r}")
        return value


def read_utf8(path: Path) -> str:
    """The text of a UTF-8 file, or of a UTF-16 or UTF-32 file that begins with its mark.

    Raises ValueError that names file and line.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: must be UTF-8: {error.reason} 0x{data[error.start]:02x}, byte "
            f"{error.start} of the file; convert it (for example iconv -f WINDOWS-1252 -t UTF-8)"
        ) from error
    if encoding == "utf-8" and "\0" in text[:1000]:
        raise ValueError(f"{path}: must be UTF-8, found zero bytes; is it UTF-16? convert it")
    return text


def read_rows(path: Path, what: str) -> Iterator[Row]:
    """The rows of a file; empty lines are skipped.

    Args:
        what: what the file is and how to get it, for the message when it is missing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object, or the file is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give {what}")
    for line_number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{line_number}: must be a JSON object: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path}:{line_number}: must be a JSON object, found {fields!r:.80}")
        yield Row(path=path, line=line_number, fields=fields)


def read_texts(path: Path, field: str) -> dict[str, str]:
    """Key -> text of a JSONL file of {"key", FIELD}. Raises ValueError for a key given twice."""
    texts: dict[str, str] = {}
    for row in read_rows(path, f'JSONL of {{"key", "{field}"}}'):
        key = row.text("key")
        if key in texts:
            raise ValueError(f"{row.place}: key {key}: must be unique, found it twice")
        texts[key] = row.text(field)
    return texts
