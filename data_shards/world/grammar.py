"""Utterances with clear, vague or no emotional content, and dialogues that mention events.

In: a seeded generator. Out: texts, and for a dialogue the event that each turn mentions. Utterances
are combinations (tens of thousands of distinct ones), so a model cannot memorize them.
"""

from dataclasses import dataclass

import numpy as np

from data_shards.shards.record import Turn

NAMES = (
    "Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack",
    "Kim", "Leo", "Mia", "Ned", "Olga", "Paul", "Rosa", "Sam", "Tina", "Will",
)  # fmt: skip

# Events and the emotion they cause. ECPE asks which of the mentioned events is the cause.
EVENTS: dict[str, tuple[str, ...]] = {
    "joy": (
        "the wedding", "the first prize", "the holiday", "the birthday cake", "the new job",
        "the picnic",
    ),
    "sadness": (
        "the funeral", "the lost dog", "the goodbye", "the empty house", "the sick cat",
        "the old grave",
    ),
    "anger": (
        "the parking fine", "the stolen bike", "the rude waiter", "the scratched car", "the lie",
        "the noise",
    ),
    "fear": (
        "the dark cellar", "the big spider", "the storm", "the strange shadow", "the wolf",
        "the cliff",
    ),
    "surprise": (
        "the magic trick", "the secret door", "the visitor", "the hidden letter", "the twin",
        "the comet",
    ),
    "disgust": (
        "the rotten fish", "the mouldy bread", "the dirty toilet", "the sour milk",
        "the dead rat", "the slime",
    ),
}  # fmt: skip

_MENTIONS = (
    "I keep thinking about {event}.", "Did you hear about {event}?", "There was {event} again.",
    "Tell me about {event}.", "Then came {event}.", "I just saw {event}.",
    "Everybody talks about {event}.", "You should have seen {event}.", "First it was {event}.",
    "They told us about {event}.",
)  # fmt: skip
_FILLERS = (
    "Shall we go?", "I will call you later.", "What time is it?", "The bus is late today.",
    "Pass me the salt.", "It is Monday.", "I need some coffee.", "Where did you park?",
    "We can eat at noon.", "Please sit down.", "My phone is in the car.",
    "The meeting starts soon.", "I was at the office.", "Did you lock the door?",
)  # fmt: skip
_OPENERS = ("", "", "Oh, ", "Well, ", "You know, ", "Listen, ", "So, ", "Look, ")
_VAGUE = (
    "I can not believe it.", "that is how it is.", "here we are.", "I have no words.",
    "this is really something.", "I did not know that.", "what can I say.", "it happened again.",
    "now you know it.", "I will never forget this.", "just look at it.", "that was it then.",
    "you see what I mean.", "it is what it is.",
)  # fmt: skip
_PLAIN = (
    "I put the keys on the table.", "the train leaves at nine.", "the shop opens at ten.",
    "we have two rooms.", "the book is on the shelf.", "I take the bus to work.",
    "the window is closed.", "there are six chairs.",
)  # fmt: skip
_CLEAR: dict[str, tuple[str, ...]] = {
    "joy": (
        "I am so glad", "this is wonderful", "I love it", "what a lovely day", "I could dance",
        "this is great",
    ),
    "sadness": (
        "I could cry", "it hurts so much", "I feel so lonely", "I miss it all",
        "my heart is heavy", "I am so sorry",
    ),
    "anger": (
        "this is so unfair", "I am fed up", "I have had enough", "how dare they",
        "this makes me mad", "stop it now",
    ),
    "fear": (
        "I am scared", "my hands are shaking", "I want to hide", "this is dangerous",
        "please help me", "I can not breathe",
    ),
    "surprise": (
        "no way", "I did not expect that", "this is so sudden", "who would have thought", "wow",
        "you are joking",
    ),
    "disgust": (
        "this is gross", "it makes me sick", "yuck", "what a nasty smell", "I can not touch that",
        "this is filthy",
    ),
}  # fmt: skip
_TAILS = ("", " today", " my friend", " really", " right now", " again")
# Tone of the words, for composed reasons.
TONE: dict[str, str] = {
    "joy": "happy", "sadness": "sad", "anger": "angry", "fear": "frightened",
    "surprise": "surprised", "disgust": "disgusted", "neutral": "calm",
}  # fmt: skip


def _pick(rng: np.random.Generator, bank: tuple[str, ...]) -> str:
    return bank[int(rng.integers(len(bank)))]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def vague_utterance(rng: np.random.Generator) -> str:
    """An utterance that fits every emotion, so that only the face shows it."""
    return _sentence(_pick(rng, _OPENERS) + _pick(rng, _VAGUE))


def plain_utterance(rng: np.random.Generator) -> str:
    """A neutral statement."""
    return _sentence(_pick(rng, _OPENERS) + _pick(rng, _PLAIN))


def clear_utterance(rng: np.random.Generator, emotion: str, event: str | None) -> str:
    """An utterance of one emotion, with the event that causes it if one is given."""
    about = f" about {event}" if event else ""
    return _sentence(
        f"{_pick(rng, _OPENERS)}{_pick(rng, _CLEAR[emotion])}{_pick(rng, _TAILS)}{about}."
    )


def draw_event(rng: np.random.Generator, emotion: str) -> str:
    """A random event that causes an emotion."""
    return _pick(rng, EVENTS[emotion])


def mention(rng: np.random.Generator, event: str) -> str:
    """A turn that mentions an event without emotion."""
    return _pick(rng, _MENTIONS).format(event=event)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """A conversation: `named[i]` is the event that turn i+1 mentions, or None."""

    turns: tuple[Turn, ...]
    named: tuple[str | None, ...]


def draw_dialogue(
    rng: np.random.Generator,
    events: list[str],
    num_turns: int,
    *,
    target: int,
    target_event: str | None,
) -> Dialogue:
    """A dialogue of `num_turns` turns; each of `events` is mentioned once, not by the target turn.

    `target` is the 1-based turn of interest: its text is vague, or mentions `target_event`.
    """
    assert len(events) < num_turns, "every event requires a turn other than the target"
    others = [i for i in range(num_turns) if i != target - 1]
    positions = sorted(int(i) for i in rng.choice(others, size=len(events), replace=False))
    order = [events[int(i)] for i in rng.permutation(len(events))]
    named: list[str | None] = [None] * num_turns
    for position, event in zip(positions, order, strict=True):
        named[position] = event
    named[target - 1] = target_event
    speakers = [
        NAMES[int(i)] for i in rng.choice(len(NAMES), size=int(rng.integers(2, 4)), replace=False)
    ]
    turns = []
    last = -1
    for position in range(num_turns):
        choices = [i for i in range(len(speakers)) if i != last]
        last = choices[int(rng.integers(len(choices)))]
        mentioned = named[position]
        if mentioned is not None:
            text = mention(rng, mentioned)
        elif position == target - 1:
            text = vague_utterance(rng)
        else:
            text = _pick(rng, _FILLERS)
        turns.append(Turn(speaker=speakers[last], text=text))
    return Dialogue(turns=tuple(turns), named=tuple(named))
