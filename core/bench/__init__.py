"""Benchmarks with known answers: one frame, and a suite a lever. A suite is a package in here; it is found by being here.

``frame`` plans and runs, ``worlds`` and ``figures`` are what suites have in common, ``planted`` makes concepts whose words are known, and
``verify`` measures a model that nobody here has seen.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..phrases import parse_list

if TYPE_CHECKING:
    from .frame import Suite

Profile: TypeAlias = Literal["quick", "full"]


@dataclass(frozen=True)
class Entry:
    """What the package of a suite says of it as ``ENTRY``, before anything heavy is imported: the command ``conceptkit bench NAME``.

    about: what is measured. methods: of the option of that name, its help; listed: what it is unless given. make: the suite for a profile,
    a model and methods separated by commas; raises ValueError for a method that the suite does not know.
    """

    about: str
    methods: str
    listed: str
    make: Callable[[Profile, str, str], Suite]


def suites() -> dict[str, Entry]:
    """The suites by name."""
    packages = [found.name for found in pkgutil.iter_modules(__path__) if found.ispkg]
    return {name: import_module(f".{name}", __name__).ENTRY for name in packages}


def chosen(known: Sequence[str], asked: str) -> tuple[str, ...]:
    """The methods of a list separated by commas. Raises ValueError for one that is not ``known``."""
    listed = parse_list(asked)
    if not set(listed) <= set(known):
        raise ValueError(f"there is no method {', '.join(sorted(set(listed) - set(known)))}: choose from {', '.join(known)}")
    return listed
