"""Distilled decomposition: the weighted words under which the model predicts what it predicts for the concept itself.

The target is the model's own prediction with the concept's prompt, at the states its sampler passed through, so the loss
sum_s ||eps(x_s, alpha) - eps(x_s, concept)||^2 carries no noise and vanishes wherever the words say the same as the concept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Conditioning, Model, Prompt, Slot
from ..progress import OnStep, silent
from ..vocabulary import candidates as choose_candidates
from ..vocabulary import is_known
from .mixture import Mixture, SimplexDescent
from .result import RELIABLE_R2, Attempt, Decomposition, Fidelity, LevelR2, fill, split_template
from .states import States, distances, harvest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How much is spent. pictures: sampled for the fit; heldout: sampled for measuring; steps: the sampler's; guidance: the sampler's.

    descent: gradient steps of ``batch`` states each; refit: of those, on the surviving words only; survivors: how many survive.
    """

    pictures: int = 4
    heldout: int = 2
    steps: int = 12
    guidance: float = 4.0
    descent: int = 60
    refit: int = 12
    batch: int = 6
    survivors: int = 24
    attempts: int = 2


def decompose_concept(
    model: Model,
    concept: str | Slot,
    *,
    template: str = "a photo of a {}",
    words: int = 5,
    candidates: Iterable[str] | None = None,
    limit: int = 1000,
    exclude: Iterable[str] = (),
    keep_concept: bool = False,
    seed: int = 0,
    height: int = 512,
    width: int = 512,
    settings: Settings = Settings(),
    on_step: OnStep = silent,
) -> Decomposition:
    """Take ``concept`` (a word, a phrase, or a learnt token as a slot) apart into at most ``words`` weighted vocabulary words.

    candidates: the words to choose from, else the ``limit`` whole words nearest to the concept; the concept itself and its near-copies
    are left out unless ``keep_concept``. height, width: of the pictures sampled, in pixels. ``on_step`` counts evals. Deterministic:
    all randomness comes from ``seed``. The base model is only read.

    Look at ``r2`` before believing the words: it is measured on pictures that the fit did not see.

    Raises ValueError for a concept that is empty or unknown to the tokenizer, a template without ``{}``, too many tokens, or no
    candidates; whatever ``Model.denoise`` and ``on_step`` raise.
    """
    split_template(template)
    if words < 1:
        raise ValueError(f"ask for at least 1 word, got {words}")
    cells = [side // model.denoiser.downscale for side in (height, width)]
    if min(cells) < 1:
        raise ValueError(f"pictures of {width}x{height} pixels are too small: the model needs at least {model.denoiser.downscale}")
    name = concept.strip() if isinstance(concept, str) else None
    if name is not None:
        _check_concept(model, name)
    pool = choose_candidates(model.text, name, limit=limit, words=candidates, exclude=exclude, keep_concept=keep_concept)
    with torch.no_grad():
        teacher: Prompt = fill(template, name if isinstance(concept, str) and name is not None else [concept])
        target, empty = model.text.encode([teacher]).detach(), model.text.encode([""]).detach()
    return _Fit(model, Mixture.of(model, template, pool), target, empty, settings, seed, on_step).run(
        name or "<pseudo-token>", words, cells[0], cells[1]
    )


def _check_concept(model: Model, concept: str) -> None:
    if not concept:
        raise ValueError("the concept is empty: give a word or a phrase")
    if not is_known(model.text, concept):
        raise ValueError(f"no word of {concept!r} is known to the text encoder: check the spelling, or describe it in other words")


class _Fit:
    """One decomposition under way."""

    def __init__(
        self, model: Model, mixture: Mixture, teacher: Conditioning, empty: Conditioning, settings: Settings, seed: int, on_step: OnStep
    ) -> None:
        self.model, self.mixture, self.teacher, self.empty = model, mixture, teacher, empty
        self.settings, self.seed, self.on_step = settings, seed, on_step
        self.evals, self.calls = model.meter.evals, model.meter.calls
        self.generator = torch.Generator().manual_seed(seed)
        states = (settings.pictures + settings.heldout) * settings.steps
        self._planned = 2 * states + 3 * settings.batch * (settings.descent + settings.refit) + 4 * states

    def run(self, concept: str, words: int, height: int, width: int) -> Decomposition:
        options = self.settings
        seeds = torch.randint(2**31, (options.pictures + options.heldout,), generator=self.generator).tolist()
        states = harvest(
            self.model, self.teacher, self.empty, seeds, height=height, width=width, steps=options.steps, guidance=options.guidance,
            on_step=self._report,
        )  # fmt: skip
        fitted, heldout = states[states.picture < options.pictures], states[states.picture >= options.pictures]
        if not float(states.gap.sum()) > 0:
            raise ValueError(
                f"the model ignores {concept!r}: its predictions equal those of the empty prompt, so there is nothing to explain"
            )
        attempts: list[Attempt] = []
        best: tuple[float, Mixture, Tensor] | None = None
        for start, alpha in self._starts():
            mixture, alpha = self._descend(fitted, alpha)
            r2 = self._r2(heldout, mixture, alpha)
            attempts.append(Attempt(start, r2, kept=False))
            if best is None or r2 > best[0]:
                best = (r2, mixture, alpha)
            if r2 >= RELIABLE_R2 + 0.1 or len(attempts) >= options.attempts:
                break
            logger.info("start %r reached R2 %.3f on held-out pictures; trying another", start, r2)
        assert best is not None
        every, mixture, alpha = best
        attempts = [Attempt(a.start, a.r2, kept=a.r2 == every) for a in attempts]
        mixture, alpha = self._truncate(fitted, mixture, alpha, words)
        per_state = distances(self.model, heldout, mixture.encode(alpha[None]))
        importance = tuple(self._importance(heldout, mixture, alpha, _ratio(per_state, heldout)))
        spent = (self.model.meter.evals - self.evals, self.model.meter.calls - self.calls)
        self.on_step(spent[0], spent[0], {"r2": _ratio(per_state, heldout)})
        return Decomposition(
            concept=concept,
            template=mixture.template,
            words=mixture.words,
            ids=mixture.ids,
            alpha=alpha.cpu(),
            importance=importance,
            fidelity=Fidelity(_ratio(per_state, heldout), self._r2(fitted, mixture, alpha), _levels(per_state, heldout), every),
            embeddings=mixture.embeddings,
            norms=mixture.norms,
            method="distilled",
            seed=self.seed,
            seeds=tuple(seeds[: options.pictures]),
            heldout_seeds=tuple(seeds[options.pictures :]),
            settings={name: float(value) for name, value in vars(options).items()},
            candidates=len(self.mixture),
            attempts=tuple(attempts),
            evals=spent[0],
            calls=spent[1],
            model=self.model.name,
        )

    def _report(self, step: int = 0, total: int = 0, metrics: Mapping[str, float] | None = None) -> None:
        spent = self.model.meter.evals - self.evals
        self.on_step(min(spent, self._planned - 1), self._planned, metrics or {})

    def _starts(self) -> Iterator[tuple[str, Tensor]]:
        """Weights to descend from: the words that read like the concept to the text encoder, then all words alike."""
        even = torch.full((len(self.mixture),), 1 / len(self.mixture))
        yield "text", 0.8 * self._text_code() + 0.2 * even
        yield "even", even

    def _text_code(self, steps: int = 150) -> Tensor:
        """Weights whose conditioning is nearest to the concept's; costs no evals."""
        even = torch.full((len(self.mixture),), 1 / len(self.mixture))
        descent = SimplexDescent(even, steps)
        for _ in range(steps):
            alpha = descent.alpha.requires_grad_()
            with torch.enable_grad():
                loss = (self.mixture.encode(alpha[None]).context - self.teacher.context).square().sum()
            descent.step(torch.autograd.grad(loss, alpha)[0])
        return descent.alpha

    def _descend(self, states: States, alpha: Tensor) -> tuple[Mixture, Tensor]:
        options, mixture = self.settings, self.mixture
        alpha = self._fit(mixture, states, alpha, options.descent, 0.1)
        if len(mixture) > options.survivors:
            kept = alpha.topk(options.survivors).indices.sort().values
            mixture, alpha = mixture.choose(kept), alpha[kept] / alpha[kept].sum()
        return mixture, self._fit(mixture, states, alpha, options.refit, 0.03)

    def _fit(self, mixture: Mixture, states: States, alpha: Tensor, steps: int, rate: float) -> Tensor:
        """Gradient steps on the distance to the teacher from ``alpha``, each on a fresh batch of the most telling states."""
        descent = SimplexDescent(alpha, steps, rate)
        scale = float(states.gap.mean())
        weight = 0.8 * states.gap.cpu() / float(states.gap.sum()) + 0.2 / len(states)
        for _ in range(steps):
            rows = torch.multinomial(weight, min(self.settings.batch, len(states)), generator=self.generator)
            batch = states[rows.to(states.x.device)]
            alpha = descent.alpha.requires_grad_()
            with torch.enable_grad():
                x0 = self.model.denoise(batch.x, batch.sigma, mixture.encode(alpha[None]))
                loss = batch.distance(x0).mean() / scale
            descent.step(torch.autograd.grad(loss, alpha)[0].cpu())
            self._report(metrics={"loss": float(loss.detach())})
        return descent.alpha

    def _truncate(self, states: States, mixture: Mixture, alpha: Tensor, words: int) -> tuple[Mixture, Tensor]:
        """The strongest words, at most ``words`` and no more than keep R2 within 0.01 of that many, refitted."""
        kept = alpha.topk(min(words, int((alpha > 0).sum()))).indices
        mixture, alpha = mixture.choose(kept), alpha[kept] / alpha[kept].sum()
        alpha = self._fit(mixture, states, alpha, self.settings.refit, 0.03)
        order = alpha.argsort(descending=True)
        mixture, alpha = mixture.choose(order), alpha[order]
        enough = self._r2(states, mixture, alpha) - 0.01
        count = next(
            (k for k in range(1, len(alpha)) if self._r2(states, mixture.choose(torch.arange(k)), alpha[:k]) >= enough), len(alpha)
        )
        return mixture.choose(torch.arange(count)), alpha[:count] / alpha[:count].sum()

    def _importance(self, states: States, mixture: Mixture, alpha: Tensor, r2: float) -> Iterator[float]:
        for index in range(len(alpha)):
            without = alpha.clone()
            without[index] = 0
            conditioning = mixture.encode(without[None]) if len(alpha) > 1 else self.empty
            yield r2 - _ratio(distances(self.model, states, conditioning), states)
            self._report()

    def _r2(self, states: States, mixture: Mixture, alpha: Tensor) -> float:
        with torch.no_grad():
            return _ratio(distances(self.model, states, mixture.encode(alpha[None])), states)


def _ratio(distance: Tensor, states: States) -> float:
    return 1 - float(distance.sum() / states.gap.sum())


def _levels(distance: Tensor, states: States) -> tuple[LevelR2, ...]:
    """R2 from the noisiest third of the sampler's steps to the cleanest."""
    sigmas = torch.tensor(sorted(set(states.sigma.tolist()), reverse=True), device=states.sigma.device)
    bins = [part for part in sigmas.tensor_split(3) if len(part)]
    rows = [(states.sigma >= part.min()) & (states.sigma <= part.max()) for part in bins]
    return tuple(
        LevelR2(float(part.min()), float(part.max()), 1 - float(distance[row].sum() / states.gap[row].sum()))
        for part, row in zip(bins, rows, strict=True)
    )
