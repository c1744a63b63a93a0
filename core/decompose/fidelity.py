"""How much of what a concept changes a mixture of words changes alike, measured at states of the concept's own sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model import fill
from .decomposition import Fidelity, LevelR2
from .mixture import Mixture
from .shown import show
from .states import States, distances, harvest
from .task import Task


def explained(distance: Tensor, states: States, weights: Tensor | None = None) -> float:
    """R2_cond = 1 - sum ||eps_w - eps_c||^2 / sum ||eps_empty - eps_c||^2 for ``distance`` (n,) at ``states``.

    weights: (n,), what each state stands for where they were drawn with unequal probabilities, the reciprocals of those.
    """
    missed, gap = (distance, states.gap) if weights is None else (weights * distance, weights * states.gap)
    return 1 - float(missed.sum() / gap.sum())


def by_level(distance: Tensor, states: States) -> tuple[LevelR2, ...]:
    """R2 from the noisiest third of the sampler's steps to the cleanest."""
    sigmas = torch.tensor(sorted(set(states.sigma.tolist()), reverse=True), device=states.sigma.device)
    bins = [part for part in sigmas.tensor_split(3) if len(part)]
    rows = [(states.sigma >= part.min()) & (states.sigma <= part.max()) for part in bins]
    return tuple(
        LevelR2(float(part.min()), float(part.max()), 1 - float(distance[row].sum() / states.gap[row].sum()))
        for part, row in zip(bins, rows, strict=True)
    )


def picture_seeds(generator: torch.Generator, count: int) -> list[int]:
    """Seeds of ``count`` pictures."""
    return torch.randint(2**31, (count,), generator=generator).tolist()


def sampled_states(task: Task, seeds: Sequence[int], steps: int, guidance: float, report: Callable[[], None]) -> States:
    """The states of sampling the concept: len(seeds) * steps of them, 2 model evaluations each.

    task: the concept, and the size of the images.
    seeds: one an image. Images that fit, choose and measure must not share any.
    steps: of the sampler. More give states at more noise levels.
    guidance: of the sampler. It decides which images are sampled; the states hold unguided predictions.
    report: runs after each step.

    Raises ValueError when the model predicts the same with and without the concept.
    """
    states = harvest(
        task.model,
        task.teacher,
        task.empty,
        seeds,
        height=task.height,
        width=task.width,
        steps=steps,
        guidance=guidance,
        on_step=lambda step, total, metrics: report(),
    )
    if not float(states.gap.sum()) > 0:
        raise ValueError(
            f"the model ignores {task.name!r}: its predictions equal those of the empty prompt, so there is nothing to explain"
        )
    return states


def measure(mixture: Mixture, alpha: Tensor, states: States, report: Callable[[], None]) -> tuple[Fidelity, tuple[float, ...]]:
    """`fidelity` and `importance` at the same states: 1 + words evals each.

    ``Fidelity.fitted`` and ``every_word`` are left to the caller.
    """
    return fidelity(mixture, alpha, states, report), importance(mixture, states, report)


def fidelity(mixture: Mixture, alpha: Tensor, states: States, report: Callable[[], None]) -> Fidelity:
    """The fidelity of ``alpha`` (words,) on held-out ``states``: an eval each."""
    with torch.no_grad():
        distance = distances(mixture.model, states, mixture.encode(alpha[None]))
    report()
    return Fidelity(explained(distance, states), None, by_level(distance, states), None)


def importance(mixture: Mixture, states: States, report: Callable[[], None]) -> tuple[float, ...]:
    """Delta R2 of each word: what the words together show of the concept (`Shown.r2`) that they no longer show without it.

    At every state the other words' weights are fitted anew. An eval a word and state.
    """
    with torch.no_grad():
        prompts = mixture.model.encode([fill(mixture.template, word) for word in mixture.words])
    return show(mixture.model, prompts, states, None, report).lost(range(len(mixture)))
