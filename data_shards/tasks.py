"""The five tasks: identifier, instruction, query, label vocabulary and answer format.

In: the labels of a record. Out: the text of a prompt (query) and of the expected answer, and the
label of a written answer: `format_answer` and `parse_answer` are inverse functions. The rest of the
project takes its task vocabulary from this file. Standard library only.

Words of people that look like structure (a task identifier, a media tag, a special token of a
tokenizer) are escaped in queries: see `escape_tags`.
"""

import enum
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, cast


class Task(enum.StrEnum):
    """One task of the paper; the value is its name in configs, shards and reports."""

    MSA = "msa"
    ER = "er"
    FER = "fer"
    ERI = "eri"
    ECPE = "ecpe"


TASKS: Final[tuple[Task, ...]] = tuple(Task)
"""The canonical order: bit i of a task mask stands for TASKS[i]. Part of the shard format."""

_BIT: Final[dict[Task, int]] = {task: 1 << index for index, task in enumerate(TASKS)}

EMOTIONS: Final = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
POLARITIES: Final = ("positive", "negative")


class Pair(NamedTuple):
    """An emotion-cause pair; utterances are numbered from 1."""

    target: int
    emotion: str
    cause: int


Answer = str | tuple[str, ...] | tuple[Pair, ...]
"""MSA, ER: a label. FER: phrases. ERI: free text. ECPE: sorted, distinct pairs, possibly none."""

IDENTIFIER: Final[dict[Task, str]] = {
    Task.MSA: "<sentiment>",
    Task.ER: "<emotion>",
    Task.FER: "<caption>",
    Task.ERI: "<reason>",
    Task.ECPE: "<emotion cause-pair>",
}

INSTRUCTION: Final[dict[Task, str]] = {
    Task.MSA: (
        "Please determine which sentiment label in the video represents: positive or negative."
    ),
    Task.ER: (
        "Please determine which emotion label in the video represents: "
        "anger, sad, surprise, disgust, happy, neutral or fear."
    ),
    Task.FER: "Detail the facial expressions used in the image.",
    Task.ERI: "What is the emotional state of the person in the video? Please tell me the reason.",
    # The paper does not give its instruction for this task; this wording is ours.
    Task.ECPE: "Please extract the emotion-cause pairs of the target utterance.",
}

# The paper's answer for the label joy (its name in MELD and SemEval) is "Happy.".
_MSA_TEXT: Final = {label: f"{label.capitalize()}." for label in POLARITIES}
_ER_TEXT: Final = {e: "Happy." if e == "joy" else f"{e.capitalize()}." for e in EMOTIONS}
_MSA_WORDS: Final = {label: label for label in POLARITIES}
# One emotion has several names in the corpora: joy/happy/happiness, sadness/sad, anger/angry.
_ER_SYNONYMS: Final = {"happy": "joy", "happiness": "joy", "sad": "sadness", "angry": "anger"}
_ER_WORDS: Final = {e: e for e in EMOTIONS} | _ER_SYNONYMS

_PAIR_EXACT: Final = re.compile(r"([1-9][0-9]{0,5})_([a-z]+),([1-9][0-9]{0,5})")
_PAIR_LOOSE: Final = re.compile(
    r"(?<![0-9A-Za-z_.\-+])(?P<u1>[uU]?)\s?0*(?P<target>[1-9][0-9]{0,5})\s*_\s*(?P<emotion>[A-Za-z]+)"
    r"\s*,\s*(?P<u2>[uU]?)\s?0*(?P<cause>[1-9][0-9]{0,5})(?![0-9_]|\.[0-9])"
)
# Anything of the form A_B,C. What is left of it beside the readable pairs is an unreadable pair.
_PAIR_ATTEMPT: Final = re.compile(r"[^\s;,_]+\s*_\s*[^\s;,_]+\s*,\s*[^\s;,]+")
_NO_PAIR_WORDS: Final = frozenset({"none", "no pair", "no pairs", "empty"})
# Words that some program would read as structure: the identifiers above, the media tags of ms-swift
# and InternVL, the special tokens of Phi-3, InternLM2, Qwen and the nano tokenizer.
_TAG_NAMES: Final = (
    *(re.escape(identifier.strip("<>")) for identifier in IDENTIFIER.values()),
    *("image", "/image", "video", "/video", "audio", "/audio", "img", "/img", "IMG_CONTEXT"),
    *("quad", "/quad", "ref", "/ref", "box", "/box", "bbox", "ref-object"),
    *("s", "/s", "unk", "pad", "bos", "eos", "mask", "sep", "cls"),
    *("think", "/think", "tool_call", "/tool_call", "tool_response", "/tool_response"),
    r"\|[^<>|\s\\]{1,40}\|",  # <|end|>, <|im_start|>, <|vision_pad|>, ...
)
_TAG: Final = re.compile(rf"<(\\*)({'|'.join(_TAG_NAMES)})>")
_NEGATION: Final = re.compile(r"(?:\b(?:not|no|never|neither|nor|without)|n't)\s+(?:\w+\s+)?$")


class TurnLike(Protocol):
    """The fields of a turn that a query uses."""

    @property
    def speaker(self) -> str: ...
    @property
    def text(self) -> str: ...


class QuerySource(Protocol):
    """The fields of a record that a query uses; implemented by `shards.record.Record`."""

    @property
    def key(self) -> str: ...
    @property
    def utterance(self) -> str: ...
    @property
    def conversation(self) -> Sequence[TurnLike]: ...
    @property
    def target(self) -> int: ...
    @property
    def emotion(self) -> str | None: ...
    @property
    def pairs(self) -> tuple[Pair, ...] | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """The outcome of `parse_answer`.

    value: the answer, None when unparseable.
    status: 'parsed' (the exact format), 'repaired' (clear meaning, other form) or 'unparseable'.
    rule: 'exact', or the repairs that were needed joined by '+', or why the text is unreadable.
    unread_pairs: ECPE, tolerant: distinct texts in the form of a pair that are none, such as
        '1_love,2' or '1_joy,2.7'. Each is one wrong predicted pair to the metrics.
    """

    value: Answer | None
    status: Literal["parsed", "repaired", "unparseable"]
    rule: str
    unread_pairs: int = 0


def bit(task: Task) -> int:
    """The bit of one task in a task mask."""
    return _BIT[task]


def mask_of(tasks: Iterable[Task]) -> int:
    """The task mask (0..31) of some tasks."""
    mask = 0
    for task in tasks:
        mask |= _BIT[task]
    return mask


def tasks_in(mask: int) -> tuple[Task, ...]:
    """The tasks of a mask, in canonical order. Raises ValueError for a mask outside 0..31."""
    if not 0 <= mask < 1 << len(TASKS):
        raise ValueError(f"task mask: must be 0..{(1 << len(TASKS)) - 1}, found {mask}")
    return tuple(task for task in TASKS if mask & _BIT[task])


def polarity(sentiment: float) -> str:
    """'positive' for a sentiment of 0 or more, else 'negative' (non-negative against negative)."""
    if math.isnan(sentiment):
        raise ValueError("sentiment: must be a number, found nan")
    return "positive" if sentiment >= 0 else "negative"


# ------------------------------------------------------------------------------------------ answers


def format_answer(task: Task, answer: Answer) -> str:
    """The text of an answer, as the model is trained to write it.

    MSA 'Positive.'; ER 'Happy.'; FER 'Eyes narrowing; Lips part'; ERI the text itself;
    ECPE '3_surprise,1;3_surprise,3', the empty text for no pair.

    Raises ValueError for a label, phrase or pair that is not valid for the task.
    """
    match task:
        case Task.MSA | Task.ER:
            texts = _MSA_TEXT if task is Task.MSA else _ER_TEXT
            if not isinstance(answer, str) or answer not in texts:
                raise ValueError(
                    f"{task} answer: must be one of {', '.join(texts)}, found {answer!r}"
                )
            return texts[answer]
        case Task.FER:
            return "; ".join(_checked_phrases(answer))
        case Task.ERI:
            if not isinstance(answer, str) or not answer or answer != _squeeze(answer):
                rule = "must be text on one line, single spaces, not empty"
                raise ValueError(f"eri answer: {rule}, found {answer!r}")
            return answer
        case Task.ECPE:
            return ";".join(f"{p.target}_{p.emotion},{p.cause}" for p in _checked_pairs(answer))


def parse_answer(task: Task, text: str, *, strict: bool = False) -> Parsed:
    """Parse a written answer; the inverse of `format_answer`. Never raises.

    The tolerant parser accepts other case, a missing final period, extra spaces, synonyms of the
    emotions, 'U3' for utterance 3, repeated items and words around the answer; `rule` names these
    repairs. `strict` accepts the exact format only (pairs in any order).
    """
    exact, repair = _READERS[task]
    value = exact(text)
    if value is not None:
        return Parsed(value=value, status="parsed", rule="exact")
    if strict:
        return _unparseable("not-exact")
    return repair(text)


def _unparseable(rule: str, *, unread_pairs: int = 0) -> Parsed:
    return Parsed(value=None, status="unparseable", rule=rule, unread_pairs=unread_pairs)


def _repaired(value: Answer, seen: Mapping[str, bool], *, unread_pairs: int = 0) -> Parsed:
    rule = "+".join(name for name, happened in seen.items() if happened) or "spaces"
    return Parsed(value=value, status="repaired", rule=rule, unread_pairs=unread_pairs)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _checked_phrases(answer: Answer) -> tuple[str, ...]:
    if not isinstance(answer, tuple) or not answer:
        raise ValueError(f"fer answer: must be one or more phrases, found {answer!r}")
    for phrase in answer:
        if not isinstance(phrase, str) or not _is_phrase(phrase):
            rule = "a phrase must be text on one line without ';' and final period"
            raise ValueError(f"fer answer: {rule}, found {phrase!r}")
    if len({str(phrase).casefold() for phrase in answer}) != len(answer):
        raise ValueError(f"fer answer: phrases must differ, found {answer!r}")
    return cast("tuple[str, ...]", answer)


def _is_phrase(text: str) -> bool:
    return bool(text) and text == _squeeze(text) and ";" not in text and not text.endswith(".")


def _checked_pairs(answer: Answer) -> tuple[Pair, ...]:
    if not isinstance(answer, tuple) or not all(isinstance(pair, Pair) for pair in answer):
        raise ValueError(f"ecpe answer: must be a tuple of Pair, found {answer!r}")
    pairs = cast("tuple[Pair, ...]", answer)
    for pair in pairs:
        if pair.emotion not in EMOTIONS:
            rule = f"an emotion must be one of {', '.join(EMOTIONS)}"
            raise ValueError(f"ecpe answer: {rule}, found {pair.emotion!r}")
        if not (1 <= pair.target < 1_000_000 and 1 <= pair.cause < 1_000_000):
            raise ValueError(f"ecpe answer: utterances are numbered from 1 to 999999, found {pair}")
    if list(pairs) != sorted(set(pairs)):
        raise ValueError(f"ecpe answer: pairs must be sorted and differ, found {pairs!r}")
    return pairs


def _label_reader(
    texts: Mapping[str, str], words: Mapping[str, str]
) -> tuple[Callable[[str], Answer | None], Callable[[str], Parsed]]:
    labels = {text: label for label, text in texts.items()}
    anywhere = re.compile(rf"(?<![\w-])({'|'.join(sorted(words, key=len, reverse=True))})(?![\w-])")

    def exact(text: str) -> Answer | None:
        return labels.get(text)

    def repair(text: str) -> Parsed:
        plain = _squeeze(text)
        core = plain.rstrip(" .")
        low = core.lower()
        if low in words:
            label = words[low]
            seen = {
                "spaces": plain != text,
                "period": plain != f"{core}.",
                "case": core != core.capitalize(),
                "synonym": low != texts[label][:-1].lower(),
            }
            return _repaired(label, seen)
        mentions = list(anywhere.finditer(low))
        mentioned = {words[mention[1]] for mention in mentions}
        if not mentioned:
            return _unparseable("no-label" if plain else "empty")
        if len(mentioned) > 1:
            return _unparseable("ambiguous")
        if any(_NEGATION.search(low[: mention.start()]) for mention in mentions):
            return _unparseable("negated")
        return _repaired(mentioned.pop(), {"text": True})

    return exact, repair


def _exact_phrases(text: str) -> Answer | None:
    phrases = tuple(text.split("; "))
    distinct = {phrase.casefold() for phrase in phrases}
    return phrases if len(distinct) == len(phrases) and all(map(_is_phrase, phrases)) else None


def _repair_phrases(text: str) -> Parsed:
    seen = dict.fromkeys(("period", "empty-item", "duplicate"), False)
    phrases: dict[str, str] = {}
    for item in text.split(";"):
        phrase = _squeeze(item)
        bare = phrase.rstrip(" .")
        seen["period"] |= bare != phrase
        seen["empty-item"] |= not bare
        seen["duplicate"] |= bare.casefold() in phrases
        if bare:
            phrases.setdefault(bare.casefold(), bare)
    return _repaired(tuple(phrases.values()), seen) if phrases else _unparseable("empty")


def _exact_line(text: str) -> Answer | None:
    return text if text and text == _squeeze(text) else None


def _repair_line(text: str) -> Parsed:
    line = _squeeze(text)
    return _repaired(line, {"spaces": True}) if line else _unparseable("empty")


def _exact_pairs(text: str) -> Answer | None:
    if not text:
        return ()
    pairs: set[Pair] = set()
    items = text.split(";")
    for item in items:
        match = _PAIR_EXACT.fullmatch(item)
        if match is None or match[2] not in EMOTIONS:
            return None
        pairs.add(Pair(int(match[1]), match[2], int(match[3])))
    return tuple(sorted(pairs)) if len(pairs) == len(items) else None


def _repair_pairs(text: str) -> Parsed:
    plain = _squeeze(text)
    if not plain or plain.rstrip(" .").lower() in _NO_PAIR_WORDS:
        return _repaired((), {"no-pair-word": bool(plain)})
    seen = dict.fromkeys(
        (
            "spaces",
            "utterance-prefix",
            "case",
            "synonym",
            "duplicate",
            "unreadable-pair",
            "text",
            "period",
        ),
        False,
    )
    pairs: set[Pair] = set()
    rest = plain
    for match in _PAIR_LOOSE.finditer(plain):
        emotion = _ER_WORDS.get(match["emotion"].lower())
        if emotion is None:
            continue
        pair = Pair(int(match["target"]), emotion, int(match["cause"]))
        seen["spaces"] |= " " in match[0]
        seen["utterance-prefix"] |= bool(match["u1"] or match["u2"])
        seen["case"] |= not match["emotion"].islower()
        seen["synonym"] |= match["emotion"].lower() != emotion
        seen["duplicate"] |= pair in pairs
        pairs.add(pair)
        rest = rest.replace(match[0], "", 1)
    unread = len({_squeeze(attempt) for attempt in _PAIR_ATTEMPT.findall(rest)})
    if not pairs:
        return _unparseable("unreadable-pair" if unread else "no-pair", unread_pairs=unread)
    seen["unreadable-pair"] = unread > 0
    left = rest.replace(";", "").strip()
    seen["period"] = left == "."
    seen["text"] = left not in ("", ".")
    return _repaired(tuple(sorted(pairs)), seen, unread_pairs=unread)


_READERS: Final[dict[Task, tuple[Callable[[str], Answer | None], Callable[[str], Parsed]]]] = {
    Task.MSA: _label_reader(_MSA_TEXT, _MSA_WORDS),
    Task.ER: _label_reader(_ER_TEXT, _ER_WORDS),
    Task.FER: (_exact_phrases, _repair_phrases),
    Task.ERI: (_exact_line, _repair_line),
    Task.ECPE: (_exact_pairs, _repair_pairs),
}


# -------------------------------------------------------------------------------- words like tags


def find_tags(text: str) -> tuple[str, ...]:
    """The distinct identifiers, media tags and special tokens in a text, in order of appearance."""
    return tuple(dict.fromkeys(match[0] for match in _TAG.finditer(text) if not match[1]))


def escape_tags(text: str) -> str:
    r"""The text with `<\image>` for `<image>`, and so on for everything that `find_tags` finds.

    No program reads the result as structure. Exact: `unescape_tags` gives the text back, also if it
    holds such a backslash already. Other texts stay as they are.
    """
    return _TAG.sub(r"<\\\1\2>", text)


def unescape_tags(text: str) -> str:
    """The inverse of `escape_tags`."""
    return _TAG.sub(lambda match: f"<{match[1][1:]}{match[2]}>", text)


def _escape_speaker(speaker: str) -> str:
    """A speaker's name as it stands before the colon of a turn: a colon of its own is escaped."""
    name = escape_tags(_squeeze(speaker))
    return re.sub(r"[\\:]", r"\\\g<0>", name) if ":" in name or "\\" in name else name


def unescape_speaker(name: str) -> str:
    """The speaker of a name in an ECPE query."""
    return unescape_tags(re.sub(r"\\([\\:])", r"\1", name))


# ------------------------------------------------------------------------------------------ queries


def build_query(record: QuerySource, task: Task, *, give_emotion: bool) -> str:
    """The text of a prompt, without image tags.

    MSA, ER, FER, ERI: 'The person says: {utterance} {identifier} {instruction}'. ECPE: the whole
    conversation, one numbered turn per line, then identifier, instruction, and the number and text
    of the target; with `give_emotion` also its reference emotion (which makes the task easier and
    is therefore recorded with every metric). Words that look like tags are escaped.

    Raises ValueError for an ECPE query of a record without conversation, or without the emotion.
    """
    tail = f"{IDENTIFIER[task]} {INSTRUCTION[task]}"
    if task is not Task.ECPE:
        utterance = escape_tags(_squeeze(record.utterance))
        return f"The person says: {utterance} {tail}" if utterance else tail
    turns = record.conversation
    if not 1 <= record.target <= len(turns):
        raise ValueError(
            f"record {record.key}: target: an ecpe query requires a target within its conversation "
            f"of {len(turns)} turns, found {record.target}"
        )
    lines = [
        f"{n}. {_escape_speaker(t.speaker)}: {escape_tags(_squeeze(t.text))}"
        for n, t in enumerate(turns, start=1)
    ]
    target = f"Target {record.target}: {escape_tags(_squeeze(turns[record.target - 1].text))}"
    query = "\n".join([*lines, f"{tail} {target}"])
    if not give_emotion:
        return query
    emotion = record.emotion or (record.pairs[0].emotion if record.pairs else None)
    if emotion is None:
        raise ValueError(
            f"record {record.key}: emotion: give_emotion requires the target's emotion, found none"
            "; set data.give_emotion=false or build the record with its emotion"
        )
    return f"{query} Emotion: {emotion}"
