"""How much of what a concept changes a mixture of words changes alike, from distances at states."""

from __future__ import annotations

import torch
from torch import Tensor

from .result import LevelR2
from .states import States


def explained(distance: Tensor, states: States) -> float:
    """R2_cond = 1 - sum ||eps_w - eps_c||^2 / sum ||eps_empty - eps_c||^2 for ``distance`` (n,) at ``states``."""
    return 1 - float(distance.sum() / states.gap.sum())


def by_level(distance: Tensor, states: States) -> tuple[LevelR2, ...]:
    """R2 from the noisiest third of the sampler's steps to the cleanest."""
    sigmas = torch.tensor(sorted(set(states.sigma.tolist()), reverse=True), device=states.sigma.device)
    bins = [part for part in sigmas.tensor_split(3) if len(part)]
    rows = [(states.sigma >= part.min()) & (states.sigma <= part.max()) for part in bins]
    return tuple(
        LevelR2(float(part.min()), float(part.max()), 1 - float(distance[row].sum() / states.gap[row].sum()))
        for part, row in zip(bins, rows, strict=True)
    )
