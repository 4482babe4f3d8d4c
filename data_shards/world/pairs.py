"""Generic question-answer pairs of the synthetic world, on which the nano base is aligned.

Image-text, video-text and text-only pairs about visible facts and utterances: face, hair, head, who
speaks, which turn names an event. Never an emotion, a sentiment, a cause, or a format of the five
tasks; the identities come from a random stream that the corpus does not use.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from data_shards.annotate.au_phrases import PHRASE_TABLES
from data_shards.media.video import clip_indices
from data_shards.shards.record import Turn
from data_shards.tasks import EMOTIONS, INSTRUCTION
from data_shards.world import describe, expression, grammar
from data_shards.world.face import ACTION_UNITS, Person, Pose, draw_light, draw_person, render
from data_shards.world.scene import IMAGE_SIZE

VIDEO_FRAMES = 4
WHICH_TURN = "Which turn names"  # beginning of the questions whose answer is a turn number
_NO_SIGN = "nothing special"
# Signs that exclude each other: one would hide the other.
_EXCLUSIVE = {
    frozenset(pair)
    for pair in (
        ("AU12", "AU15"), ("AU05", "AU45"), ("AU07", "AU45"), ("AU06", "AU45"), ("AU26", "AU28"),
        ("AU10", "AU28"), ("AU12", "AU28"), ("AU23", "AU28"), ("AU23", "AU26"), ("AU20", "AU23"),
    )
}  # fmt: skip
_DRAWABLE = tuple(describe.SIGNS)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenericPair:
    """One question and its answer.

    `frames`: uint8 RGB [F, H, W, 3], or None for text only; `video`: a clip, not a single image.
    """

    kind: str
    question: str
    answer: str
    frames: np.ndarray | None = None
    video: bool = False


def draw_signs(rng: np.random.Generator) -> tuple[str, ...]:
    """A random set of up to seven AUs that can be visible together."""
    size = int(rng.integers(0, 8))
    chosen: list[str] = []
    for i in rng.permutation(len(_DRAWABLE)):
        unit = _DRAWABLE[int(i)]
        if len(chosen) < size and not any(frozenset((unit, c)) in _EXCLUSIVE for c in chosen):
            chosen.append(unit)
    return tuple(chosen)


def still_face(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, float], Person, Pose]:
    """One image of a person with random signs: (frame, AU intensities, person, pose)."""
    shown = draw_signs(rng)
    au = {
        unit: float(rng.uniform(2.2, 5.0) if unit in shown else rng.uniform(0, 0.7))
        for unit in ACTION_UNITS
    }
    au["AU28"] = au["AU28"] if "AU28" in shown else 0.0
    au["AU25"] = float(rng.uniform(0, 1.5))
    person, pose = draw_person(rng), _pose(rng, lean=0.1)
    return render([(person, pose, au)], draw_light(rng), IMAGE_SIZE, rng), au, person, pose


def _pose(rng: np.random.Generator, *, lean: float) -> Pose:
    return Pose(
        x=0.5 + float(rng.uniform(-0.06, 0.04)),
        y=0.47 + float(rng.uniform(-0.03, 0.03)),
        size=0.33 * float(rng.uniform(0.9, 1.07)),
        roll=float(rng.choice((-lean, 0.0, lean)) + rng.normal(0, 0.05)),
    )


def _listed(signs: tuple[str, ...]) -> str:
    return (", ".join(signs) if signs else _NO_SIGN) + "."


def _about_face(rng: np.random.Generator) -> GenericPair:
    frame, au, _, _ = still_face(rng)
    return GenericPair(
        kind="face",
        question=_heard(rng) + "Describe the face.",
        answer=_listed(describe.visible_signs(au)),
        frames=frame[None],
    )


def _about_one_sign(rng: np.random.Generator) -> GenericPair:
    frame, au, _, _ = still_face(rng)
    seen = describe.visible_signs(au)
    signs = tuple(describe.SIGNS.values())
    bank = seen if seen and rng.random() < 0.5 else signs
    sign = bank[int(rng.integers(len(bank)))]
    return GenericPair(
        kind="sign",
        question=f"Do you see {sign}?",
        answer="Yes." if sign in seen else "No.",
        frames=frame[None],
    )


def _about_person(rng: np.random.Generator) -> GenericPair:
    frame, _, person, pose = still_face(rng)
    answer = f"{describe.person_words(person)}, {describe.head_words(pose)}."
    return GenericPair(
        kind="person", question="Describe the person.", answer=answer, frames=frame[None]
    )


def _about_moving_face(rng: np.random.Generator) -> GenericPair:
    """A video in which the signs appear and fade; the answer names those visible at their peak."""
    shown = tuple(unit for unit in draw_signs(rng) if unit != "AU45")
    person = draw_person(rng)
    num_frames = int(rng.integers(10, 17))
    track = expression.act(
        rng,
        shown,
        strength=float(rng.uniform(2.6, 4.6)),
        gain=person.expressiveness,
        num_frames=num_frames,
        speaking=True,
    )
    light, pose = draw_light(rng), _pose(rng, lean=0.0)
    frames = []
    for t in clip_indices(num_frames, VIDEO_FRAMES):
        au = dict(zip(ACTION_UNITS, track[t].tolist(), strict=True))
        frames.append(render([(person, pose, au)], light, IMAGE_SIZE, rng))
    peak = dict(zip(ACTION_UNITS, track.max(axis=0).tolist(), strict=True)) | {"AU45": 0.0}
    return GenericPair(
        kind="video",
        question=_heard(rng) + "Describe the face in the video.",
        answer=_listed(describe.visible_signs(peak)),
        frames=np.stack(frames),
        video=True,
    )


def _who_speaks(rng: np.random.Generator) -> GenericPair:
    people = draw_person(rng), draw_person(rng)
    speaker = int(rng.integers(2))
    light = draw_light(rng)
    poses = (Pose(x=0.26, y=0.48, size=0.2), Pose(x=0.74, y=0.48, size=0.2))
    frames = []
    for t in range(VIDEO_FRAMES):
        mouths = [{"AU26": 0.0}, {"AU26": 0.0}]
        mouths[speaker] = {"AU26": 4.0 if t % 2 else 1.0, "AU25": 3.0}
        frames.append(render(list(zip(people, poses, mouths, strict=True)), light, IMAGE_SIZE, rng))
    side = ("left", "right")[speaker]
    return GenericPair(
        kind="speaker",
        question="Who speaks?",
        answer=f"The person on the {side}.",
        frames=np.stack(frames),
        video=True,
    )


def _utterance(rng: np.random.Generator) -> str:
    kinds: tuple[Callable[[], str], ...] = (
        lambda: grammar.vague_utterance(rng),
        lambda: grammar.plain_utterance(rng),
        lambda: grammar.mention(rng, _event(rng)),
        lambda: grammar.clear_utterance(
            rng, _kind(rng), _event(rng) if rng.random() < 0.5 else None
        ),
    )
    return kinds[int(rng.integers(len(kinds)))]()


def _heard(rng: np.random.Generator) -> str:
    """In half of the pairs an utterance, so that images are learned in the presence of text."""
    return f"The person says: {_utterance(rng)} " if rng.random() < 0.5 else ""


def _kind(rng: np.random.Generator) -> str:
    return list(grammar.EVENTS)[int(rng.integers(len(grammar.EVENTS)))]


def _event(rng: np.random.Generator) -> str:
    return grammar.draw_event(rng, _kind(rng))


def _about_dialogue(rng: np.random.Generator) -> GenericPair:
    """Who said what: the turn or the speaker of a named event, and the words of a turn."""
    dialogue, named_turn, turn = _draw_dialogue(rng)
    event = dialogue.named[named_turn]
    question, answer = (
        (f"{WHICH_TURN} {event}?", f"{named_turn + 1}."),
        (f"Who names {event}?", f"{dialogue.turns[named_turn].speaker}."),
        (f"Who speaks in turn {turn + 1}?", f"{dialogue.turns[turn].speaker}."),
        (f"What is said in turn {turn + 1}?", dialogue.turns[turn].text),
        (
            "Which events are named?",
            ", ".join(f"{i + 1} {e}" for i, e in enumerate(dialogue.named) if e) + ".",
        ),
    )[int(rng.integers(5))]
    return GenericPair(
        kind="dialogue", question=f"{transcript(dialogue.turns)} {question}", answer=answer
    )


def _who_said_what(rng: np.random.Generator) -> GenericPair:
    """As `_about_dialogue`, with answers that repeat the number or event of the question.

    After the repeated words a small model can copy what follows them in the dialogue; a bare answer
    would require a look-up from the question alone.
    """
    dialogue, named_turn, turn = _draw_dialogue(rng)
    event = dialogue.named[named_turn]
    speaker, text = dialogue.turns[turn].speaker, dialogue.turns[turn].text
    question, answer = (
        (f"{WHICH_TURN} {event}?", f"{event}: {named_turn + 1}."),
        (f"Who names {event}?", f"{event}: {dialogue.turns[named_turn].speaker}."),
        (f"Who speaks in turn {turn + 1}?", f"{turn + 1}. {speaker}."),
        (f"What is said in turn {turn + 1}?", f"{turn + 1}. {speaker}: {text}"),
    )[int(rng.integers(4))]
    return GenericPair(
        kind="turns", question=f"{transcript(dialogue.turns)} {question}", answer=answer
    )


def _many_turns(rng: np.random.Generator) -> GenericPair:
    """As `_who_said_what`, with several look-ups in one answer, in random order.

    One short answer per dialogue teaches look-ups slowly; a list has many per dialogue.
    """
    dialogue, _, _ = _draw_dialogue(rng, most_events=6)
    lines = dialogue.turns
    named = [(i, event) for i, event in enumerate(dialogue.named) if event]
    picked = [named[int(i)] for i in rng.permutation(len(named))]
    numbers = [int(i) for i in rng.permutation(len(lines))][: int(rng.integers(2, 6))]
    few = numbers[:2]
    events, turns = ", ".join(event for _, event in picked), _numbers(numbers)
    question, answer = (
        (f"Which turns name {events}?", " ".join(f"{e}: {i + 1}." for i, e in picked)),
        (f"Who names {events}?", " ".join(f"{e}: {lines[i].speaker}." for i, e in picked)),
        (
            f"Who speaks in turns {turns}?",
            " ".join(f"{i + 1}. {lines[i].speaker}." for i in numbers),
        ),
        (
            f"What is said in turns {_numbers(few)}?",
            " ".join(f"{i + 1}. {lines[i].speaker}: {lines[i].text}" for i in few),
        ),
    )[int(rng.integers(4))]
    return GenericPair(kind="many", question=f"{transcript(lines)} {question}", answer=answer)


def _numbers(turns: list[int]) -> str:
    """Turns, counted from 0, as a list of their numbers from 1."""
    return ", ".join(str(turn + 1) for turn in turns)


def _draw_dialogue(
    rng: np.random.Generator, *, most_events: int = 4
) -> tuple[grammar.Dialogue, int, int]:
    """A dialogue, the turn that names one of its events, and any turn, both counted from 0."""
    num_turns = int(rng.integers(3, 9))
    most = min(most_events, num_turns - 1)
    kinds = rng.permutation(len(grammar.EVENTS))[: int(rng.integers(1, most + 1))]
    events = [grammar.draw_event(rng, list(grammar.EVENTS)[int(k)]) for k in kinds]
    dialogue = grammar.draw_dialogue(
        rng, events, num_turns, target=int(rng.integers(1, num_turns + 1)), target_event=None
    )
    named_turn = dialogue.named.index(events[int(rng.integers(len(events)))])
    return dialogue, named_turn, int(rng.integers(num_turns))


def transcript(turns: tuple[Turn, ...]) -> str:
    """The turns as numbered lines."""
    return "\n".join(
        f"{number}. {turn.speaker}: {turn.text}" for number, turn in enumerate(turns, start=1)
    )


def _repeat(rng: np.random.Generator) -> GenericPair:
    text = _utterance(rng)
    return GenericPair(
        kind="repeat", question=f"The person says: {text} What does the person say?", answer=text
    )


def lexicon() -> tuple[str, ...]:
    """Every word of the world, lower case and capitalized, which a base must be able to write.

    They are trained as meaningless lists, so that every word has a trained embedding when the
    stages begin, without any information about its use in the five tasks.
    """
    texts = [
        *INSTRUCTION.values(),
        *EMOTIONS,
        *(phrase for table in PHRASE_TABLES.values() for bank in table.values() for phrase in bank),
        "happy positive negative calm frightened disgusted surprised",
        "The woman's man's face shows stays still words sound she he feels because of",
        "target caption",
    ]
    words = {word for text in texts for word in re.findall(r"[A-Za-z'-]+", text)}
    lower, capitalized = {word.lower() for word in words}, {word.capitalize() for word in words}
    return tuple(sorted(words | lower | capitalized))


_LEXICON = lexicon()


def _words(rng: np.random.Generator) -> GenericPair:
    """Repeat a list of words; in some lists numbers are joined to words by an underscore."""
    words = [_LEXICON[int(i)] for i in rng.integers(len(_LEXICON), size=int(rng.integers(2, 9)))]
    if rng.random() < 0.3:
        words = [
            f"{int(rng.integers(1, 10))}_{word}" if rng.random() < 0.5 else word for word in words
        ]
    listed = (" ", ", ", ";", "; ", ",")[int(rng.integers(5))].join(words)
    return GenericPair(kind="words", question=f"Repeat the words: {listed}", answer=listed)


_MAKERS: dict[str, Callable[[np.random.Generator], GenericPair]] = {
    "face": _about_face,
    "sign": _about_one_sign,
    "person": _about_person,
    "video": _about_moving_face,
    "speaker": _who_speaks,
    "dialogue": _about_dialogue,
    "repeat": _repeat,
    "words": _words,
    "turns": _who_said_what,
    "many": _many_turns,
}
KINDS = tuple(_MAKERS)
# Shares of the kinds per phase. Basics: recognition and copying, on which the other kinds build.
# Talk: dialogues, which are learned last, with enough of the other kinds to retain them.
BASICS = {"face": 0.5, "words": 0.5}
TALK = {
    "turns": 0.54,
    "many": 0.13,
    "video": 0.14,
    "face": 0.12,
    "repeat": 0.03,
    "words": 0.04,
}
MIXTURE = {
    "face": 0.24,
    "sign": 0.04,
    "person": 0.04,
    "video": 0.18,
    "speaker": 0.02,
    "dialogue": 0.06,
    "turns": 0.28,
    "many": 0.06,
    "repeat": 0.03,
    "words": 0.05,
}


def draw_kind(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    """A kind of pair, drawn by its share."""
    return str(rng.choice(list(shares), p=list(shares.values())))


def draw_pair(rng: np.random.Generator, kind: str) -> GenericPair:
    """One generic pair of one of KINDS."""
    return _MAKERS[kind](rng)
