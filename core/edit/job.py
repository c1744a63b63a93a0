"""What every method is given to solve an edit from, made when first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from ..model import Model
from ..phrases import Concept
from ..progress import OnStep, silent
from .layers import Gram, gram
from .solve import LowRank
from .texts import Corpus, Texts, caption_corpus, corpus
from .words import Words

Parts: TypeAlias = Literal["keep", "erase"]
"""What becomes of words that are parts of a concept (robin of bird)."""


@dataclass(eq=False)
class Job:
    """Concepts to edit in a model, words to keep, and where intermediate results are kept."""

    model: Model
    concepts: tuple[Concept, ...]
    keep: tuple[str, ...] = ()
    captions: Sequence[str] | None = None
    cache: Path | None = None
    seed: int = 0
    hard: bool = False
    parts: Parts = "keep"
    on_step: OnStep = silent
    texts: Texts = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.captions, str):
            raise ValueError("captions is one text, and would be read letter by letter: give a list of texts")
        self.texts = Texts(self.model.text)

    @property
    def width(self) -> int:
        """Width of the context."""
        return self.texts.context("").shape[1]

    @cached_property
    def gram(self) -> Gram:
        """Of the model's text-reading weights."""
        pooled = self.texts.pooled("")
        return gram(self.model, self.width, None if pooled is None else len(pooled), self.cache)

    @cached_property
    def words(self) -> Words:
        """What the model's own words are to the concepts."""
        return Words(self)

    @cached_property
    def all_captions(self) -> tuple[str, ...]:
        """The captions given, or the pack's own."""
        return caption_corpus(self.model) if self.captions is None else tuple(self.captions)

    @cached_property
    def corpus(self) -> Corpus:
        """Second moments of the captions."""
        return corpus(self.texts, self.all_captions, self.cache)


@dataclass(frozen=True, eq=False)
class Solution:
    """What a method found: maps for the context and the pooled text, per concept the text it is read as and the synonyms that are erased
    with it (none where a method looks for none), gains per layer and column, and figures worth keeping."""

    context: LowRank
    anchors: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...] = ()
    pooled: LowRank | None = None
    gains: dict[str, tuple[float, ...]] = field(default_factory=dict)
    settings: dict[str, float | str | bool] = field(default_factory=dict)
