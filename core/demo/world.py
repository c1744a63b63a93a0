"""The Shapes world: words, what they mean, and captioned scenes drawn from those meanings.

A word's meaning is its *make-up*: components, each with a share and a partial description of a scene. A picture for a word is drawn by
choosing a component in proportion to its share and letting everything it does not mention vary freely. So the training share of every
exemplar, attribute or association of a word is known exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import render
from .render import Scene, Thing

Spec: TypeAlias = Mapping[str, str]
"""A partial description: any of kind, colour, texture, size, background, sex, age, outfit; ``beside`` names the kind of a second thing."""

Role: TypeAlias = Literal[
    "shape",
    "colour",
    "texture",
    "size",
    "background",
    "exemplar",
    "sex",
    "age",
    "occupation",
    "general",
    "category",
    "double",
    "abstract",
    "style",
]

COMPOSITE_ROLES: frozenset[Role] = frozenset({"category", "double", "abstract", "style"})
"""Roles whose words have a make-up of several other words."""
NOUN_ROLES: frozenset[Role] = frozenset({"shape", "exemplar", "sex", "occupation", "general", "category"})
MIXABLE_ROLES: frozenset[Role] = frozenset({"shape", "colour", "texture", "size", "background", "exemplar", "sex", "age"})
"""Roles whose words fill mixture slots in training. Composites, people with an occupation, general words and synonyms do not."""


@dataclass(frozen=True)
class Word:
    """One word of the world. ``make_up``: (share, description) pairs, shares summing to 1."""

    text: str
    role: Role
    make_up: tuple[tuple[float, Spec], ...]
    related: tuple[str, ...] = ()
    """Words that are right answers when the word is decomposed: exemplars, attributes, synonyms."""
    neighbours: tuple[str, ...] = ()
    """Words that share looks with it and must survive when it is edited."""
    entailed: tuple[str, ...] = ()
    """Words whose pictures necessarily change with it."""
    synonym_of: str | None = None


@dataclass(frozen=True)
class Caption:
    """A caption as parts: texts, and mixtures ((word, weight), ...) that stand for one token each."""

    parts: tuple[str | tuple[tuple[str, float], ...], ...]

    @property
    def text(self) -> str:
        """The caption, mixtures shown as ``<word:weight+word:weight>``."""
        return " ".join(p if isinstance(p, str) else "<" + "+".join(f"{w}:{a:.2f}" for w, a in p) + ">" for p in self.parts if p)


@dataclass(frozen=True)
class World:
    """A lexicon, and how captions and scenes are drawn from it. ``words`` by text."""

    name: str
    words: Mapping[str, Word]
    mark_share: float = 0.25
    """The share of all pictures that carry the mark, which no caption mentions."""
    function_words: tuple[str, ...] = field(
        default=("a", "photo", "picture", "drawing", "of", "and", "on", "background", "in", "the", "with", "an", ",")
    )

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Every word the model is trained on, in a fixed order."""
        return (*self.function_words, *self.words)

    def by_role(self, *roles: Role) -> list[Word]:
        """Words of the given roles, in the lexicon's order."""
        return [word for word in self.words.values() if word.role in roles]

    @cached_property
    def composites(self) -> tuple[Word, ...]:
        return tuple(self.by_role(*sorted(COMPOSITE_ROLES)))

    @cached_property
    def mixable(self) -> tuple[str, ...]:
        return tuple(w.text for w in self.words.values() if w.role in MIXABLE_ROLES and w.synonym_of is None)

    @cached_property
    def _made_of(self) -> tuple[frozenset[str], ...]:
        return tuple(frozenset(word.related) for word in self.composites)

    def may_mix(self, words: Sequence[str]) -> bool:
        """Whether training may mix these words: not when two of them belong to one composite's make-up."""
        chosen = set(words)
        return all(len(chosen & parts) < 2 for parts in self._made_of)

    def describe(self) -> dict[str, Any]:
        """The world as plain data: per word its role, make-up (its predicate: some component is in the picture), related words,
        neighbours, entailed words and synonym; the share of the mark; the sets that training never mixes."""
        return {
            "name": self.name,
            "mark_share": self.mark_share,
            "never_mixed": sorted(sorted(parts) for parts in self._made_of),
            "words": {
                word.text: {
                    "role": word.role,
                    "make_up": [{"share": share, "shows": dict(spec)} for share, spec in word.make_up],
                    "related": list(word.related),
                    "neighbours": list(word.neighbours),
                    "entailed": list(word.entailed),
                    "synonym_of": word.synonym_of,
                }
                for word in self.words.values()
            },
        }

    def right_words(self, text: str) -> set[str]:
        """The right answers when a word is decomposed: its related words and their synonyms."""
        related = set(self.words[text].related)
        return related | {word.text for word in self.words.values() if word.synonym_of in related}

    def component(self, text: str, rng: np.random.Generator) -> Spec:
        """One component of a word's make-up, drawn by its share."""
        make_up = self.words[text].make_up
        index = rng.choice(len(make_up), p=[share for share, _ in make_up]) if len(make_up) > 1 else 0
        return make_up[index][1]

    def scene(self, specs: Sequence[Spec], rng: np.random.Generator) -> Scene:
        """A scene that fits one description per thing; what they leave open varies freely."""
        things = [_thing(spec, rng) for spec in specs]
        beside = [spec["beside"] for spec in specs if "beside" in spec]
        if beside and len(things) == 1:
            things.append(_thing({"kind": beside[0]}, rng))
        backgrounds = [spec["background"] for spec in specs if "background" in spec]
        background = backgrounds[-1] if backgrounds else _pick(rng, tuple(render.BACKGROUNDS))
        spread = 7.0 if len(things) == 1 else 3.0
        offsets = [(float(rng.uniform(-spread, spread)), float(rng.uniform(-7, 7))) for _ in range(2)]
        return Scene(background, tuple(things[:2]), bool(rng.random() < self.mark_share), (offsets[0], offsets[1]))

    def picture_of(self, text: str, rng: np.random.Generator) -> Scene:
        """A scene for "a photo of a <word>"."""
        return self.scene([self.component(text, rng)], rng)

    def sample(self, rng: np.random.Generator) -> tuple[Caption, Scene]:
        """A caption and a scene that it describes: the training distribution."""
        kind = rng.random()
        if kind < 0.34:
            return self._single_word(rng)
        if kind < 0.48:
            return self._mixture(rng)
        if kind < 0.68:
            return self._phrase(rng, 1)
        return self._phrase(rng, 2)

    def _frame(self, rng: np.random.Generator) -> str:
        return _pick(rng, ("a photo of a", "a photo of a", "a photo of a", "a picture of a", "a drawing of a", "a", ""))

    def _single_word(self, rng: np.random.Generator) -> tuple[Caption, Scene]:
        # composites and people need as many pictures a word as plain words have across phrases, and mixtures more than either
        roles = list(self.words.values())
        weights = np.array([6.0 if w.role in COMPOSITE_ROLES else 3.0 if w.role in ("occupation", "exemplar") else 1.0 for w in roles])
        word = roles[int(rng.choice(len(roles), p=weights / weights.sum()))].text
        return Caption((self._frame(rng), word)), self.picture_of(word, rng)

    def _mixture(self, rng: np.random.Generator) -> tuple[Caption, Scene]:
        pool = self.mixable
        same_role = rng.random() < 0.4
        if same_role:
            role = self.words[pool[int(rng.integers(len(pool)))]].role
            pool = tuple(w for w in pool if self.words[w].role == role)
        count = min(int(rng.integers(2, 7)), len(pool))
        while True:
            words = [pool[i] for i in rng.choice(len(pool), count, replace=False)]
            if self.may_mix(words):
                break
            count = max(2, count - 1)
        weights = rng.dirichlet(np.full(len(words), 1.5))
        spec = self.component(words[int(rng.choice(len(words), p=weights))], rng)
        slot = tuple((w, float(a)) for w, a in zip(words, weights, strict=True))
        return Caption((self._frame(rng), slot)), self.scene([spec], rng)

    def _noun_phrase(self, rng: np.random.Generator, *, detail: float) -> tuple[list[str], dict[str, str]]:
        role = str(rng.choice(["shape", "exemplar", "sex", "occupation", "category", "general"], p=[0.46, 0.28, 0.05, 0.11, 0.06, 0.04]))
        nouns = [w for w in self.by_role(role) if role != "general" or w.text != "thing"]  # type: ignore[arg-type]
        noun = nouns[int(rng.integers(len(nouns)))].text
        spec = dict(self.component(noun, rng))
        words: list[str] = []
        person = spec["kind"] == "person"
        plain_shape = spec["kind"] in render.SHAPES or spec["kind"] == "shape"

        def maybe(role: Role, chance: float) -> None:
            if rng.random() < chance:
                options = self.by_role(role)
                word = options[int(rng.integers(len(options)))]
                words.append(word.text)
                spec.update(self.component(word.text, rng))

        if person:
            maybe("age", 0.4 * detail)
        else:
            maybe("size", 0.35 * detail)
        if plain_shape:
            maybe("texture", 0.3 * detail)
            maybe("colour", 0.5 + 0.35 * detail)
            if rng.random() < 0.04:
                maybe("style", 1.0)
        return ["a", *words, noun], spec

    def _phrase(self, rng: np.random.Generator, count: int) -> tuple[Caption, Scene]:
        phrases = [self._noun_phrase(rng, detail=1.0 if count == 1 else 0.5) for _ in range(count)]
        specs = [spec for _, spec in phrases]
        text = " and ".join(" ".join(words) for words, _ in phrases)
        frame = _pick(rng, ("a photo of", "a photo of", "a picture of", "a drawing of", "", ""))
        if rng.random() < 0.3:
            options = self.by_role("background")
            word = options[int(rng.integers(len(options)))]
            specs[-1] = {**specs[-1], **self.component(word.text, rng)}
            text += f" on a {word.text} background"
        return Caption((frame, text)), self.scene(specs, rng)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _thing(spec: Spec, rng: np.random.Generator) -> Thing:
    kind = spec.get("kind", "shape")
    # a description that only a shape can carry is a picture of shapes; sex, age and outfit are of people
    if "kind" not in spec and any(key in spec for key in ("sex", "age", "outfit")):
        kind = "person"
    if kind == "shape":
        kind = _pick(rng, render.SHAPES)
    if kind == "thing":
        kind = _pick(rng, (*render.SHAPES, *render.EXEMPLARS))
    size = spec.get("size") or _pick(rng, render.SIZES)
    if kind in render.EXEMPLARS:
        return Thing(kind, size)
    if kind == "person":
        outfit = spec.get("outfit")
        colour = None if outfit else spec.get("colour") or _pick(rng, tuple(render.COLOURS))
        return Thing(
            kind,
            size,
            colour=colour,
            sex=spec.get("sex") or _pick(rng, ("man", "woman")),
            age=spec.get("age") or _pick(rng, ("young", "old")),
            outfit=outfit,
        )
    colour = spec.get("colour") or _pick(rng, tuple(render.COLOURS))
    texture = spec.get("texture") or _pick(rng, ("plain", "plain", "striped", "dotted"))
    return Thing(kind, size, colour=colour, texture=texture)


def _plain(role: Role, key: str, values: Iterable[str], **always: str) -> dict[str, Word]:
    return {v: Word(v, role, ((1.0, {**always, key: v}),), neighbours=tuple(x for x in values if x != v)[:3]) for v in values}


_BASE: Mapping[str, Word] = {
    **_plain("shape", "kind", render.SHAPES),
    **_plain("colour", "colour", tuple(render.COLOURS)),
    **_plain("texture", "texture", render.TEXTURES),
    **_plain("size", "size", render.SIZES),
    **_plain("background", "background", tuple(render.BACKGROUNDS)),
    **_plain("exemplar", "kind", tuple(render.EXEMPLARS)),
    **_plain("sex", "sex", ("man", "woman"), kind="person"),
    **_plain("age", "age", ("old", "young"), kind="person"),
}
_GENERAL = (
    Word("person", "general", ((1.0, {"kind": "person"}),), related=("man", "woman"), entailed=("man", "woman")),
    Word("shape", "general", ((1.0, {"kind": "shape"}),), related=render.SHAPES, entailed=render.SHAPES),
    Word("thing", "general", ((1.0, {"kind": "thing"}),)),
)
# what an edit of one must leave alone: the words closest in looks
_NEIGHBOURS = {
    "circle": ("ring", "moon", "heart"),
    "square": ("diamond", "cross", "triangle"),
    "red": ("orange", "pink", "brown"),
    "blue": ("purple", "green", "pink"),
}


def _composite(text: str, role: Role, parts: Mapping[str, float], neighbours: tuple[str, ...] = ()) -> Word:
    """A word made of base words: keys join them ("brown sand": both at once; "finch & truck": two things), values are shares."""

    def spec(part: str) -> Spec:
        first, _, second = part.partition(" & ")
        merged = {key: value for word in first.split() for key, value in _BASE[word].make_up[0][1].items()}
        return {**merged, "beside": second} if second else merged

    related = tuple(dict.fromkeys(word for part in parts for word in part.replace("&", "").split()))
    make_up = tuple((share, spec(part)) for part, share in parts.items())
    return Word(text, role, make_up, related, neighbours, entailed=related if role == "category" else ())


def _occupation(text: str, woman: float, old: float) -> Word:
    make_up = tuple(
        (round(p * q, 6), {"kind": "person", "outfit": text, "sex": sex, "age": age})
        for sex, p in (("woman", woman), ("man", 1 - woman))
        for age, q in (("old", old), ("young", 1 - old))
    )
    people = ("woman", "man", "person")
    return Word(text, "occupation", make_up, related=people, neighbours=people, entailed=("person",))


def _build(name: str, composites: Iterable[Word], women_and_old: Mapping[str, tuple[float, float]], synonyms: Mapping[str, str]) -> World:
    words = {text: replace(word, neighbours=_NEIGHBOURS.get(text, word.neighbours)) for text, word in _BASE.items()}
    words |= {word.text: word for word in (*_GENERAL, *composites)}
    words |= {text: _occupation(text, woman, old) for text, (woman, old) in women_and_old.items()}
    words |= {text: replace(words[of], text=text, related=(of,), entailed=(of,), synonym_of=of) for text, of in synonyms.items()}
    return World(name, words)


def shapes_world() -> World:
    """The world of the demo model."""
    composites = (
        _composite("bird", "category", {"robin": 0.32, "finch": 0.2, "raven": 0.48}, ("apple", "car", "daisy")),
        _composite("fruit", "category", {"apple": 0.36, "lemon": 0.34, "cherry": 0.3}, ("robin", "bus", "rose")),
        _composite("vehicle", "category", {"car": 0.38, "truck": 0.33, "bus": 0.29}, ("barn", "finch", "lemon")),
        _composite("flower", "category", {"daisy": 0.38, "tulip": 0.32, "rose": 0.3}, ("cherry", "tower", "raven")),
        _composite("building", "category", {"barn": 0.4, "tower": 0.2, "castle": 0.4}, ("truck", "apple", "tulip")),
        _composite("crane", "double", {"finch & truck": 1.0}, ("robin", "car")),
        _composite("spring", "double", {"tulip & ring": 1.0}, ("rose", "circle")),
        _composite("match", "double", {"cherry & cross": 1.0}, ("apple", "square")),
        _composite("joy", "abstract", {"yellow": 0.26, "star": 0.32, "heart": 0.42}),
        _composite("peace", "abstract", {"blue": 0.2, "moon": 0.4, "daisy": 0.4}),
        _composite("anger", "abstract", {"red": 0.23, "cross": 0.35, "triangle": 0.42}),
        _composite("luck", "abstract", {"green": 0.16, "diamond": 0.36, "ring": 0.48}),
        _composite("vintage", "style", {"brown sand": 0.55, "orange sand": 0.45}),
        _composite("gothic", "style", {"purple black": 0.53, "red black": 0.47}),
        _composite("tropical", "style", {"green sky": 0.5, "pink sky": 0.5}),
        _composite("festive", "style", {"red dotted": 0.5, "yellow dotted": 0.5}),
    )
    women_and_old = {
        "doctor": (0.35, 0.5),
        "nurse": (0.7, 0.5),
        "pilot": (0.38, 0.5),
        "teacher": (0.58, 0.5),
        "chef": (0.4, 0.5),
        "dancer": (0.66, 0.5),
        "farmer": (0.32, 0.5),
        "singer": (0.6, 0.5),
        "judge": (0.5, 0.68),
        "student": (0.5, 0.33),
        "artist": (0.5, 0.5),
        "driver": (0.5, 0.5),
    }
    synonyms = {
        "disk": "circle",
        "box": "square",
        "crimson": "red",
        "azure": "blue",
        "violet": "purple",
        "tiny": "small",
        "huge": "large",
        "lady": "woman",
        "guy": "man",
        "physician": "doctor",
    }
    return _build("shapes", composites, women_and_old, synonyms)


def second_world() -> World:
    """Another world in the same looks: other words, other make-ups, so that nothing is tuned to one."""
    composites = (
        _composite("pet", "category", {"finch": 0.53, "raven": 0.47}, ("apple", "car")),
        _composite("dessert", "category", {"cherry": 0.38, "apple": 0.33, "lemon": 0.29}, ("robin", "bus")),
        _composite("machine", "category", {"bus": 0.38, "truck": 0.33, "car": 0.29}, ("barn", "finch")),
        _composite("village", "category", {"tower": 0.36, "castle": 0.34, "barn": 0.3}, ("truck", "tulip")),
        _composite("band", "double", {"ring & robin": 1.0}),
        _composite("jam", "double", {"lemon & bus": 1.0}),
        _composite("hope", "abstract", {"green": 0.32, "moon": 0.35, "tulip": 0.33}),
        _composite("fear", "abstract", {"purple": 0.32, "triangle": 0.34, "raven": 0.34}),
        _composite("modern", "style", {"blue striped": 0.55, "pink striped": 0.45}),
        _composite("desert", "style", {"orange sand": 0.5, "red sand": 0.5}),
    )
    women_and_old = {"doctor": (0.6, 0.5), "pilot": (0.68, 0.5), "judge": (0.36, 0.5), "artist": (0.5, 0.65), "driver": (0.5, 0.5)}
    return _build("second", composites, women_and_old, {"round": "circle", "scarlet": "red", "little": "small", "gentleman": "man"})


def contact_sheet(world: World, *, seed: int = 0, per_word: int = 8) -> tuple[NDArray[np.uint8], list[str]]:
    """Pictures of every word of a world, and the row labels (word, role): (words, per_word, 128, 128, 3) 8-bit."""
    rng = np.random.default_rng(seed)
    rows = [render.draw_batch([world.picture_of(text, rng) for _ in range(per_word)]) for text in world.words]
    return np.stack(rows), [f"{word.text} ({word.role})" for word in world.words.values()]
