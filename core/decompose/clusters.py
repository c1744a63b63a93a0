"""Which words of a decomposition say nearly the same, so that only their shares together mean much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

SYNONYM = 0.5
"""Cosine of two token embeddings, averaged over the text encoders, from which two words count as interchangeable."""


def clusters(words: Sequence[str], embeddings: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more of the words, in their order, joined wherever two token embeddings have a cosine of ``SYNONYM`` or more.

    embeddings: per text encoder (words, width). Costs no evals.
    """
    cosines = torch.stack([(n := normalize(rows.float().cpu(), dim=1)) @ n.T for rows in embeddings.values()]).mean(0)
    near = cosines >= SYNONYM
    groups: list[list[int]] = []
    for index in range(len(words)):
        joined = [group for group in groups if bool(near[index, group].any())]
        groups = [group for group in groups if group not in joined] + [sorted([index, *(i for group in joined for i in group)])]
    return tuple(tuple(words[i] for i in group) for group in sorted(groups) if len(group) > 1)
