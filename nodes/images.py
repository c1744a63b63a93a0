"""Drawn pictures and charts as IMAGEs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def as_image(picture: Any) -> Tensor:
    """A drawn picture, (height, width, 3) of bytes, as an IMAGE."""
    import torch

    return torch.from_numpy(picture).float().div(255)[None]
