"""What the teacher's sampler saw: noisy latents with the model's own predictions, and how close another prompt comes to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifact import Spec
from ..model import Conditioning, Model
from ..progress import OnStep, silent
from ..sampling import initial_noise, sample, schedule


@dataclass(frozen=True)
class States:
    """Noisy latents x (n, channels, h, w) at ``sigma`` (n,), the teacher's x0 there and that of the empty prompt, same shape as x.

    ``picture`` (n,) says which sampled picture each state belongs to.
    """

    x: Tensor
    sigma: Tensor
    teacher: Tensor
    empty: Tensor
    picture: Tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> States:
        return States(self.x[rows], self.sigma[rows], self.teacher[rows], self.empty[rows], self.picture[rows])

    @staticmethod
    def layout(prefix: str, height: int | None = None, width: int | None = None) -> dict[str, Spec]:
        """States as a file holds them: the tensors' names, each after ``prefix``, and their types and shapes."""
        latents: Spec = (torch.float32, (None, None, height, width))
        whole: dict[str, Spec] = {"sigma": (torch.float32, (None,)), "picture": (torch.int64, (None,))}
        return {f"{prefix}{name}": spec for name, spec in {**dict.fromkeys(("x", "teacher", "empty"), latents), **whole}.items()}

    @property
    def gap(self) -> Tensor:
        """Squared distance in predicted noise between the empty prompt and the teacher, (n,): how much the concept matters there."""
        return self.distance(self.empty)

    def distance(self, x0: Tensor) -> Tensor:
        """Squared distance in predicted noise between ``x0`` and the teacher, (n,).

        Two x0 predictions differ by sigma times the difference of the noise predictions, hence the division.
        """
        return ((x0 - self.teacher) / self.sigma.view(-1, 1, 1, 1)).square().flatten(1).sum(1)


def harvest(
    model: Model,
    teacher: Conditioning,
    empty: Conditioning,
    seeds: Sequence[int],
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    batch: int = 8,
    on_step: OnStep = silent,
) -> States:
    """Sample one image per seed and keep every state with both predictions: len(seeds) * steps states, 2 model evaluations each.

    teacher, empty: the conditioning of the concept's prompt and of the empty one, batch 1.
    seeds: one an image.
    height, width: in latent cells.
    steps: of the sampler, evenly spaced in training time.
    guidance: of the sampler. With 1, where it skips the empty prompt, that is evaluated afterwards.
    batch: images sampled at once. Fewer take less memory and longer.
    on_step: counts the steps of each batch.
    """
    denoiser = model.require_denoiser()
    sigmas = schedule(denoiser, steps)
    parts: list[States] = []
    for start in range(0, len(seeds), batch):
        chosen = seeds[start : start + batch]

        def keep(x: Tensor, sigma: Tensor, cond: Tensor, uncond: Tensor | None, chosen: Sequence[int] = chosen, start: int = start) -> None:
            if uncond is None:
                uncond = model.denoise(x, sigma, empty)
            pictures = torch.arange(start, start + len(chosen), device=x.device)
            parts.append(States(x.clone(), sigma.expand(len(chosen)), cond.clone(), uncond.clone(), pictures))

        noise = initial_noise(chosen, denoiser.latent_channels, height, width)
        with torch.no_grad():
            sample(model, teacher, empty, noise, sigmas, guidance=guidance, on_prediction=keep, on_step=on_step)
    return States(
        torch.cat([part.x for part in parts]),
        torch.cat([part.sigma for part in parts]),
        torch.cat([part.teacher for part in parts]),
        torch.cat([part.empty for part in parts]),
        torch.cat([part.picture for part in parts]),
    )


def distances(model: Model, states: States, conditioning: Conditioning, *, batch: int = 16) -> Tensor:
    """``States.distance`` of what the model predicts under a batch-1 conditioning, (n,); 1 eval per state, no gradient."""
    with torch.no_grad():
        chunks = [slice(start, start + batch) for start in range(0, len(states), batch)]
        return torch.cat([states[c].distance(model.denoise(states.x[c], states.sigma[c], conditioning)) for c in chunks])
