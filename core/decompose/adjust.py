"""Adjusting a decomposition by a few lines of text: more of a word, less of it, none, a new one, another in its place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..model import TextEncoder
from .result import Decomposition

HOW = "write `word: factor`, `+word: share` or `old -> new`, one to a line"
_Kind: TypeAlias = Literal["scale", "add", "replace"]


@dataclass(frozen=True)
class Adjustment:
    """One line: ``word`` times ``amount`` (scale), ``word`` added with the share ``amount`` (add), or ``other`` in its place (replace)."""

    line: int
    text: str
    kind: _Kind
    word: str
    amount: float = 1.0
    other: str = ""

    @property
    def where(self) -> str:
        """The line as an error names it."""
        return f"line {self.line}, {self.text!r}"


def parse_adjustments(text: str) -> tuple[Adjustment, ...]:
    """Lines of ``word: factor`` (0 removes), ``+word: share`` (0.2 or 20%) and ``old -> new``; empty lines and those after # are comments.

    Raises ValueError naming the line that cannot be read, or that adjusts a word a second time.
    """
    found: list[Adjustment] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("#")[0].strip()
        if line:
            found.append(_parse(number, line))
            word = found[-1].word
            first = next(adjustment for adjustment in found if adjustment.word == word)
            if first is not found[-1]:
                raise ValueError(f"{found[-1].where}: {word!r} is adjusted on line {first.line} already: keep one of the two")
    return tuple(found)


def _parse(number: int, line: str) -> Adjustment:
    where = f"line {number}, {line!r}"
    old, arrow, new = (part.strip().lower() for part in line.partition("->"))
    if arrow:
        if not old or not new:
            raise ValueError(f"{where}: {HOW}")
        return Adjustment(number, line, "replace", old, other=new)
    word, colon, value = (part.strip().lower() for part in line.partition(":"))
    added = word.startswith("+")
    word = word.removeprefix("+").strip()
    if not colon or not word or not value:
        raise ValueError(f"{where}: {HOW}")
    try:
        amount = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{where}: {value!r} is not a number: {HOW}") from None
    if not math.isfinite(amount) or amount < 0:
        raise ValueError(f"{where}: words have no negative weights: write 0 to remove one")
    if added and not 0 < amount < 1:
        raise ValueError(f"{where}: a share lies between 0 and 1, as in `+{word}: 0.2`")
    return Adjustment(number, line, "add" if added else "scale", word, amount)


def adjust(decomposition: Decomposition, text: TextEncoder, adjustments: tuple[Adjustment, ...]) -> Decomposition:
    """The decomposition after the adjustments: factors first, all at once, then words replaced and added in the order of their lines.

    Raises ValueError naming the line whose word the decomposition lacks or has already, or the text encoder does not know.
    """
    for adjustment in adjustments:
        if adjustment.kind != "add" and adjustment.word not in decomposition.words:
            words = ", ".join(decomposition.words)
            raise ValueError(f"{adjustment.where}: {adjustment.word!r} is none of the words, which are {words}")
    factors = {adjustment.word: adjustment.amount for adjustment in adjustments if adjustment.kind == "scale"}
    if factors:
        decomposition = decomposition.reweighted(factors)
    for adjustment in adjustments:
        try:
            if adjustment.kind == "replace":
                decomposition = decomposition.replaced(text, adjustment.word, adjustment.other)
            elif adjustment.kind == "add":
                decomposition = decomposition.with_word(text, adjustment.word, adjustment.amount)
        except ValueError as error:
            raise ValueError(f"{adjustment.where}: {error}") from error
    return decomposition
