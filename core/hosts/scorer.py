"""The image scorer a checkpoint in the demo's layout may carry: a picture tower beside the text encoder, as CLIP-L serves SD 1.x twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

READ_SIDE = 32
"""Pictures are area-averaged to this side before they are read."""


class Scorer(nn.Module):
    """Picture tower, and the projection of the text encoder's pooled state into the same space.

    width: of the text encoder's states and of the joint space.
    """

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.visual = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, 96, 3, stride=2, padding=1),
            nn.GroupNorm(8, 96),
            nn.GELU(),
            nn.Conv2d(96, 96, 3, stride=2, padding=1),
            nn.GroupNorm(8, 96),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(96 * (READ_SIDE // 8) ** 2, width),
        )
        self.text_projection = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors (batch, width) of pictures (batch, 3, height, width) in [0, 1]."""
        small = nn.functional.interpolate(pictures, size=(READ_SIDE, READ_SIDE), mode="area")
        vectors: Tensor = self.visual(small * 2 - 1)
        return nn.functional.normalize(vectors, dim=-1)

    def texts(self, pooled: Tensor) -> Tensor:
        """Unit vectors (batch, width) of the text encoder's state at the end-of-text token (batch, width)."""
        return nn.functional.normalize(self.text_projection(pooled), dim=-1)
