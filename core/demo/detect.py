"""Reading pictures of the Shapes world exactly: which things, of which attributes, on which background.

Analysis by synthesis: a thing is cut out against its background, scaled to a fixed box and compared with every rendered kind of thing on
that background. Nothing here is learned, so the reading of a picture does not depend on any model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from . import render
from .render import Scene, Thing
from .world import Spec, Word, World

_BOX = 24
_CONTRAST = 0.10
"""How far (largest channel, in [0, 1]) a pixel is from the background to belong to a thing."""
_OTHER = 0.10
"""Distance to the nearest rendered kind above which a thing is "other"; renders stay below half of it."""
_MARK_CORNER = 113

Array: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class ThingReading:
    """What one thing in a picture is; attributes that its kind does not have are None. kind may be "other"."""

    kind: str
    size: str
    colour: str | None
    texture: str | None
    sex: str | None
    age: str | None
    outfits: frozenset[str]
    distance: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows, left to right."""

    background: str
    things: tuple[ThingReading, ...]
    mark: bool


@dataclass(frozen=True)
class _Template:
    thing: Thing
    features: Array
    extent: float
    """Larger side of the thing's bounding box over twice its radius."""


def _background(picture: Array) -> tuple[str, Array]:
    frame = np.concatenate(
        [picture[:5].reshape(-1, 3), picture[:, :5].reshape(-1, 3), picture[:110, -5:].reshape(-1, 3), picture[-5:, :110].reshape(-1, 3)]
    )
    colour: Array = np.median(frame, 0).astype(np.float32)
    names = list(render.BACKGROUNDS)
    palette = np.array([render.BACKGROUNDS[n] for n in names], np.float32) / 255
    return names[int(np.square(palette - colour).sum(1).argmin())], colour


def _foreground(picture: Array, background: Array) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = np.abs(picture - background).max(-1) > _CONTRAST
    mask[_MARK_CORNER:, _MARK_CORNER:] = False
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    mask &= (np.bincount(labels.ravel()) >= 16)[labels]
    return mask


def _sides(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The masks of the things: one, or two when a gap of columns at the middle parts them."""
    if mask.sum() < 80:
        return []
    empty = mask[:, 54:75].sum(0) == 0
    runs, count = ndimage.label(empty)
    widths = ndimage.sum_labels(empty, runs, np.arange(1, count + 1)) if count else np.zeros(1)
    if count and widths.max() >= 5:
        cut = 54 + int(np.flatnonzero(runs == 1 + int(widths.argmax())).mean())
        left, right = mask.copy(), mask.copy()
        left[:, cut:] = False
        right[:, :cut] = False
        if left.sum() >= 80 and right.sum() >= 80:
            return [left, right]
    return [mask]


def _features(picture: Array, background: Array, mask: NDArray[np.bool_]) -> tuple[Array, float]:
    """Silhouette and brightness-free colour of a thing in a fixed box, (box, box, 4), and the side of its bounding box in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = float(max(bottom - top, right - left))
    centre = ((top + bottom - 1) / 2, (left + right - 1) / 2)
    steps = (np.arange(_BOX) + 0.5) / _BOX - 0.5
    smooth = side / _BOX / 2.5
    # Beyond the filter's reach around the box everything is 0: the rest of the picture need not be filtered.
    reach = int(4 * smooth + 0.5) + 1
    y0, x0 = max(0, top - reach), max(0, left - reach)
    part = (slice(y0, bottom + reach), slice(x0, right + reach))
    picture, mask = picture[part], mask[part]
    y, x = np.meshgrid(centre[0] + steps * side * 1.06 - y0, centre[1] + steps * side * 1.06 - x0, indexing="ij")
    solid = ndimage.gaussian_filter(mask.astype(np.float32), smooth)
    hue = picture / (picture.max(-1, keepdims=True) + 0.1) * mask[..., None]
    planes = [solid, *(ndimage.gaussian_filter(hue[..., c], smooth) for c in range(3))]
    sampled = [ndimage.map_coordinates(plane, [y, x], order=1, mode="constant") for plane in planes]
    return np.stack(sampled, -1).astype(np.float32), side


def _kinds() -> list[Thing]:
    shapes = [Thing(kind, "large", colour=colour, texture="plain") for kind in render.SHAPES for colour in render.COLOURS]
    exemplars = [Thing(kind, "large") for kind in render.EXEMPLARS]
    people = [
        Thing("person", "large", colour=colour, sex=sex, age=age, outfit=outfit)
        for sex in ("man", "woman")
        for age in ("young", "old")
        for colour, outfit in [*((c, None) for c in render.COLOURS), *((None, o) for o in render.OUTFITS)]
    ]
    return [*shapes, *exemplars, *people]


@lru_cache
def _templates(background: str) -> tuple[_Template, ...]:
    found = []
    for thing in _kinds():
        picture = render.draw(Scene(background, (thing,))).astype(np.float32) / 255
        _, colour = _background(picture)
        features, side = _features(picture, colour, _foreground(picture, colour))
        found.append(_Template(thing, features, side / (2 * render.RADII[1, "large"])))
    return tuple(found)


@lru_cache
def _stack(background: str) -> Array:
    return np.stack([t.features for t in _templates(background)])


@lru_cache
def _same_looks(background: str) -> tuple[frozenset[str], ...]:
    """Per template, the outfits whose clothes and hat it wears (some are plain coloured clothes)."""
    result = []
    for template in _templates(background):
        thing = template.thing
        worn = None
        if thing.is_person:
            worn = render.OUTFITS[thing.outfit] if thing.outfit else (render.COLOURS[str(thing.colour)], None)
        result.append(frozenset(name for name, outfit in render.OUTFITS.items() if outfit == worn))
    return tuple(result)


def _texture(picture: Array, mask: NDArray[np.bool_]) -> str:
    inside = ndimage.binary_erosion(mask, iterations=2)
    light = picture.max(-1)
    dimming = {}
    for name, dark in _patterns().items():
        shaded, lit = light[inside & dark[0]], light[inside & dark[1]]
        dimming[name] = float(np.mean(shaded) / max(1e-3, float(np.mean(lit)))) if len(shaded) and len(lit) else 1.0
    name = min(dimming, key=dimming.__getitem__)
    return name if dimming[name] < 0.86 else "plain"


@lru_cache
def _patterns() -> Mapping[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Per texture, pixels well inside its dark and well inside its light parts."""
    y, x = np.mgrid[0 : render.SIDE, 0 : render.SIDE] + 0.5
    stripe = y % 16
    row = np.floor(y / 8)
    dot = np.sqrt((y % 8 - 4) ** 2 + ((x + 8 * (row % 2)) % 16 - 4) ** 2)
    between = np.sqrt((y % 8 - 4) ** 2 + ((x + 8 + 8 * (row % 2)) % 16 - 4) ** 2)
    return {"striped": ((stripe > 9) & (stripe < 15), (stripe > 1) & (stripe < 7)), "dotted": (dot < 2.8, between < 2.8)}


def _settle_age(name: str, features: Array, best: int) -> int:
    """Between a person's template and its twin of the other age, decide on the few pixels of hair where they differ."""
    thing = _templates(name)[best].thing
    if not thing.is_person:
        return best
    twin = next(i for i, t in enumerate(_templates(name)) if t.thing == replace(thing, age="old" if thing.age == "young" else "young"))
    ours, theirs = _stack(name)[best], _stack(name)[twin]
    hair = np.abs(ours - theirs).max(-1) > 0.1
    return best if np.abs(features - ours)[hair].sum() <= np.abs(features - theirs)[hair].sum() else twin


def _read_thing(picture: Array, name: str, background: Array, mask: NDArray[np.bool_], count: int) -> ThingReading:
    features, side = _features(picture, background, mask)
    distances = np.abs(_stack(name) - features).mean((1, 2, 3))
    best = _settle_age(name, features, int(distances.argmin()))
    template = _templates(name)[best]
    thing = template.thing
    small, large = render.RADII[count, "small"], render.RADII[count, "large"]
    radius = side / template.extent / 2
    is_shape = thing.kind in render.SHAPES
    return ThingReading(
        kind=thing.kind if distances[best] <= _OTHER else "other",
        size="small" if radius < (small + large) / 2 else "large",
        colour=thing.colour if is_shape or thing.is_person else None,
        texture=_texture(picture, mask) if is_shape else None,
        sex=thing.sex,
        age=thing.age,
        outfits=_same_looks(name)[best],
        distance=float(distances[best]),
    )


def read(picture: NDArray[np.uint8] | Array) -> Reading:
    """Read one picture (128, 128, 3), 8-bit or float in [0, 1]. Raises ValueError for another size."""
    if picture.shape != (render.SIDE, render.SIDE, 3):
        raise ValueError(f"a picture of the Shapes world is {render.SIDE} x {render.SIDE} x 3, this one is {picture.shape}")
    values = picture.astype(np.float32) / 255 if picture.dtype == np.uint8 else picture.astype(np.float32)
    name, background = _background(values)
    left, top, right, bottom = render.MARK_BOX
    corner = values[top + 2 : bottom - 2, left + 2 : right - 2]
    pink = np.array([236, 60, 160], np.float32) / 255
    mark = bool(np.abs(corner - pink).sum(-1).mean() < np.abs(corner - background).sum(-1).mean())
    sides = _sides(_foreground(values, background))
    return Reading(name, tuple(_read_thing(values, name, background, side, len(sides)) for side in sides), mark)


def fits(spec: Spec, reading: Reading) -> bool:
    """Whether a picture shows what a partial description says, in one thing (and one more for ``beside``)."""
    if "background" in spec and spec["background"] != reading.background:
        return False
    if "beside" in spec and not any(t.kind == spec["beside"] for t in reading.things):
        return False
    return any(_thing_fits(spec, thing) for thing in reading.things)


def _thing_fits(spec: Spec, thing: ThingReading) -> bool:
    for key, value in spec.items():
        if key in ("background", "beside"):
            continue
        if key == "kind" and value == "shape":
            right = thing.kind in render.SHAPES
        elif key == "kind" and value == "thing":
            right = thing.kind != "other"
        elif key == "outfit":
            right = value in thing.outfits
        else:
            right = getattr(thing, key) == value
        if not right:
            return False
    return True


def present(word: Word, reading: Reading) -> bool:
    """The word's predicate: some component of its make-up is in the picture."""
    return any(fits(spec, reading) for _, spec in word.make_up)


def outcome(word: Word, reading: Reading) -> int:
    """Which component of the word's make-up a picture shows, the most specific first; -1 for none."""
    for index in sorted(range(len(word.make_up)), key=lambda i: -len(word.make_up[i][1])):
        if fits(word.make_up[index][1], reading):
            return index
    return -1


def shares(word: Word, readings: Sequence[Reading]) -> list[float]:
    """The share of each component of a word's make-up among pictures, and last of none of them."""
    found = np.array([outcome(word, r) for r in readings])
    return [float((found == i).mean()) for i in (*range(len(word.make_up)), -1)]


def agreement(world: World, count: int, *, seed: int = 0) -> dict[str, float]:
    """How often the detectors are right on renders of the world, by attribute."""
    rng = np.random.default_rng(seed)
    hits: dict[str, list[bool]] = {}
    for _ in range(count):
        scene = world.sample(rng)[1]
        reading = read(render.draw(scene))
        hits.setdefault("background", []).append(reading.background == scene.background)
        hits.setdefault("mark", []).append(reading.mark == scene.mark)
        hits.setdefault("count", []).append(len(reading.things) == len(scene.things))
        for thing, seen in zip(scene.things, reading.things, strict=False):
            wanted = {k: getattr(thing, k) for k in ("kind", "size", "colour", "texture", "sex", "age") if getattr(thing, k) is not None}
            for key, value in wanted.items():
                hits.setdefault(key, []).append(getattr(seen, key) == value)
            if thing.outfit is not None:
                hits.setdefault("outfit", []).append(thing.outfit in seen.outfits)
    return {key: float(np.mean(values)) for key, values in hits.items()}
