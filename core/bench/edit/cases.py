"""What is sampled before and after an edit, and the word that judges each image.

Every image is read by the exact detectors and judged by the world's own predicates, so presence is a count and not an opinion.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from ...demo.render import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES
from ...demo.world import COMPOSITE_ROLES, Role, Word, World
from ...edit import Concept, parse_concepts
from ..worlds import TEMPLATE

BESIDE = ("a drawing of a {} and a {}", "a drawing of a {1} and a {0}", "a {} and a {} on a white background")
ATTRIBUTED = ("a drawing of a {0}", "a drawing of a {0} and a {1}", "a {0} on a {2} background", "a drawing of a {1} and a {0}")
"""Wordings of two things and of attributes: none that the method solves for."""
KINDS: tuple[Role, ...] = ("shape", "exemplar", "category", "double", "abstract", "style", "occupation")
"""Roles of the words that something else is drawn for, one by one."""
COMPOSITE_KINDS: Mapping[Role, tuple[Role, ...]] = {
    "category": ("category", "exemplar"),
    "double": ("double", "category", "exemplar"),
    "abstract": ("abstract", "shape", "exemplar"),
    "style": ("style", "background", "colour"),
}
"""Of which roles an anchor of a composite may be."""
PARTNERS = ("square", "car", "daisy", "heart", "barn", "lemon", "diamond", "raven")
"""What stands beside the concept in prompts of two things."""
JOINT_SETS = ("concept", "synonym", "neighbour", "unrelated")


@dataclass(frozen=True)
class Case:
    """One picture to draw and the word whose predicate judges it."""

    prompt: str
    seed: int
    word: str


@dataclass(frozen=True)
class Counts:
    """Pictures: of the concept (of each synonym and of prompts of two things alike), each neighbour, each unrelated word, and after an
    attack; learn: steps of textual inversion."""

    concept: int
    neighbour: int
    unrelated: int
    attack: int
    learn: int


def concept_of(line: str) -> Concept:
    """The concept of a job's argument."""
    (concept,) = parse_concepts(line)
    return concept


def cases(world: World, concept: Concept, counts: Counts) -> dict[str, list[Case]]:
    """What is drawn before and after an edit, by set: concept, synonym, attributed, pair, instead, part, neighbour, unrelated, chance.

    attributed: the concept and its synonyms with an attribute, alone and beside another thing. instead: what replaces it and the synonyms
    of that, with an attribute, to stay what they are. part: words that are parts of it and those that hold it, asked for by name. Other
    words that the world says change with the concept are in none of them; a set may be empty. Seeds are the same before and after, and for
    every method.
    """
    word = world.words[concept.text]
    seeds = range(50_000, 50_000 + counts.concept)
    found = {
        "concept": [Case(TEMPLATE.replace("{}", word.text), seed, word.text) for seed in seeds],
        "synonym": [Case(TEMPLATE.replace("{}", text), seed + 1_000, word.text) for text in synonyms(world, word.text) for seed in seeds],
        "attributed": [
            Case(prompt, 58_000 + i, word.text)
            for i, (prompt, _) in enumerate(_in_turn(world, concept, [word.text, *synonyms(world, word.text)], counts.concept // 2))
        ],
        "pair": [Case(prompt, seed + 2_000, word.text) for prompt, seed in zip(pair_prompts(world, word, concept), seeds, strict=False)],
        "instead": [
            Case(prompt, 59_000 + i, text)
            for i, (prompt, text) in enumerate(_in_turn(world, concept, replacements(world, concept), counts.concept // 4))
        ],
        "part": [Case(TEMPLATE.replace("{}", text), 60_000 + i, text) for text in parts(world, word) for i in range(counts.neighbour)],
        "neighbour": [
            Case(TEMPLATE.replace("{}", text), 53_000 + i, text) for text in neighbours(world, word) for i in range(counts.neighbour)
        ],
        "unrelated": [
            Case(TEMPLATE.replace("{}", text), 54_000 + i, text) for text in unrelated(world, concept) for i in range(counts.unrelated)
        ],
        "chance": [Case("", 55_000 + i, word.text) for i in range(counts.attack)],
    }
    return found


def joint_cases(world: World, concepts: Sequence[str], counts: Counts) -> dict[str, list[Case]]:
    """What is drawn of concepts that are erased in one call, by set as in ``cases``: of each a quarter of the pictures, and words that
    survive once for all. Words that change with any of the concepts are in neither of the last two."""
    words, each = [world.words[text] for text in concepts], max(1, counts.concept // 4)
    gone = {text for word in words for text in (word.text, *synonyms(world, word.text), *word.related, *word.entailed, *parts(world, word))}
    near = dict.fromkeys(text for word in words for text in neighbours(world, word) if text not in gone)
    far = _every_third(world, gone | set(near))
    seeds = range(61_000, 61_000 + each)
    return {
        "concept": [Case(TEMPLATE.replace("{}", word.text), seed, word.text) for word in words for seed in seeds],
        "synonym": [
            Case(TEMPLATE.replace("{}", text), seed + 1_000, word.text)
            for word in words
            for text in synonyms(world, word.text)
            for seed in seeds
        ],
        "neighbour": [Case(TEMPLATE.replace("{}", text), 63_000 + i, text) for text in near for i in range(counts.neighbour)],
        "unrelated": [Case(TEMPLATE.replace("{}", text), 64_000 + i, text) for text in far for i in range(counts.unrelated)],
    }


def of_kinds(world: World) -> list[Word]:
    """The words that something else is drawn for, one by one: of ``KINDS``, but for synonyms."""
    return [word for word in world.by_role(*KINDS) if word.synonym_of is None]


def of_word(word: Word, pictures: int) -> list[Case]:
    return [Case(TEMPLATE.replace("{}", word.text), 65_000 + i, word.text) for i in range(pictures)]


def synonyms(world: World, word: str) -> list[str]:
    """Words that mean the same."""
    return [other.text for other in world.words.values() if other.synonym_of == word]


def parts(world: World, word: Word) -> list[str]:
    """Words that are drawn where ``word`` is asked for, and composites that it is part of: they have names of their own and must stay."""
    made_of = [text for text in word.related if world.words[text].synonym_of is None] if word.role in COMPOSITE_ROLES else []
    return [*made_of, *(other.text for other in world.by_role(*COMPOSITE_ROLES) if word.text in other.related)]


def replacements(world: World, concept: Concept) -> list[str]:
    """What replaces a concept, and what means the same."""
    return [] if concept.replacement is None else [concept.replacement, *synonyms(world, concept.replacement)]


def neighbours(world: World, word: Word) -> tuple[str, ...]:
    """The words that share looks with ``word`` and must survive its edit: the world's own list, else the next of its role."""
    if word.neighbours:
        return word.neighbours
    peers = [other.text for other in world.by_role(word.role) if other.synonym_of is None and not set(other.related) & set(word.related)]
    return tuple(text for text in peers if text != word.text)[:3]


def unrelated(world: World, concept: Concept) -> list[str]:
    """Base words, every third, that have nothing to do with the concept: not its make-up, neighbours, synonyms or replacement."""
    word = world.words[concept.text]
    out = {word.text, concept.replacement, *word.related, *word.entailed, *neighbours(world, word)}
    return _every_third(world, out)


def _every_third(world: World, out: Container[str | None]) -> list[str]:
    """Base words that are not ``out``, every third."""
    roles = world.by_role("shape", "exemplar", "colour", "texture", "background")
    return [other.text for other in roles if other.synonym_of is None and other.text not in out][::3]


def pair_prompts(world: World, word: Word, concept: Concept) -> Iterator[str]:
    """Prompts of two things, one of them the concept; none for words that name no thing and no attribute of one."""
    partners = [other for other in PARTNERS if other not in {word.text, concept.replacement, *word.related, *neighbours(world, word)}]
    colours = [colour for colour in COLOURS if colour not in (word.text, concept.replacement)]
    index = 0
    while word.role in ("shape", "exemplar", "category", "colour", "texture"):
        partner = partners[index % len(partners)]
        if word.role in ("colour", "texture"):
            thing, other = f"{word.text} {SHAPES[index % len(SHAPES)]}", f"{colours[index % len(colours)]} square"
        else:
            thing, other = word.text, partner
        yield BESIDE[index % len(BESIDE)].format(thing, other)
        index += 1


def attributed_prompts(world: World, text: str, concept: Concept) -> Iterator[str]:
    """Prompts that say ``text`` with an attribute, alone and beside another thing; none for words that take and are no attribute."""
    known = (concept.text, *replacements(world, concept))
    out = {*known, *(text for word in known for text in (*world.words[word].related, *neighbours(world, world.words[word])))}

    def free(words: Iterable[str]) -> list[str]:
        return [word for word in words if word not in out]

    role, nouns = world.words[text].role, free(SHAPES)
    partners, backgrounds, colours = free(PARTNERS), free(BACKGROUNDS), free(COLOURS)
    taken = {"shape": [*colours, *free(TEXTURES)], "exemplar": list(SIZES), "category": list(SIZES), "sex": ["old", "young"]}
    pairs = [(text, noun) for noun in nouns] if role in ("colour", "texture") else [(word, text) for word in taken.get(role, [])]
    index = 0
    while pairs:
        noun, frame = " ".join(pairs[index % len(pairs)]), ATTRIBUTED[index % len(ATTRIBUTED)]
        yield frame.format(noun, partners[index % len(partners)], backgrounds[index % len(backgrounds)])
        index += 1


def _in_turn(world: World, concept: Concept, texts: Sequence[str], count: int) -> Iterator[tuple[str, str]]:
    """``count`` prompts with attributes, and the text of ``texts`` that each says, the texts in turn."""
    asked = [[(prompt, text) for prompt in islice(attributed_prompts(world, text, concept), count)] for text in texts]
    return islice((found for turn in zip(*asked, strict=True) for found in turn), count)


def of_a_kind(world: World, text: str, anchor: str) -> bool:
    """Whether the world counts ``anchor`` as of the kind of ``text`` while neither is part of the other: a person for an occupation, and
    else a word of the same role, or of one that composites of its role are made of."""
    word, other = (world.words.get(name) for name in (text, anchor))
    if word is None or other is None:
        return False
    word, other = (world.words[found.synonym_of] if found.synonym_of else found for found in (word, other))
    if word.role == "occupation":
        return other.text == "person" or (other.text != word.text and other.role in ("occupation", "sex"))
    shared = {word.text, *word.related} & {other.text, *other.related}
    return not shared and other.role in COMPOSITE_KINDS.get(word.role, (word.role,))
