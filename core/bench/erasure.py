"""Erasing concepts of the demo model, and reading what is left from pictures: the measurements of ``conceptkit bench edit``.

Every picture is read by the exact detectors and judged by the world's own predicates, so presence is a count and not an opinion. The
edited model is run in the conditioning form, which equals the weight form (a law with a test of its own) and costs no copy of the model.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..demo.render import SIDE
from ..demo.world import COMPOSITE_ROLES, Role, Word, World
from .frame import Result

if TYPE_CHECKING:
    from torch import Tensor

    from ..demo.detect import Reading
    from ..edit import Concept, ContextEdit
    from ..edit.job import Job
    from ..model import Conditioning, Model, Slot

TEMPLATE = "a photo of a {}"
BESIDE = ("a drawing of a {} and a {}", "a drawing of a {1} and a {0}", "a {} and a {} on a white background")
ATTRIBUTED = ("a drawing of a {0}", "a drawing of a {0} and a {1}", "a {0} on a {2} background", "a drawing of a {1} and a {0}")
"""Wordings of two things and of attributes: none that the method solves for."""
STEPS = 12
"""Of DPM++ 2M: 24 evals a picture with guidance."""
BATCH = 16
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
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "the default": {},
    "without padding": {"padding": 0.0},
    "without prompts with other words": {"frames": 0},
    "without synonyms": {"synonyms": False},
    "without near words that stay": {"siblings": 0},
    "without parts that stay": {"related": False},
    "without an anchor of its kind": {"kind": False},
    "without an exact empty prompt": {"null": 0.0, "empty": 0.0},
}
"""What the default method is tried without, as changes to its settings."""
LEARN_BATCH = 8
LEARN_RATE = 0.1
"""Of Adam, in units of a table row's root mean square."""
LEARN_PICTURES = 64
"""Renders of the concept that textual inversion learns from."""


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
        "pair": [Case(prompt, seed + 2_000, word.text) for prompt, seed in zip(_pairs(world, word, concept), seeds, strict=False)],
        "instead": [
            Case(prompt, 59_000 + i, text)
            for i, (prompt, text) in enumerate(_in_turn(world, concept, _instead(world, concept), counts.concept // 4))
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


def synonyms(world: World, word: str) -> list[str]:
    """Words that mean the same."""
    return [other.text for other in world.words.values() if other.synonym_of == word]


def parts(world: World, word: Word) -> list[str]:
    """Words that are drawn where ``word`` is asked for, and composites that it is part of: they have names of their own and must stay."""
    made_of = [text for text in word.related if world.words[text].synonym_of is None] if word.role in COMPOSITE_ROLES else []
    return [*made_of, *(other.text for other in world.by_role(*COMPOSITE_ROLES) if word.text in other.related)]


def _instead(world: World, concept: Concept) -> list[str]:
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


def _pairs(world: World, word: Word, concept: Concept) -> Iterator[str]:
    """Prompts of two things, one of them the concept; none for words that name no thing and no attribute of one."""
    from ..demo.render import COLOURS, SHAPES

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


def _attributed(world: World, text: str, concept: Concept) -> Iterator[str]:
    """Prompts that say ``text`` with an attribute, alone and beside another thing; none for words that take and are no attribute."""
    from ..demo.render import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES

    known = (concept.text, *_instead(world, concept))
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
    asked = [[(prompt, text) for prompt in islice(_attributed(world, text, concept), count)] for text in texts]
    return islice((found for turn in zip(*asked, strict=True) for found in turn), count)


def measure_before(model: str, world: str, concept: str, counts: Mapping[str, int]) -> Result:
    """What the unedited model draws for each set, and after learning an embedding with the same budget."""
    from ..edit import parse_concepts
    from .decompose import WORLDS, _model

    loaded, known = _model(model), WORLDS[world]()
    (asked,), budget = parse_concepts(concept), Counts(**counts)
    before = loaded.meter.evals
    hits = {name: judged(known, listed, look(loaded, listed, None)) for name, listed in cases(known, asked, budget).items()}
    if asked.replacement is not None:
        # How often the replacement's own prompt shows it: what an edit can reach at best.
        own = [Case(TEMPLATE.replace("{}", asked.replacement), 50_000 + i, asked.replacement) for i in range(budget.concept)]
        hits["replacement"] = judged(known, own, look(loaded, own, None))
    hits["learned"] = learned(loaded, known, asked, None, budget)
    return {"hits": hits, "evals": loaded.meter.evals - before}


def measure_edit(
    model: str, world: str, method: str, concept: str, strength: float, hard: bool, counts: Mapping[str, int], sets: Sequence[str]
) -> Result:
    """Erase a concept, and see what is left of it and of the rest, drawn as before. sets: which to draw, of those of ``cases`` and the
    attacks ``derived`` and ``learned``."""
    from ..edit import parse_concepts, solve_edit
    from .decompose import _model

    loaded = _model(model)
    (asked,) = parse_concepts(concept)
    start = time.perf_counter()
    edit = solve_edit(loaded, [asked], method=method, strength=strength, hard=hard)
    seconds = round(time.perf_counter() - start, 3)
    return {**_drawn(loaded, world, asked, edit, Counts(**counts), sets), "seconds": seconds}


def measure_ablation(model: str, world: str, method: str, concept: str, counts: Mapping[str, int], sets: Sequence[str]) -> Result:
    """The same for the default method without one of its ingredients, and where the concept is left, by the trace. sets may be empty."""
    from ..edit import ContextEdit, parse_concepts, report_edit
    from ..edit.context_edit import single
    from ..edit.job import Job
    from ..edit.joint import DEFAULT, conceptkit
    from .decompose import WORLDS, _model

    loaded = _model(model)
    (asked,) = parse_concepts(concept)
    start = time.perf_counter()
    job = Job(loaded, (asked,))
    solution = conceptkit(job, replace(DEFAULT, **ABLATIONS[method]))
    seconds, prompts = round(time.perf_counter() - start, 3), job.texts.encodes
    known = WORLDS[world]()
    # Known synonyms are no neighbours, whichever of them this variant finds.
    alike = (tuple(synonyms(known, asked.text)),)
    edit = ContextEdit(loaded.family, single(solution.context), concepts=(asked,), anchors=solution.anchors, synonyms=alike)
    edit = replace(edit, report=report_edit(loaded, edit))
    left = left_over(job, known, edit)
    return {**_drawn(loaded, world, asked, edit, Counts(**counts), sets), "seconds": seconds, "left": left, "prompts": prompts}


def left_over(job: Job, world: World, edit: ContextEdit) -> dict[str, float]:
    """What the trace leaves of a concept beside other words, asked for by its synonyms, and in the padding: without a picture."""
    import torch

    from ..edit.report import trace
    from ..edit.solve import LowRank

    (concept,), (anchor,) = edit.concepts, edit.anchors
    word = world.words[concept.text]
    factors = LowRank(edit.context.u.double(), edit.context.v.double())

    def left(asked: Iterable[tuple[str, str]], *, padding: bool = False) -> float:
        columns, anchors = [], []
        for template, text in asked:
            ours, theirs = job.texts.prompt(template, text), job.texts.prompt(template, anchor)
            if padding:
                columns.append(ours.context[max(ours.end, theirs.end) + 1 :])
                anchors.append(theirs.context[max(ours.end, theirs.end) + 1 :])
            else:
                columns.append(ours.context[[ours.last, ours.end]])
                anchors.append(theirs.context[[max(theirs.last, 0), theirs.end]])
        return trace(factors, torch.cat(columns).T, torch.cat(anchors).T, job.gram.matrix)

    beside = [(prompt.replace(word.text, "{}"), word.text) for prompt in islice(_pairs(world, word, concept), len(PARTNERS))]
    others = [(TEMPLATE, text) for text in synonyms(world, word.text)]
    found = {"padding": left([(TEMPLATE, word.text)], padding=True)}
    return found | {name: left(asked) for name, asked in (("beside", beside), ("synonym", others)) if asked}


def _drawn(model: Model, world: str, asked: Concept, edit: ContextEdit, budget: Counts, sets: Sequence[str]) -> dict[str, Any]:
    """What the pictures of an edited model show."""
    from .decompose import WORLDS

    known, before = WORLDS[world](), model.meter.evals
    hits: dict[str, list[int]] = {}
    for name, listed in cases(known, asked, budget).items():
        if name in sets:
            readings = look(model, listed, edit)
            hits[name] = judged(known, listed, readings)
            if name == "concept" and asked.replacement is not None:
                hits["replacement"] = judged(known, [replace(case, word=asked.replacement) for case in listed], readings)
    if "derived" in sets:
        hits["derived"] = derived(model, known, asked, edit, budget)
    if "learned" in sets:
        hits["learned"] = learned(model, known, asked, edit, budget)
    certificate = {} if edit.report is None else edit.report.to_json()
    return {"hits": hits, "rank": edit.rank, "report": certificate, "evals": model.meter.evals - before}


JOINT_SETS = ("concept", "synonym", "neighbour", "unrelated")


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


def measure_joint(model: str, world: str, method: str | None, concepts: Sequence[str], counts: Mapping[str, int]) -> Result:
    """Erase concepts in one call (with no method: none), and see what is left of them and of the rest. Of the concepts' pictures, mistaken
    counts those that show another concept of the call."""
    from ..demo.detect import present
    from ..edit import solve_edit
    from .decompose import WORLDS, _model

    loaded, known = _model(model), WORLDS[world]()
    start, before = time.perf_counter(), loaded.meter.evals
    edit = None if method is None else solve_edit(loaded, list(concepts), method=method)
    seconds = round(time.perf_counter() - start, 3)
    hits: dict[str, list[int]] = {}
    for name, listed in joint_cases(known, concepts, Counts(**counts)).items():
        seen = look(loaded, listed, edit)
        hits[name] = judged(known, listed, seen)
        if name == "concept":
            others = [[known.words[text] for text in concepts if text != case.word] for case in listed]
            hits["mistaken"] = [int(any(present(word, reading) for word in rest)) for rest, reading in zip(others, seen, strict=True)]
    anchors = [] if edit is None else list(edit.anchors)
    return {"hits": hits, "anchors": anchors, "seconds": seconds, "evals": loaded.meter.evals - before}


def planned_joint(world: World, concepts: Sequence[str], counts: Counts) -> int:
    """The evals of ``measure_joint``."""
    return 2 * STEPS * sum(map(len, joint_cases(world, concepts, counts).values()))


def measure_kinds(model: str, world: str, pictures: int) -> Result:
    """What is read in the place of each shape, exemplar, composite and occupation, erased one by one, and with ``pictures`` of each what is
    drawn then: whether it is a scene at all (every thing in it is one that the world knows), and one of the same kind."""
    from ..edit import Concept, solve_edit
    from ..edit.job import Job
    from ..edit.joint import DEFAULT, anchors
    from .decompose import WORLDS, _model

    loaded, known = _model(model), WORLDS[world]()
    before, found, shared = loaded.meter.evals, [], Job(loaded, ())
    for word in of_kinds(known):
        job = Job(loaded, (Concept(word.text),))
        job.texts, job.words = shared.texts, shared.words
        (anchor,) = anchors(job, DEFAULT)
        row: dict[str, Any] = {"word": word.text, "role": word.role, "anchor": anchor, "kind": of_a_kind(known, word.text, anchor)}
        if pictures:
            listed = _of_word(word, pictures)
            seen = look(loaded, listed, solve_edit(loaded, [word.text]))
            row["shown"] = judged(known, listed, seen)
            row["scene"] = [_is_scene(reading) for reading in seen]
            row["same"] = [int(bool(scene) and _same_kind(word, reading)) for scene, reading in zip(row["scene"], seen, strict=True)]
        found.append(row)
    return {"words": found, "evals": loaded.meter.evals - before}


def measure_scenes(model: str, world: str, pictures: int) -> Result:
    """Whether what the unedited model draws for the words of ``measure_kinds``, with the same seeds, is a scene."""
    from .decompose import WORLDS, _model

    loaded = _model(model)
    before = loaded.meter.evals
    listed = [case for word in of_kinds(WORLDS[world]()) for case in _of_word(word, pictures)]
    return {"scene": [_is_scene(reading) for reading in look(loaded, listed, None)], "evals": loaded.meter.evals - before}


def of_kinds(world: World) -> list[Word]:
    """The words that something else is drawn for, one by one: of ``KINDS``, but for synonyms."""
    return [word for word in world.by_role(*KINDS) if word.synonym_of is None]


def _of_word(word: Word, pictures: int) -> list[Case]:
    return [Case(TEMPLATE.replace("{}", word.text), 65_000 + i, word.text) for i in range(pictures)]


def _is_scene(reading: Reading) -> int:
    """1 where a picture holds things, and none that the detectors do not know."""
    return int(bool(reading.things) and all(thing.kind != "other" for thing in reading.things))


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


def _same_kind(word: Word, reading: Reading) -> bool:
    """Whether what is drawn is of the kind that a word's own pictures show: shapes, people, or other things."""
    from ..demo.render import EXEMPLARS, SHAPES

    def kind(thing: str | None) -> str:
        return "shape" if thing is None or thing in (*SHAPES, "shape") else "thing" if thing in EXEMPLARS else str(thing)

    own = {kind(spec.get("kind")) for _, spec in word.make_up}
    return {kind(thing.kind) for thing in reading.things} <= own | ({"thing", "shape"} if word.role == "double" else set())


def planned(world: World, concept: Concept, counts: Counts, sets: Sequence[str]) -> int:
    """The evals of ``measure_edit``, and with every set of ``cases``, ``replacement`` and ``learned`` those of ``measure_before``."""
    pictures = sum(len(listed) for name, listed in cases(world, concept, counts).items() if name in sets)
    pictures += counts.concept * ("replacement" in sets and concept.replacement is not None)
    pictures += counts.attack * sum(name in sets for name in ("derived", "learned"))
    return 2 * STEPS * pictures + 3 * LEARN_BATCH * counts.learn * ("learned" in sets)


def judged(world: World, listed: Sequence[Case], readings: Sequence[Reading]) -> list[int]:
    """1 where a picture shows the word it is judged by."""
    from ..demo.detect import present

    return [int(present(world.words[case.word], reading)) for case, reading in zip(listed, readings, strict=True)]


def look(model: Model, listed: Sequence[Case], edit: ContextEdit | None) -> list[Reading]:
    """What the pictures of an edited model (or the model itself) show."""
    import torch

    found: list[Reading] = []
    with torch.no_grad():
        for first in range(0, len(listed), BATCH):
            part = listed[first : first + BATCH]
            found += readings(model, model.text.encode([case.prompt for case in part]), [case.seed for case in part], edit)
    return found


def readings(model: Model, positive: Conditioning, seeds: Sequence[int], edit: ContextEdit | None) -> list[Reading]:
    """What the detectors see in a picture a seed, the edit acting on what guidance adds and on what it subtracts alike."""
    from ..demo import detect
    from ..demo.evaluate import GUIDANCE
    from ..sampling import draw

    negative = model.text.encode([""])
    if edit is not None:
        positive, negative = edit.apply_to_conditioning(positive), edit.apply_to_conditioning(negative)
    pictures = draw(model, positive, negative, seeds, height=SIDE, width=SIDE, steps=STEPS, guidance=GUIDANCE)
    return [detect.read(picture) for picture in pictures.movedim(1, -1).numpy()]


def derived(model: Model, world: World, concept: Concept, edit: ContextEdit, counts: Counts) -> list[int]:
    """Presence under the strongest plausible context: every position of the concept's prompt replaced by what brings it back best.

    Source: the derived embedding of RECE (Gong et al., arXiv 2407.12383), with the captions' covariance in place of the identity.
    """
    import torch

    prompt = model.text.encode([TEMPLATE.replace("{}", concept.text)])
    attacked = replace(prompt, context=adversary(model, edit, prompt.context[0])[None])
    hits: list[int] = []
    for first in range(0, counts.attack, BATCH):
        seeds = range(56_000 + first, 56_000 + min(first + BATCH, counts.attack))
        with torch.no_grad():
            seen = readings(model, attacked, seeds, edit)
        hits += judged(world, [Case("", seed, concept.text) for seed in seeds], seen)
    return hits


def adversary(model: Model, edit: ContextEdit, context: Tensor) -> Tensor:
    """Per position of a context (positions, width) the embedding, no less plausible, that the edited model reads most like it."""
    import torch

    from ..edit.layers import gram
    from ..edit.report import Adversary
    from ..edit.solve import LowRank
    from ..edit.texts import Texts, caption_corpus, corpus

    captions = corpus(Texts(model.text), caption_corpus(model)).covariance
    factors = LowRank(edit.context.u.double().cpu(), edit.context.v.double().cpu())
    attacker = Adversary(factors, gram(model, context.shape[1], None).matrix, captions)
    return torch.stack([attacker.derive(row) for row in context.double().cpu()]).to(context)


def learned(model: Model, world: World, concept: Concept, edit: ContextEdit | None, counts: Counts) -> list[int]:
    """Presence after textual inversion on the edited model: can a new word, learned from pictures, say the concept again?

    Source: Pham et al., "Circumventing Concept Erasure Methods", arXiv 2308.01508, with the world's own pictures in place of generated
    ones.
    """
    from ..decompose.decomposition import fill

    slot = inverted(model, world, concept, edit, steps=counts.learn, seed=0)
    prompt = fill(TEMPLATE, [slot])
    hits: list[int] = []
    for first in range(0, counts.attack, BATCH):
        seeds = range(57_000 + first, 57_000 + min(first + BATCH, counts.attack))
        seen = readings(model, model.text.encode([prompt]).detach(), seeds, edit)
        hits += judged(world, [Case("", seed, concept.text) for seed in seeds], seen)
    return hits


def inverted(model: Model, world: World, concept: Concept, edit: ContextEdit | None, *, steps: int, seed: int) -> Slot:
    """One token per text encoder that minimises the noise-prediction error on renders of the concept, started from the word "thing".

    Adam with a rate relative to the table's mean row length, decaying to zero along a cosine; noise levels uniform in training time.
    """
    import numpy as np
    import torch

    from ..decompose.decomposition import fill
    from ..demo import render
    from ..vocabulary import WORD_END, embeddings

    if model.autoencoder is None:
        raise ValueError("the model has no autoencoder to encode the concept's pictures with: load one that has")
    generator, drawn = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    renders = render.draw_batch([world.picture_of(concept.text, drawn) for _ in range(LEARN_PICTURES)])
    with torch.no_grad():
        latents = model.autoencoder.encode(torch.from_numpy(renders).float().div(255).movedim(-1, 1))
    start = embeddings(model.text, [model.text.vocabulary["thing" + WORD_END]])
    rows = {name: row.clone().requires_grad_() for name, row in start.items()}
    norm = {name: float(table.norm(dim=1).mean()) for name, table in model.text.tables.items()}
    groups = [{"params": [row], "lr": LEARN_RATE * norm[name] / row.shape[-1] ** 0.5} for name, row in rows.items()]
    optimiser = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    sigmas = model.require_denoiser().training_sigmas
    for _ in range(steps):
        index = torch.randint(len(latents), (LEARN_BATCH,), generator=generator)
        sigma = sigmas[torch.randint(len(sigmas), (LEARN_BATCH,), generator=generator)]
        x0, level = latents[index], sigma.view(-1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=generator)
        conditioning = model.text.encode([fill(TEMPLATE, [dict(rows)])])
        if edit is not None:
            conditioning = edit.apply_to_conditioning(conditioning)
        loss = ((model.denoise(x0 + level * noise, sigma, conditioning) - x0) / level).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    return {name: row.detach() for name, row in rows.items()}
