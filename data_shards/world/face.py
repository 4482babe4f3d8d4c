"""A parametric face, rendered with anti-aliasing from action units (AUs).

In: a person's features (Person), the head pose (Pose), the intensity of each AU (0..5, OpenFace's
scale). Out: one uint8 RGB frame. At 112 pixels every AU moves a feature by several pixels, well
above the pose jitter, so that AUs can be recognized from pixels. Used by the synthetic corpus and
by the generic pairs of the nano base. Emotions are not modeled here.

Coordinates: the face's own frame has its origin between the eyes and the mouth, x to the viewer's
right, y down, and half the width of the head as its unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# OpenFace 2.x: 17 intensities, and AU28 with presence only (OpenFace wiki, Output-Format).
ACTION_UNITS = (
    "AU01", "AU02", "AU04", "AU05", "AU06", "AU07", "AU09", "AU10", "AU12",
    "AU14", "AU15", "AU17", "AU20", "AU23", "AU25", "AU26", "AU28", "AU45",
)  # fmt: skip
MAX_INTENSITY = 5.0

SKIN = {
    "pale": (246, 216, 196), "light": (232, 190, 160), "tan": (204, 154, 116),
    "brown": (160, 110, 78), "dark": (116, 78, 56),
}  # fmt: skip
HAIR = {
    "black": (34, 30, 34), "brown": (98, 62, 36), "blond": (222, 188, 104),
    "red": (176, 72, 32), "grey": (160, 160, 166),
}  # fmt: skip
SHIRT = {
    "white": (236, 236, 236), "blue": (52, 92, 190), "green": (46, 140, 78),
    "yellow": (228, 196, 48), "purple": (126, 62, 160),
}  # fmt: skip
_SUPERSAMPLE = 2  # polygons are filled at twice the size and averaged down: anti-aliasing


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """The constant features of an identity. Shape factors are relative to 1."""

    woman: bool
    skin: str
    hair: str
    hair_style: str  # 'long' | 'short' | 'bald'
    shirt: str
    glasses: bool
    head_height: float
    eye_size: float
    eye_gap: float
    brow_weight: float
    nose_length: float
    mouth_width: float
    lip_weight: float
    expressiveness: float  # personal gain on every AU


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Pose of the head: center and half head width in frame widths, roll in radians."""

    x: float = 0.5
    y: float = 0.47
    size: float = 0.33
    roll: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Light:
    """Background color, overall gain and a left-right gradient (-1..1 of +-15 %)."""

    background: tuple[int, int, int]
    gain: float
    gradient: float


def draw_person(rng: np.random.Generator) -> Person:
    """A random identity."""
    woman = bool(rng.random() < 0.5)
    styles = ("long", "short") if woman else ("short", "bald")
    return Person(
        woman=woman,
        skin=str(rng.choice(list(SKIN))),
        hair=str(rng.choice(list(HAIR))),
        hair_style=str(rng.choice(styles, p=(0.75, 0.25))),
        shirt=str(rng.choice(list(SHIRT))),
        glasses=bool(rng.random() < 0.2),
        head_height=float(rng.uniform(1.16, 1.34)),
        eye_size=float(rng.uniform(0.9, 1.12)),
        eye_gap=float(rng.uniform(0.94, 1.06)),
        brow_weight=float(rng.uniform(0.8, 1.25)),
        nose_length=float(rng.uniform(0.85, 1.15)),
        mouth_width=float(rng.uniform(0.9, 1.1)),
        lip_weight=float(rng.uniform(0.85, 1.2)),
        expressiveness=float(rng.uniform(0.85, 1.15)),
    )


def draw_light(rng: np.random.Generator) -> Light:
    """A random background and lighting."""
    red, green, blue = (int(v) for v in rng.integers(70, 200, size=3))
    return Light(
        background=(red, green, blue),
        gain=float(rng.uniform(0.85, 1.1)),
        gradient=float(rng.uniform(-1, 1)),
    )


class _Canvas:
    """Draws shapes given in the face's own coordinates onto a supersampled image."""

    def __init__(self, draw: ImageDraw.ImageDraw, pose: Pose, pixels: int) -> None:
        self._draw = draw
        self._unit = pose.size * pixels
        self._center = np.array([pose.x * pixels, pose.y * pixels])
        cos, sin = np.cos(pose.roll), np.sin(pose.roll)
        self._rotation = np.array([[cos, -sin], [sin, cos]]) * self._unit

    def _to_pixels(self, points: np.ndarray) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in points @ self._rotation.T + self._center]

    def fill(self, points: np.ndarray, color: tuple[int, int, int]) -> None:
        self._draw.polygon(self._to_pixels(points), fill=color)

    def line(self, points: np.ndarray, width: float, color: tuple[int, int, int]) -> None:
        pixels = self._to_pixels(points)
        width_px = max(1, round(width * self._unit))
        self._draw.line(pixels, fill=color, width=width_px, joint="curve")
        radius = width_px / 2 - 0.5
        for x, y in (pixels[0], pixels[-1]):
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    def disc(self, x: float, y: float, radius: float, color: tuple[int, int, int]) -> None:
        (px, py), r = self._to_pixels(np.array([[x, y]]))[0], radius * self._unit
        self._draw.ellipse((px - r, py - r, px + r, py + r), fill=color)


_ANGLE = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_T = np.linspace(0, 1, 9)


def _ellipse(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.stack([x + width * np.cos(_ANGLE), y + height * np.sin(_ANGLE)], axis=1)


def _curve(
    a: tuple[float, float], control: tuple[float, float], b: tuple[float, float]
) -> np.ndarray:
    """A quadratic Bezier curve through a and b, bent towards `control`."""
    t = _T[:, None]
    points: np.ndarray = (
        (1 - t) ** 2 * np.array(a) + 2 * t * (1 - t) * np.array(control) + t**2 * np.array(b)
    )
    return points


def _shade(color: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    red, green, blue = (int(min(255, max(0, v * factor))) for v in color)
    return red, green, blue


def _draw_head(canvas: _Canvas, person: Person, jaw: float) -> None:
    skin, hair = SKIN[person.skin], HAIR[person.hair]
    height = person.head_height
    if person.hair_style == "long":
        canvas.fill(_ellipse(0, 0.1, 1.28, height * 1.12), hair)
        canvas.fill(np.array([[-1.28, 0], [1.28, 0], [1.2, 1.6], [-1.2, 1.6]]), hair)
    canvas.fill(_ellipse(0, height * 1.62, 1.7, 0.75), SHIRT[person.shirt])
    canvas.fill(
        np.array([[-0.36, 0.8], [0.36, 0.8], [0.42, 1.5], [-0.42, 1.5]]), _shade(skin, 0.86)
    )
    if person.hair_style == "short":
        canvas.fill(_ellipse(0, -0.22, 1.09, height * 0.98), hair)
    for side in (-1, 1):
        canvas.fill(_ellipse(side * 1.0, 0.02, 0.12, 0.2), _shade(skin, 0.92))
    head = _ellipse(0, 0, 1.0, height)
    # The jaw drops, the crown stays.
    head[:, 1] += np.where(head[:, 1] > 0, jaw * head[:, 1] / height, 0)
    canvas.fill(head, skin)
    if person.hair_style != "bald":
        fringe = head[head[:, 1] < -height * 0.62]
        order = np.argsort(fringe[:, 0])
        first, last = fringe[order[0]], fringe[order[-1]]
        arc = _curve((last[0], last[1]), (0, -height * 0.42), (first[0], first[1]))
        canvas.fill(np.concatenate([fringe[order] * 1.03, arc]), hair)


def _draw_eyes(canvas: _Canvas, person: Person, au: Mapping[str, float]) -> None:
    skin = SKIN[person.skin]
    x = 0.44 * person.eye_gap
    blink = min(1.0, au["AU45"])
    top = (0.13 + 0.13 * au["AU05"] - 0.07 * au["AU07"]) * person.eye_size * (1 - blink)
    bottom = (0.11 - 0.05 * au["AU07"] - 0.09 * au["AU06"]) * person.eye_size * (1 - blink)
    width = 0.24 * person.eye_size
    for side in (-1, 1):
        eye_x, eye_y = side * x, -0.2
        upper = _curve(
            (eye_x - width, eye_y), (eye_x, eye_y - 2 * max(top, 0.0)), (eye_x + width, eye_y)
        )
        lower = _curve(
            (eye_x + width, eye_y), (eye_x, eye_y + 2 * max(bottom, 0.0)), (eye_x - width, eye_y)
        )
        if top + bottom > 0.04:
            canvas.fill(np.concatenate([upper, lower]), (250, 250, 250))
            radius = min(0.115, (top + bottom) / 2 + 0.015)
            canvas.disc(eye_x, eye_y + (bottom - top) / 2, radius, (40, 34, 30))
        canvas.line(upper, 0.05, (44, 34, 30))
        if au["AU07"] > 0.25:  # tightened lids: a crease under the eye
            canvas.line(lower + np.array([0, 0.06]), 0.045, _shade(skin, 0.62))
        if au["AU06"] > 0.2:  # raised cheek: a bright bulge and a fold below the eye
            canvas.fill(
                _ellipse(side * 0.56, 0.2 - 0.08 * au["AU06"], 0.25, 0.15), _shade(skin, 1.12)
            )
            fold = _curve((side * 0.3, 0.06), (side * 0.56, 0.16), (side * 0.82, 0.02))
            canvas.line(fold, 0.03 + 0.035 * au["AU06"], _shade(skin, 0.72))
    if person.glasses:
        for side in (-1, 1):
            ring = _ellipse(side * x, -0.18, 0.33, 0.28)
            canvas.line(np.concatenate([ring, ring[:1]]), 0.035, (60, 60, 70))
        canvas.line(np.array([[-x + 0.33, -0.2], [x - 0.33, -0.2]]), 0.035, (60, 60, 70))


def _draw_brows(canvas: _Canvas, person: Person, au: Mapping[str, float]) -> None:
    color = _shade(HAIR[person.hair if person.hair_style != "bald" else "brown"], 0.7)
    x = 0.44 * person.eye_gap
    inner = -0.52 - 0.2 * au["AU01"] + 0.16 * au["AU04"]
    outer = -0.5 - 0.22 * au["AU02"] + 0.06 * au["AU04"]
    middle = -0.6 - 0.1 * au["AU01"] - 0.18 * au["AU02"] + 0.16 * au["AU04"]
    pinch = 0.1 * au["AU04"]  # the corrugator draws the inner ends together
    for side in (-1, 1):
        brow = _curve(
            (side * (x - 0.27 - pinch), inner), (side * x, middle), (side * (x + 0.3), outer)
        )
        canvas.line(brow, 0.085 * person.brow_weight, color)
        if au["AU04"] > 0.3:
            furrow = np.array([[side * 0.06, -0.62], [side * 0.06, -0.42]])
            canvas.line(furrow, 0.035, _shade(SKIN[person.skin], 0.6))


def _draw_nose(canvas: _Canvas, person: Person, au: Mapping[str, float]) -> None:
    dark = _shade(SKIN[person.skin], 0.66)
    tip = 0.26 * person.nose_length - 0.06 * au["AU09"]
    flare = 0.14 + 0.05 * au["AU09"]
    canvas.line(_curve((-flare, tip), (0, tip + 0.12), (flare, tip)), 0.045, dark)
    canvas.line(
        np.array([[0.05, -0.12], [0.08, tip - 0.06]]), 0.03, _shade(SKIN[person.skin], 0.84)
    )
    if au["AU09"] > 0.2:  # wrinkles across the bridge and down the sides
        for row in range(3):
            y = -0.2 + 0.11 * row
            canvas.line(
                _curve((-0.13, y), (0, y - 0.07), (0.13, y)), 0.03 + 0.02 * au["AU09"], dark
            )
        for side in (-1, 1):
            canvas.line(np.array([[side * 0.16, 0.0], [side * 0.3, 0.2]]), 0.04, dark)


def _draw_mouth(canvas: _Canvas, person: Person, au: Mapping[str, float], jaw: float) -> None:
    skin = SKIN[person.skin]
    lip = (
        (176, 74, 78)
        if person.woman
        else _shade((skin[0], int(skin[1] * 0.82), int(skin[2] * 0.82)), 0.82)
    )
    center = 0.66
    half = person.mouth_width * (
        0.34 + 0.11 * au["AU12"] + 0.2 * au["AU20"] - 0.11 * au["AU23"] - 0.06 * au["AU26"]
    )
    corner = center - 0.2 * au["AU12"] + 0.2 * au["AU15"] + 0.05 * au["AU20"]
    gap = 0.06 * au["AU25"] + 0.34 * au["AU26"]
    weight = 0.085 * person.lip_weight * (1 - 0.7 * au["AU23"]) * (1 - 0.9 * au["AU28"])
    upper = center - 0.13 * au["AU10"] - 0.02
    lower = center + gap - 0.1 * au["AU17"] + 0.02
    left, right = (-half, corner), (half, corner)
    if gap > 0.02:
        opening = np.concatenate(
            [
                _curve(left, (0, 2 * upper - corner), right),
                _curve(right, (0, 2 * lower - corner), left),
            ]
        )
        canvas.fill(opening, (64, 22, 26))
        if au["AU26"] < 0.5 and (au["AU12"] > 0.3 or au["AU10"] > 0.3):
            canvas.fill(_ellipse(0, upper + 0.06, half * 0.6, 0.04), (246, 246, 240))
    if au["AU10"] > 0.2:  # raised upper lip: teeth and the fold beside the nose
        canvas.fill(
            _ellipse(0, center - 0.03 - 0.05 * au["AU10"], half * 0.62, 0.05 + 0.03 * au["AU10"]),
            (246, 246, 240),
        )
        for side in (-1, 1):
            fold = _curve((side * 0.2, 0.3), (side * 0.36, 0.4), (side * 0.44, 0.58))
            canvas.line(fold, 0.045, _shade(skin, 0.68))
    if weight > 0.012:
        canvas.line(_curve(left, (0, 2 * upper - corner), right), weight, lip)
        canvas.line(_curve(left, (0, 2 * lower - corner), right), weight * 1.15, _shade(lip, 1.12))
    else:
        canvas.line(_curve(left, (0, 2 * center - corner), right), 0.025, _shade(skin, 0.6))
    for side in (-1, 1):
        if au["AU14"] > 0.2:  # dimples beside the corners
            x = side * (half + 0.16)
            dimple = _curve((x, corner - 0.14), (x + side * 0.08, corner), (x, corner + 0.12))
            canvas.line(dimple, 0.035 + 0.035 * au["AU14"], _shade(skin, 0.56))
        if au["AU20"] > 0.3:  # stretched: vertical tension lines
            x = side * (half + 0.05)
            canvas.line(
                np.array([[x, corner + 0.08], [x - side * 0.03, corner + 0.24]]),
                0.04,
                _shade(skin, 0.66),
            )
    if au["AU17"] > 0.2:  # the chin pushed up: a dimpled arc below the mouth
        y = 0.98 + jaw * 0.6
        canvas.line(
            _curve((-0.22, y), (0, y - 0.2), (0.22, y)),
            0.04 + 0.035 * au["AU17"],
            _shade(skin, 0.58),
        )


def draw_face(
    canvas_image: Image.Image, person: Person, pose: Pose, au: Mapping[str, float]
) -> None:
    """Draw one face onto a (supersampled) image. `au`: intensities 0..5; a missing AU is 0."""
    level = {unit: min(1.2, au.get(unit, 0.0) / MAX_INTENSITY * 1.4) for unit in ACTION_UNITS}
    canvas = _Canvas(ImageDraw.Draw(canvas_image), pose, canvas_image.width)
    jaw = 0.2 * level["AU26"]
    _draw_head(canvas, person, jaw)
    _draw_mouth(canvas, person, level, jaw)
    _draw_nose(canvas, person, level)
    _draw_eyes(canvas, person, level)
    _draw_brows(canvas, person, level)


def render(
    faces: Sequence[tuple[Person, Pose, Mapping[str, float]]],
    light: Light,
    size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """One frame with the given faces, back to front. Returns uint8 [size, size, 3] (rgb).

    `rng` draws the sensor noise (standard deviation 2.5 grey levels) only.
    """
    image = Image.new("RGB", (size * _SUPERSAMPLE, size * _SUPERSAMPLE), light.background)
    for person, pose, au in faces:
        draw_face(image, person, pose, au)
    frame = np.asarray(image.reduce(_SUPERSAMPLE), dtype=np.float32)
    ramp = light.gain * (1 + 0.15 * light.gradient * np.linspace(-1, 1, size, dtype=np.float32))
    frame = frame * ramp[None, :, None]
    frame += rng.standard_normal((size, size, 1), dtype=np.float32) * 2.5
    return np.clip(frame, 0, 255).astype(np.uint8)
