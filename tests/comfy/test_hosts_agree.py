"""The same weights through ComfyUI and through diffusers: the same pictures and gradients (float32, CPU)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers", reason="the other host needs diffusers in the environment that runs the tests")

from conceptkit.core.hosts.diffusers import load_model
from conceptkit.core.sampling import initial_noise, sample, schedule

TOLERANCE = 1e-3
"""Of pictures in [0, 1], and relative for gradients: what design.md promises."""


@pytest.fixture(scope="module")
def headless(comfy):
    return load_model(comfy.weights)


@pytest.mark.parametrize(("sampler", "guidance", "seed"), [("euler", 1.0, 1), ("euler", 4.0, 2), ("dpmpp_2m", 4.0, 3)])
def test_same_picture(comfy, headless, sampler, guidance, seed):
    path = comfy.base / f"{sampler}{seed}.safetensors"
    prompts = {"prompt": "a large red circle and a blue star", "negative": "a green square"}
    counts = comfy.probe("picture", **prompts, seed=seed, steps=8, guidance=guidance, sampler=sampler, path=str(path))
    theirs = load_file(path)
    with torch.no_grad():
        noise, sigmas = initial_noise([seed], 4, 16, 16), schedule(headless.denoiser, 8)
        positive, negative = headless.text.encode([prompts["prompt"]]), headless.text.encode([prompts["negative"]])
        latents = sample(headless, positive, negative, noise, sigmas, guidance=guidance, sampler=sampler)
        pictures = headless.autoencoder.decode(latents)
        encoded = headless.autoencoder.encode(theirs["pictures"])
    torch.testing.assert_close(theirs["sigmas"], sigmas, rtol=1e-5, atol=0)
    torch.testing.assert_close(theirs["context"], positive.context, rtol=0, atol=1e-4)
    assert (pictures - theirs["pictures"]).abs().max() < TOLERANCE
    assert (encoded - theirs["encoded"]).abs().max() < TOLERANCE
    assert (counts["evals"], counts["calls"]) == (headless.meter.evals, headless.meter.calls)
    headless.meter.evals = headless.meter.calls = 0


def test_same_gradients_vocabulary_and_embeddings(comfy, headless):
    path = comfy.base / "gradients.safetensors"
    result = comfy.probe("gradients", wires={"vae": None}, word="bird", path=str(path))
    theirs = load_file(path)
    assert result["difference"] < 1e-5, "a word's own embedding in a slot must read as the word"
    assert result["ids"] == headless.text.tokenize("A Photo of a café!")
    assert torch.equal(theirs["table"], headless.text.tables["l"])
    rows = headless.text.tables["l"][headless.text.tokenize("bird")].repeat(2, 1, 1).requires_grad_()
    conditioning = headless.text.encode([["a photo of a ", {"l": rows}]])
    conditioning.context.retain_grad()
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
    headless.denoise(x, torch.tensor([3.0, 0.7]), conditioning).square().mean().backward()
    for name, mine in (("rows", rows.grad), ("context", conditioning.context.grad)):
        assert mine.norm() > 0
        assert (mine - theirs[name]).norm() / mine.norm() < TOLERANCE, name
