"""Reading pictures: which of some texts a picture shows, by a joint image-text embedding; and how sure figures from pictures are.

Source: zero-shot classification as in Radford et al. 2021 (arXiv 2103.00020), section 3.1.2.
"""

from __future__ import annotations

from collections import Counter
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
        raise ValueError("reading an image needs at least two texts to choose from")
    cosines = scorer.embed_pictures(pictures) @ scorer.embed_texts(texts).T
    return (scorer.logit_scale * cosines).softmax(-1)


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion. Raises ValueError unless 0 <= hits <= of and of >= 1."""
    from scipy.stats import binomtest

    interval = binomtest(hits, of).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float], *, resamples: int = 2000) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of the mean, the same on every call; None for fewer than two values."""
    if len(values) < 2:
        return None
    import numpy as np
    from scipy.stats import bootstrap

    drawn = bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def total_variation(first: Sequence[int], second: Sequence[int]) -> float:
    """Half the summed difference of two samples' shares per outcome: 0 for equal shares, 1 for none in common."""
    shares = [Counter(sample) for sample in (first, second)]
    return sum(abs(shares[0][outcome] / len(first) - shares[1][outcome] / len(second)) for outcome in shares[0] | shares[1]) / 2


def split_half_floor(outcomes: Sequence[int], *, splits: int = 200) -> float:
    """The mean total variation between random halves of one sample: what chance alone puts between two samples of that size.

    Raises ValueError for fewer than two outcomes.
    """
    if len(outcomes) < 2:
        raise ValueError("one outcome has no halves to compare: generate at least two images")
    generator, half = torch.Generator().manual_seed(0), len(outcomes) // 2
    found = 0.0
    for _ in range(splits):
        shuffled = [outcomes[i] for i in torch.randperm(len(outcomes), generator=generator).tolist()]
        found += total_variation(shuffled[:half], shuffled[half:])
    return found / splits
