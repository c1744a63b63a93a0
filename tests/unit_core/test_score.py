"""Reading pictures against texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from conceptkit.core.model import ImageScorer
from conceptkit.core.score import JointScorer, zero_shot
from torch.nn.functional import normalize


class Colours(torch.nn.Module):
    """The mean colour of a picture against the colour a text names."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(3.0)))

    def pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        return normalize(pictures.mean((-1, -2)), dim=-1)

    def texts(self, pooled: torch.Tensor) -> torch.Tensor:
        return normalize(pooled, dim=-1)


def pooled(texts: Sequence[str]) -> torch.Tensor:
    return torch.eye(3, dtype=torch.float64)[[("red", "green", "blue").index(text) for text in texts]]


def test_zero_shot_is_the_softmax_of_scaled_cosines() -> None:
    scorer = JointScorer(Colours(), pooled)
    assert isinstance(scorer, ImageScorer)
    picture = torch.tensor([0.6, 0.8, 0.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    expected = torch.tensor([3 * 0.6, 3 * 0.8]).softmax(0)
    probabilities = zero_shot(scorer, picture, ["red", "green"])
    torch.testing.assert_close(probabilities, expected.expand(2, 2))
    assert not probabilities.requires_grad
    with pytest.raises(ValueError, match="two texts"):
        zero_shot(scorer, picture, ["red"])
