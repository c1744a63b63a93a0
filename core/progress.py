"""Progress reporting and cancelling, as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class OnStep(Protocol):
    """Called after each step of a method; raising from it cancels the method, which then leaves nothing half-done."""

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], /) -> None: ...


def silent(step: int, total: int, metrics: Mapping[str, float], /) -> None:
    """Report nothing."""
