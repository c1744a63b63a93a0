"""The same weights through ComfyUI and through diffusers: the same pictures and gradients (float32, CPU)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="the other host needs diffusers in the environment that runs the tests")

from conceptkit.core.hosts.diffusers import DiffusersAutoencoder, load_model
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


def sd_autoencoder(comfy):
    """SD's autoencoder with random weights, and a VAE loader of it."""
    from diffusers import AutoencoderKL

    layout = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "scaling_factor": 1.0}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(**layout, **blocks).requires_grad_(False).eval()
    (comfy.base / "models" / "vae").mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, comfy.base / "models" / "vae" / "random.safetensors"
    )
    return DiffusersAutoencoder(vae), {"vae": {"class_type": "VAELoader", "inputs": {"vae_name": "random.safetensors"}}}


@pytest.mark.parametrize("kind", ["demo", "sd"])
def test_same_gradients_through_the_vae(comfy, headless, kind):
    autoencoder, graph = (headless.autoencoder, None) if kind == "demo" else sd_autoencoder(comfy)
    given, path, generator = comfy.base / "given.safetensors", comfy.base / "through.safetensors", torch.Generator().manual_seed(0)
    shapes = {"latents": (1, 4, 8, 8), "on pictures": (1, 3, 64, 64), "on latents": (1, 4, 8, 8)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, given)
    before = comfy.probe("state")
    wires = {} if graph is None else {"vae": ["vae", 0]}
    stock = comfy.probe("through_pixels", wires=wires, graph=graph, given=str(given), path=str(path))
    theirs = load_file(path)
    assert stock["decode"] < 1e-5 and stock["encode"] < 1e-4, "with a gradient or without, the values are the same"
    leaf, x = tensors["latents"].clone().requires_grad_(), tensors["latents"].clone().requires_grad_()
    pictures = autoencoder.decode(leaf)
    pictures.retain_grad()
    ((pictures * tensors["on pictures"]).sum() + (autoencoder.encode(pictures) * tensors["on latents"]).sum()).backward()
    autoencoder.decode(headless.denoise(x, 1.0, headless.text.encode(["a circle"]).detach())).square().mean().backward()
    for name, mine in (("latents", leaf.grad), ("pictures", pictures.grad), ("x", x.grad)):
        assert mine.norm() > 0, name
        assert (mine - theirs[name]).norm() / mine.norm() < TOLERANCE, name
    assert comfy.probe("state") == before
