"""The model linearised in what its cross-attention reads: how well a mixture of words says a concept, for no evals.

Near the concept's own conditioning c* a denoiser answers nearly linearly; the text encoder between a token and its conditioning does not,
and linearised there, wrong words look right. So only the denoiser is linearised, at a conditioning c0 and by random projections v of its
noise prediction's residual r:

    y(alpha) = v r(c0) + G (c(alpha) - c0),    G = v dr/dc at c0    (3 evals a row),

while c(alpha) is the text encoder itself. Then sum y^2 estimates what a mixture of words leaves unexplained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..model import Conditioning, in_chunks
from .mixture import Mixture
from .sparse import small_nnls

_BUMP = 0.02
"""Step of the finite differences in alpha: text encoders are smooth, and float32 leaves five digits of it."""


def flat(conditioning: Conditioning) -> Tensor:
    """All numbers of a conditioning side by side, (batch, size)."""
    context = conditioning.context.flatten(1)
    return context if conditioning.pooled is None else torch.cat([context, conditioning.pooled.to(context)], dim=1)


@dataclass(frozen=True)
class Surrogate:
    """y(c) = rows @ flat(c) - offsets, with rows (n, size) and offsets (n,) scaled so that sum y^2 is the unexplained share.

    token: the concept's direction, the unit embeddings of all encoders side by side, (width,), or None where it is not one token.
    """

    mixture: Mixture
    rows: Tensor
    offsets: Tensor
    token: Tensor | None = None
    chunk: int = 32

    def residual(self, alphas: Tensor) -> Tensor:
        """y for each row of alphas (batch, words): (batch, n), double, CPU. One text encoding a row."""

        def encoded(part: Tensor) -> Tensor:
            return (flat(self.mixture.encode(part)) @ self.rows.T - self.offsets).cpu().double()

        with torch.no_grad():
            return in_chunks(encoded, alphas, self.chunk, "a prompt in the text encoder")

    def r2(self, alphas: Tensor) -> Tensor:
        """1 - sum y^2 for each row of alphas, (batch,): an estimate of R2."""
        return 1 - self.residual(alphas).square().sum(1)

    def cosine(self, alphas: Tensor) -> Tensor:
        """Cosine between each mixture and the concept's embedding, (batch,), never below 0; 0 without a token."""
        if self.token is None:
            return torch.zeros(len(alphas), dtype=torch.double)
        rows = self.mixture.embeddings.values()
        mixed = torch.cat([normalize(alphas.double() @ e.cpu().double(), dim=1) for e in rows], dim=1)
        return (mixed @ self.token.double() / len(self.mixture.embeddings)).clamp_min(0)

    def equations(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Gauss-Newton's equations in the weights of all words at ``alpha`` (words,): (n + 1, words), (n + 1,). words + 1 encodings."""
        y = self.residual(torch.cat([alpha[None], alpha + _BUMP * torch.eye(len(alpha))]))
        return fix_scale((y[1:] - y[0]).T / _BUMP, y[0], alpha)

    def polish(self, alphas: Tensor, rounds: int = 2) -> tuple[Tensor, Tensor]:
        """Each row of alphas after Gauss-Newton on the weights of its own words, with a line search, and its `r2`."""
        alphas, scores = alphas.clone(), torch.full((len(alphas),), -torch.inf, dtype=torch.double)
        active = torch.arange(len(alphas))
        for _ in range(rounds):
            supports = [alphas[i].nonzero()[:, 0] for i in active]
            eye = torch.eye(alphas.shape[1])
            probes = [torch.cat([alphas[i][None], alphas[i] + _BUMP * eye[s]]) for i, s in zip(active, supports, strict=True)]
            values = self.residual(torch.cat(probes)).split([len(p) for p in probes])
            lines = []
            for i, support, y in zip(active.tolist(), supports, values, strict=True):
                scores[i] = max(float(scores[i]), 1 - float(y[0].square().sum()))
                goal = on_support(support, small_nnls(*fix_scale((y[1:] - y[0]).T / _BUMP, y[0], alphas[i][support])), alphas[i])
                lines += [goal, alphas[i] + 0.4 * (goal - alphas[i])]
            reached, which = self.r2(torch.stack(lines)).view(-1, 2).max(1)
            gain = reached - scores[active]
            for row, i in enumerate(active.tolist()):
                if gain[row] > 0:
                    alphas[i], scores[i] = lines[2 * row + int(which[row])], reached[row]
            active = active[gain > 1e-3]
            if not len(active):
                break
        return alphas, scores


def on_support(support: Tensor, weights: Tensor, instead: Tensor) -> Tensor:
    """``weights`` on ``support``, summing to 1; ``instead`` when all are 0."""
    if not float(weights.sum()) > 0:
        return instead
    alpha = torch.zeros_like(instead)
    alpha[support] = (weights / weights.sum()).float()
    return alpha


def fix_scale(jacobian: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Newton's matrix (n + 1, words) and target (n + 1,) for weights that sum to 1.

    y does not change with the scale of alpha, so its differential vanishes along alpha and the sum needs an equation of its own.
    """
    scale = jacobian.norm() / jacobian.shape[1] ** 0.5
    system = torch.cat([jacobian, scale.expand(1, jacobian.shape[1])])
    return system, torch.cat([jacobian @ alpha.double() - y, scale[None]])
