"""The task vocabulary: format and parse are inverse, parse never raises, queries are exact."""

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.shards.record import Record, Turn, Video
from data_shards.tasks import (
    EMOTIONS,
    IDENTIFIER,
    INSTRUCTION,
    POLARITIES,
    TASKS,
    Answer,
    Pair,
    Task,
    bit,
    build_query,
    format_answer,
    mask_of,
    parse_answer,
    polarity,
    tasks_in,
)
from tests.builders import make_record

LINE = st.text(max_size=60).map(lambda text: " ".join(text.split())).filter(bool)
PHRASE = LINE.map(lambda text: text.replace(";", "").strip(" .")).map(
    lambda text: " ".join(text.split()).rstrip(" .")
)
PHRASES = st.lists(PHRASE.filter(bool), min_size=1, max_size=5, unique_by=str.casefold).map(tuple)
PAIRS = st.sets(
    st.builds(Pair, st.integers(1, 30), st.sampled_from(EMOTIONS), st.integers(1, 30)), max_size=6
).map(lambda pairs: tuple(sorted(pairs)))
ANSWERS: dict[Task, st.SearchStrategy[Answer]] = {
    Task.MSA: st.sampled_from(POLARITIES),
    Task.ER: st.sampled_from(EMOTIONS),
    Task.FER: PHRASES,
    Task.ERI: LINE,
    Task.ECPE: PAIRS,
}
TASK_AND_ANSWER = st.sampled_from(TASKS).flatmap(
    lambda task: st.tuples(st.just(task), ANSWERS[task])
)
# Text near the formats, so that the fuzz reaches the repairs and not only the refusals.
NEAR = st.lists(
    st.sampled_from(
        [
            *("3", "_", ",", ";", "; ", ".", " ", "U", "u12", "joy", "Happy", "SAD", "not ", "\n"),
            *("positive", "Negative.", "none", "000", "9" * 5000, "3_joy,1"),
            *("\u0130", "\ud800", "\x00"),
        ]
    ),
    max_size=12,
).map("".join)


def record(**changes: object) -> Record:
    fields: dict[str, object] = {
        "utterance": "What  a day!",
        "sentiment": None,
        "tasks": (Task.ER,),
        "media": Video(mp4=b"mp4"),
    }
    return make_record("clip-1", **(fields | changes))


@given(TASK_AND_ANSWER)
def test_parse_inverts_format(case: tuple[Task, Answer]) -> None:
    task, answer = case
    text = format_answer(task, answer)
    for strict in (False, True):
        parsed = parse_answer(task, text, strict=strict)
        assert (parsed.value, parsed.status, parsed.rule) == (answer, "parsed", "exact")


@given(st.sampled_from(TASKS), st.one_of(st.text(max_size=80), NEAR), st.booleans())
def test_parse_never_raises_and_gives_a_formattable_answer(
    task: Task, text: str, strict: bool
) -> None:
    parsed = parse_answer(task, text, strict=strict)
    assert (parsed.value is None) == (parsed.status == "unparseable")
    assert parsed.rule
    if parsed.value is not None:
        again = parse_answer(task, format_answer(task, parsed.value), strict=True)
        assert again.value == parsed.value
    if strict:
        assert parsed.status != "repaired"


@given(TASK_AND_ANSWER)
def test_exact_text_is_the_only_strict_form(case: tuple[Task, Answer]) -> None:
    task, answer = case
    text = format_answer(task, answer)
    for other in (f" {text}", f"{text} "):
        assert parse_answer(task, other, strict=True).status == "unparseable"
        assert parse_answer(task, other).value == answer


def test_answers_of_the_paper() -> None:
    assert [format_answer(Task.MSA, label) for label in POLARITIES] == ["Positive.", "Negative."]
    assert {e: format_answer(Task.ER, e) for e in EMOTIONS} == {
        "neutral": "Neutral.",
        "surprise": "Surprise.",
        "fear": "Fear.",
        "sadness": "Sadness.",
        "joy": "Happy.",
        "disgust": "Disgust.",
        "anger": "Anger.",
    }
    assert format_answer(Task.FER, ("Eyes narrowing", "Slightly puzzled")) == (
        "Eyes narrowing; Slightly puzzled"
    )
    pairs = (Pair(3, "surprise", 1), Pair(3, "surprise", 3))
    assert format_answer(Task.ECPE, pairs) == "3_surprise,1;3_surprise,3"
    assert format_answer(Task.ECPE, ()) == ""


@pytest.mark.parametrize(
    ("task", "text", "value", "rule"),
    [
        (Task.MSA, "positive", "positive", "period+case"),
        (Task.MSA, " Negative.\n", "negative", "spaces"),
        (Task.MSA, "The sentiment is negative!", "negative", "text"),
        (Task.ER, "Joy.", "joy", "synonym"),
        (Task.ER, "HAPPY", "joy", "period+case"),
        (Task.ER, "Sad.", "sadness", "synonym"),
        (Task.ER, "angry", "anger", "period+case+synonym"),
        (Task.ER, "The person feels surprise because of the news.", "surprise", "text"),
        (Task.ER, "happy, so happy", "joy", "text"),
        (Task.FER, "Lips part;Eyes narrowing", ("Lips part", "Eyes narrowing"), "spaces"),
        (Task.FER, "Smile; smile; ;Grinning.", ("Smile", "Grinning"), None),
        (Task.FER, "Smile; smile", ("Smile",), "duplicate"),
        (Task.ERI, " He is\nglad. ", "He is glad.", "spaces"),
        (Task.ECPE, "3_happy, 1", (Pair(3, "joy", 1),), "spaces+synonym"),
        (Task.ECPE, "U3_joy,U1", (Pair(3, "joy", 1),), "utterance-prefix"),
        (Task.ECPE, "3_Joy,1;", (Pair(3, "joy", 1),), "case"),
        (Task.ECPE, "3_joy,1.", (Pair(3, "joy", 1),), "period"),
        (Task.ECPE, "3_joy,1; 3_joy,2", (Pair(3, "joy", 1), Pair(3, "joy", 2)), "spaces"),
        (Task.ECPE, "3_joy,1;3_joy,1", (Pair(3, "joy", 1),), "duplicate"),
        (Task.ECPE, "The pairs are 3_sad,2", (Pair(3, "sadness", 2),), "synonym+text"),
        (Task.ECPE, "003_fear,01", (Pair(3, "fear", 1),), None),
        (Task.ECPE, "None.", (), "no-pair-word"),
        (Task.ECPE, "3_joy,1 4_glad,2", (Pair(3, "joy", 1),), "unreadable-pair+text"),
    ],
)
def test_repairs(task: Task, text: str, value: Answer, rule: str | None) -> None:
    parsed = parse_answer(task, text)
    assert (parsed.value, parsed.status) == (value, "repaired")
    assert rule is None or parsed.rule == rule
    assert parse_answer(task, text, strict=True).rule == "not-exact"


def test_pairs_in_any_order_are_exact() -> None:
    parsed = parse_answer(Task.ECPE, "3_joy,2;3_joy,1", strict=True)
    assert parsed.value == (Pair(3, "joy", 1), Pair(3, "joy", 2))


@pytest.mark.parametrize(
    ("task", "text", "rule"),
    [
        (Task.MSA, "", "empty"),
        (Task.MSA, "Neutral.", "no-label"),
        (Task.MSA, "positive or negative", "ambiguous"),
        (Task.MSA, "It is not positive.", "negated"),
        (Task.ER, "unhappy", "no-label"),
        (Task.ER, "not happy but anger", "ambiguous"),
        (Task.ER, "She isn't very happy", "negated"),
        (Task.FER, " ; .", "empty"),
        (Task.ERI, "\n", "empty"),
        (Task.ECPE, "utterance 3 and 2024", "no-pair"),
        (Task.ECPE, "3_joy", "no-pair"),
        (Task.ECPE, "3_glad,1", "unreadable-pair"),
        (Task.ECPE, "0_joy,0", "unreadable-pair"),
    ],
)
def test_unparseable(task: Task, text: str, rule: str) -> None:
    parsed = parse_answer(task, text)
    assert (parsed.value, parsed.status, parsed.rule) == (None, "unparseable", rule)


@pytest.mark.parametrize(
    ("task", "answer", "message"),
    [
        (Task.MSA, "neutral", "msa answer: must be one of positive, negative, found 'neutral'"),
        (Task.ER, "happy", "er answer: must be one of neutral, surprise, .* found 'happy'"),
        (Task.ER, ("joy",), "er answer: must be one of"),
        (Task.FER, (), "fer answer: must be one or more phrases, found ()"),
        (Task.FER, "Smile", "fer answer: must be one or more phrases"),
        (Task.FER, ("A; B",), "fer answer: a phrase must be text on one line without ';'"),
        (Task.FER, ("End.",), "fer answer: a phrase must be text .* found 'End.'"),
        (Task.FER, ("Smile", "smile"), "fer answer: phrases must differ"),
        (Task.ERI, "two\nlines", "eri answer: must be text on one line"),
        (Task.ERI, "", "eri answer: must be text on one line, single spaces, not empty"),
        (Task.ECPE, "3_joy,1", "ecpe answer: must be a tuple of Pair"),
        (Task.ECPE, (Pair(1, "happy", 1),), "ecpe answer: an emotion must be one of"),
        (Task.ECPE, (Pair(0, "joy", 1),), "ecpe answer: utterances are numbered from 1"),
        (Task.ECPE, (Pair(2, "joy", 2), Pair(2, "joy", 1)), "ecpe answer: pairs must be sorted"),
    ],
)
def test_format_refuses(task: Task, answer: Answer, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("()", r"\(\)")):
        format_answer(task, answer)


def test_masks() -> None:
    assert [bit(task) for task in TASKS] == [1, 2, 4, 8, 16]
    for mask in range(32):
        assert mask_of(tasks_in(mask)) == mask
    assert tasks_in(5) == (Task.MSA, Task.FER)
    for mask in (-1, 32):
        with pytest.raises(ValueError, match=rf"task mask: must be 0\.\.31, found {mask}"):
            tasks_in(mask)


def test_polarity() -> None:
    assert [polarity(s) for s in (-3, -0.1, -0.0, 0, 2.4)] == [
        "negative",
        "negative",
        "positive",
        "positive",
        "positive",
    ]
    with pytest.raises(ValueError, match="sentiment: must be a number, found nan"):
        polarity(math.nan)


@pytest.mark.parametrize("task", [task for task in TASKS if task is not Task.ECPE])
def test_query_of_one_utterance(task: Task) -> None:
    query = build_query(record(), task, give_emotion=True)
    assert query == f"The person says: What a day! {IDENTIFIER[task]} {INSTRUCTION[task]}"


def test_query_without_words() -> None:
    query = build_query(record(utterance=" "), Task.MSA, give_emotion=False)
    assert query == f"<sentiment> {INSTRUCTION[Task.MSA]}"


def test_ecpe_query() -> None:
    turns = (Turn(speaker="Ann", text="We won!"), Turn(speaker="Bob", text="Won\n what?"))
    pairs = (Pair(2, "surprise", 1),)
    plain = record(conversation=turns, target=2, pairs=pairs, emotion=None, tasks=(Task.ECPE,))
    assert build_query(plain, Task.ECPE, give_emotion=False) == (
        "1. Ann: We won!\n2. Bob: Won what?\n<emotion cause-pair> Please extract the "
        "emotion-cause pairs of the target utterance. Target 2: Won what?"
    )
    with_emotion = build_query(plain, Task.ECPE, give_emotion=True)
    assert with_emotion.endswith("Target 2: Won what? Emotion: surprise")
    labelled = dataclasses.replace(
        plain, emotion="joy"
    )  # the label counts, the pairs only stand in for it
    assert build_query(labelled, Task.ECPE, give_emotion=True).endswith("Emotion: joy")


def test_ecpe_query_refuses() -> None:
    with pytest.raises(ValueError, match=r"record clip-1: target: .* of 0 turns, found 0"):
        build_query(record(), Task.ECPE, give_emotion=False)
    turns = (Turn(speaker="Ann", text="Hm."),)
    silent = record(conversation=turns, target=1, emotion=None, pairs=(), tasks=(Task.ECPE,))
    with pytest.raises(ValueError, match=r"record clip-1: emotion: .*set data.give_emotion=false"):
        build_query(silent, Task.ECPE, give_emotion=True)


def test_identifiers_are_the_papers() -> None:
    assert list(IDENTIFIER.values()) == [
        "<sentiment>",
        "<emotion>",
        "<caption>",
        "<reason>",
        "<emotion cause-pair>",
    ]
    assert all(re.search(r"[.?]$", text) for text in INSTRUCTION.values())
