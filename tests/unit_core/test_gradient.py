"""Gradients in parts are the gradient, and what does not fit at once is taken in halves."""

from __future__ import annotations

import pytest
import torch
from conceptkit.core.gradient import vjp
from conceptkit.core.model import OutOfMemory
from torch import Tensor


def problem(room: int) -> tuple[list[Tensor], list[int], object]:
    """A sum over 7 rows in one shared input and one with a row each, of which ``room`` fit in memory."""
    generator = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((5,), (7, 5)))
    fixed, sizes = torch.randn(7, 5, generator=generator), list[int]()

    def values(rows: slice) -> Tensor:
        sizes.append(rows.stop - rows.start)
        if sizes[-1] > room:
            raise torch.OutOfMemoryError
        return (fixed[rows] * own[rows] * shared).sin().sum(1)

    return [shared, own], sizes, values


@pytest.mark.parametrize(("room", "sizes"), [(7, [7]), (3, [7, 3, 3, 1]), (1, [7, 3, 1, 1, 1, 1, 1, 1, 1])])
def test_parts_add_up_to_the_whole(room, sizes):
    inputs, asked, values = problem(room)
    found, gradients = vjp(values, inputs, 7)
    assert asked == sizes
    whole = problem(7)[2](slice(0, 7))
    inputs, _, values = problem(7)
    expected = torch.autograd.grad(values(slice(0, 7)).sum(), inputs)
    torch.testing.assert_close(found, whole.detach())
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right)
        assert room < 7 or torch.equal(gradient, right)


def test_gradients_are_taken_whatever_the_caller_switched_off():
    inputs, _, values = problem(7)
    with torch.no_grad():
        found, gradients = vjp(values, inputs, 7)
    assert not found.requires_grad and all(bool(gradient.any()) for gradient in gradients)


def test_a_row_too_large_says_what_to_do():
    inputs, _, values = problem(0)
    with pytest.raises(OutOfMemory, match="a gradient through the model does not fit in memory: use smaller images"):
        vjp(values, inputs, 7)
