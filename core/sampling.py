"""Samplers over ``Model.denoise`` on an explicit list of noise levels.

Everything is deterministic: the only randomness is ``initial_noise``, which is drawn on the CPU from one generator per seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from .model import Conditioning, Denoiser, Model, UnsupportedModel, in_chunks
from .progress import OnStep, part_of, silent

Sampler: TypeAlias = Literal["euler", "dpmpp_2m"]
"""The samplers' names, as ComfyUI spells them."""


class OnPrediction(Protocol):
    """Called with what the sampler saw at each step, before guidance: x, sigma, the conditional and the unconditional x0.

    The unconditional x0 is None when guidance is 1. The tensors are the sampler's own: clone what is kept and changed.
    """

    def __call__(self, x: Tensor, sigma: Tensor, cond_x0: Tensor, uncond_x0: Tensor | None, /) -> None: ...


def schedule(denoiser: Denoiser, steps: int) -> Tensor:
    """``steps`` noise levels evenly spaced in training time from the largest down to the smallest, then 0: (steps + 1,), float32, CPU.

    Levels between two training timesteps are interpolated in log sigma, so the values are those of ComfyUI's scheduler "normal".
    Raises ValueError when ``steps`` < 1.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got {steps}")
    log_sigmas = denoiser.training_sigmas.log()
    time = torch.linspace(len(log_sigmas) - 1, 0, steps)
    low, high, weight = time.floor().long(), time.ceil().long(), time.frac()
    levels = ((1 - weight) * log_sigmas[low] + weight * log_sigmas[high]).exp()
    return torch.cat([levels, levels.new_zeros(1)])


def initial_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> Tensor:
    """Unit Gaussian noise (len(seeds), channels, height, width), float32, CPU; row i depends on ``seeds[i]`` alone.

    height and width count latent cells. Row i equals the noise ComfyUI draws for a batch of one with that seed.
    """
    rows = [torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(rows)


def sample(
    model: Model,
    positive: Conditioning,
    negative: Conditioning | None,
    noise: Tensor,
    sigmas: Tensor,
    *,
    guidance: float,
    sampler: Sampler = "dpmpp_2m",
    on_prediction: OnPrediction | None = None,
    on_step: OnStep = silent,
) -> Tensor:
    """Denoise unit ``noise`` (batch, channels, h, w) down ``sigmas`` (steps + 1,) to latents of the same shape, on the model's device.

    positive, negative: batch 1 or the batch of the noise.
    noise: of unit variance, as `initial_noise` makes it.
    sigmas: descending. A list that starts at the model's largest sigma is taken to start from pure noise of variance 1 + sigma^2, as
        ComfyUI does.
    guidance: the guided prediction is uncond + guidance * (cond - uncond) (Ho and Salimans, arXiv 2207.12598), both halves in one call of
        2 * batch samples. 1 leaves the negative out and halves the cost.
    sampler: "dpmpp_2m" is of second order, and needs fewer steps than "euler" for the same image.
    on_prediction: sees every state and both predictions there.
    on_step: counts steps; raising from it cancels.

    Raises ValueError for an unknown sampler, a list of levels that does not descend, or guidance without a negative, and
    whatever ``Model.denoise`` raises.
    """
    if sampler not in _SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(_SAMPLERS)}")
    if len(sigmas) < 2 or bool((sigmas.diff() >= 0).any()) or sigmas[-1] < 0:
        raise ValueError("sigmas must descend, to 0 or above, and hold at least two levels")
    if guidance != 1 and negative is None:
        raise ValueError("guidance other than 1 needs a negative conditioning: encode the empty prompt, or set guidance to 1")
    # Both halves of guidance as one batch.
    denoiser, batch = model.require_denoiser(), noise.shape[0]
    both = positive.expand(batch)
    if guidance != 1 and negative is not None:
        both = Conditioning.cat([both, negative.expand(batch)])

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        if guidance == 1:
            cond, uncond = model.denoise(x, sigma, both), None
        else:
            cond, uncond = model.denoise(torch.cat([x, x]), sigma, both).chunk(2)
        if on_prediction is not None:
            on_prediction(x, sigma, cond, uncond)
        return cond if uncond is None else uncond + guidance * (cond - uncond)

    # From unit noise to the first level, then down the list.
    sigmas = sigmas.to(device=denoiser.device, dtype=torch.float32)
    largest = float(denoiser.training_sigmas[-1])
    first = float(sigmas[0])
    pure = first > largest or math.isclose(first, largest, rel_tol=1e-5)
    latents = noise.to(device=denoiser.device, dtype=torch.float32) * ((1 + sigmas[0] ** 2).sqrt() if pure else sigmas[0])
    states = _SAMPLERS[sampler](predict, latents, sigmas)
    total = len(sigmas) - 1
    for step in range(1, total + 1):
        latents = next(states)
        on_step(step, total, {"sigma": float(sigmas[step])})
    return latents


@torch.no_grad()
def draw(
    model: Model,
    positive: Conditioning,
    negative: Conditioning | None,
    seeds: Sequence[int],
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    sampler: Sampler = "dpmpp_2m",
    batch: int | None = None,
    on_step: OnStep = silent,
) -> Tensor:
    """An image a seed from pure noise: (len(seeds), 3, height, width) in [0, 1], CPU.

    positive: batch 1, or a row a seed.
    negative: batch 1.
    seeds: row i starts from the noise of ``seeds[i]``, whatever the other seeds are.
    height, width: in pixels, rounded down to whole latent cells.
    steps: evenly spaced in training time.
    guidance, sampler: as of `sample`.
    batch: the most images in memory at once, all of them by default.
    on_step: counts the sampler's steps over all batches; raising from it cancels.

    Raises UnsupportedModel for a model without denoiser or autoencoder, and whatever ``sample`` raises.
    """
    if model.autoencoder is None:
        raise UnsupportedModel(
            f"{model.name} has no autoencoder to generate images with: connect the VAE of its checkpoint, or choose a complete pipeline"
        )
    denoiser = model.require_denoiser()
    cells = [side // denoiser.downscale for side in (height, width)]
    sigmas = schedule(denoiser, steps)
    starts = range(0, len(seeds), batch or len(seeds))
    pictures = []
    for number, start in enumerate(starts):
        rows = slice(start, start + starts.step)
        noise = initial_noise(seeds[rows], denoiser.latent_channels, *cells)
        prompts = positive if len(positive) == 1 else positive.map(itemgetter(rows))
        told = part_of(on_step, number, len(starts))
        latents = sample(model, prompts, negative, noise, sigmas, guidance=guidance, sampler=sampler, on_step=told)
        pictures.append(in_chunks(model.autoencoder.decode, latents, len(latents), f"an image of {width}x{height}").clamp(0, 1).cpu())
    return torch.cat(pictures)


_Predict: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def _euler(predict: _Predict, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Euler steps on dx/dsigma = (x - x0) / sigma (Karras et al., arXiv 2206.00364, algorithm 2 without churn)."""
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * (x - predict(x, sigma)) / sigma
        yield x


def _dpmpp_2m(predict: _Predict, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """DPM-Solver++(2M) in data prediction (Lu et al., arXiv 2211.01095, algorithm 2) with lambda = -log sigma; last step first order."""
    previous: Tensor | None = None
    last_stride = sigmas[0]
    for sigma, following in pairwise(sigmas):
        x0 = predict(x, sigma)
        stride = (sigma / following).log()
        estimate = x0
        if previous is not None and following > 0:
            estimate = x0 + stride / (2 * last_stride) * (x0 - previous)
        ratio = following / sigma
        x = ratio * x + (1 - ratio) * estimate
        previous, last_stride = x0, stride
        yield x


_SAMPLERS: dict[str, Callable[[_Predict, Tensor, Tensor], Iterator[Tensor]]] = {"dpmpp_2m": _dpmpp_2m, "euler": _euler}
