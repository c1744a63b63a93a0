"""The public entry: checks what is asked, chooses the candidate words, and hands over to a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import get_args

import torch
from torch import Tensor

from .. import __version__
from ..model import Family, Model, Prompt, Slot, UnsupportedModel, fill, split_template
from ..progress import OnStep, silent
from ..vocabulary import choose_candidates, embeddings, is_known
from .clusters import clusters
from .conceptor import decompose_conceptor
from .decomposition import Decomposition
from .distilled import decompose_distilled
from .task import Budget, Select, Task
from .text import decompose_text

METHODS: Mapping[str, Callable[[Task], Decomposition]] = MappingProxyType(
    {"distilled": decompose_distilled, "conceptor": decompose_conceptor, "text": decompose_text}
)
"""The methods by name."""


def decompose_concept(
    model: Model,
    concept: str | Slot,
    *,
    method: str = "distilled",
    template: str = "a photo of a {}",
    words: int = 5,
    candidates: str | Iterable[str] | None = None,
    limit: int = 1000,
    exclude: str | Iterable[str] = (),
    exclude_unsafe: bool = True,
    keep_concept: bool = False,
    budget: Budget = "default",
    settings: Mapping[str, float] = MappingProxyType({}),
    select: Select = "scorer",
    seed: int = 0,
    height: int = 512,
    width: int = 512,
    checkpoint: Path | None = None,
    on_step: OnStep = silent,
) -> Decomposition:
    """Decompose ``concept`` into at most ``words`` weighted vocabulary words. The model is not modified.

    Look at ``r2`` before believing the words: it is measured on images that the fit did not see.

    model: an SD 1.x, SD 2.x or SDXL model with its denoiser.
    concept: a word, a phrase, or a learnt token as a slot.
    method: a name in ``METHODS``. "text" generates no images to find the words, and finds what the text encoder relates rather than what
        the model generates.
    template: the prompt, with ``{}`` where the concept goes. Words are found for this context and may differ in another.
    words: the most words of the result. More explain more, and the last of them are often fillers.
    candidates: the words to choose from, else the model's own ``words``, else the ``limit`` whole words nearest to the concept. A str is
        read as `parse_list` does.
    limit: the most candidates. More of them reach further from the concept, and take longer.
    exclude: words that may not be chosen, in the form of ``candidates``. What is left out is said in the result.
    exclude_unsafe: whether personal names and offensive words are left out.
    keep_concept: whether the concept itself and its near-copies may be chosen. The concept then usually explains itself.
    budget: how much the method may spend, in model evaluations. Larger ones are more reliable.
    settings: single settings that replace those of the budget, such as ``{"guidance": 7.5}``.
    select: what the conceptor method chooses its result by: "scorer" needs a scorer and an autoencoder, "r2" neither.
    seed: of all randomness, 0 to 2^63 - 1. The same inputs and seed give the same result.
    height, width: of the images sampled, in pixels: take the size that the model was trained on.
    checkpoint: a file that intermediate results are saved to. An interrupted run resumes from it and gives the identical result.
    on_step: counts model evaluations; raising from it cancels.

    Raises ValueError for an unknown method, a concept that is empty or unknown to the tokenizer, a template without ``{}``, too many
    tokens, or no candidates; UnsupportedModel for another family or a part the method needs and the model lacks; ArtifactError for a
    checkpoint that does not belong to this task; whatever ``Model.denoise`` and ``on_step`` raise.
    """
    # What is asked must be possible, before anything is spent.
    if model.family not in get_args(Family):
        raise UnsupportedModel(
            f"{model.name} is not supported yet, because a decomposition replaces one word's token in CLIP's vocabulary and {model.family} "
            "models read their prompts otherwise: connect an SD 1.x, SD 2.x or SDXL model with its CLIP"
        )
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    split_template(template)
    if words < 1:
        raise ValueError(f"ask for at least 1 word, got {words}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed must be a whole number from 0 to 2^63 - 1, got {seed}")
    downscale = model.require_denoiser().downscale
    cells = [side // downscale for side in (height, width)]
    if min(cells) < 1:
        raise ValueError(f"images of {width}x{height} pixels are too small: the model needs at least {downscale}")
    name = concept.strip() if isinstance(concept, str) else None
    if name is not None:
        _check_concept(model, name)
    # The words to choose from, and the prompts that everything is compared with.
    listed = model.words if candidates is None else candidates
    pool = choose_candidates(
        model.text, name, limit=limit, words=listed, exclude=exclude, exclude_unsafe=exclude_unsafe, keep_concept=keep_concept
    )
    with torch.no_grad():
        prompt: Prompt = fill(template, name if isinstance(concept, str) and name is not None else [concept])
        teacher, empty = model.text.encode([prompt]).detach(), model.text.encode([""]).detach()
    task = Task(
        model=model,
        concept=concept if name is None else name,
        name=name or "<pseudo-token>",
        template=template,
        max_words=words,
        pool=pool.words,
        excluded=pool.excluded,
        teacher=teacher,
        empty=empty,
        token=_own_token(model, concept),
        height=cells[0],
        width=cells[1],
        seed=seed,
        budget=budget,
        settings=settings,
        select=select,
        checkpoint=checkpoint,
        on_step=on_step,
    )
    # The method finds words and weights; how they stand to each other is the same for all methods.
    found = METHODS[method](task).by_importance()
    return replace(
        found,
        budget=budget,
        size=(height, width),
        excluded=task.excluded,
        clusters=clusters(model.text, template, found.words, list(task.pool)),
        versions={"conceptkit": __version__, "torch": torch.__version__},
    )


def _own_token(model: Model, concept: str | Slot) -> dict[str, Tensor] | None:
    """The concept as one token per encoder, (1, width), or None when it is several."""
    if not isinstance(concept, str):
        rows = {name: row.detach().reshape(-1, row.shape[-1]) for name, row in concept.items()}
        return {name: row.float() for name, row in rows.items()} if all(len(row) == 1 for row in rows.values()) else None
    ids = model.text.tokenize(concept.strip())
    return embeddings(model.text, ids) if len(ids) == 1 else None


def _check_concept(model: Model, concept: str) -> None:
    if not concept:
        raise ValueError("the concept is empty: give a word or a phrase")
    if not is_known(model.text, concept):
        raise ValueError(f"no word of {concept!r} is known to the text encoder: check the spelling, or describe it in other words")
