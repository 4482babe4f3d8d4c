"""The rule of the world: words alone and face alone both lose, and dialogues need the face."""

import numpy as np
import pytest

from data_shards.world import scene
from data_shards.world.expression import act, choose_units, measure
from data_shards.world.face import ACTION_UNITS, draw_person
from data_shards.world.grammar import EVENTS

MONOLOGUES = [
    scene.draw_monologue(
        np.random.default_rng([1, n]), n, draw_person(np.random.default_rng([2, n]))
    )
    for n in range(1500)
]
DIALOGUES = [
    scene.draw_dialogue_scene(
        np.random.default_rng([3, n]), n, draw_person(np.random.default_rng([4, n]))
    )
    for n in range(800)
]


def test_words_alone_and_face_alone_both_lose_but_the_rule_wins() -> None:
    """A still face leaves it to the words, a moving face is right."""
    words = np.mean([s.words_emotion == s.emotion for s in MONOLOGUES])
    face = np.mean([bool(s.units) or s.emotion == "neutral" for s in MONOLOGUES])
    both = np.mean(
        [s.emotion == (s.words_emotion if not s.units else s.emotion) for s in MONOLOGUES]
    )
    assert words < 0.5
    assert face < 0.96
    assert both == 1.0


def test_contrary_words_name_another_emotion() -> None:
    contrary = [s for s in MONOLOGUES if s.words == "contrary"]
    assert len(contrary) > 100
    assert all(s.words_emotion != s.emotion and s.units and s.event is None for s in contrary)


def test_a_dialogue_names_events_of_other_feelings_so_that_the_face_decides() -> None:
    for s in DIALOGUES:
        assert s.pairs
        assert 2 <= len(s.conversation) <= 8
        causes = {pair.cause for pair in s.pairs}
        named = {
            number: kind
            for number, turn in enumerate(s.conversation, start=1)
            for kind, events in EVENTS.items()
            for event in events
            if event in turn.text
        }
        assert causes == {number for number, kind in named.items() if kind == s.emotion}
        assert set(named.values()) - {s.emotion}, "one feeling only: the words would give it away"


def test_causes_stand_before_at_and_after_the_target() -> None:
    sides = {np.sign(pair.cause - pair.target) for s in DIALOGUES for pair in s.pairs or ()}
    assert sides == {-1, 0, 1}


def test_sentiment_follows_the_feeling_in_thirds() -> None:
    for s in MONOLOGUES:
        assert s.sentiment * 3 == pytest.approx(round(s.sentiment * 3), abs=1e-3)
        assert -3 <= s.sentiment <= 3
        assert (s.sentiment == 0) == (s.emotion == "neutral")


def test_signature_units_are_always_shown_and_others_vary() -> None:
    rng = np.random.default_rng(0)
    drawn = {choose_units(rng, "fear") for _ in range(60)}
    assert len(drawn) > 5
    assert all({"AU01", "AU20"} <= set(units) for units in drawn)
    assert choose_units(rng, "neutral") == ()


def test_a_track_rises_to_an_apex_and_falls() -> None:
    rng = np.random.default_rng(1)
    track = act(rng, ("AU12",), strength=3.5, gain=1.0, num_frames=16, speaking=False)
    smile = track[:, ACTION_UNITS.index("AU12")]
    assert track.shape == (16, len(ACTION_UNITS))
    assert smile[0] < 0.9
    assert 3 < smile[4:12].max() <= 5
    assert smile[-1] < smile.max() - 0.5


def test_measured_faces_have_one_row_per_frame_and_face() -> None:
    rng = np.random.default_rng(2)
    tracks = [act(rng, (), strength=0, gain=1, num_frames=10, speaking=False) for _ in range(2)]
    faces = measure(rng, tracks, fps=10)
    assert faces.num_rows == 20
    assert faces.face_id_R.tolist() == [0, 1] * 10
    assert faces.timestamp_R[-1] == pytest.approx(0.9)


def test_a_film_is_repeatable() -> None:
    films = [scene.film(np.random.default_rng(7), MONOLOGUES[0]) for _ in range(2)]
    assert (films[0].frames == films[1].frames).all()
    assert 10 <= len(films[0].frames) <= 16
    assert films[0].frames.shape[1:] == (scene.IMAGE_SIZE, scene.IMAGE_SIZE, 3)
