"""From words to an edit and its report: the verb of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ..model import Model, NonFinite
from ..phrases import Concept, parse_concepts, parse_list
from ..progress import OnStep, silent
from ..vocabulary import STOP_WORDS, candidates, is_known, stem
from .context_edit import ContextEdit, single
from .job import Job, Parts
from .joint import conceptkit
from .layers import cross_attention, in_single
from .presets import PRESETS, Preset
from .report import Adversary, Clash, ConceptTrace, Report, WordShift, distortion, shift, trace
from .solve import LowRank
from .texts import check_concepts, common_words, fill, words_of
from .words import PLAIN, SYNONYM, marked

METHODS: Mapping[str, Preset] = {
    "conceptkit": Preset(conceptkit),
    **PRESETS,
}
"""Every method by name, the default first."""

EXACT = 1e-7
"""What float32 factors cannot tell from nothing, relative."""
MAX_LAYER_COLUMNS = 64
"""Concepts' columns that are traced layer by layer; of further concepts only the sum over layers is."""
NEIGHBOURS = 24
"""Words near the concepts that are looked at for damage."""


def solve_edit(
    model: Model,
    concepts: str | Sequence[Concept | str],
    *,
    keep: str | Sequence[str] = (),
    method: str = "conceptkit",
    strength: float = 1.0,
    hard: bool = False,
    parts: Parts = "keep",
    captions: Sequence[str] | None = None,
    cache: Path | None = None,
    seed: int = 0,
    on_step: OnStep = silent,
) -> ContextEdit:
    """The edit that erases ``concepts`` (or puts their replacements in their place), solved jointly, with its report.

    No image is generated, and nothing in the model is changed.

    model: its text encoder and the weights that read the text; it needs no denoiser.
    concepts: "circle" or "circle -> square", as `parse_concepts` reads them. None gives the identity.
    keep: words that must stay as they are, a sequence or a str as `parse_list` reads it. Many of them may leave more of the concepts.
    method: a name in ``METHODS``.
    strength: 1 for the whole edit, 0 for none (the identity). Above 1, concepts are pushed past what they are read as.
    hard: no embedding at all is read as exactly a concept ("conceptkit" only). Similar words suffer more; adversarial embeddings may still
        recover it.
    parts: whether words that are parts of a concept (robin of bird) stay, as far as they can, or are erased with it ("conceptkit" only).
    captions: texts that must keep their meaning, the pack's own by default. What none of them says may change.
    cache: a folder for what depends on the checkpoint and the captions alone, which makes the next edit faster.
    seed: of the methods that draw random numbers.
    on_step: counts the steps of the method; raising from it cancels.

    Raises ValueError for concepts that cannot be meant, an unknown method or a singular system, UnsupportedModel for a model whose weights
    cannot be read, NonFinite when anything comes out as NaN or infinity, and whatever ``on_step`` raises.
    """
    # What is asked must be possible, before anything is computed.
    listed = parse_concepts(concepts)
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    if hard and method != "conceptkit":
        raise ValueError(f"hard erasing is part of the method 'conceptkit' and {method!r} has none: choose that method, or turn hard off")
    if parts not in get_args(Parts):
        raise ValueError(f"parts is {parts!r}: choose one of {', '.join(get_args(Parts))}")
    if parts != "keep" and method != "conceptkit":
        raise ValueError(f"{method!r} erases no parts of a concept: choose the method 'conceptkit', or keep the parts")
    if not math.isfinite(strength):
        raise ValueError(f"the strength is {strength}: give a number, 0 for no edit and 1 for the whole")
    keep = parse_list(keep)
    check_concepts(model.text, listed, keep)
    # Solve in float64.
    job = Job(model, listed, keep, captions, cache, seed, hard, parts, on_step)
    if not listed or strength == 0:
        return ContextEdit.identity(model.family, job.width)
    model.before_call()
    if not torch.isfinite(job.texts.context(listed[0].text)).all():
        raise NonFinite("the text encoder returns NaN or infinity: load it in fp32, and check any LoRA on it")
    solution = METHODS[method].solve(job)
    model.before_call()
    # As files keep it, and measured as such.
    # Orthogonal factors: the solver's own may cancel each other, which the precision of files does not forgive.
    context = solution.context if solution.gains else solution.context.truncate(EXACT, job.width)
    edit = ContextEdit(
        family=model.family,
        context=single(context),
        pooled=None if solution.pooled is None else single(solution.pooled),
        gains=solution.gains,
        concepts=listed,
        anchors=solution.anchors,
        synonyms=solution.synonyms,
        keep=keep,
        method=method,
        settings={**solution.settings, "seed": seed},
        model=job.gram.key,
    ).scale(strength)
    return replace(edit, report=_measure(job, edit))


def report_edit(model: Model, edit: ContextEdit, *, captions: Sequence[str] | None = None, cache: Path | None = None) -> Report:
    """Figures of any edit on a model, without a picture. Raises ValueError for an edit of another width, and as ``solve_edit`` does."""
    job = Job(model, edit.concepts, edit.keep, captions, cache)
    if edit.width != job.width:
        raise ValueError(f"the edit is for text {edit.width} wide and this model's is {job.width}: use the model family it was solved on")
    return _measure(job, edit)


def _measure(job: Job, edit: ContextEdit) -> Report:
    found = LowRank(edit.context.u.double().cpu(), edit.context.v.double().cpu())
    gram, covariance = job.gram.matrix, job.corpus.covariance
    erased = [word for words in edit.synonyms for word in words]
    related = _related(job, erased)
    near = _near(job, [*erased, *related])
    parts = _parts(job)
    job.texts.load(fill(PLAIN, word) for word in (*job.keep, *near, *parts, *related))
    marks = [marked(job.texts, concept.text, anchor) for concept, anchor in zip(edit.concepts, edit.anchors, strict=True)]
    adversary = Adversary(found, gram, covariance)
    layers, highest = _by_layer(job, edit, marks)
    concepts = tuple(
        ConceptTrace(
            concept.text,
            trace(found, c, a, gram),
            highest[i] if i < len(highest) else trace(found, c, a, gram),
            max(adversary.plausible(x, y) for x, y in zip(c.T, a.T, strict=True)),
            max(adversary.anything(x, y) for x, y in zip(c.T, a.T, strict=True)),
        )
        for i, (concept, (c, a)) in enumerate(zip(job.concepts, marks, strict=True))
    )
    shifts = {word: shift(found, *marked(job.texts, word, ""), gram) for word in (*job.keep, *near, *parts, *related)}
    neighbours, kin = (
        tuple(sorted((WordShift(word, shifts[word]) for word in words), key=lambda w: (-w.shift, w.word))) for words in (near, related)
    )
    null = job.texts.context("").T
    return Report(
        concepts=concepts,
        layers=layers,
        kept=tuple(WordShift(word, shifts[word]) for word in job.keep),
        neighbours=neighbours,
        distortion=distortion(found, covariance, gram),
        null_drift=max(shift(found, x[:, None], torch.zeros_like(x[:, None]), gram) for x in null.T),
        pooled_leak=_pooled_leak(job, edit),
        parts=tuple(WordShift(word, shifts[word]) for word in parts),
        unknown=_unknown(job),
        related=kin,
        clashes=_clashes(job, edit),
    )


def _near(job: Job, along: Sequence[str]) -> tuple[str, ...]:
    """Words near the concepts that are neither concepts, nor to be kept, nor go ``along`` with a concept."""
    each = max(4, NEIGHBOURS // max(1, len(job.concepts)))
    said = {word for concept in job.concepts for word in concept.text.lower().split()} | {word.lower() for word in (*job.keep, *along)}
    words: dict[str, None] = {}
    for concept in job.concepts[:NEIGHBOURS]:
        pool = candidates(job.model.text, concept.text, limit=each + len(said), words=common_words(job.model), keep_concept=True)
        words |= dict.fromkeys([word for word in pool if word not in said][:each])
    return tuple(words)


def _related(job: Job, erased: Sequence[str]) -> tuple[str, ...]:
    """Parts of the concepts and words that hold them, but for those that are concepts, erased with one, or to be kept."""
    out = {*erased, *(concept.text.lower() for concept in job.concepts), *(word.lower() for word in job.keep)}
    kin = [job.words.kin(concept.text) for concept in job.concepts[:NEIGHBOURS]]
    return tuple(word for word in dict.fromkeys(word for k in kin for word in (*k.parts, *k.holders)) if word not in out)


def _clashes(job: Job, edit: ContextEdit) -> tuple[Clash, ...]:
    """Anchors that mean the same as a concept of the job, hold it or are part of it."""
    found = []
    for concept, anchor in list(zip(edit.concepts, edit.anchors, strict=True))[:NEIGHBOURS]:
        for other in edit.concepts[:NEIGHBOURS] if anchor.strip() else ():
            same = float(job.words.distances(other.text, [anchor])) <= SYNONYM
            kin = job.words.kin(other.text)
            if same or anchor.lower() in (*kin.parts, *kin.holders):
                found.append(Clash(concept.text, anchor, other.text, same))
    return tuple(found)


def _parts(job: Job) -> tuple[str, ...]:
    """The words of concepts of several words, but for those that only place and relate things."""
    phrases = [words_of(concept.text) for concept in job.concepts]
    erased = {word for phrase in phrases if len(phrase) == 1 for word in phrase}
    words = dict.fromkeys(word for phrase in phrases if len(phrase) > 1 for word in phrase)
    return tuple(word for word in words if word not in STOP_WORDS and word not in erased and is_known(job.model.text, word))


def _unknown(job: Job) -> tuple[str, ...]:
    """Words of the concepts that are not among those the model knows, where it says which it knows."""
    if job.model.words is None:
        return ()
    known = {stem(word) for word in job.model.words}
    words = dict.fromkeys(word for concept in job.concepts for word in words_of(concept.text) if word not in STOP_WORDS)
    return tuple(word for word in words if stem(word) not in known)


def _by_layer(job: Job, edit: ContextEdit, marks: Sequence[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], list[float]]:
    """Path to trace over the concepts, and per concept its highest; one pass over the weights."""
    shown = marks[: MAX_LAYER_COLUMNS // 2]
    if not shown:
        return {}, []
    c, a = (torch.cat(part, 1).float() for part in zip(*shown, strict=True))
    layers, highest = {}, [-math.inf] * len(shown)
    u, v = edit.context.u.cpu(), edit.context.v.cpu()
    coordinates = v.T @ c
    for path, _, weight in in_single(cross_attention(job.model), edit.width):
        gains = edit.gains.get(path)
        moved = c + (u if gains is None else u * torch.tensor(gains, dtype=u.dtype)) @ coordinates
        after, away = (weight @ torch.cat([moved - a, c - a], 1)).chunk(2, 1)
        part, whole = (after * away).sum(0), away.square().sum(0)
        layers[path] = float(part.sum() / whole.sum())
        each = part.view(-1, 2).sum(1) / whole.view(-1, 2).sum(1)
        highest = [max(h, float(e)) for h, e in zip(highest, each, strict=True)]
    return layers, highest


def _pooled_leak(job: Job, edit: ContextEdit) -> float | None:
    gram = job.gram.pooled
    if gram is None or not edit.concepts:
        return None
    pairs = []
    for concept, anchor in zip(edit.concepts, edit.anchors, strict=True):
        ours, theirs = (job.texts.prompt(PLAIN, text).pooled for text in (concept.text, anchor))
        if ours is not None and theirs is not None:
            pairs.append((ours, theirs))
    c, a = (torch.stack(part, 1) for part in zip(*pairs, strict=True))
    part = LowRank.identity(len(gram)) if edit.pooled is None else LowRank(edit.pooled.u.double().cpu(), edit.pooled.v.double().cpu())
    return trace(part, c, a, gram)
