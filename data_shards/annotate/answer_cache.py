"""`AnswerCache`: a file of (hash of the question, answer), so that no question is paid for twice.

In: the hash of everything that decides an answer. Out: the answer, if it was given before. Each
answer is appended as one line; an incomplete last line, left by a kill, is cut off on opening. Any
other damage is refused, since `--cache` may name a file that is not a cache.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

from data_shards.jsonl import read_rows


def question_id(**content: Any) -> str:
    """sha256 of everything that decides the answer; JSON values."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class AnswerCache:
    """The answers in one file, locked against a second writer. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(
                f"{self._path}: another run is writing this cache; wait for it or name another one"
            ) from error
        try:
            self._cut_incomplete_line()
            for row in read_rows(self._path, "a cache of answers"):
                self._answers[row.text("id")] = row.text("answer")
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, question: str) -> str | None:
        """The answer to a question by its id."""
        return self._answers.get(question)

    def put(self, question: str, answer: str, **details: str) -> None:
        """Store an answer; `details` are written beside it for people."""
        self._answers[question] = answer
        line = json.dumps({"id": question, "answer": answer, **details}) + "\n"
        self._file.write(line.encode("ascii"))
        self._file.flush()

    def _cut_incomplete_line(self) -> None:
        content = self._path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.ftruncate(self._file.fileno(), end)
