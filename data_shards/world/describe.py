"""Descriptions of visible facts of the synthetic world: the language of the generic pairs.

In: a person, the pose of the head, AU intensities. Out: text about hair, skin, shirt, glasses, head
pose, and the visible signs of brows, eyes and mouth; never an emotion, a sentiment, a cause, or a
format of the five tasks. The nano base is aligned on these texts.
"""

from collections.abc import Mapping

from data_shards.world.face import Person, Pose

# An AU of at least this intensity (0..5) moves its part by about three pixels at 112 px.
VISIBLE_FROM = 1.6

# One sign per AU, from the top of the face to the bottom.
SIGNS: dict[str, str] = {
    "AU01": "brows up inside", "AU02": "brows up outside", "AU04": "brows pulled down",
    "AU05": "eyes wide", "AU07": "lids tight", "AU45": "eyes closed", "AU06": "cheeks lifted",
    "AU09": "wrinkled nose", "AU10": "upper lip lifted", "AU12": "mouth corners up",
    "AU15": "mouth corners down", "AU14": "small folds", "AU20": "mouth pulled wide",
    "AU23": "thin lips", "AU28": "no lips", "AU26": "jaw open", "AU17": "chin pushed up",
}  # fmt: skip


def person_words(person: Person) -> str:
    """'a woman with long red hair, pale skin and a blue shirt'."""
    hair = "no hair" if person.hair_style == "bald" else f"{person.hair_style} {person.hair} hair"
    kind = "woman" if person.woman else "man"
    glasses = ", glasses" if person.glasses else ""
    return f"a {kind} with {hair}, {person.skin} skin{glasses} and a {person.shirt} shirt"


def head_words(pose: Pose) -> str:
    """The side to which the head leans (roll over 0.07 rad), from the viewer's side."""
    if abs(pose.roll) <= 0.07:
        return "upright"
    return "leaning right" if pose.roll > 0 else "leaning left"


def visible_signs(au: Mapping[str, float]) -> tuple[str, ...]:
    """The signs of all AUs with a visible intensity, from top to bottom."""
    return tuple(sign for unit, sign in SIGNS.items() if au.get(unit, 0.0) >= VISIBLE_FROM)
