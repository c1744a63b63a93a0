"""Progress reporting and cancelling, as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class OnStep(Protocol):
    """Called after each step of a method; raising from it cancels the method, which then leaves nothing half-done."""

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], /) -> None: ...


def silent(step: int, total: int, metrics: Mapping[str, float], /) -> None:
    """Report nothing."""


def part_of(on_step: OnStep, number: int, of: int) -> OnStep:
    """Reports the steps of run ``number`` (from 0) of ``of`` runs of equal length as steps of them all."""

    def told(step: int, total: int, metrics: Mapping[str, float], /) -> None:
        on_step(number * total + step, of * total, metrics)

    return told
