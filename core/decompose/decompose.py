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
from ..model import Family, Model, Prompt, Slot, UnsupportedModel
from ..progress import OnStep, silent
from ..vocabulary import choose_candidates, embeddings, is_known
from .clusters import clusters
from .conceptor import decompose_conceptor
from .decomposition import Decomposition, fill, split_template
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
    """Take ``concept`` (a word, a phrase, or a learnt token as a slot) apart into at most ``words`` weighted vocabulary words.

    method: a name in ``METHODS``; budget: how much it may spend, and ``settings`` replaces single settings of that budget (such as
    ``{"guidance": 7.5}``). candidates: the words to choose from, else the model's own ``words``, else the ``limit`` whole words nearest
    to the concept; ``exclude``, personal names and offensive words (``exclude_unsafe``), and the concept itself with its near-copies
    (unless ``keep_concept``) are left out, and the result says so. A str for candidates or exclude is read as `parse_list` does.
    height, width: of the pictures sampled, in pixels. select: what the conceptor method chooses its result by. checkpoint: a file that a
    stopped run continues from. ``on_step`` counts evals.
    Deterministic: all randomness comes from ``seed``. The base model is only read.

    Look at ``r2`` before believing the words: it is measured on pictures that the fit did not see.

    Raises ValueError for an unknown method, a concept that is empty or unknown to the tokenizer, a template without ``{}``, too many
    tokens, or no candidates; UnsupportedModel for another family or a part the method needs and the model lacks; ArtifactError for a
    checkpoint that does not belong to this task; whatever ``Model.denoise`` and ``on_step`` raise.
    """
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
        raise ValueError(f"pictures of {width}x{height} pixels are too small: the model needs at least {downscale}")
    name = concept.strip() if isinstance(concept, str) else None
    if name is not None:
        _check_concept(model, name)
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
