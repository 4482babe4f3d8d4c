"""The generic pairs: what they show is what they say, and nothing of the five tasks is in them."""

import numpy as np
import pytest

from data_shards.sources.synthetic import SyntheticOptions, make_scene
from data_shards.tasks import EMOTIONS, IDENTIFIER
from data_shards.world import pairs
from data_shards.world.describe import SIGNS, visible_signs


def draw(kind: str, number: int) -> pairs.GenericPair:
    return pairs.draw_pair(np.random.default_rng([17, number]), kind)


@pytest.mark.parametrize("kind", pairs.KINDS)
def test_every_kind_has_a_question_an_answer_and_its_frames(kind: str) -> None:
    for number in range(5):
        pair = draw(kind, number)
        assert pair.kind == kind
        assert pair.question.strip() and pair.answer.strip()
        if kind in ("dialogue", "repeat", "words", "turns", "many"):
            assert pair.frames is None
        else:
            assert pair.frames is not None
            assert len(pair.frames) == (pairs.VIDEO_FRAMES if pair.video else 1)


@pytest.mark.parametrize("kind", sorted({*pairs.KINDS} - {"words", "repeat", "turns"}))
def test_no_answer_names_an_emotion_or_a_task(kind: str) -> None:
    for number in range(40):
        pair = draw(kind, number)
        words = set(pair.answer.lower().replace(",", " ").replace(".", " ").split())
        # What somebody says may hold any word; what the base is taught to see and find may not.
        if not pair.question.endswith(tuple(f"turn {n}?" for n in range(1, 9))):
            assert not words & {*EMOTIONS, "happy", "positive", "negative"}
        assert not any(identifier in pair.question for identifier in IDENTIFIER.values())


def test_visible_signs_need_a_visible_intensity() -> None:
    assert visible_signs({"AU12": 1.5}) == ()
    assert visible_signs({"AU12": 1.6, "AU01": 4.0}) == (SIGNS["AU01"], SIGNS["AU12"])


def test_signs_that_hide_each_other_are_not_drawn_together() -> None:
    rng = np.random.default_rng(3)
    sets = [set(pairs.draw_signs(rng)) for _ in range(300)]
    assert not any({"AU12", "AU15"} <= chosen or {"AU26", "AU28"} <= chosen for chosen in sets)
    assert {len(chosen) for chosen in sets} == set(range(8))


def test_the_lexicon_holds_every_word_of_the_answers() -> None:
    assert {"Happy", "joy", "Dimpler", "Corner", "negative"} <= set(pairs.lexicon())


def test_pairs_are_repeatable() -> None:
    assert draw("dialogue", 4).question == draw("dialogue", 4).question


def test_the_people_of_the_pairs_are_not_those_of_the_corpus() -> None:
    """With any seeds, also equal ones: the streams of random numbers differ."""
    for seed in range(3):
        options = SyntheticOptions(clips=1, seed=seed, identities=20)
        corpus = {make_scene(options, number)[0].person for number in range(40)}
        streams = ([seed], [seed, 101], [seed, 102, 0, 0], [seed, 103, 0, 0], [seed, 104, 0, 0])
        shown = {pairs.still_face(np.random.default_rng(stream))[2] for stream in streams}
        assert len(shown) == len(streams)
        assert not corpus & shown
