"""Which words of a decomposition say nearly the same, so that only their shares together mean much."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from ..model import TextEncoder, fill

SYNONYM = 0.9
"""Cosine of two words' conditionings from which they count as interchangeable."""
_BACKGROUND = 32


@torch.no_grad()
def clusters(text: TextEncoder, template: str, words: Sequence[str], pool: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more of the words, in their order, joined wherever the text encoder makes nearly the same of two of them.

    Compared is the conditioning of the template with each word, as seen from the mean over a few words of the ``pool``: what all prompts
    of the template share would make any two look alike. (Token embeddings themselves tell little: CLIP's synonyms are hardly nearer to
    each other than other words are.) Costs no evals, one text encoding a word.
    """
    spread = torch.linspace(0, len(pool) - 1, min(_BACKGROUND, len(pool))).round().long().tolist()
    background = text.encode([fill(template, pool[i]) for i in spread]).context.float()
    offsets = text.encode([fill(template, word) for word in words]).context.float() - background.mean(0)
    directions = normalize(offsets.flatten(1), dim=1)
    near = (directions @ directions.T >= SYNONYM).cpu()
    groups: list[list[int]] = []
    for index in range(len(words)):
        joined = [group for group in groups if bool(near[index, group].any())]
        groups = [group for group in groups if group not in joined] + [sorted([index, *(i for group in joined for i in group)])]
    return tuple(tuple(words[i] for i in group) for group in sorted(groups) if len(group) > 1)
