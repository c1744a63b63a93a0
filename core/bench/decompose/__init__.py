"""``conceptkit bench decompose``: are the words a method finds the right ones, and how much of the concept do they explain?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import Entry, chosen
from .methods import ABLATIONS, METHODS

if TYPE_CHECKING:
    from .. import Profile
    from ..frame import Suite


def _make(profile: Profile, model: str, methods: str) -> Suite:
    from ...hosts.diffusers import DEMO, DEMOS
    from .suite import DecomposeSuite

    second = "demo-second" if (DEMO / DEMOS["demo-second"]).is_file() else None
    return DecomposeSuite(profile, model, second, chosen((*METHODS, *ABLATIONS), methods))


ENTRY = Entry(
    about="Measure decompositions where the answer is known: planted mixtures, and the composite words of the demo's worlds.",
    methods="Which methods, separated by commas; docs/bench.md names those of the ablation.",
    listed=",".join(METHODS),
    make=_make,
)
