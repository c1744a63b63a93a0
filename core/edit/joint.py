"""The pack's own method: what the field's closed forms do well, solved as one problem.

Wherever a prompt says a concept (its last sub-token, the words after it, end token and padding, in many prompts) it is read as in the twin
prompt that says the anchor instead, and every other concept of the call as its own anchor; captions and near words keep their meaning; the
start token is exact, the empty prompt too where the text is wide enough for it; the pooled text is edited as well.

Every part of it earns its place on the demo model (``conceptkit bench edit``, set "ablation"). Two things the literature suggests did not
and are left out: embeddings that would bring the concept back, derived and solved for as well, moved near words a quarter further; a weight
of the end token's own changed nothing, so it counts as the words do.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..phrases import Concept
from .job import Job, Solution
from .report import distortion, trace
from .solve import LowRank, Problem, annihilate, minimise
from .texts import TEMPLATES, common_words, fill, mentions, words_of
from .words import SYNONYM, marked

FRAMES = (
    "a photo of a {} and a {0}",
    "a photo of a {0} and a {}",
    "a photo of a {0} {}",
    "a photo of a {} {0}",
    "a picture of a {0} {} and a {1}",
    "a {} {0} and a {1}",
    "a photo of a {} {0} and a {1} {2}",
    "a photo of a {0} {1} and a {2} {}",
)
"""Prompts that say the concept beside other words."""

STAYING = (FRAMES[2], FRAMES[5])
"""Those that words which stay are put in: what changes beside a concept would change them as well."""
STEPS = 6
"""Bisections of the weight of captions."""
INDEPENDENT = 0.05
"""Smallest singular value, relative to the largest, of a direction that says something of its own."""
COLUMNS = 2
"""Directions that are a concept's own: where it is said, and at the end of the prompt."""
TYPICAL = 0.1
"""A weight of captions, for the pooled text."""
AHEAD = 8
"""Words that stay, whose prompts, two or more each, are encoded together."""
TOTAL_FRAMES = 1024
"""Prompts over all concepts of one call, beyond which each concept gets fewer."""


@dataclass(frozen=True)
class Settings:
    """What the method weighs. Weights are relative to one prompt's sum over positions.

    said, padding: of a concept's positions, from its last sub-token to the end token, and after. frames: prompts with other words.
    synonyms: whether words that say the same go with a concept. kind: whether a word of its kind is read in its place, or nothing.
    siblings: words near a concept that stay, each with weight ``near``, those of more weight among them. keep: weight of a word to keep,
    and, where ``related``, of those that say something of a concept's own (its parts, what holds it) or the same as its anchor. ridge:
    relative to the captions' mean size. target, budget: the weight of captions is the largest, of ``least`` to ``most``, that leaves
    ``target`` of a concept, unless captions then change by more than ``budget``. null: share of the width that the empty prompt's exact
    directions may take up: all there are where the text is 608 wide, the main ones where it is narrower; empty: weight of the rest. rank
    (more for many concepts), tolerance: of the edit as it is kept.
    """

    said: float = 1.0
    padding: float = 0.2
    frames: int = 24
    synonyms: bool = True
    kind: bool = True
    siblings: int = 24
    near: float = 0.005
    related: bool = True
    keep: float = 0.2
    ridge: float = 1e-4
    least: float = 0.1
    most: float = 1.0
    target: float = 0.1
    budget: float = 0.02
    null: float = 0.125
    empty: float = 500.0
    rank: int = 64
    tolerance: float = 1e-3


DEFAULT = Settings()


@dataclass(frozen=True)
class _Twin:
    """A prompt in parts (what it says, what that is read as) of which some are equal."""

    parts: tuple[tuple[str, str], ...]

    @property
    def ours(self) -> str:
        return " ".join(said for said, _ in self.parts)

    @property
    def theirs(self) -> str:
        return " ".join(read for _, read in self.parts if read)


@dataclass(frozen=True)
class _Target:
    """A concept with the words erased with it, what is read in its place, and the words that stay: those that say something of its
    own or the same as the anchor, and further ones nearby."""

    concept: Concept
    synonyms: tuple[str, ...]
    anchor: str
    related: tuple[str, ...]
    siblings: tuple[str, ...]


def conceptkit(job: Job, settings: Settings = DEFAULT) -> Solution:
    """Solve the concepts of a job together. Raises ValueError for more of them than the text is wide enough for."""
    exact = _null(job, settings.null)
    most = (job.width - exact.shape[1]) // COLUMNS
    if len(job.concepts) > most:
        raise ValueError(
            f"{len(job.concepts)} concepts are too many for a text {job.width} wide: what is said of them leaves no room for other words; "
            f"erase at most {most}"
        )
    targets = _targets(job, settings)
    twins = _twins(job, targets, settings)
    erased = [word for target in targets for word in (target.concept.text, *target.synonyms)]
    captions, pooled_captions = _without(job, erased)
    marks = [marked(job.texts, target.concept.text, target.anchor) for target in targets]
    stay = _staying(job, targets, settings)
    edit, cost, weight = _weighed(job, _stated(job, twins, stay, exact, captions, settings), captions, marks, settings)
    gram = job.gram.matrix
    edit = edit.truncate(settings.tolerance, max(settings.rank, 4 * len(targets)), gram, captions)
    if job.hard:
        # Their anchors stay where they are: a projection alone would move both sides to the middle.
        exact = torch.cat([exact, _basis(torch.cat([a for _, a in marks], 1))], 1)
        away = _basis(torch.cat([_basis(c - a) for c, a in marks], 1))
        if exact.shape[1] + away.shape[1] > job.width:
            raise ValueError(
                f"{len(targets)} concepts cannot be erased hard in a text {job.width} wide: erase fewer at once, or turn hard off"
            )
        edit = annihilate(edit, away, replace(cost, invariant=exact))
    job.on_step(STEPS, STEPS, {"left": _left(edit, marks, gram)})
    chosen = {**asdict(settings), "captions": weight, "hard": job.hard, "parts": job.parts}
    read_as, synonyms = tuple(target.anchor for target in targets), tuple(target.synonyms for target in targets)
    return Solution(edit, read_as, synonyms, _pooled(job, twins, pooled_captions, settings), settings=chosen)


def _stated(job: Job, twins: Sequence[_Twin], stay: Tensor, exact: Tensor, captions: Tensor, settings: Settings) -> Problem:
    """The problem but for what captions cost, their mean size in its ridge apart."""
    second, moved = torch.zeros(2, job.width, job.width, dtype=torch.float64)
    for twin in job.texts.ahead(twins, lambda twin: (twin.ours, twin.theirs)):
        c, a, w = _block(job, twin, settings)
        w = w * (len(job.concepts) / len(twins))
        second.addmm_(c * w, c.T)
        moved.addmm_((a - c) * w, c.T)
    none = torch.zeros(job.width, 0, dtype=torch.float64)
    null = job.texts.context("")
    preserve = stay.addmm_(null.T, null, alpha=settings.empty)
    ridge = settings.ridge * float(captions.diagonal().mean())
    return Problem(none, none, none[0], ridge, preserve, invariant=exact, second=second, moved=moved)


def _weighed(
    job: Job, stated: Problem, captions: Tensor, marks: Sequence[tuple[Tensor, Tensor]], settings: Settings
) -> tuple[LowRank, Problem, float]:
    """The edit at the largest weight of captions that leaves little of the concepts; what anything else costs in it, as a problem without
    columns; and that weight."""
    gram = job.gram.matrix

    def problem(weight: float) -> Problem:
        preserve = captions * weight
        return replace(stated, preserve=preserve if stated.preserve is None else preserve.add_(stated.preserve))

    def too_heavy(number: int, weight: float) -> bool:
        edit = minimise(problem(weight))
        left = _left(edit, marks, gram)
        job.on_step(number, STEPS, {"left": left})
        return left > settings.target and distortion(edit, captions, gram) < settings.budget

    low, high = settings.least, settings.most
    for number in range(STEPS):
        weight = math.sqrt(low * high)
        low, high = (low, weight) if too_heavy(number, weight) else (weight, high)
    weighed = problem(low)
    edit = minimise(weighed)
    none = torch.zeros(job.width, 0, dtype=torch.float64)
    cost = replace(weighed, columns=none, anchors=none, weights=none[0], second=None, moved=None)
    return edit, cost, low


def _left(edit: LowRank, marks: Sequence[tuple[Tensor, Tensor]], gram: Tensor) -> float:
    """The trace of the concept of which most is left."""
    return max(trace(edit, c, a, gram) for c, a in marks)


def _targets(job: Job, settings: Settings) -> list[_Target]:
    """Each concept with the words that are erased with it, the word read in its place, and those that must stay.

    No anchor that is found means the same as any concept of the job, holds it or is part of it, so of several that are erased together
    none takes another's place; and no word stays that is erased with another.
    """
    words, texts = job.words, [concept.text for concept in job.concepts]
    kin = [words.kin(text) for text in texts]
    # The words of a phrase say other things by themselves: they neither go with it nor take its place.
    named = {word for text in texts for word in words_of(text)} | {word.lower() for word in job.keep}
    named |= {text.lower() for concept in job.concepts for text in (concept.text, concept.replacement or "")}
    along: dict[str, int] = {}
    for number, (text, around) in enumerate(zip(texts, kin, strict=True)):
        mine = [*(around.synonyms if settings.synonyms else ()), *(around.parts if job.parts == "erase" else ())]
        for word in mine:
            if word in named:
                continue
            # A word near two concepts goes with the nearer one.
            other = along.get(word)
            if other is None or words.distances(text, [word]) < words.distances(texts[other], [word]):
                along[word] = number
    erased = {text.lower() for text in texts} | set(along)
    bound = {word for around in kin for word in (*around.synonyms, *around.bound)} | erased
    listed = [word for word in dict.fromkeys(word for around in kin for word in around.others) if word not in bound and word not in named]
    apart = {word for word, distance in zip(listed, words.clearance(texts, listed).tolist(), strict=True) if distance > SYNONYM}
    targets = []
    for number, (concept, around) in enumerate(zip(job.concepts, kin, strict=True)):
        anchor = concept.replacement
        if anchor is None:
            free = [word for word in around.others if word in apart]
            anchor = words.kind(concept.text, free) if free and settings.kind else ""
        alike = words.kin(anchor).synonyms if anchor else ()
        staying = [word for word in dict.fromkeys((*around.bound, *alike)) if word not in (*erased, anchor)]
        others = [word for word in around.others if word not in (*erased, *staying, anchor)]
        away = dict(zip(others, words.distances(concept.text, others).tolist(), strict=True))
        others.sort(key=away.__getitem__)
        synonyms = tuple(word for word, owner in along.items() if owner == number)
        rest = max(0, settings.siblings - len(staying))
        targets.append(_Target(concept, synonyms, anchor, tuple(staying) if settings.related else (), tuple(others[:rest])))
    return targets


def anchors(job: Job, settings: Settings = DEFAULT) -> tuple[str, ...]:
    """What each concept of a job is read as."""
    return tuple(target.anchor for target in _targets(job, settings))


def _twins(job: Job, targets: Sequence[_Target], settings: Settings) -> list[_Twin]:
    """Prompts and what they are read as, over all concepts: each alone, beside other words, and beside the other concepts of the call."""
    frames = min(settings.frames, max(4, TOTAL_FRAMES // len(targets)))
    words = common_words(job.model)
    read_as = {word: target.anchor for target in targets for word in (target.concept.text, *target.synonyms)}
    plain = [(template,) for template in TEMPLATES if not mentions(template, read_as)]
    twins = []
    for number, target in enumerate(targets):
        # Each concept draws its own, so that it is framed alike in any company.
        rng = random.Random(f"{job.seed} {target.concept.text}")
        erased = (target.concept.text, *target.synonyms)
        others = [word for word in words if not mentions(word, erased)]
        framed = [*plain, *((FRAMES[i % len(FRAMES)], *rng.sample(others, 3)) for i in range(frames))]
        together = min(frames, len(FRAMES) * (len(targets) - 1))
        company = [targets[(number + 1 + i // len(FRAMES)) % len(targets)].concept.text for i in range(together)]
        framed += [(FRAMES[i % len(FRAMES)], other, *rng.sample(others, 2)) for i, other in enumerate(company)]
        twins += [_twin(target.concept.text, read_as, *frame) for frame in framed]
        twins += [_twin(word, read_as, *frame) for word in target.synonyms for frame in framed]
    return twins


def _twin(concept: str, read_as: Mapping[str, str], template: str, *others: str) -> _Twin:
    """A template that says a concept and other words, in which everything that is erased is read as its anchor."""
    said = {"{}": concept} | {f"{{{i}}}": word for i, word in enumerate(others)}
    pieces = [said.get(piece, piece).strip() for piece in re.split(r"(\{\d?\})", template)]
    return _Twin(tuple((piece, read_as.get(piece, piece)) for piece in pieces if piece))


def _block(job: Job, twin: _Twin, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Columns, anchors (width, n) and weights (n,) of a prompt and its twin, from the last sub-token of the first concept on.

    Words that both say and the end tokens are aligned, a concept with the last sub-token of its anchor (the word before, where it is read
    as nothing), padding with the padding in the same place.
    """
    source, anchor = job.texts.context(twin.ours), job.texts.context(twin.theirs)
    at, instead, start, end = [], [], 1, 1
    for said, read in twin.parts:
        count, other = len(job.texts.tokens(said)), len(job.texts.tokens(read))
        if said != read:
            at.append(start + count - 1)
            instead.append(end + other - 1)
        elif at:
            at += range(start, start + count)
            instead += range(end, end + other)
        start, end = start + count, end + other
    last = len(source) - 1
    padding = range(start + 1, last + 1)
    positions = torch.tensor([*at, start, *padding])
    theirs = torch.tensor([*instead, end, *(min(max(place, end + 1), last) for place in padding)])
    weights = torch.full((len(positions),), settings.padding, dtype=torch.float64)
    weights[: len(at) + 1] = settings.said
    return source[positions].T, anchor[theirs].T, weights


def _basis(columns: Tensor) -> Tensor:
    """Orthonormal directions of columns (width, n), those of almost no size left out."""
    axes, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    return axes[:, sizes > INDEPENDENT * sizes[0]]


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
        total.addmm_(context.T, context, alpha=-1)
        if pooled is not None and row is not None:
            pooled.addr_(row, row, alpha=-1)
    rest = len(captions) - len(out)
    return total.div_(rest), None if pooled is None else pooled.div_(rest)


def _staying(job: Job, targets: Sequence[_Target], settings: Settings) -> Tensor:
    """Weighted second moments of prompts about words that must stay, (width, width): those that matter more beside other words as well."""
    erased = [word for target in targets for word in (target.concept.text, *target.synonyms)]
    others = [word for word in common_words(job.model) if not mentions(word, erased)]
    light = dict.fromkeys((word for target in targets for word in target.siblings), settings.near)
    heavy = dict.fromkeys((*(word for target in targets for word in target.related), *job.keep), settings.keep)
    prompts = {word: [fill(template, word) for template in TEMPLATES[:2]] for word in light | heavy}
    for word in heavy if len(others) >= 3 else ():
        rng = random.Random(f"{job.seed} {word}")
        prompts[word] += [_twin(word, {}, frame, *rng.sample(others, 3)).ours for frame in STAYING]
    total = torch.zeros(job.width, job.width, dtype=torch.float64)
    for word in job.texts.ahead(tuple(prompts), prompts.__getitem__, AHEAD):
        for prompt in prompts[word]:
            rows = job.texts.context(prompt)[1:]
            total.addmm_(rows.T, rows, alpha=(light | heavy)[word] / len(prompts[word]))
    return total


def _null(job: Job, share: float) -> Tensor:
    """What must not change at all: the start token, and the main directions of the rest of the empty prompt, (width, 1 + count), of which
    there are at most ``share`` of the width."""
    context = job.texts.context("")
    start = context[:1].T / context[0].norm()
    rest = context[1:].T
    rest = rest - start @ (start.T @ rest)
    axes, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    count = min(int(share * job.width), int((sizes > 1e-6 * sizes[0]).sum()))
    return torch.cat([start, axes[:, :count]], 1)


def _pooled(job: Job, twins: Sequence[_Twin], captions: Tensor | None, settings: Settings) -> LowRank | None:
    """The same problem for the pooled text, one column a prompt."""
    if captions is None:
        return None
    columns, anchors = [], []
    for twin in twins:
        c, a = job.texts.pooled(twin.ours), job.texts.pooled(twin.theirs)
        if c is not None and a is not None:
            columns.append(c)
            anchors.append(a)
    null = job.texts.pooled("")
    c, a = torch.stack(columns, 1), torch.stack(anchors, 1)
    weights = torch.full((c.shape[1],), len(job.concepts) / c.shape[1], dtype=torch.float64)
    ridge = settings.ridge * float(captions.diagonal().mean())
    problem = Problem(c, a, weights, ridge, TYPICAL * captions, invariant=None if null is None else null[:, None])
    return minimise(problem).truncate(settings.tolerance, settings.rank, job.gram.pooled, captions)
