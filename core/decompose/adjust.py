"""Adjusting a decomposition by a list of changes: more of a word, less of it, none, a new one, another in its place."""

from __future__ import annotations

from collections.abc import Iterable

from ..model import TextEncoder
from ..phrases import Adjustment, parse_adjustments
from ..vocabulary import token_of
from .decomposition import Decomposition

__all__ = ["Adjustment", "adjust", "parse_adjustments"]


def adjust(decomposition: Decomposition, text: TextEncoder, adjustments: str | Iterable[Adjustment]) -> Decomposition:
    """The decomposition after the adjustments, which a str lists as `parse_adjustments` reads it.

    Factors come first, all at once; then words are replaced, in the order of the list; then words are added, all at once, each with its
    share of the whole. Raises ValueError naming the item whose word the decomposition lacks or the text encoder does not know.
    """
    adjustments = parse_adjustments(adjustments) if isinstance(adjustments, str) else tuple(adjustments)
    for adjustment in adjustments:
        if adjustment.kind != "add" and adjustment.word not in decomposition.words:
            words = ", ".join(decomposition.words)
            raise ValueError(f"{adjustment.where}: {adjustment.word!r} is none of the words, which are {words}")
    factors = {adjustment.word: adjustment.amount for adjustment in adjustments if adjustment.kind == "scale"}
    if factors:
        decomposition = decomposition.reweighted(factors)
    added: dict[str, float] = {}
    for adjustment in adjustments:
        try:
            if adjustment.kind == "replace":
                decomposition = decomposition.replaced(text, adjustment.word, adjustment.other)
            elif adjustment.kind == "add":
                token_of(text, adjustment.word)
                added[adjustment.word] = adjustment.amount
        except ValueError as error:
            raise ValueError(f"{adjustment.where}: {error}") from error
    return decomposition.with_words(text, added)
