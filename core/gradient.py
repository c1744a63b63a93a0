"""Gradients through a model: vector-Jacobian products that are taken in parts where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .model import in_chunks


def vjp(function: Callable[[slice], Tensor], inputs: Sequence[Tensor], rows: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values of ``function``, flat and detached, and the gradient of their sum in each of ``inputs``.

    function: the values of some of ``rows`` rows, of any shape, whose sum over all parts is what is differentiated: a product with a vector
        is the values times that vector, and a mean over rows is each part's sum divided by ``rows``. It must be the same on every call, so
        random numbers are drawn before. All rows at once first; where their graph does not fit in memory, half as many at a time.
    inputs: tensors that require a gradient and that the values of every part depend on.

    Raises OutOfMemory where one row is too much, and whatever ``function`` raises.
    """
    total: tuple[Tensor, ...] = ()

    def part(indices: Tensor) -> Tensor:
        nonlocal total
        with torch.enable_grad():
            values = function(slice(int(indices[0]), int(indices[-1]) + 1))
            gradients = torch.autograd.grad(values.sum(), inputs)
        total = tuple(map(torch.add, total, gradients)) if total else gradients
        return values.detach().flatten()

    what, advice = "a gradient through the model", "use smaller images, or free memory first"
    return in_chunks(part, torch.arange(rows), rows, what, advice), total
