"""The demo model's latent space, which is *chosen* rather than learned.

A latent cell covers 8 x 8 pixels and holds four numbers at unit scale: three opponent colour channels of the cell's mean colour, and the
cell's contrast (the standard deviation of its pixels), which tells a flat cell from one that an edge or a detail crosses. The autoencoder
learns to write and read that code. A chosen code keeps latents smooth and interpretable, gives an exact linear latent-to-RGB preview, and
lets the diffusion model train without waiting for an autoencoder.
"""

from __future__ import annotations

import torch
from torch import Tensor

CELL = 8
"""Pixels per latent cell along one side."""
_OPPONENT = torch.tensor([[0.577, 0.577, 0.577], [0.707, -0.707, 0.0], [0.408, 0.408, -0.816]])
_MEAN = torch.tensor([1.03, 0.0, 0.01])
_SCALE = torch.tensor([0.52, 0.12, 0.16])
_CONTRAST_HALF = 0.12
_CONTRAST_MEAN, _CONTRAST_SCALE = 0.11, 0.21


def latent_code(pictures: Tensor) -> Tensor:
    """The code of pictures: (batch, 3, height, width) in [0, 1] to (batch, 4, height / 8, width / 8) at unit scale."""
    cells = torch.nn.functional.avg_pool2d(pictures, CELL)
    spread = (torch.nn.functional.avg_pool2d(pictures.square(), CELL) - cells.square()).clamp_min(0).sum(1, keepdim=True)
    matrix = _OPPONENT.to(pictures)
    opponent = torch.einsum("kc,bchw->bkhw", matrix, cells)
    opponent = (opponent - _MEAN.to(pictures)[:, None, None]) / _SCALE.to(pictures)[:, None, None]
    # the root's slope at a flat cell is bounded by the offset, so that tiny noise is not blown up; the ratio bounds the tail
    deviation = (spread + 1e-4).sqrt() - 1e-2
    contrast = (deviation / (deviation + _CONTRAST_HALF) - _CONTRAST_MEAN) / _CONTRAST_SCALE
    return torch.cat([opponent, contrast], 1)


def _preview() -> tuple[list[list[float]], list[float]]:
    inverse = torch.linalg.inv(_OPPONENT)
    factors = (inverse * _SCALE).T
    bias = inverse @ _MEAN
    # hosts show previews in [-1, 1]
    rows = [*(factors * 2).tolist(), [0.0, 0.0, 0.0]]
    return rows, (bias * 2 - 1).tolist()


LATENT_RGB, LATENT_RGB_BIAS = _preview()
"""Rows of latent channel to RGB in [-1, 1], and the bias: an exact preview of each cell's mean colour."""
