"""Reading pictures: which of some texts a picture shows, by a joint image-text embedding.

Source: zero-shot classification as in Radford et al. 2021 (arXiv 2103.00020), section 3.1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .model import ImageScorer


class JointNetwork(Protocol):
    """A picture tower, and a projection of a text encoder's state at the end token, into one space of unit vectors."""

    @property
    def log_scale(self) -> Tensor: ...

    def pictures(self, pictures: Tensor) -> Tensor: ...

    def texts(self, pooled: Tensor) -> Tensor: ...


class JointScorer:
    """An ``ImageScorer`` from a joint network and the text encoder it was trained with.

    pooled: texts to that encoder's last normed state at the end token, (len(texts), width).
    """

    def __init__(self, network: JointNetwork, pooled: Callable[[Sequence[str]], Tensor]) -> None:
        self._network = network
        self._pooled = pooled

    @property
    def logit_scale(self) -> float:
        """The factor that turns a cosine into a logit."""
        return float(self._network.log_scale.detach().exp())

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors (batch, width) for pictures (batch, 3, height, width) in [0, 1]. Differentiable."""
        return self._network.pictures(pictures.to(self._network.log_scale))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (len(texts), width)."""
        return self._network.texts(self._pooled(texts).to(self._network.log_scale))


@torch.no_grad()
def zero_shot(scorer: ImageScorer, pictures: Tensor, texts: Sequence[str]) -> Tensor:
    """How probable each text is for each picture, given that one of them fits: (batch, len(texts)), rows sum to 1.

    pictures: (batch, 3, height, width) in [0, 1]. Raises ValueError for fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError("reading a picture needs at least two texts to choose from")
    cosines = scorer.embed_pictures(pictures) @ scorer.embed_texts(texts).T
    return (scorer.logit_scale * cosines).softmax(-1)
