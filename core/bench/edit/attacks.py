"""Bringing an erased concept back: the attacks that edits are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...decompose.result import fill
from ...demo import render
from ...demo.world import World
from ...edit import Concept, ContextEdit
from ...edit.layers import gram
from ...edit.report import Adversary
from ...edit.solve import LowRank
from ...edit.texts import Texts, caption_corpus, corpus
from ...model import Conditioning, Model, Slot
from ...vocabulary import WORD_END, embeddings
from ..worlds import TEMPLATE
from .cases import Case, Counts
from .look import judged, sampled

LEARN_BATCH = 8
LEARN_RATE = 0.1
"""Of Adam, in units of a table row's root mean square."""
LEARN_PICTURES = 64
"""Renders of the concept that textual inversion learns from."""


def derived(model: Model, world: World, concept: Concept, edit: ContextEdit, counts: Counts) -> list[int]:
    """Presence under the strongest plausible context: every position of the concept's prompt replaced by what brings it back best.

    Source: the derived embedding of RECE (Gong et al., arXiv 2407.12383), with the captions' covariance in place of the identity.
    """
    prompt = model.text.encode([TEMPLATE.replace("{}", concept.text)])
    attacked = replace(prompt, context=adversary(model, edit, prompt.context[0])[None])
    return _hits(model, world, concept, attacked, range(56_000, 56_000 + counts.attack), edit)


def adversary(model: Model, edit: ContextEdit, context: Tensor) -> Tensor:
    """Per position of a context (positions, width) the embedding, no less plausible, that the edited model reads most like it."""
    captions = corpus(Texts(model.text), caption_corpus(model)).covariance
    factors = LowRank(edit.context.u.double().cpu(), edit.context.v.double().cpu())
    attacker = Adversary(factors, gram(model, context.shape[1], None).matrix, captions)
    return torch.stack([attacker.derive(row) for row in context.double().cpu()]).to(context)


def learned(model: Model, world: World, concept: Concept, edit: ContextEdit | None, counts: Counts) -> list[int]:
    """Presence after textual inversion on the edited model: can a new word, learned from pictures, say the concept again?

    Source: Pham et al., "Circumventing Concept Erasure Methods", arXiv 2308.01508, with the world's own pictures in place of generated
    ones.
    """
    slot = inverted(model, world, concept, edit, steps=counts.learn, seed=0)
    attacked = model.text.encode([fill(TEMPLATE, [slot])]).detach()
    return _hits(model, world, concept, attacked, range(57_000, 57_000 + counts.attack), edit)


def _hits(
    model: Model, world: World, concept: Concept, attacked: Conditioning, seeds: Sequence[int], edit: ContextEdit | None
) -> list[int]:
    """1 where an image of an attack shows the concept."""
    return judged(world, [Case("", seed, concept.text) for seed in seeds], sampled(model, attacked, seeds, edit))


def inverted(model: Model, world: World, concept: Concept, edit: ContextEdit | None, *, steps: int, seed: int) -> Slot:
    """One token per text encoder that minimises the noise-prediction error on renders of the concept, started from the word "thing".

    Adam with a rate relative to the table's mean row length, decaying to zero along a cosine; noise levels uniform in training time.
    """
    if model.autoencoder is None:
        raise ValueError("the model has no autoencoder to encode the concept's pictures with: load one that has")
    generator, drawn = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    renders = render.draw_batch([world.picture_of(concept.text, drawn) for _ in range(LEARN_PICTURES)])
    with torch.no_grad():
        latents = model.autoencoder.encode(torch.from_numpy(renders).float().div(255).movedim(-1, 1))
    start = embeddings(model.text, [model.text.vocabulary["thing" + WORD_END]])
    rows = {name: row.clone().requires_grad_() for name, row in start.items()}
    norm = {name: float(table.norm(dim=1).mean()) for name, table in model.text.tables.items()}
    groups = [{"params": [row], "lr": LEARN_RATE * norm[name] / row.shape[-1] ** 0.5} for name, row in rows.items()]
    optimiser = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    sigmas = model.denoiser.training_sigmas
    for _ in range(steps):
        index = torch.randint(len(latents), (LEARN_BATCH,), generator=generator)
        sigma = sigmas[torch.randint(len(sigmas), (LEARN_BATCH,), generator=generator)]
        x0, level = latents[index], sigma.view(-1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=generator)
        conditioning = model.text.encode([fill(TEMPLATE, [dict(rows)])])
        if edit is not None:
            conditioning = edit.apply_to_conditioning(conditioning)
        loss = ((model.denoise(x0 + level * noise, sigma, conditioning) - x0) / level).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    return {name: row.detach() for name, row in rows.items()}
