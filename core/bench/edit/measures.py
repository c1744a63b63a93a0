"""Erasing concepts of the demo model, and reading from images what is left: the measurements themselves.

Every function ``measure_*`` is a job's: plain arguments in, plain data out, one measurement.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from ...demo.detect import Reading, present
from ...demo.render import EXEMPLARS, SHAPES
from ...demo.world import Word, World
from ...edit import Concept, ContextEdit, report_edit, solve_edit
from ...edit.context_edit import single
from ...edit.job import Job
from ...edit.joint import DEFAULT as SETTINGS
from ...edit.joint import anchors, conceptkit
from ...edit.report import trace
from ...edit.solve import LowRank
from ...model import Model
from ..frame import Result
from ..worlds import TEMPLATE, WORLDS, load, sampling_evals
from .attacks import LEARN_BATCH, derived, learned
from .cases import PARTNERS, Case, Counts, cases, concept_of, joint_cases, of_a_kind, of_kinds, of_word, pair_prompts, synonyms
from .look import judged, look

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


def measure_before(model: str, world: str, concept: str, counts: Mapping[str, int]) -> Result:
    """What the unedited model draws for each set, and after learning an embedding with the same budget."""
    loaded, known = load(model), WORLDS[world]()
    asked, budget = concept_of(concept), Counts(**counts)
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
    """Erase a concept, and see what is left of it and of the rest, from the seeds it was generated with before.

    model: "demo", or a checkpoint in its layout.
    world: the name of the model's world.
    method: a name of ``core.edit.METHODS``.
    concept: as `parse_concepts` reads it.
    strength, hard: of ``solve_edit``.
    counts: images by set, as `Counts`.
    sets: what to generate, of the sets of ``cases`` and the attacks ``derived`` and ``learned``.
    """
    loaded = load(model)
    asked = concept_of(concept)
    start = time.perf_counter()
    edit = solve_edit(loaded, [asked], method=method, strength=strength, hard=hard)
    seconds = round(time.perf_counter() - start, 3)
    return {**_drawn(loaded, world, asked, edit, Counts(**counts), sets), "seconds": seconds}


def measure_ablation(model: str, world: str, method: str, concept: str, counts: Mapping[str, int], sets: Sequence[str]) -> Result:
    """The same for the default method without one of its ingredients, and where the concept is left, by the trace.

    model: "demo", or a checkpoint in its layout.
    world: the name of the model's world.
    method: a name of ``ABLATIONS``.
    concept: as `parse_concepts` reads it.
    counts: images by set, as `Counts`.
    sets: what to generate; none leaves the figures that need no image.
    """
    loaded = load(model)
    asked = concept_of(concept)
    start = time.perf_counter()
    job = Job(loaded, (asked,))
    solution = conceptkit(job, replace(SETTINGS, **ABLATIONS[method]))
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
    (concept,), (anchor,) = edit.concepts, edit.anchors
    word = world.words[concept.text]
    factors = LowRank(edit.context.u.double(), edit.context.v.double())

    def left(asked: Iterable[tuple[str, str]], *, padding: bool = False) -> float:
        columns, instead = [], []
        for template, text in asked:
            ours, theirs = job.texts.prompt(template, text), job.texts.prompt(template, anchor)
            if padding:
                columns.append(ours.context[max(ours.end, theirs.end) + 1 :])
                instead.append(theirs.context[max(ours.end, theirs.end) + 1 :])
            else:
                columns.append(ours.context[[ours.last, ours.end]])
                instead.append(theirs.context[[max(theirs.last, 0), theirs.end]])
        return trace(factors, torch.cat(columns).T, torch.cat(instead).T, job.gram.matrix)

    beside = [(prompt.replace(word.text, "{}"), word.text) for prompt in islice(pair_prompts(world, word, concept), len(PARTNERS))]
    others = [(TEMPLATE, text) for text in synonyms(world, word.text)]
    found = {"padding": left([(TEMPLATE, word.text)], padding=True)}
    return found | {name: left(asked) for name, asked in (("beside", beside), ("synonym", others)) if asked}


def _drawn(model: Model, world: str, asked: Concept, edit: ContextEdit, budget: Counts, sets: Sequence[str]) -> dict[str, Any]:
    """What the pictures of an edited model show."""
    known, before = WORLDS[world](), model.meter.evals
    hits: dict[str, list[int]] = {}
    for name, listed in cases(known, asked, budget).items():
        if name in sets:
            seen = look(model, listed, edit)
            hits[name] = judged(known, listed, seen)
            if name == "concept" and asked.replacement is not None:
                hits["replacement"] = judged(known, [replace(case, word=asked.replacement) for case in listed], seen)
    if "derived" in sets:
        hits["derived"] = derived(model, known, asked, edit, budget)
    if "learned" in sets:
        hits["learned"] = learned(model, known, asked, edit, budget)
    certificate = {} if edit.report is None else edit.report.to_json()
    return {"hits": hits, "rank": edit.rank, "report": certificate, "evals": model.meter.evals - before}


def measure_joint(model: str, world: str, method: str | None, concepts: Sequence[str], counts: Mapping[str, int]) -> Result:
    """Erase concepts in one call, and see what is left of them and of the rest; mistaken are images that show another of them.

    model: "demo", or a checkpoint in its layout.
    world: the name of the model's world.
    method: a name of ``core.edit.METHODS``; None erases nothing.
    concepts: those of the call.
    counts: images by set, as `Counts`.
    """
    loaded, known = load(model), WORLDS[world]()
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
    return {"hits": hits, "anchors": [] if edit is None else list(edit.anchors), "seconds": seconds, "evals": loaded.meter.evals - before}


def measure_kinds(model: str, world: str, pictures: int) -> Result:
    """What is read in the place of each shape, exemplar, composite and occupation, erased one by one, and with ``pictures`` of each what is
    drawn then: whether it is a scene at all (every thing in it is one that the world knows), and one of the same kind."""
    loaded, known = load(model), WORLDS[world]()
    before, found, shared = loaded.meter.evals, [], Job(loaded, ())
    for word in of_kinds(known):
        job = Job(loaded, (Concept(word.text),))
        job.texts, job.words = shared.texts, shared.words
        (anchor,) = anchors(job, SETTINGS)
        row: dict[str, Any] = {"word": word.text, "role": word.role, "anchor": anchor, "kind": of_a_kind(known, word.text, anchor)}
        if pictures:
            listed = of_word(word, pictures)
            seen = look(loaded, listed, solve_edit(loaded, [word.text]))
            row["shown"] = judged(known, listed, seen)
            row["scene"] = [_is_scene(reading) for reading in seen]
            row["same"] = [int(bool(scene) and _same_kind(word, reading)) for scene, reading in zip(row["scene"], seen, strict=True)]
        found.append(row)
    return {"words": found, "evals": loaded.meter.evals - before}


def measure_scenes(model: str, world: str, pictures: int) -> Result:
    """Whether what the unedited model draws for the words of ``measure_kinds``, with the same seeds, is a scene."""
    loaded = load(model)
    before = loaded.meter.evals
    listed = [case for word in of_kinds(WORLDS[world]()) for case in of_word(word, pictures)]
    return {"scene": [_is_scene(reading) for reading in look(loaded, listed, None)], "evals": loaded.meter.evals - before}


def _is_scene(reading: Reading) -> int:
    """1 where a picture holds things, and none that the detectors do not know."""
    return int(bool(reading.things) and all(thing.kind != "other" for thing in reading.things))


def _same_kind(word: Word, reading: Reading) -> bool:
    """Whether what is drawn is of the kind that a word's own pictures show: shapes, people, or other things."""

    def kind(thing: str | None) -> str:
        return "shape" if thing is None or thing in (*SHAPES, "shape") else "thing" if thing in EXEMPLARS else str(thing)

    own = {kind(spec.get("kind")) for _, spec in word.make_up}
    return {kind(thing.kind) for thing in reading.things} <= own | ({"thing", "shape"} if word.role == "double" else set())


def planned(world: World, concept: Concept, counts: Counts, sets: Sequence[str]) -> int:
    """The evals of ``measure_edit``, and with every set of ``cases``, ``replacement`` and ``learned`` those of ``measure_before``."""
    pictures = sum(len(listed) for name, listed in cases(world, concept, counts).items() if name in sets)
    pictures += counts.concept * ("replacement" in sets and concept.replacement is not None)
    pictures += counts.attack * sum(name in sets for name in ("derived", "learned"))
    return sampling_evals(pictures) + 3 * LEARN_BATCH * counts.learn * ("learned" in sets)


def planned_joint(world: World, concepts: Sequence[str], counts: Counts) -> int:
    """The evals of ``measure_joint``."""
    return sampling_evals(sum(map(len, joint_cases(world, concepts, counts).values())))
