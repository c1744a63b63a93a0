"""The pack's own method: what the field's closed forms do well, solved as one problem.

Wherever a prompt says a concept (its last sub-token, the words after it, end token and padding, in many prompts) it is read as in the twin
prompt that says the anchor instead; captions and near words keep their meaning; the start token and the empty prompt are exact; the pooled
text is edited too. Embeddings that would bring the concept back can be derived and solved for jointly, from T = I, so that nothing drifts;
that is off, since on the demo model it moved other words about twice as far and erased no more.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from ..vocabulary import candidates
from .job import Job, Solution
from .report import Adversary, distortion, trace
from .solve import LowRank, Problem, annihilate, minimise, response
from .texts import BATCH, TEMPLATES, Concept, Prompt, common_words, fill, mentions

FRAMES = (
    "a photo of a {{}} and a {0}",
    "a photo of a {0} and a {{}}",
    "a photo of a {0} {{}}",
    "a photo of a {{}} {0}",
    "a picture of a {0} {{}} and a {1}",
    "a {{}} {0} and a {1}",
)
"""Prompts that say the concept beside other words."""

PLAIN = TEMPLATES[0]
STEPS = 6
"""Bisections of the weight of captions."""
INDEPENDENT = 0.05
"""Smallest singular value, of unit directions, of one that says something of its own."""
TYPICAL = 0.1
"""A weight of captions to compare anchors at, and for the pooled text."""
TOTAL_FRAMES = 1024
"""Prompts over all concepts of one call, beyond which each concept gets fewer."""


@dataclass(frozen=True)
class Settings:
    """What the method weighs. Weights are relative to one prompt's sum over positions.

    last, end, padding: of a concept's positions. frames: prompts with other words. looked_at: words near a concept; those at most
    ``synonym`` from it, as a share of what it says, go with it; one of those at least ``apart`` is read in its place; the ``siblings`` next
    nearest stay, each with weight ``near``. keep: weight of a word to keep. ridge: relative to the captions' mean size. target, budget: the
    weight of captions is the largest, of ``least`` to ``most``, that leaves ``target`` of a concept, unless captions then change by more
    than ``budget``. derived, rounds: weight and rounds of derived columns (none by default). null: directions of the empty prompt that are
    exact; empty: weight of the rest of it. subspace: directions a concept that ``hard`` removes. rank (more for many concepts), tolerance:
    of the edit as it is kept.
    """

    last: float = 1.0
    end: float = 1.0
    padding: float = 0.2
    frames: int = 24
    looked_at: int = 48
    synonym: float = 0.33
    apart: float = 0.75
    siblings: int = 8
    near: float = 0.02
    keep: float = 0.2
    ridge: float = 1e-4
    least: float = 0.1
    most: float = 1.0
    target: float = 0.05
    budget: float = 0.02
    derived: float = 0.5
    rounds: int = 0
    null: int = 12
    empty: float = 5.0
    subspace: int = 2
    rank: int = 64
    tolerance: float = 1e-3


DEFAULT = Settings()


@dataclass(frozen=True)
class _Target:
    """A concept with what was found out about it: words that mean the same, what is read in its place, words nearby that must stay."""

    concept: Concept
    synonyms: tuple[str, ...]
    anchor: str
    siblings: tuple[str, ...]


def conceptkit(job: Job, settings: Settings = DEFAULT) -> Solution:
    """Solve the concepts of a job together."""
    targets = [_target(job, concept, settings) for concept in job.concepts]
    pairs = _pairs(job, targets, settings)
    second, moved = torch.zeros(2, job.width, job.width, dtype=torch.float64)
    for number, (template, ours, theirs) in enumerate(pairs):
        if number % BATCH == 0:
            ahead = pairs[number : number + BATCH]
            job.texts.load(fill(t, word) for t, *both in ahead for word in both)
        c, a, w = _block(job.texts.prompt(template, ours), job.texts.prompt(template, theirs), settings)
        w = w * (len(job.concepts) / len(pairs))
        second += (c * w) @ c.T
        moved += ((a - c) * w) @ c.T
    erased = [word for target in targets for word in (target.concept.text, *target.synonyms)]
    captions, pooled_captions = _without(job, erased)
    stay = {word: settings.near for target in targets for word in target.siblings} | dict.fromkeys(job.keep, settings.keep)
    ridge = settings.ridge * float(captions.diagonal().mean())
    none = torch.zeros(job.width, 0, dtype=torch.float64)
    null = job.texts.context("")
    preserve = _staying(job, stay) + settings.empty * null.T @ null
    base = Problem(none, none, none[0], ridge, preserve, invariant=_null(job, settings.null), second=second, moved=moved)
    marks = [_marks(job, target) for target in targets]
    gram = job.gram.matrix

    def stated(weight: float, derived: Sequence[tuple[Tensor, Tensor]] = ()) -> Problem:
        problem = replace(base, preserve=preserve + weight * captions)
        for c, a in derived:
            problem = problem.with_columns(c, a, torch.full((c.shape[1],), settings.derived, dtype=torch.float64))
        return problem

    def left(edit: LowRank) -> float:
        return max(trace(edit, c, a, gram) for c, a in marks)

    low, high = settings.least, settings.most
    for number in range(STEPS):
        weight = math.sqrt(low * high)
        edit = minimise(stated(weight))
        job.on_step(number, STEPS + settings.rounds, {"left": left(edit)})
        if left(edit) > settings.target and distortion(edit, captions, gram) < settings.budget:
            high = weight
        else:
            low = weight
    problem = stated(low)
    edit = minimise(problem)
    derived: list[tuple[Tensor, Tensor]] = []
    for number in range(settings.rounds):
        adversary = Adversary(edit, gram, captions)
        found = [(torch.stack([adversary.derive(x) for x in c.T], 1), a) for c, a in marks]
        further = stated(low, [*derived, *found])
        attempt = minimise(further)
        job.on_step(STEPS + number, STEPS + settings.rounds, {"left": left(attempt)})
        if distortion(attempt, captions, gram) > settings.budget:
            break
        derived, problem, edit = [*derived, *found], further, attempt
    edit = edit.truncate(settings.tolerance, max(settings.rank, 4 * len(targets)), gram, captions)
    if job.hard:
        away = torch.cat([torch.linalg.svd(c - a, full_matrices=False)[0][:, : settings.subspace] for c, a in marks], 1)
        axes, sizes, _ = torch.linalg.svd(away, full_matrices=False)
        edit = annihilate(edit, axes[:, sizes > INDEPENDENT], problem)
    job.on_step(STEPS + settings.rounds, STEPS + settings.rounds, {"left": left(edit)})
    chosen: dict[str, float | str | bool] = {**asdict(settings), "captions": low, "hard": job.hard, "derived_columns": len(derived)}
    chosen["with"] = ", ".join(word for target in targets for word in target.synonyms)
    read_as = tuple(target.anchor for target in targets)
    return Solution(edit, read_as, _pooled(job, pairs, pooled_captions, settings), settings=chosen)


def _target(job: Job, concept: Concept, settings: Settings) -> _Target:
    """Looks at words near a concept: as near as a synonym goes with it, unless it is to be kept or is spoken of elsewhere in the job."""
    taken = {text.lower() for c in job.concepts for text in (c.text, c.replacement or "")}
    words = list(candidates(job.model.text, concept.text, limit=settings.looked_at, words=common_words(job.model), keep_concept=True))
    words = [word for word in words if word not in taken]
    job.texts.load(fill(PLAIN, word) for word in (concept.text, "", *words))
    origin = job.texts.prompt(PLAIN, "")
    ours = _two(job.texts.prompt(PLAIN, concept.text))
    gram = job.gram.matrix

    def size(x: Tensor) -> float:
        return math.sqrt(float(x.mul(gram @ x).sum()))

    said = size(ours - _two(origin))
    distances = {word: size(_two(job.texts.prompt(PLAIN, word)) - ours) / max(said, 1e-12) for word in words}
    kept = {word.lower() for word in job.keep}
    synonyms = tuple(word for word in words if distances[word] <= settings.synonym and word not in kept)
    others = sorted((word for word in words if distances[word] > settings.synonym and word not in kept), key=distances.__getitem__)
    anchor = concept.replacement
    if anchor is None:
        apart = [word for word in others if distances[word] >= settings.apart][: settings.looked_at // 2]
        anchor = _least_cost(job, concept, apart, settings) if apart else ""
    siblings = [word for word in others if word != anchor][: settings.siblings]
    return _Target(concept, synonyms, anchor, tuple(siblings))


def _least_cost(job: Job, concept: Concept, words: Sequence[str], settings: Settings) -> str:
    """The word that takes a concept's place at the least change to captions: one of its own kind, which also keeps pictures whole.

    The columns are the concept's, whatever the anchor, so all candidates share one solution.
    """
    templates = TEMPLATES[:4]
    job.texts.load(fill(t, word) for t in templates for word in (concept.text, *words))
    sources = [job.texts.prompt(t, concept.text) for t in templates]
    captions, gram = job.corpus.covariance, job.gram.matrix
    ridge = settings.ridge * float(captions.diagonal().mean())

    def blocks(word: str) -> tuple[Tensor, Tensor, Tensor]:
        read = [_block(source, job.texts.prompt(t, word), settings) for t, source in zip(templates, sources, strict=True)]
        c, a, w = (torch.cat(part, -1) for part in zip(*read, strict=True))
        return c, a, w / len(templates)

    c, a, w = blocks(words[0])
    down = response(Problem(c, a, w, ridge, TYPICAL * captions))

    def cost(word: str) -> float:
        c, a, _ = blocks(word)
        return distortion(LowRank(a - c, down), captions, gram)

    return min(words, key=cost)


def _pairs(job: Job, targets: Sequence[_Target], settings: Settings) -> list[tuple[str, str, str]]:
    """Template, what it says and what it is read as, over all concepts."""
    frames = min(settings.frames, max(4, TOTAL_FRAMES // len(targets)))
    words = common_words(job.model)
    pairs = []
    for target in targets:
        # Each concept draws its own, so that it is framed alike in any company.
        rng = random.Random(f"{job.seed} {target.concept.text}")
        erased = (target.concept.text, *target.synonyms)
        others = [word for word in words if not mentions(word, erased)]
        templates = [*TEMPLATES, *(FRAMES[i % len(FRAMES)].format(*rng.sample(others, 2)) for i in range(frames))]
        pairs += [(template, target.concept.text, target.anchor) for template in templates]
        pairs += [(template, word, target.anchor) for word in target.synonyms for template in islice(templates, 0, None, 2)]
    return pairs


def _block(source: Prompt, anchor: Prompt, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Columns, anchors (width, n) and weights (n,) of a prompt and its twin, from the last sub-token on.

    Words after the concept and the end token are aligned with theirs, padding with the padding in the same place.
    """
    positions = torch.arange(source.last, len(source.context))
    shifted = (positions + anchor.end - source.end).clamp(0, len(anchor.context) - 1)
    theirs = torch.where(positions <= source.end, shifted, positions)
    theirs[0] = max(anchor.last, 0)
    weights = torch.where(positions < source.end, settings.last, torch.where(positions == source.end, settings.end, settings.padding))
    return source.context[positions].T, anchor.context[theirs].T, weights.double()


def _two(prompt: Prompt) -> Tensor:
    """Last sub-token and end token, (width, 2)."""
    return prompt.context[[max(prompt.last, 0), prompt.end]].T


def _marks(job: Job, target: _Target) -> tuple[Tensor, Tensor]:
    """Where a concept stands in a plain prompt, and its anchor: each (width, 2)."""
    return _two(job.texts.prompt(PLAIN, target.concept.text)), _two(job.texts.prompt(PLAIN, target.anchor))


def _without(job: Job, erased: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """The captions' second moments (context and pooled) without those that mention what is erased."""
    captions = job.all_captions
    out = [caption for caption in captions if mentions(caption, erased)]
    if len(out) == len(captions):
        raise ValueError("every caption mentions a concept to erase: give captions of other things too")
    total, pooled = job.corpus.covariance * len(captions), job.corpus.pooled
    pooled = None if pooled is None else pooled * len(captions)
    for caption in out:
        context, row = job.texts.context(caption), job.texts.pooled(caption)
        total = total - context.T @ context
        if pooled is not None and row is not None:
            pooled = pooled - torch.outer(row, row)
    rest = len(captions) - len(out)
    return total / rest, None if pooled is None else pooled / rest


def _staying(job: Job, words: Mapping[str, float]) -> Tensor:
    """Weighted second moments of prompts about words that must stay, (width, width)."""
    templates = TEMPLATES[:4]
    job.texts.load(fill(t, word) for t in templates for word in words)
    total = torch.zeros(job.width, job.width, dtype=torch.float64)
    for word, weight in words.items():
        for template in templates:
            prompt = job.texts.prompt(template, word)
            rows = prompt.context[prompt.first :]
            total += weight / len(templates) * rows.T @ rows
    return total


def _null(job: Job, count: int) -> Tensor:
    """What must not change at all: the start token, and the main directions of the rest of the empty prompt, (width, 1 + count)."""
    context = job.texts.context("")
    start = context[:1].T / context[0].norm()
    rest = context[1:].T
    rest = rest - start @ (start.T @ rest)
    axes, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    return torch.cat([start, axes[:, :count][:, sizes[:count] > 1e-6 * sizes[0]]], 1)


def _pooled(job: Job, pairs: Sequence[tuple[str, str, str]], captions: Tensor | None, settings: Settings) -> LowRank | None:
    """The same problem for the pooled text, one column a prompt."""
    if captions is None:
        return None
    columns, anchors = [], []
    for template, ours, theirs in pairs:
        c, a = job.texts.pooled(fill(template, ours)), job.texts.pooled(fill(template, theirs))
        if c is not None and a is not None:
            columns.append(c)
            anchors.append(a)
    null = job.texts.pooled("")
    c, a = torch.stack(columns, 1), torch.stack(anchors, 1)
    weights = torch.full((c.shape[1],), len(job.concepts) / c.shape[1], dtype=torch.float64)
    ridge = settings.ridge * float(captions.diagonal().mean())
    problem = Problem(c, a, weights, ridge, TYPICAL * captions, invariant=None if null is None else null[:, None])
    return minimise(problem).truncate(settings.tolerance, settings.rank, job.gram.pooled, captions)
