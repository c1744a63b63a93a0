"""Textual inversion: a token embedding that stands for what some images show, learned with the model frozen.

Source: Gal et al., "An Image is Worth One Word", arXiv 2208.01618, equation 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model import Conditioning, Model, NonFinite, Slot, UnsupportedModel, fill, in_chunks
from ..progress import OnStep, silent
from ..vocabulary import embeddings, token_of

TEMPLATES = ("a photo of a {}",)


def invert_concept(
    model: Model,
    images: Tensor,
    *,
    start: str = "thing",
    templates: Sequence[str] = TEMPLATES,
    steps: int = 500,
    batch: int = 8,
    rate: float = 0.1,
    seed: int = 0,
    transform: Callable[[Conditioning], Conditioning] | None = None,
    on_step: OnStep = silent,
) -> Slot:
    """Learn the pseudo-token of what ``images`` have in common: per text encoder one row (1, width), detached, to stand in a prompt.

    The rows v minimise the mean of ||eps - eps_model(x0 + sigma * eps, sigma, prompt(v))||^2 over images, noise eps, and noise levels sigma
    uniform in training time, by Adam with a learning rate that decays to zero along a cosine. The model is frozen. All randomness comes
    from one generator on the CPU, so that the same arguments give the same rows. Costs 3 * batch * steps evals (in ``model.meter``).

    images: (n, 3, height, width) in [0, 1], with sides that are multiples of the model's downscale (8 for SD); the paper uses 3 to 5.
    start: the word to start from, one token. A word close to what the images show needs fewer steps, and leaves less to be learned.
    templates: prompts with ``{}`` in the concept's place, used in turn. Several keep what one wording adds out of the token.
    steps: of gradient descent. Few leave the token near ``start``; many fit the images' backgrounds and style, too.
    batch: images a step, drawn with replacement. Memory grows with it, and the gradient's noise shrinks.
    rate: the first learning rate, in units of a table row's root mean square (mean length / sqrt(width)). Far above 0.1 the token leaves
        the region that the text encoder was trained on.
    seed: of the choice of images and noise levels, and of the noise.
    transform: what is done to every prompt's conditioning before the model reads it, such as ``ContextEdit.apply_to_conditioning``: the
        token is then learned through it. Must be differentiable.
    on_step: hears ``loss`` after each step; raising from it cancels, and leaves the model as it was.

    Raises UnsupportedModel for a model without autoencoder, ValueError for images of another shape or range, a word that is not one token
    or a template without its place, and NonFinite where the model returns NaN or infinity or the token becomes so.
    """
    if model.autoencoder is None:
        raise UnsupportedModel(f"{model.name} has no autoencoder to encode images with: connect the VAE of the same checkpoint")
    _check(images, templates, steps, batch, rate)
    rows = {name: row.detach().clone() for name, row in embeddings(model.text, [token_of(model.text, start)]).items()}
    device = model.require_denoiser().device

    with torch.no_grad():
        latents = in_chunks(model.autoencoder.encode, images, len(images), "encoding an image").to(device)

    norms = {name: float(table.norm(dim=1).mean()) for name, table in model.text.tables.items()}
    groups = [{"params": [row.requires_grad_()], "lr": rate * norms[name] / row.shape[-1] ** 0.5} for name, row in rows.items()]
    optimiser = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator, sigmas = torch.Generator().manual_seed(seed), model.require_denoiser().training_sigmas
    for step in range(steps):
        index = torch.randint(len(latents), (batch,), generator=generator)
        sigma = sigmas[torch.randint(len(sigmas), (batch,), generator=generator)].to(device)
        x0, level = latents[index.to(device)], sigma.view(-1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        with torch.enable_grad():
            conditioning = model.text.encode([fill(templates[step % len(templates)], [dict(rows)])])
            if transform is not None:
                conditioning = transform(conditioning)
            loss = ((model.denoise(x0 + level * noise, sigma, conditioning) - x0) / level).square().mean()
        # Of the rows alone: nothing is left in the model's weights.
        for row, gradient in zip(rows.values(), torch.autograd.grad(loss, list(rows.values())), strict=True):
            row.grad = gradient
        optimiser.step()
        decay.step()
        if not all(torch.isfinite(row).all() for row in rows.values()):
            raise NonFinite(f"the token became NaN or infinite in step {step + 1} of {steps}: use a lower rate, or a model in fp32 or bf16")
        on_step(step + 1, steps, {"loss": loss.item()})
    return {name: row.detach() for name, row in rows.items()}


def _check(images: Tensor, templates: Sequence[str], steps: int, batch: int, rate: float) -> None:
    """Raises ValueError for what nothing can be learned from or with."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images have shape {tuple(images.shape)}: give at least one, as (images, 3, height, width)")
    if not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
        raise ValueError("images have values outside [0, 1]: divide 8-bit images by 255")
    if not templates:
        raise ValueError("there is no template: give at least one, as in 'a photo of a {}'")
    for template in templates:
        fill(template, "")  # raises for a template without its place
    if steps < 1 or batch < 1 or not 0 < rate < float("inf"):
        raise ValueError(f"steps {steps}, batch {batch} and rate {rate:g} must be positive")
