"""What nodes of decompositions share: where they lie, tooltips, headline, chart, and the words as a CONDITIONING."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .files import DECOMPOSITIONS
from .images import as_image
from .store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from comfy.sd import CLIP
    from torch import Tensor

    from ..core.decompose import Decomposition

FOUND = "The words with their importance and shares, and how much they explain, for ConceptKit's other nodes."
CHART = "A bar for each word's importance, what is lost without it, beside its share of the mixture."
TEXT = "The same in words, with how far the result can be trusted."


def _load(path: Path) -> Decomposition:
    from ..core.decompose import Decomposition

    return Decomposition.load(path)


STORE = Store(DECOMPOSITIONS, _load, lambda found: (found.concept, *found.words[:3]))


def conditioning(found: Decomposition, clip: CLIP, template: str | None = None) -> list[list[Any]]:
    """A decomposition's words in ``template`` (its own by default) as a CONDITIONING."""
    from .comfy import check_fits, graph_conditioning, graph_text

    check_fits(found.embeddings, clip)
    with graph_text(clip) as text:
        return graph_conditioning(found.apply(text, template))


def chart(found: Decomposition) -> Tensor:
    """A decomposition's chart as an IMAGE."""
    from ..core.chart import share_bars

    prompt = found.template.replace("{}", found.concept)
    measured = (
        "how much the words explain is not known"
        if found.fidelity is None
        else f"the words explain {found.r2:.0%} of what the concept changes"
    )
    bars = (found.words, found.shares, found.importance, found.fillers)
    return as_image(share_bars(*bars, title=found.concept, subtitle=f"“{prompt}”: {measured}"))


def headline(found: Decomposition) -> str:
    """The first line of a decomposition's summary."""
    return found.summary().splitlines()[0]
