"""From the text of an answer to what the scorers need of it; one way for every source of answers.

Used after generation, for result files of other systems, and to read stored answers again in
another mode. Torch-free.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from typing import Literal

from data_shards.tasks import Parsed, Task, TurnLike, parse_answer, polarity
from emoverse.evaluation.metrics import END_OF_SCALE, NEUTRAL, Row
from emoverse.evaluation.predictions import Prediction

Mode = Literal["tolerant", "strict", "mmsa"]
MODES: tuple[Mode, ...] = ("tolerant", "strict", "mmsa")

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")


def read_text(row: Row, text: str, *, mode: Mode = "tolerant") -> tuple[Row, str]:
    """The row with the answer that `text` holds, and the rule by which it was read; never raises.

    tolerant: `parse_answer`, and for MSA one number between -3 and 3 is an intensity (rule
    'number'). strict: the exact format alone. mmsa: tolerant, and for MSA a neutral answer is a
    predicted 0 as in MMSA's metrics: non-negative in N/N, negative in N/P (rule 'neutral').
    """
    parsed = parse_answer(row.task, text, strict=mode == "strict")
    number = None
    if row.task is Task.MSA and mode != "strict" and parsed.value is None:
        number = _intensity(text)
        if number is not None:
            parsed = Parsed(value=polarity(number), status="repaired", rule="number")
        elif mode == "mmsa" and parse_answer(Task.ER, text).value == NEUTRAL:
            parsed = Parsed(value=NEUTRAL, status="repaired", rule="neutral")
    read = dataclasses.replace(
        row,
        value=parsed.value,
        response=text,
        status=parsed.status,
        number=number,
        unread_pairs=parsed.unread_pairs,
    )
    return read, parsed.rule


def _intensity(text: str) -> float | None:
    core = text.strip()
    core = core[:-1] if core.endswith(".") and core.count(".") == 2 else core
    if not _NUMBER.fullmatch(core) or len(core) > 20:
        return None
    number = float(core)
    return number if abs(number) <= END_OF_SCALE else None


def read_again(predictions: Iterable[Prediction], mode: Mode) -> list[Prediction]:
    """The same answers read in this mode."""
    found = []
    for one in predictions:
        row, rule = read_text(one.row, one.row.response, mode=mode)
        found.append(dataclasses.replace(one, row=row, rule=rule))
    return found


def conversation_id(source: str, turns: Iterable[TurnLike]) -> str:
    """Equal for all records of one conversation: source and a hash of its turns; '' without one."""
    texts = [f"{turn.speaker}\t{turn.text}" for turn in turns]
    if not texts:
        return ""
    return f"{source}-{hashlib.sha256(chr(10).join(texts).encode()).hexdigest()[:16]}"
