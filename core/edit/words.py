"""What a model's own words are to a concept, from its text alone: which say the same, which hold it or are parts of it, which are its kind.

A word is what the model's attention reads of it in a plain prompt (last sub-token and end token, by the Gram matrix of the weights that
read them), less what a word says on average. Among the words nearest to a concept, what they all share is taken out as well: words that
still point its way hold the concept or are part of it (bird for robin), another of its kind (raven) does not. Words of a kind take the
same company, so candidates for an anchor are also compared by how they and other words change one another in a prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..vocabulary import candidates
from .solve import root
from .texts import TEMPLATES, Prompt, Texts, common_words, fill

if TYPE_CHECKING:
    from .job import Job

PLAIN = TEMPLATES[0]
COMPANY = "a photo of a {0} {} {1} and a {2} {3}"
"""A word between others: what comes after it is encoded with it in mind."""
COMPANIES = 4
"""Prompts of a word in company. Eight find no more words of a concept's kind on the demo model, two a tenth fewer."""
REFERENCE = 24
"""Words of the vocabulary that say what a word says on average, and that keep company."""
LOOKED_AT = 96
"""Words by their token embeddings that are looked at, beside a concept; over all concepts of a call at most ``TOTAL``."""
TOTAL = 4096
SYNONYM = 0.33
"""Distance from a concept, as a share of what it says, within which a word says the same."""
AROUND = 24
"""Nearest words whose common part is taken out to see which are more than of a kind."""
BOUND = 0.2
"""Cosine beyond which what such a word says beyond the common part is the concept's: no picture of it is sure to be without the concept."""
SHARE = 0.2
"""Of a concept in a word, and of the word in the concept, from which one is part of the other: a fifth, as reports count what is left."""
GENERAL = 0.75
"""Length, relative to the concept's, below which a word says too little to be of its kind: one for things of many kinds."""
COMPARED = 16
"""Nearest words that are compared in company."""
AHEAD = 4
"""Words whose prompts, ``COMPANIES`` each, are encoded together."""


@dataclass(frozen=True)
class Kin:
    """Words around a concept, each nearest first.

    synonyms: say the same. parts: drawn where the concept is asked for, among others (robin for bird). holders: drawn as the concept, among
    others (bird for robin). bound: all that say something of the concept's own, parts and holders among them. others: the rest.
    """

    synonyms: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    bound: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(eq=False)
class Words:
    """The words of a job's model, as far as its concepts ask for them."""

    job: Job
    _said: dict[str, Tensor] = field(default_factory=dict)
    _kin: dict[str, Kin] = field(default_factory=dict)
    _companies: dict[str, Tensor] = field(default_factory=dict)

    def said(self, texts: Iterable[str]) -> Tensor:
        """What the model reads of each of ``texts`` in a plain prompt, (len(texts), 2 width), float32: Euclidean distances are those its
        attention makes."""
        listed = list(texts)
        missing = [text for text in dict.fromkeys(listed) if text not in self._said]
        for text in self.job.texts.ahead(missing, lambda text: [fill(PLAIN, text)]):
            self._said[text] = self._read(two(self.job.texts.prompt(PLAIN, text)).T)
        return torch.stack([self._said[text] for text in listed]) if listed else torch.zeros(0, 2 * self.job.width)

    def distances(self, concept: str, texts: Sequence[str]) -> Tensor:
        """How far each of ``texts`` is from ``concept``, as a share of what that says, (len(texts),)."""
        ours, nothing = self.said([concept, ""])
        return (self.said(texts) - ours).norm(dim=1) / (ours - nothing).norm().clamp_min(1e-12)

    def clearance(self, concepts: Sequence[str], texts: Sequence[str]) -> Tensor:
        """The distance of each of ``texts`` from the nearest of ``concepts``, each by its own measure, (len(texts),)."""
        ours = self.said(concepts)
        sizes = (ours - self.said([""])).norm(dim=1).clamp_min(1e-12)
        return (torch.cdist(self.said(texts), ours, compute_mode="donot_use_mm_for_euclid_dist") / sizes).amin(1)

    def looked_at(self, concept: str) -> list[str]:
        """The words nearest to a concept by their token embeddings, itself left out."""
        limit = max(COMPARED, min(LOOKED_AT, TOTAL // max(1, len(self.job.concepts))))
        words = candidates(self.job.model.text, concept, limit=limit, words=common_words(self.job.model), keep_concept=True)
        return [word for word in words if word != concept.lower()]

    def kin(self, concept: str) -> Kin:
        """The words looked at beside a concept, sorted by what they are to it."""
        if concept not in self._kin:
            self._kin[concept] = self._sorted(concept, self.looked_at(concept))
        return self._kin[concept]

    def kind(self, concept: str, words: Sequence[str]) -> str:
        """That of ``words`` which is most of a concept's kind: by what it says and by the company it keeps, of the ``COMPARED`` that say
        most of what the concept says. Words that say much less than it are not taken while there are others."""
        ours, theirs = self.said([concept])[0] - self._average, self.said(words) - self._average
        enough = (theirs.norm(dim=1) >= GENERAL * ours.norm()).nonzero()[:, 0].tolist() or range(len(words))
        cosines = _cosines(theirs, ours)
        best = sorted(enough, key=lambda i: -float(cosines[i]))[:COMPARED]
        near = [words[i] for i in best]
        kept = torch.stack([self._company(word) for word in self.job.texts.ahead(near, self._in_company, AHEAD)])
        company = torch.cat([kept, self._company(concept)[None]])
        company = company - company.mean(0)
        return words[best[int((cosines[best] + _cosines(company[:-1], company[-1])).argmax())]]

    def _sorted(self, concept: str, words: Sequence[str]) -> Kin:
        distances = self.distances(concept, words)
        ours = self.said([concept])[0] - self._average
        order = _cosines(self.said(words) - self._average, ours).argsort(descending=True, stable=True).tolist()
        synonyms = tuple(words[i] for i in order if distances[i] <= SYNONYM)
        near = [words[i] for i in order if distances[i] > SYNONYM]
        around, others = near[:AROUND], near[AROUND:]
        if not around:
            return Kin(synonyms)
        rows = self.said(around) - self._average
        beyond = _cosines(rows - rows.mean(0), ours - rows.mean(0)) > BOUND
        parts: list[str] = []
        holders: list[str] = []
        for i, held in enumerate(_shares(ours, rows)):
            if held > SHARE:
                others_rows = torch.cat([ours[None], rows[:i], rows[i + 1 :]])
                holds = _shares(rows[i], others_rows)[0]
                if holds > SHARE:
                    (parts if holds > held else holders).append(around[i])
        bound = tuple(word for word, own in zip(around, beyond.tolist(), strict=True) if own or word in (*parts, *holders))
        return Kin(synonyms, tuple(parts), tuple(holders), bound, (*(word for word in around if word not in bound), *others))

    def _company(self, word: str) -> Tensor:
        """How a word changes those around it and they it: what is encoded from it on, in company, less the mean of all its companies."""
        if word not in self._companies:
            self._companies[word] = self._changed(word)
        return self._companies[word]

    def _changed(self, word: str) -> Tensor:
        prompts = [self.job.texts.prompt(template, word) for template in self._templates]
        rows = torch.stack([self._read(prompt.context[prompt.last : prompt.end + 3]) for prompt in prompts])
        return (rows - rows.mean(0)).flatten()

    def _in_company(self, word: str) -> list[str]:
        return [] if word in self._companies else [fill(template, word) for template in self._templates]

    @cached_property
    def _templates(self) -> tuple[str, ...]:
        count = COMPANY.count("{") - 1
        others = (self._reference * count * COMPANIES)[: count * COMPANIES]
        return tuple(COMPANY.replace("{}", "{{}}").format(*others[i : i + count]) for i in range(0, len(others), count))

    @cached_property
    def _reference(self) -> list[str]:
        words = common_words(self.job.model)
        return random.Random(0).sample(words, min(REFERENCE, len(words)))

    @cached_property
    def _average(self) -> Tensor:
        return self.said(self._reference).mean(0)

    @cached_property
    def _root(self) -> Tensor:
        return root(self.job.gram.matrix).float()

    def _read(self, rows: Tensor) -> Tensor:
        return (rows.float() @ self._root).flatten()


def two(prompt: Prompt) -> Tensor:
    """Last sub-token and end token, (width, 2)."""
    return prompt.context[[max(prompt.last, 0), prompt.end]].T


def marked(texts: Texts, word: str, instead: str) -> tuple[Tensor, Tensor]:
    """`two` of a word in a plain prompt, and of what stands in its place: each (width, 2)."""
    return two(texts.prompt(PLAIN, word)), two(texts.prompt(PLAIN, instead))


def _cosines(rows: Tensor, row: Tensor) -> Tensor:
    return (rows @ row) / (rows.norm(dim=1) * row.norm()).clamp_min(1e-12)


def _shares(row: Tensor, rows: Tensor) -> list[float]:
    """How much of each of ``rows`` is in ``row``: its weights as their sum with no negative one, by least squares."""
    from scipy.optimize import nnls

    found: list[float] = nnls(rows.double().numpy().T, row.double().numpy())[0].tolist()
    return found
