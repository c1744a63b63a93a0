"""A concept as a few weighted vocabulary words, and what that explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..model import Conditioning, Prompt, TextEncoder

RELIABLE_R2 = 0.8
"""Held-out R2 from which a decomposition is taken to explain its concept."""


def split_template(template: str) -> tuple[str, str]:
    """The texts before and after the placeholder. Raises ValueError unless ``{}`` stands in the template exactly once."""
    before, *after = template.split("{}")
    if len(after) != 1:
        raise ValueError(f"the template {template!r} must contain {{}} once, where the concept goes, as in 'a photo of a {{}}'")
    return before, after[0]


def fill(template: str, concept: Prompt) -> Prompt:
    """``template`` with a concept, which may hold slots, at its placeholder."""
    before, after = split_template(template)
    return before + concept + after if isinstance(concept, str) else [before, *concept, after]


def mix(embeddings: Mapping[str, Tensor], norms: Mapping[str, float], alpha: Tensor) -> dict[str, Tensor]:
    """Pseudo-tokens w = m * (sum_i alpha_i e_i) / ||sum_i alpha_i e_i|| per text encoder, (batch, 1, width).

    embeddings: (words, width); norms: m; alpha: (batch, words), whose scale does not matter. Differentiable in alpha.
    """
    return {name: (norms[name] * normalize(alpha.to(rows.device) @ rows, dim=-1)).unsqueeze(-2) for name, rows in embeddings.items()}


@dataclass(frozen=True)
class LevelR2:
    """R2 on the held-out states with ``low`` <= sigma <= ``high``."""

    low: float
    high: float
    r2: float


@dataclass(frozen=True)
class Fidelity:
    """How much of what the concept changes in the model's predictions its words change alike.

    R2_cond = 1 - sum ||eps_w - eps_c||^2 / sum ||eps_empty - eps_c||^2: 1 is the concept itself, 0 no better than the empty prompt.
    ``heldout``: on pictures that the fit never saw; ``fitted``: on those it saw; ``levels``: held out, from the noisiest third of the
    steps (layout) to the cleanest (detail); ``every_word``: held out, before all but the strongest words were dropped.
    """

    heldout: float
    fitted: float
    levels: tuple[LevelR2, ...]
    every_word: float


@dataclass(frozen=True)
class Attempt:
    """One descent of the fit: how it was started, the R2 it reached on the states it was judged by, and whether it was kept."""

    start: str
    r2: float
    kept: bool


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A concept w* = normalised sum of ``alpha_i`` times the token embeddings of ``words``, strongest word first.

    ``alpha``: (words,), >= 0, sums to 1, float32, CPU. ``importance``: held-out R2 lost when a word is left out (the rest renormalised).
    ``embeddings``: the words' token embeddings per text encoder, (words, width); ``norms``: the length w* is scaled to there.
    ``seeds``: of the pictures fitted, ``heldout_seeds``: of those it was measured on. ``candidates``: how many words could be chosen.
    Source: Chefer et al., "The Hidden Language of Diffusion Models", ICLR 2024, for the object; the model's own prediction is the target.
    """

    concept: str
    template: str
    words: tuple[str, ...]
    ids: tuple[int, ...]
    alpha: Tensor
    importance: tuple[float, ...]
    fidelity: Fidelity
    embeddings: Mapping[str, Tensor]
    norms: Mapping[str, float]
    method: str
    seed: int
    seeds: tuple[int, ...]
    heldout_seeds: tuple[int, ...]
    settings: Mapping[str, float]
    candidates: int
    attempts: tuple[Attempt, ...]
    evals: int
    calls: int
    model: str = field(default="")

    @property
    def shares(self) -> tuple[float, ...]:
        """What each word contributes, summing to 1."""
        return tuple((self.alpha / self.alpha.sum()).tolist())

    @property
    def r2(self) -> float:
        """The held-out R2: the number to look at before believing the words."""
        return self.fidelity.heldout

    @property
    def reliable(self) -> bool:
        """Whether the words explain the concept: held-out R2 of at least 0.8."""
        return self.fidelity.heldout >= RELIABLE_R2

    @property
    def token(self) -> dict[str, Tensor]:
        """The pseudo-token w* per text encoder: (1, width), a slot for ``TextEncoder.encode``."""
        return {name: rows[0] for name, rows in mix(self.embeddings, self.norms, self.alpha[None]).items()}

    def apply(self, text: TextEncoder, template: str | None = None) -> Conditioning:
        """The conditioning of ``template`` (its own by default) with w* in place of the concept, batch 1."""
        return text.encode([fill(self.template if template is None else template, [self.token])])

    def to(self, device: torch.device | str) -> Decomposition:
        """The same decomposition with its embeddings on ``device``."""
        return replace(self, embeddings={name: rows.to(device) for name, rows in self.embeddings.items()})

    def summary(self) -> str:
        """What was found, in a few lines for people."""
        lines = [f"{self.concept} = " + " + ".join(f"{share:.0%} {word}" for word, share in zip(self.words, self.shares, strict=True))]
        lines += [f"  {w}: share {s:.3f}, importance {d:+.3f}" for w, s, d in zip(self.words, self.shares, self.importance, strict=True)]
        lines.append(f"explains {self.r2:.1%} of what the concept changes (pictures not fitted), {self.evals} evals in {self.calls} calls")
        if not self.reliable:
            lines.append("These words do not explain the concept well: take more words or more candidates, or another template or seed.")
        return "\n".join(lines)
