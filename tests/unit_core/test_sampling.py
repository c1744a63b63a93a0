"""Samplers: exactness on a Gaussian world, agreement of guidance with its definition, determinism, cancelling."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conceptkit.core.model import Conditioning, Model, NonFinite, OutOfMemory, UnsupportedModel
from conceptkit.core.sampling import draw, initial_noise, sample, schedule
from torch import Tensor


class Gaussian:
    """Exact denoiser of N(mean, scale^2 I), the mean being the first context entry."""

    latent_channels, downscale, device = 2, 8, torch.device("cpu")

    def __init__(self, scale: float = 0.5) -> None:
        self.scale = scale
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        survival = torch.cumprod(1 - betas, 0)
        self.training_sigmas = ((1 - survival) / survival).sqrt().float()

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        mean = conditioning.context[:, 0, 0].view(-1, 1, 1, 1)
        keep = (self.scale**2 / (self.scale**2 + sigma**2)).view(-1, 1, 1, 1)
        return mean + keep * (x - mean)


def model(denoiser: object | None = None) -> Model:
    return Model("sd1", "gaussian", text=SimpleNamespace(), denoiser=denoiser or Gaussian())  # type: ignore[arg-type]


def mean(value: float) -> Conditioning:
    return Conditioning(torch.full((1, 3, 4), value))


class Room:
    """An autoencoder with room for ``pictures`` at once."""

    def __init__(self, pictures: int) -> None:
        self.pictures = pictures

    def decode(self, latents: Tensor) -> Tensor:
        if len(latents) > self.pictures:
            raise torch.OutOfMemoryError
        return latents.repeat_interleave(8, -1).repeat_interleave(8, -2)[:, :1].expand(-1, 3, -1, -1).sigmoid()


NOISE = initial_noise([3, 4], 2, 4, 4)


def test_schedule_runs_from_the_largest_level_to_zero() -> None:
    denoiser = Gaussian()
    sigmas = schedule(denoiser, 20)
    assert sigmas.shape == (21,) and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert torch.isclose(sigmas[0], denoiser.training_sigmas[-1]) and torch.isclose(sigmas[-2], denoiser.training_sigmas[0])
    # With 3 steps the middle level lies half-way between timesteps 499 and 500, in log sigma.
    middle = (denoiser.training_sigmas[499] * denoiser.training_sigmas[500]).sqrt()
    assert torch.isclose(schedule(denoiser, 3)[1], middle)
    assert torch.equal(schedule(denoiser, 1), torch.stack([denoiser.training_sigmas[-1].log().exp(), torch.tensor(0.0)]))
    with pytest.raises(ValueError, match="at least 1"):
        schedule(denoiser, 0)


def test_noise_depends_on_its_own_seed_and_on_no_global_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(initial_noise([4], 2, 4, 4)[0], NOISE[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(initial_noise([4], 2, 4, 4), torch.randn(1, 2, 4, 4, generator=torch.manual_seed(4)))


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("dpmpp_2m", 2)])
def test_a_sampler_converges_at_its_order_to_the_exact_solution(sampler: str, order: int) -> None:
    """The probability-flow ODE of N(m, s^2) is linear: x(sigma) - m scales with sqrt(s^2 + sigma^2)."""
    denoiser = Gaussian()
    start, end = 10.0, 0.05
    exact = 1.0 + (start * NOISE - 1.0) * ((denoiser.scale**2 + end**2) / (denoiser.scale**2 + start**2)) ** 0.5

    def error(steps: int) -> float:
        sigmas = torch.logspace(1, torch.tensor(end).log10().item(), steps + 1)
        return float((sample(model(), mean(1.0), None, NOISE, sigmas, guidance=1, sampler=sampler) - exact).abs().max())  # type: ignore[arg-type]

    assert error(160) < error(80) / 2 ** (order - 0.35) and error(160) < (0.05, 0.005)[order - 1]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_guidance_extrapolates_from_negative_to_positive(sampler: str) -> None:
    """For two Gaussians of one scale the guided denoiser is that of the extrapolated mean."""
    sigmas = schedule(Gaussian(), 12)
    guided = sample(model(), mean(1.0), mean(0.25), NOISE, sigmas, guidance=3.0, sampler=sampler)  # type: ignore[arg-type]
    direct = sample(model(), mean(0.25 + 3 * 0.75), None, NOISE, sigmas, guidance=1.0, sampler=sampler)  # type: ignore[arg-type]
    assert torch.allclose(guided, direct, atol=1e-5)


def test_pure_noise_starts_at_the_full_variance_and_a_later_start_at_sigma() -> None:
    seen: list[Tensor] = []
    top = schedule(Gaussian(), 5)
    for sigmas in (top, top[1:]):
        sample(model(), mean(0.0), None, NOISE, sigmas, guidance=1, on_prediction=lambda x, s, c, u: seen.append(x))
    assert torch.allclose(seen[0], NOISE * (1 + top[0] ** 2).sqrt()) and torch.allclose(seen[5], NOISE * top[1])


def test_what_the_sampler_saw_is_what_the_model_predicted() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
    instance = model()
    steps: list[int] = []
    sample(
        instance,
        mean(1.0),
        mean(0.0),
        NOISE,
        schedule(Gaussian(), 4),
        guidance=2,
        on_prediction=lambda *row: seen.append(row),
        on_step=lambda step, total, metrics: steps.append(step),
    )
    assert steps == [1, 2, 3, 4] and (instance.meter.evals, instance.meter.calls) == (16, 4)
    for x, sigma, cond, uncond in seen:
        assert torch.equal(cond, Gaussian().denoise(x, sigma.expand(2), mean(1.0).expand(2)))
        assert uncond is not None and torch.equal(uncond, Gaussian().denoise(x, sigma.expand(2), mean(0.0).expand(2)))


def test_same_inputs_same_bits_and_rows_do_not_mix() -> None:
    sigmas = schedule(Gaussian(), 6)
    first = sample(model(), mean(1.0), mean(0.0), NOISE, sigmas, guidance=4)
    assert torch.equal(first, sample(model(), mean(1.0), mean(0.0), NOISE, sigmas, guidance=4))
    assert torch.allclose(first[1:], sample(model(), mean(1.0), mean(0.0), NOISE[1:], sigmas, guidance=4), atol=1e-6)


def test_cancelling_stops_at_the_next_call() -> None:
    class Cancel(Exception):
        pass

    calls = 0

    def stop_at_third() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Cancel

    instance = Model("sd1", "gaussian", SimpleNamespace(), Gaussian(), before_call=stop_at_third)  # type: ignore[arg-type]
    with pytest.raises(Cancel):
        sample(instance, mean(1.0), None, NOISE, schedule(Gaussian(), 10), guidance=1)
    assert instance.meter.calls == 2


def test_bad_input_is_named() -> None:
    sigmas = schedule(Gaussian(), 4)
    with pytest.raises(ValueError, match="unknown sampler"):
        sample(model(), mean(1.0), None, NOISE, sigmas, guidance=1, sampler="heun")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="descend"):
        sample(model(), mean(1.0), None, NOISE, sigmas.flip(0), guidance=1)
    with pytest.raises(ValueError, match="negative"):
        sample(model(), mean(1.0), None, NOISE, sigmas, guidance=2)
    with pytest.raises(NonFinite):
        sample(model(), mean(float("nan")), None, NOISE, sigmas, guidance=1)


def test_a_picture_depends_on_its_own_row_and_seed_however_many_are_drawn_at_once() -> None:
    def decode(latents: Tensor) -> Tensor:
        return latents[:, :1].expand(-1, 3, -1, -1).repeat_interleave(8, 2).repeat_interleave(8, 3)

    whole = Model("sd1", "gaussian", SimpleNamespace(), Gaussian(), SimpleNamespace(decode=decode))  # type: ignore[arg-type]
    prompts, common = Conditioning.cat([mean(0.2), mean(0.5), mean(0.8)]), {"height": 16, "width": 24, "steps": 3, "guidance": 2.0}
    seen: list[tuple[int, int]] = []
    pictures = draw(whole, prompts, mean(0.1), [7, 3, 9], batch=2, on_step=lambda step, total, _: seen.append((step, total)), **common)
    assert pictures.shape == (3, 3, 16, 24) and 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    assert seen == [(step, 6) for step in range(1, 7)]
    torch.testing.assert_close(draw(whole, prompts, mean(0.1), [7, 3, 9], **common), pictures)
    torch.testing.assert_close(draw(whole, mean(0.8), mean(0.1), range(9, 11), **common)[0], pictures[2])
    expected = sample(whole, mean(0.5), mean(0.1), initial_noise([3], 2, 2, 3), schedule(Gaussian(), 3), guidance=2.0)
    torch.testing.assert_close(pictures[1], decode(expected)[0].clamp(0, 1))
    with pytest.raises(UnsupportedModel, match="connect the VAE"):
        draw(model(), mean(0.5), None, [0], height=16, width=16, steps=1, guidance=1)


def test_a_model_without_denoiser_says_what_to_connect() -> None:
    alone = replace(model(), denoiser=None)
    with pytest.raises(UnsupportedModel, match="gaussian has no denoiser to generate images with: connect a MODEL"):
        alone.denoise(NOISE, 1.0, mean(1.0))
    with pytest.raises(UnsupportedModel, match="no denoiser"):
        sample(alone, mean(1.0), None, NOISE, schedule(Gaussian(), 3), guidance=1)
    assert alone.meter.calls == 0


def test_pictures_too_large_for_memory_are_decoded_in_parts() -> None:
    def drawn(room: int) -> Tensor:
        kept = replace(model(), autoencoder=Room(room))  # type: ignore[arg-type]
        return draw(kept, mean(0.3), None, [1, 2, 3, 4, 5], height=32, width=32, steps=2, guidance=1.0)

    assert torch.equal(drawn(2), drawn(5)) and torch.equal(drawn(1), drawn(5))
    with pytest.raises(OutOfMemory, match="an image of 32x32 does not fit"):
        drawn(0)
