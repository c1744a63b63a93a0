"""Estimates and their 95 % intervals, as rows and bars state them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypeAlias

from ..score import mean_interval, wilson

Estimate: TypeAlias = tuple[float | None, list[float] | None]
"""A figure and its interval, None where nothing was measured (or too little for an interval)."""


def share(hits: int, of: int) -> Estimate:
    """A proportion, with Wilson's interval."""
    return (hits / of, list(wilson(hits, of))) if of else (None, None)


def mean(values: Sequence[float | None]) -> Estimate:
    """The mean of what was measured, with the bootstrap's interval."""
    given = [value for value in values if value is not None]
    interval = mean_interval(given)
    return (statistics.fmean(given), None if interval is None else list(interval)) if given else (None, None)


def between(interval: Sequence[float] | None) -> str:
    """An interval in words."""
    low, high = interval or (float("nan"), float("nan"))
    return f"{low:.3f} to {high:.3f}"
