"""What words show by themselves: how much of a concept's effect on the model's predictions the words' own effects add up to.

At a state x_s of the concept's sampling, a word's effect is d_w(s) = eps(x_s, word) - eps(x_s, empty), and the concept's d_c(s) likewise. A
denoiser that may draw any of several things predicts the mean of what each alone predicts, weighted by how likely each is at this state
(Tweedie's formula for a mixture), and attributes that hold together add up. Both are non-negative combinations, each state with weights
of its own:

    shown(W) = 1 - sum_s min_{b >= 0} ||d_c(s) - sum_{w in W} b_w d_w(s)||^2 / sum_s ||d_c(s)||^2.

An exemplar that is drawn now and then raises it by what no other word shows; a word that only bends a mixture of embeddings does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Conditioning, Model
from .sparse import nnls
from .states import States

_PART = 16
"""Words a call."""


@dataclass(frozen=True)
class Shown:
    """gram: (states, words + 1, words + 1), double, CPU: inner products of the words' effects and, last, the concept's at each state."""

    gram: Tensor

    @property
    def known(self) -> Tensor:
        """Which words were looked at, (words,)."""
        return self.gram.diagonal(dim1=1, dim2=2).sum(0)[:-1] > 0

    def r2(self, sets: Tensor) -> Tensor:
        """shown(W) for each row of sets (n, size), indices of words, -1 where a set has fewer: (n,)."""
        if not len(sets) or not sets.shape[1]:
            return torch.zeros(len(sets), dtype=torch.double)
        here = sets >= 0
        index = sets.clamp_min(0)
        both = here[:, :, None] & here[:, None, :]
        grams = self.gram[:, index[:, :, None], index[:, None, :]] * both
        moments = self.gram[:, index, -1] * here
        left = self.gram[:, -1, -1].sum() - (nnls(grams, moments) * moments).sum((0, 2))
        return 1 - left / self.gram[:, -1, -1].sum()

    def lost(self, subset: Sequence[int]) -> tuple[float, ...]:
        """What shown(W) loses when each of the words (indices) is left out and the others' weights are fitted anew, 0 or more each."""
        rest = [[*subset[:i], *subset[i + 1 :], -1] for i in range(len(subset))]
        r2 = self.r2(torch.tensor([list(subset), *rest]))
        return tuple((r2[0] - r2[1:]).clamp_min(0).tolist())

    def first(self, count: int) -> list[tuple[int, ...]]:
        """The words that show most of the concept together, chosen one by one: sets of 1 to ``count``."""
        known, found = self.known.nonzero()[:, 0].tolist(), list[tuple[int, ...]]()
        for _ in range(min(count, len(known))):
            base = found[-1] if found else ()
            rest = [(*base, word) for word in known if word not in base]
            found.append(rest[int(self.r2(torch.tensor(rest)).argmax())])
        return found

    def extended(self, size: int) -> Shown:
        """With words that were not looked at, and so show nothing, up to ``size`` of them."""
        known = self.gram.shape[1] - 1
        gram = self.gram.new_zeros(len(self.gram), size + 1, size + 1)
        kept = torch.tensor([*range(known), size])
        gram[:, kept[:, None], kept] = self.gram
        return Shown(gram)


@torch.no_grad()
def show(model: Model, prompts: Conditioning, states: States, weights: Tensor | None, report: Callable[[], None]) -> Shown:
    """The effects of each of some words: words * states model evaluations.

    prompts: a conditioning a word, (words, ...).
    states: where effects are measured. Only inner products are kept of them, so many cost time and no memory.
    weights: (states,), what each state stands for, 1 by default: reciprocals of the probabilities they were drawn with.
    report: runs after each state.
    """
    grams = []
    for index in range(len(states)):
        state, effects = states[index : index + 1], []
        for first in range(0, len(prompts), _PART):
            part = prompts.map(lambda tensor, first=first: tensor[first : first + _PART])  # type: ignore[misc]
            size = len(part)
            x0 = model.denoise(state.x.expand(size, -1, -1, -1), state.sigma.expand(size), part)
            effects.append(((x0 - state.empty) / state.sigma.view(-1, 1, 1, 1)).flatten(1))
        effects.append(((state.teacher - state.empty) / state.sigma.view(-1, 1, 1, 1)).flatten(1))
        rows = torch.cat(effects).double().cpu()
        grams.append(rows @ rows.T * (1.0 if weights is None else float(weights[index])))
        report()
    return Shown(torch.stack(grams))
