"""Bringing an erased concept back: the attacks that edits are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...demo import render
from ...demo.world import World
from ...edit import Concept, ContextEdit
from ...edit.layers import gram
from ...edit.report import Adversary
from ...edit.solve import LowRank
from ...edit.texts import Texts, caption_corpus, corpus
from ...learn import invert_concept
from ...model import Conditioning, Model, Slot, fill
from ..worlds import TEMPLATE
from .cases import Case, Counts
from .look import judged, sampled

LEARN_BATCH = 8
LEARN_RATE = 0.1
"""Of textual inversion, as `invert_concept` counts it."""
LEARN_PICTURES = 64
"""Renders of the concept that textual inversion learns from."""


def derived(model: Model, world: World, concept: Concept, edit: ContextEdit, counts: Counts) -> list[int]:
    """Presence under the strongest plausible context: every position of the concept's prompt replaced by what brings it back best.

    model: the unedited model.
    world: its world, which judges.
    concept: what was erased.
    edit: the edit under attack.
    counts: how many images.

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

    model: the unedited model.
    world: its world, which judges.
    concept: what was erased.
    edit: the edit under attack; None attacks the model itself.
    counts: how many images and learning steps.

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
    """A token learned from renders of the concept, through the edit.

    model: the unedited model.
    world: its world, which renders the concept.
    concept: what was erased.
    edit: the edit that is learned through; None learns on the model itself.
    steps: of Adam.
    seed: of renders, noise and noise levels.
    """
    drawn = np.random.default_rng(seed)
    renders = render.draw_batch([world.picture_of(concept.text, drawn) for _ in range(LEARN_PICTURES)])
    images = torch.from_numpy(renders).float().div(255).movedim(-1, 1)
    transform = None if edit is None else edit.apply_to_conditioning
    return invert_concept(
        model, images, templates=[TEMPLATE], steps=steps, batch=LEARN_BATCH, rate=LEARN_RATE, seed=seed, transform=transform
    )
