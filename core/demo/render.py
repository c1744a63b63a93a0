"""Drawing the Shapes world: scenes of flat, anti-aliased things to 128 x 128 pictures.

Textures are anchored to the canvas (like cloth behind a stencil), on the grid of 8-pixel latent cells, so that a latent at 1/8 of the
resolution can carry them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

SIDE = 128
"""Side of a picture in pixels."""
_OVERSAMPLE = 3
_SHADE = 0.55
"""Factor on a colour where a stripe or a dot darkens it."""

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "orange": (250, 140, 20),
    "yellow": (250, 214, 40),
    "green": (44, 160, 66),
    "blue": (40, 84, 214),
    "purple": (134, 52, 184),
    "pink": (248, 130, 188),
    "brown": (126, 76, 40),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "black": (16, 16, 20),
    "gray": (150, 150, 150),
    "sand": (226, 204, 158),
    "sky": (150, 206, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon", "diamond")
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "large")
_TEAL, _NAVY, _SLATE, _DOOR = (20, 160, 160), (34, 44, 110), (66, 66, 92), (92, 60, 40)
_SKIN, _DARK_HAIR, _GREY_HAIR, _LEAF = (232, 180, 140), (70, 40, 24), (206, 206, 210), (60, 140, 40)
OUTFITS: Mapping[str, tuple[tuple[int, int, int], tuple[int, int, int] | None]] = {
    "doctor": (_TEAL, None),
    "nurse": (COLOURS["pink"], _TEAL),
    "pilot": (COLOURS["blue"], _NAVY),
    "teacher": (COLOURS["brown"], None),
    "chef": (COLOURS["yellow"], COLOURS["red"]),
    "dancer": (COLOURS["purple"], None),
    "farmer": (COLOURS["green"], COLOURS["orange"]),
    "singer": (COLOURS["red"], None),
    "judge": (_NAVY, None),
    "student": (COLOURS["orange"], None),
    "artist": (COLOURS["pink"], COLOURS["purple"]),
    "driver": (_TEAL, COLOURS["brown"]),
}
"""Clothes and hat of a person, by outfit."""

Colour = tuple[int, int, int]
Primitive = tuple[str, tuple[float, ...], Colour]
"""("ellipse", (cx, cy, rx, ry)) or ("polygon", (x, y, x, y, ...)), in a box of [-1, 1] x [-1, 1] with y downwards, and its colour."""


def _ellipse(cx: float, cy: float, rx: float, ry: float, colour: Colour) -> Primitive:
    return "ellipse", (cx, cy, rx, ry), colour


def _polygon(*points: float, colour: Colour) -> Primitive:
    return "polygon", points, colour


def _rectangle(x0: float, y0: float, x1: float, y1: float, colour: Colour) -> Primitive:
    return _polygon(x0, y0, x1, y0, x1, y1, x0, y1, colour=colour)


def _bird(body: Colour, breast: Colour, wing: Colour, beak: Colour) -> tuple[Primitive, ...]:
    return (
        _polygon(-1.0, -0.35, -0.45, -0.05, -0.5, 0.35, -1.0, 0.1, colour=wing),
        _ellipse(-0.05, 0.2, 0.62, 0.5, body),
        _ellipse(0.2, 0.3, 0.4, 0.4, breast),
        _ellipse(-0.2, 0.1, 0.36, 0.26, wing),
        _ellipse(0.42, -0.36, 0.38, 0.38, body),
        _polygon(0.74, -0.5, 1.0, -0.3, 0.74, -0.16, colour=beak),
        _rectangle(-0.12, 0.66, -0.02, 0.95, beak),
        _rectangle(0.14, 0.66, 0.24, 0.95, beak),
    )


def _flower(petal: Colour, centre: Colour, petals: int) -> tuple[Primitive, ...]:
    stem = (_rectangle(-0.08, 0.1, 0.08, 1.0, _LEAF), _ellipse(0.32, 0.68, 0.28, 0.13, _LEAF))
    angles = [2 * math.pi * i / petals - math.pi / 2 for i in range(petals)]
    return (
        *stem,
        *(_ellipse(0.36 * math.cos(a), -0.36 + 0.36 * math.sin(a), 0.28, 0.28, petal) for a in angles),
        _ellipse(0.0, -0.36, 0.26, 0.26, centre),
    )


_WHEEL = (76, 70, 84)
_GLASS = (90, 190, 220)
EXEMPLARS: Mapping[str, tuple[Primitive, ...]] = {
    "robin": _bird((120, 84, 60), (236, 92, 34), (88, 60, 44), (96, 72, 48)),
    "finch": _bird((246, 206, 50), (255, 238, 96), (86, 80, 70), (240, 140, 40)),
    "raven": _bird(_SLATE, _SLATE, (84, 84, 124), (206, 160, 60)),
    "apple": (
        _ellipse(-0.3, 0.2, 0.62, 0.74, (206, 30, 40)),
        _ellipse(0.3, 0.2, 0.62, 0.74, (206, 30, 40)),
        _rectangle(-0.07, -0.9, 0.07, -0.35, COLOURS["brown"]),
        _ellipse(0.4, -0.72, 0.34, 0.17, _LEAF),
    ),
    "lemon": (
        _ellipse(0.0, 0.05, 0.76, 0.56, (246, 226, 40)),
        _polygon(0.6, -0.2, 1.0, 0.05, 0.6, 0.3, colour=(246, 226, 40)),
        _polygon(-0.6, -0.2, -1.0, 0.05, -0.6, 0.3, colour=(120, 170, 40)),
    ),
    "cherry": (
        _polygon(-0.52, 0.3, 0.1, -0.95, 0.22, -0.95, -0.4, 0.3, colour=_LEAF),
        _polygon(0.42, 0.4, 0.1, -0.95, 0.22, -0.95, 0.54, 0.4, colour=_LEAF),
        _ellipse(-0.5, 0.5, 0.45, 0.45, (160, 16, 56)),
        _ellipse(0.5, 0.55, 0.45, 0.45, (160, 16, 56)),
    ),
    "car": (
        _polygon(-0.55, -0.1, -0.3, -0.55, 0.35, -0.55, 0.65, -0.1, colour=_GLASS),
        _rectangle(-1.0, -0.12, 1.0, 0.38, (214, 48, 48)),
        _ellipse(-0.55, 0.42, 0.26, 0.26, _WHEEL),
        _ellipse(0.55, 0.42, 0.26, 0.26, _WHEEL),
    ),
    "truck": (
        _rectangle(-1.0, -0.7, 0.3, 0.42, (238, 150, 40)),
        _polygon(0.36, -0.3, 0.75, -0.3, 1.0, 0.05, 1.0, 0.42, 0.36, 0.42, colour=(60, 110, 200)),
        _ellipse(-0.6, 0.5, 0.26, 0.26, _WHEEL),
        _ellipse(0.6, 0.5, 0.26, 0.26, _WHEEL),
    ),
    "bus": (
        _rectangle(-1.0, -0.62, 1.0, 0.5, (36, 140, 80)),
        _rectangle(-0.85, -0.45, 0.85, -0.05, _GLASS),
        _ellipse(-0.55, 0.52, 0.24, 0.24, _WHEEL),
        _ellipse(0.55, 0.52, 0.24, 0.24, _WHEEL),
    ),
    "rose": _flower((200, 20, 60), (150, 10, 40), 5),
    "daisy": _flower((206, 170, 246), (246, 190, 30), 8),
    "tulip": (
        _rectangle(-0.08, 0.1, 0.08, 1.0, _LEAF),
        _ellipse(0.32, 0.68, 0.28, 0.13, _LEAF),
        _polygon(
            -0.55,
            -0.95,
            -0.25,
            -0.5,
            0.0,
            -0.95,
            0.25,
            -0.5,
            0.55,
            -0.95,
            0.5,
            0.0,
            0.25,
            0.25,
            -0.25,
            0.25,
            -0.5,
            0.0,
            colour=(240, 110, 190),
        ),
    ),
    "barn": (
        _rectangle(-0.85, -0.1, 0.85, 0.9, (196, 52, 40)),
        _polygon(-1.0, -0.08, -0.6, -0.75, 0.6, -0.75, 1.0, -0.08, colour=(96, 70, 60)),
        _rectangle(-0.28, 0.25, 0.28, 0.9, _DOOR),
    ),
    "tower": (
        _rectangle(-0.42, -0.45, 0.42, 1.0, (214, 134, 104)),
        _polygon(-0.58, -0.42, 0.0, -1.0, 0.58, -0.42, colour=(40, 90, 170)),
        _rectangle(-0.14, 0.55, 0.14, 1.0, _DOOR),
    ),
    "castle": (
        _rectangle(-1.0, -0.75, -0.5, 0.9, (84, 76, 140)),
        _rectangle(0.5, -0.75, 1.0, 0.9, (84, 76, 140)),
        _rectangle(-0.6, -0.2, 0.6, 0.9, (110, 90, 190)),
        _rectangle(-0.22, 0.35, 0.22, 0.9, _DOOR),
        _polygon(-1.0, -0.75, -0.75, -1.0, -0.5, -0.75, colour=(206, 60, 50)),
        _polygon(0.5, -0.75, 0.75, -1.0, 1.0, -0.75, colour=(206, 60, 50)),
    ),
}
"""Things with looks of their own, that no mix of shape and colour words draws. No part has nearly the colour of a background."""


def _shape_points(shape: str) -> list[tuple[float, float]]:
    if shape in ("circle", "ring", "moon"):
        return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 72, endpoint=False)]
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]
    if shape == "star":
        radii = [1.05 if i % 2 == 0 else 0.46 for i in range(10)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, [math.pi * i / 5 - math.pi / 2 for i in range(10)], strict=True)]
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        x = np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
        return list(zip(x.tolist(), y.tolist(), strict=True))
    a = 0.34
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


def _person(sex: str, age: str, clothes: Colour, hat: Colour | None) -> tuple[Primitive, ...]:
    hair = _DARK_HAIR if age == "young" else _GREY_HAIR
    if sex == "woman":
        behind: tuple[Primitive, ...] = (_ellipse(0.0, -0.5, 0.46, 0.4, hair), _rectangle(-0.46, -0.5, 0.46, 0.0, hair))
        body: tuple[Primitive, ...] = (_polygon(-0.24, -0.15, 0.24, -0.15, 0.75, 1.0, -0.75, 1.0, colour=clothes),)
    else:
        behind = (_ellipse(0.0, -0.56, 0.42, 0.34, hair),)
        body = (
            _rectangle(-0.46, -0.12, 0.46, 0.52, clothes),
            _rectangle(-0.4, 0.52, -0.08, 1.0, _TROUSERS),
            _rectangle(0.08, 0.52, 0.4, 1.0, _TROUSERS),
        )
    head = (_ellipse(0.0, -0.46, 0.29, 0.34, _SKIN),)
    fringe = (_ellipse(0.0, -0.75, 0.3, 0.13, hair),)
    top = () if hat is None else (_rectangle(-0.48, -0.8, 0.48, -0.68, hat), _rectangle(-0.28, -1.0, 0.28, -0.74, hat))
    return (*behind, *body, *head, *fringe, *top)


_TROUSERS = (84, 84, 104)


@dataclass(frozen=True)
class Thing:
    """One object: a shape (with colour, texture), an exemplar, or a person (with sex, age, outfit, or a colour of clothes)."""

    kind: str
    size: str
    colour: str | None = None
    texture: str | None = None
    sex: str | None = None
    age: str | None = None
    outfit: str | None = None

    @property
    def is_person(self) -> bool:
        return self.kind == "person"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a background, one thing or two (left, right), perhaps the mark; offsets jitter the places (pixels)."""

    background: str
    things: tuple[Thing, ...]
    mark: bool = False
    offsets: tuple[tuple[float, float], ...] = field(default=((0.0, 0.0), (0.0, 0.0)))


RADII: Mapping[tuple[int, str], float] = {(1, "small"): 25.0, (1, "large"): 42.0, (2, "small"): 17.0, (2, "large"): 25.0}
"""Half the side of a thing's box in pixels, by how many things there are and its size."""
_CENTRES: Mapping[int, tuple[tuple[float, float], ...]] = {1: ((64.0, 64.0),), 2: ((33.0, 64.0), (95.0, 64.0))}
MARK_BOX = (116, 116, 125, 125)
"""Where the mark sits (left, top, right, bottom), in pixels."""


@lru_cache
def _pattern(texture: str) -> Image.Image:
    """Where the texture darkens, at drawing resolution."""
    y, x = np.mgrid[0 : SIDE * _OVERSAMPLE, 0 : SIDE * _OVERSAMPLE] / _OVERSAMPLE
    if texture == "striped":
        dark = (y % 16) >= 8
    else:
        row = np.floor(y / 8)
        dark = ((y % 8 - 4) ** 2 + ((x + 8 * (row % 2)) % 16 - 4) ** 2) < 3.6**2
    return Image.fromarray((dark * 255).astype(np.uint8), mode="L")


def _box(primitive: Primitive, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    kind, numbers, _ = primitive
    scale = float(_OVERSAMPLE)
    if kind == "ellipse":
        x, y, rx, ry = numbers
        return [((cx + (x - rx) * r) * scale, (cy + (y - ry) * r) * scale), ((cx + (x + rx) * r) * scale, (cy + (y + ry) * r) * scale)]
    return [((cx + x * r) * scale, (cy + y * r) * scale) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def _draw_shape(canvas: Image.Image, thing: Thing, cx: float, cy: float, r: float) -> None:
    stencil = Image.new("L", canvas.size, 0)
    pen = ImageDraw.Draw(stencil)
    points = [((cx + x * r) * _OVERSAMPLE, (cy + y * r) * _OVERSAMPLE) for x, y in _shape_points(thing.kind)]
    pen.polygon(points, fill=255)
    hole = {"ring": (0.0, 0.0, 0.52), "moon": (0.5, -0.12, 0.82)}.get(thing.kind)
    if hole is not None:
        x, y, h = hole
        corners = [
            ((cx + (x - h) * r) * _OVERSAMPLE, (cy + (y - h) * r) * _OVERSAMPLE),
            ((cx + (x + h) * r) * _OVERSAMPLE, (cy + (y + h) * r) * _OVERSAMPLE),
        ]
        pen.ellipse(corners, fill=0)
    colour = COLOURS[str(thing.colour)]
    canvas.paste(colour, mask=stencil)
    if thing.texture in ("striped", "dotted"):
        shade = (int(colour[0] * _SHADE), int(colour[1] * _SHADE), int(colour[2] * _SHADE))
        canvas.paste(shade, mask=ImageChops.multiply(stencil, _pattern(thing.texture)))


def primitives(thing: Thing) -> tuple[Primitive, ...]:
    """The coloured parts of an exemplar or a person, back to front."""
    if not thing.is_person:
        return EXEMPLARS[thing.kind]
    clothes, hat = OUTFITS[thing.outfit] if thing.outfit is not None else (COLOURS[str(thing.colour)], None)
    return _person(str(thing.sex), str(thing.age), clothes, hat)


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene: (128, 128, 3), 8-bit sRGB."""
    side = SIDE * _OVERSAMPLE
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    count = len(scene.things)
    for thing, (cx, cy), (dx, dy) in zip(scene.things, _CENTRES[count], scene.offsets, strict=False):
        r = RADII[count, thing.size]
        if thing.kind in SHAPES:
            _draw_shape(canvas, thing, cx + dx, cy + dy, r)
            continue
        for primitive in primitives(thing):
            corners = _box(primitive, cx + dx, cy + dy, r)
            if primitive[0] == "ellipse":
                pen.ellipse(corners, fill=primitive[2])
            else:
                pen.polygon(corners, fill=primitive[2])
    if scene.mark:
        left, top, right, bottom = (v * _OVERSAMPLE for v in MARK_BOX)
        pen.ellipse([(left, top), (right, bottom)], fill=(236, 60, 160))
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


def draw_batch(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Pictures of scenes: (len(scenes), 128, 128, 3)."""
    return np.stack([draw(scene) for scene in scenes])
