"""Reading JSONL files of users, one object per line; errors name file, line and field."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    """The text of a file, without a byte order mark. Raises ValueError that names the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8: {error}") from error


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
