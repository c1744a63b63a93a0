"""What a decomposition's words look like, each alone, beside the concept and the mixture."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from ..chart import Picture, picture_grid
from ..model import Model, fill
from ..progress import OnStep, part_of, silent
from ..sampling import Sampler, draw
from .decomposition import Decomposition


@torch.no_grad()
def word_pictures(
    model: Model,
    decomposition: Decomposition,
    *,
    seeds: Sequence[int],
    height: int,
    width: int,
    steps: int = 20,
    guidance: float = 7.0,
    sampler: Sampler = "dpmpp_2m",
    batch: int | None = None,
    on_step: OnStep = silent,
) -> list[Tensor]:
    """Images of the concept, of the mixture, and of each word by itself in the decomposition's template, in its order.

    Returns 2 + words entries of (len(seeds), 3, height, width) in [0, 1], CPU. Costs 2 * len(seeds) * steps model evaluations an entry,
    half of that at guidance 1.

    model: the one that was decomposed, with its autoencoder.
    decomposition: a word's prompt is its text, the mixture's is w*.
    seeds: one an image; row i of every entry starts from the same noise, that of ``seeds[i]``, so that rows can be compared.
    height, width: in pixels.
    steps, guidance, sampler: as of `draw`.
    batch: the most images generated at once, all by default. Fewer take less memory and longer.
    on_step: counts sampler steps.

    Raises whatever ``draw`` raises.
    """
    texts = [decomposition.concept, *decomposition.words]
    plain = model.text.encode([fill(decomposition.template, text) for text in texts])
    concept, *words = (plain.map(itemgetter(slice(i, i + 1))) for i in range(len(texts)))
    prompts = [concept, decomposition.apply(model.text), *words]
    negative = None if guidance == 1 else model.text.encode([""])
    return [
        draw(
            model,
            positive,
            negative,
            seeds,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            batch=batch,
            on_step=part_of(on_step, number, len(prompts)),
        )
        for number, positive in enumerate(prompts)
    ]


def picture_sheet(decomposition: Decomposition, pictures: Sequence[Tensor], seeds: Sequence[int]) -> Picture:
    """``word_pictures`` on one sheet: a column for the concept, the mixture and each word with its share, a row for each seed."""
    words = [f"{word} {share:.0%}" for word, share in zip(decomposition.words, decomposition.shares, strict=True)]
    return picture_grid(
        [[batch[row].movedim(0, -1).numpy() for batch in pictures] for row in range(len(seeds))],
        [f"seed {seed}" for seed in seeds],
        [decomposition.concept, "mixture", *words],
        title=decomposition.concept,
        subtitle=f"“{decomposition.template}”, every row from the same noise",
    )
