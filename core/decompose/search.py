"""Which few words account for a concept: a search over sets of words, one word exchanged, added or left out at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .shown import Shown
from .sparse import nnls
from .surrogate import Surrogate, on_support

_POLISHED = 6
"""Sets one word away that are encoded and fitted closely, out of all that are weighed by the linearised equations."""
_SUMMITS = 6
"""Likeliest sets that the search must have looked around at before it ends."""
_WEIGHED = 256
"""Sets one word away, the best by the mixture alone, whose other views are weighed too, beside those whose words were looked at."""


@dataclass(frozen=True)
class Evidence:
    """How well some words account for a concept, in nats; only differences mean anything.

    Three views of a concept: what the model predicts for it, as ``predictions`` independent measurements that the words' mixture is to
    repeat; the same as ``shown`` measurements that the words' own effects are to add up to; and its embedding, ``embedding`` numbers.
    Each counts as the likelihood of Gaussian errors of unknown size, -n/2 log(unexplained share), where shares below ``floor`` are
    estimation error. A word costs log(candidates), what it takes to name it. A view of 0 measurements is left out.
    """

    candidates: int
    predictions: float = 12
    shown: float = 24
    embedding: float = 96
    floor: float = 0.01

    def __call__(self, r2: Tensor, shown: Tensor, cosine: Tensor, sizes: Tensor) -> Tensor:
        """All (n,): R2 of the mixture, `Shown.r2` of its words, cosine with the concept's embedding (0 if unknown), numbers of words."""
        views = ((self.predictions, r2), (self.shown, shown), (self.embedding, cosine.square()))
        fit = torch.stack([-0.5 * count * ((1 - explained).clamp_min(0) + self.floor).log() for count, explained in views]).sum(0)
        return fit - sizes * math.log(self.candidates)


@dataclass
class Search:
    """Sets of at most ``count`` words that account for a concept, all with the words ``kept``.

    ``found`` maps each set to its weights, (words,), and R2 by the surrogate; searches may share it. ``pulse`` runs between steps; raising
    from it ends the search.
    """

    surrogate: Surrogate
    shown: Shown
    evidence: Evidence
    count: int
    pulse: Callable[[], None]
    found: dict[tuple[int, ...], tuple[Tensor, float]] = field(default_factory=dict)
    kept: tuple[int, ...] = ()

    def add(self, alphas: Iterable[Tensor]) -> None:
        """Polish those whose words are new, and keep them."""
        fresh = {support(alpha): alpha for alpha in alphas if support(alpha) not in self.found}
        if not fresh:
            return
        self.pulse()
        polished, scores = self.surrogate.polish(torch.stack(list(fresh.values())))
        for given, alpha, score in zip(fresh, polished, scores.tolist(), strict=True):
            for subset in {given, support(alpha)}:  # weights may have become 0
                if subset not in self.found or self.found[subset][1] < score:
                    self.found[subset] = alpha, score

    def best(self, count: int) -> list[tuple[int, ...]]:
        """The ``count`` likeliest sets found."""
        likely = self.judged()
        return sorted(likely, key=likely.__getitem__, reverse=True)[:count]

    def judged(self) -> dict[tuple[int, ...], float]:
        """The evidence of every set found that holds the words to keep."""
        sets = [subset for subset in self.found if set(self.kept) <= set(subset)]
        alphas = torch.stack([self.found[subset][0] for subset in sets])
        r2 = torch.tensor([self.found[subset][1] for subset in sets], dtype=torch.double)
        return dict(zip(sets, self._weigh(sets, alphas, r2).tolist(), strict=True))

    def run(self) -> None:
        """From the likeliest sets found, exchange, add and leave out one word at a time for as long as that leads to likelier ones."""
        done: set[tuple[int, ...]] = set()
        while True:
            likely = self.judged()
            todo = [subset for subset in sorted(likely, key=likely.__getitem__)[-_SUMMITS:] if subset not in done]
            if not todo:
                return
            done.add(todo[-1])
            self.pulse()
            self.add(self._around(todo[-1]))

    def _around(self, subset: tuple[int, ...]) -> list[Tensor]:
        """The likeliest of the sets one word away, by the surrogate linearised in the weights of all words at the present ones."""
        alpha, every = self.found[subset][0], range(len(self.surrogate.mixture))
        fewer = [subset[:i] + subset[i + 1 :] for i in range(len(subset)) if subset[i] not in self.kept]
        bases = fewer + [subset] * (len(subset) < self.count)
        sets = {tuple(sorted((*base, word))) for base in bases for word in every if word not in subset} | {base for base in fewer if base}
        proposed = sorted(sets - self.found.keys())
        if not proposed:
            return []
        matrix, target = self.surrogate.equations(alpha)
        gram, moment = matrix.T @ matrix, matrix.T @ target
        index = padded(proposed)
        here, chosen = index >= 0, index.clamp_min(0)
        moments = moment[chosen] * here
        weights = nnls(gram[chosen[:, :, None], chosen[:, None, :]] * (here[:, :, None] & here[:, None, :]), moments)
        r2 = 1 - (target.square().sum() - (weights * moments).sum(1))
        weighed = (self.shown.known[chosen] | ~here).all(1) if self.evidence.shown else torch.zeros(len(r2), dtype=torch.bool)
        weighed[r2.topk(min(_WEIGHED, len(r2))).indices] = True
        rows = weighed.nonzero()[:, 0].tolist()
        alphas = torch.stack([on_support(chosen[i][here[i]], weights[i][here[i]], alpha) for i in rows])
        likely = self._weigh([proposed[i] for i in rows], alphas, r2[rows])
        return [alphas[i] for i in likely.argsort(descending=True, stable=True)[:_POLISHED]]

    def _weigh(self, sets: list[tuple[int, ...]], alphas: Tensor, r2: Tensor) -> Tensor:
        shown = self.shown.r2(padded(sets)) if self.evidence.shown else torch.zeros(len(sets), dtype=torch.double)
        return self.evidence(r2, shown, self.surrogate.cosine(alphas), torch.tensor([len(subset) for subset in sets]))


def padded(sets: list[tuple[int, ...]]) -> Tensor:
    """Sets of indices as rows, (sets, largest), -1 where a set has fewer."""
    size = max(map(len, sets))
    return torch.tensor([[*subset, *[-1] * (size - len(subset))] for subset in sets])


def support(alpha: Tensor) -> tuple[int, ...]:
    """The indices of the words that have weight."""
    return tuple(alpha.nonzero()[:, 0].tolist())
