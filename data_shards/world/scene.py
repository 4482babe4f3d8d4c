"""One clip of the synthetic world: its labels (Scene) and its frames (Film).

The rule that a model has to learn: if the face shows an emotion, that is the label; if the face is
neutral, the words give it; vague words leave it to the face. In a share of clips the words are
contrary (of another emotion), so neither words alone nor faces alone suffice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_shards.shards.record import Turn
from data_shards.tasks import Pair
from data_shards.world import expression, grammar
from data_shards.world.face import ACTION_UNITS, Person, Pose, draw_light, draw_person, render

FPS = 10
IMAGE_SIZE = 112

_EMOTION_SHARE = {
    "neutral": 0.13, "joy": 0.19, "sadness": 0.15, "anger": 0.15, "surprise": 0.14, "fear": 0.12,
    "disgust": 0.12,
}  # fmt: skip
_WORDS_SHARE = {"clear": 0.3, "vague": 0.45, "contrary": 0.25}
_STILL_FACE = 0.3  # of the clips with clear words: the face does not show it
_TWO_FACES = 0.12  # a second, quiet person in the background
_VALENCE = {
    "joy": 1.0,
    "sadness": -1.0,
    "anger": -1.0,
    "fear": -1.0,
    "disgust": -1.0,
    "surprise": 1.0,
    "neutral": 0.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The labels of one clip. `units` are the AUs that the face shows (empty: a neutral face)."""

    identity: int
    person: Person
    emotion: str
    words: str  # 'clear' | 'vague' | 'contrary' | 'plain'
    words_emotion: str  # emotion of the words alone; 'neutral' for vague and plain words
    utterance: str
    event: str | None  # the cause, if the words mention one
    units: tuple[str, ...]
    strength: float
    sentiment: float
    conversation: tuple[Turn, ...] = ()
    target: int = 0
    pairs: tuple[Pair, ...] | None = None
    background_person: Person | None = None


def _draw(rng: np.random.Generator, shares: dict[str, float]) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))


def _sentiment(rng: np.random.Generator, emotion: str, strength: float) -> float:
    """In [-3, 3] by thirds, as means of MOSEI's annotators; 0 only for neutral."""
    valence = _VALENCE[emotion]
    if valence == 0.0:
        return 0.0
    thirds = int(np.clip(round(strength * 1.8 + rng.normal(0, 0.8)), 1, 9))
    return round(valence * thirds / 3, 4)


def _other_emotion(rng: np.random.Generator, emotion: str) -> str:
    others = [e for e in grammar.EVENTS if e != emotion]
    return others[int(rng.integers(len(others)))]


def draw_monologue(rng: np.random.Generator, identity: int, person: Person) -> Scene:
    """One person says one sentence."""
    emotion = _draw(rng, _EMOTION_SHARE)
    strength = float(rng.uniform(2.6, 4.2))
    words_emotion, event = "neutral", None
    if emotion == "neutral":
        words = "plain" if rng.random() < 0.6 else "vague"
        units: tuple[str, ...] = ()
    else:
        words = _draw(rng, _WORDS_SHARE)
        still = words == "clear" and rng.random() < _STILL_FACE
        units = () if still else expression.choose_units(rng, emotion)
    if words == "vague":
        utterance = grammar.vague_utterance(rng)
    elif words == "plain":
        utterance = grammar.plain_utterance(rng)
    else:
        words_emotion = emotion if words == "clear" else _other_emotion(rng, emotion)
        event = grammar.draw_event(rng, words_emotion) if rng.random() < 0.5 else None
        utterance = grammar.clear_utterance(rng, words_emotion, event)
    return Scene(
        identity=identity,
        person=person,
        emotion=emotion,
        words=words,
        words_emotion=words_emotion,
        utterance=utterance,
        event=event if words == "clear" else None,
        units=units,
        strength=strength,
        sentiment=_sentiment(rng, emotion, strength),
        background_person=_background(rng),
    )


def draw_dialogue_scene(rng: np.random.Generator, identity: int, person: Person) -> Scene:
    """A dialogue with events of several emotions; the target's face shows which one is the cause.

    The cause is before the target, in it or after it; in some dialogues two turns mention events of
    the shown emotion, and both are causes.
    """
    num_turns = int(rng.integers(2, 9))
    target = int(rng.integers(1, num_turns + 1))
    num_events = min(num_turns, int(rng.integers(2, 5)))
    kinds = [
        list(grammar.EVENTS)[int(i)] for i in rng.permutation(len(grammar.EVENTS))[:num_events]
    ]
    if num_events >= 3 and rng.random() < 0.3:
        kinds[1] = kinds[0]
    emotion = kinds[0]
    events = _distinct_events(rng, kinds)
    at_target = len(events) == num_turns or rng.random() < 0.25
    target_index = int(rng.integers(len(events))) if at_target else -1
    target_event = events[target_index] if at_target else None
    elsewhere = [event for i, event in enumerate(events) if i != target_index]
    dialogue = grammar.draw_dialogue(
        rng, elsewhere, num_turns, target=target, target_event=target_event
    )
    causes = {event for event, kind in zip(events, kinds, strict=True) if kind == emotion}
    strength = float(rng.uniform(2.6, 4.2))
    return Scene(
        identity=identity,
        person=person,
        emotion=emotion,
        words="vague",
        words_emotion="neutral",
        utterance=dialogue.turns[target - 1].text,
        event=None,
        units=expression.choose_units(rng, emotion),
        strength=strength,
        sentiment=_sentiment(rng, emotion, strength),
        conversation=dialogue.turns,
        target=target,
        pairs=tuple(
            Pair(target, emotion, turn)
            for turn, named in enumerate(dialogue.named, start=1)
            if named in causes
        ),
        background_person=_background(rng),
    )


def _distinct_events(rng: np.random.Generator, kinds: list[str]) -> list[str]:
    events: list[str] = []
    for kind in kinds:
        event = grammar.draw_event(rng, kind)
        while event in events:
            event = grammar.draw_event(rng, kind)
        events.append(event)
    return events


def _background(rng: np.random.Generator) -> Person | None:
    return draw_person(rng) if rng.random() < _TWO_FACES else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Film:
    """A rendered scene: frames, and AU tracks [frames, 18] of the person and of the background."""

    track: np.ndarray
    background_track: np.ndarray | None
    frames: np.ndarray  # uint8 [F, H, W, 3]


def film(rng: np.random.Generator, scene: Scene) -> Film:
    """Render a scene: 10 to 16 frames at 10 frames per second."""
    num_frames = int(rng.integers(10, 17))
    track = expression.act(
        rng,
        scene.units,
        strength=scene.strength,
        gain=scene.person.expressiveness,
        num_frames=num_frames,
        speaking=True,
    )
    background = None
    if scene.background_person is not None:
        background = expression.act(
            rng, (), strength=0, gain=1, num_frames=num_frames, speaking=False
        )
    return Film(
        track=track,
        background_track=background,
        frames=np.stack(list(_shoot(rng, scene, track, background))),
    )


def _shoot(
    rng: np.random.Generator, scene: Scene, track: np.ndarray, background: np.ndarray | None
) -> Iterator[np.ndarray]:
    light = draw_light(rng)
    num_frames = len(track)
    home = Pose(
        x=0.5 + float(rng.uniform(-0.03, 0.03)) - (0.06 if background is not None else 0.0),
        y=0.47 + float(rng.uniform(-0.025, 0.025)),
        size=0.33 * float(rng.uniform(0.92, 1.05)),
        roll=float(rng.normal(0, 0.06)),
    )
    sway = np.cumsum(rng.normal(0, 0.004, size=(num_frames, 3)), axis=0)
    behind = Pose(x=0.87, y=0.36, size=0.13, roll=float(rng.normal(0, 0.05)))
    for t in range(num_frames):
        pose = Pose(
            x=home.x + float(sway[t, 0]),
            y=home.y + float(sway[t, 1]),
            size=home.size,
            roll=home.roll + float(sway[t, 2]),
        )
        faces = [(scene.person, pose, dict(zip(ACTION_UNITS, track[t].tolist(), strict=True)))]
        if scene.background_person is not None and background is not None:
            quiet = dict(zip(ACTION_UNITS, background[t].tolist(), strict=True))
            faces.insert(0, (scene.background_person, behind, quiet))
        yield render(faces, light, IMAGE_SIZE, rng)
