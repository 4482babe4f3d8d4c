"""Suspicious texts of records: words like tags, control characters, texts of unusual length.

They are kept, since queries escape what programs would read as structure. But nobody speaks so: a
person should look. In: a record. Out: sentences for `build` and `lint`.
"""

from collections.abc import Iterator
from typing import Final

from data_shards.printing import printable
from data_shards.shards.record import Record
from data_shards.tasks import escape_tags, find_tags

LONG_TEXT: Final = 2000
"""Characters of the longest usual text, about 500 tokens: four times the longest of MELD."""


def texts_of(record: Record) -> Iterator[tuple[str, str]]:
    """(what it is, text) of everything that people or models wrote."""
    yield "utterance", record.utterance
    yield "speaker", record.speaker
    for number, turn in enumerate(record.conversation, start=1):
        yield f"speaker of turn {number}", turn.speaker
        if number != record.target or turn.text != record.utterance:
            yield f"text of turn {number}", turn.text
    for phrase in record.expressions or ():
        yield "phrase", phrase
    yield "reason", record.reason or ""


def text_findings(record: Record) -> Iterator[str]:
    """One sentence for each suspicious text of a record."""
    for name, text in texts_of(record):
        if tags := find_tags(text):
            shown = ", ".join(escape_tags(tag) for tag in tags)
            yield f"the {name} contains {', '.join(tags)}; prompts show the words {shown}"
        safe = printable(text)
        if safe != text:
            yield f"the {name} contains control characters: {safe!s:.120}"
        if len(text) > LONG_TEXT:
            yield f"the {name} has {len(text)} characters, usual are at most {LONG_TEXT}"
