"""A prompt whose concept is a mixture of candidate words, as a function of the mixture's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Conditioning, Model, Slot, fill
from ..vocabulary import embeddings
from .decomposition import mix


@dataclass(frozen=True)
class Mixture:
    """The candidate words in one template. ``embeddings``: per text encoder (words, width); ``norms``: the pseudo-token's length there."""

    model: Model
    template: str
    words: tuple[str, ...]
    ids: tuple[int, ...]
    embeddings: Mapping[str, Tensor]
    norms: Mapping[str, float]

    @classmethod
    def of(cls, model: Model, template: str, candidates: Mapping[str, int]) -> Mixture:
        """Candidates (word to token id) at the mean length of each encoder's table."""
        norms = {name: float(table.norm(dim=1).mean()) for name, table in model.text.tables.items()}
        return cls(model, template, tuple(candidates), tuple(candidates.values()), embeddings(model.text, list(candidates.values())), norms)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, alpha: Tensor) -> Conditioning:
        """The template with each row of alpha (batch, words) as its concept; differentiable in alpha."""
        return self.encode_tokens(self.tokens(alpha))

    def tokens(self, alpha: Tensor) -> dict[str, Tensor]:
        """The pseudo-token of each row of alpha (batch, words) per text encoder, (batch, 1, width)."""
        return mix(self.embeddings, self.norms, alpha)

    def encode_tokens(self, tokens: Slot) -> Conditioning:
        """The template with each token as its concept."""
        return self.model.encode([fill(self.template, [tokens])])

    def choose(self, rows: Tensor) -> Mixture:
        """The mixture of some of the words only."""
        keep = rows.tolist()
        return Mixture(
            self.model,
            self.template,
            tuple(self.words[i] for i in keep),
            tuple(self.ids[i] for i in keep),
            {name: e[rows.to(e.device)] for name, e in self.embeddings.items()},
            self.norms,
        )


def top_k(alpha: Tensor, count: int) -> Tensor:
    """alpha (words,) without all but its largest ``count`` entries, summing to 1; differentiable."""
    kept = torch.zeros_like(alpha)
    kept[alpha.detach().topk(min(count, len(alpha))).indices] = 1
    return alpha * kept / (alpha * kept).sum()


class SimplexDescent:
    """Momentum descent on alpha = u * u, ||u|| = 1, which keeps alpha on the simplex and lets weights die out.

    One global root-mean-square scale for all coordinates: scaling each coordinate by itself would equalise the weights.
    The step is rate * cosine from 1 to 2 %.
    """

    def __init__(self, alpha: Tensor, steps: int, rate: float = 0.1) -> None:
        self.u = alpha.detach().clamp_min(0).sqrt()
        self.u /= self.u.norm()
        self._steps, self._rate, self._step = steps, rate, 0
        self._momentum, self._scale = torch.zeros_like(self.u), 0.0

    @property
    def alpha(self) -> Tensor:
        return self.u.square()

    def step(self, gradient: Tensor) -> None:
        """Move against ``gradient``, the derivative with respect to alpha."""
        gradient = 2 * self.u * gradient
        self._step += 1
        self._momentum = 0.9 * self._momentum + 0.1 * gradient
        self._scale = 0.99 * self._scale + 0.01 * float(gradient.square().mean())
        mean, scale = self._momentum / (1 - 0.9**self._step), self._scale / (1 - 0.99**self._step)
        cosine = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * (self._step - 1) / self._steps)).item()
        self.u = self.u - self._rate * (0.02 + 0.98 * cosine) * mean / (scale**0.5 + 1e-12)
        self.u /= self.u.norm()
