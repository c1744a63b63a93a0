"""Every list and recipe a user types, read by one parser: in nodes, on the command line, in text files and in Python alike.

A list holds items separated by line breaks, commas or semicolons. An item is a phrase, ``circle``, or a pair, ``circle -> square``.
Spaces around items and repeated spaces inside them do not count; empty items are skipped, so an empty text is an empty list. Case does
not distinguish phrases: of ``Circle, circle`` the first stays, and the order is kept. ``#`` at the start of a line or after a space
begins a comment that lasts to the end of the line. A phrase that holds one of these characters stands in double quotes:
``"a dog, running"``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

# Other arrows, full-width commas (an input method writes them between English words, too) and typographic quotation marks are read as the
# plain ones: as a part of a phrase they would be a word that nobody means.
_ALIKE = {ord(c): plain for plain, others in {",": "\uff0c\u3001", ";": "\uff1b", '"': "\u201c\u201d\u201e"}.items() for c in others}
_ARROW = r"[-=]{1,3}>|\u2192"
_SPACE = re.compile(r"\s*")
_SIDE = re.compile(rf'"(?P<quoted>[^"]*)"|(?!")(?P<bare>(?:(?!{_ARROW}|(?<!\S)#)[^,;])*)')
_AFTER = re.compile(rf"\s*(?:(?P<arrow>{_ARROW})|[,;]|(?P<end>(?:#.*)?$))", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """One item of a list as it was typed, and the line it stands on, from 1. sides: its phrase, or the phrases around its arrows."""

    line: int
    text: str
    sides: tuple[str, ...]

    @property
    def where(self) -> str:
        """The item as an error names it."""
        return f"line {self.line}, {self.text!r}"


@dataclass(frozen=True)
class Concept:
    """A text to erase, and what is to be read in its place (None: nothing, as though it had not been said).

    attributes: (text, share to add) pairs, for the methods that balance.
    """

    text: str
    replacement: str | None = None
    attributes: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return self.text if self.replacement is None else f"{self.text} -> {self.replacement}"


@dataclass(frozen=True)
class Adjustment:
    """One item: ``word`` times ``amount`` (scale), ``word`` added with the share ``amount`` (add), or ``other`` in its place (replace)."""

    where: str
    kind: Literal["scale", "add", "replace"]
    word: str
    amount: float = 1.0
    other: str = ""


_HOW = "write `word: factor`, `+word: share` or `old -> new`"


def plain(phrase: str) -> str:
    """``phrase`` in lower case with single spaces: equal for phrases that are the same to a text encoder."""
    return " ".join(phrase.lower().split())


def items(text: str) -> tuple[Item, ...]:
    """The items of a text, empty ones left out. Raises ValueError naming the item whose quotation marks do not fit."""
    return tuple(item for number, line in enumerate(text.translate(_ALIKE).splitlines(), 1) for item in _items(number, line))


def parse_list(given: str | Iterable[str]) -> tuple[str, ...]:
    """The phrases of a list without repeats. A str is read as a user types it; any other iterable holds one phrase an entry.

    Raises ValueError naming the item that is a pair or cannot be read.
    """
    if isinstance(given, str):
        listed = items(given)
        for item in listed:
            if len(item.sides) > 1:
                raise ValueError(f"{item.where}: an arrow has no meaning in this list: write the word alone")
        given = [item.sides[0] for item in listed]
    found: dict[str, str] = {}
    for phrase in given:
        if plain(phrase):
            found.setdefault(plain(phrase), " ".join(phrase.split()))
    return tuple(found.values())


def parse_concepts(given: str | Iterable[str | Concept]) -> tuple[Concept, ...]:
    """The concepts of a list, ``circle`` or ``circle -> square``; every str is read as a user types it, and may hold several.

    Raises ValueError naming the item with an arrow that lacks a side, or the concept that is listed again with another replacement.
    """
    found: dict[str, Concept] = {}
    for entry in [given] if isinstance(given, str) else given:
        for concept in [entry] if isinstance(entry, Concept) else map(_concept, items(entry)):
            first = found.setdefault(plain(concept.text), concept)
            if _meant(first) != _meant(concept):
                raise ValueError(f"{concept.text!r} is listed twice, as {str(first)!r} and as {str(concept)!r}: delete one of the two")
    return tuple(found.values())


def parse_adjustments(text: str) -> tuple[Adjustment, ...]:
    """The changes of a list, in its order: ``word: factor`` (0 removes), ``+word: share`` (0.2 or 20%) and ``old -> new``.

    An item that is repeated counts once. Raises ValueError naming the item that cannot be read, that adjusts a word a second time and
    otherwise, or with which the added shares reach the whole.
    """
    found: dict[str, Adjustment] = {}
    for item in items(text):
        adjustment = _adjustment(item)
        first = found.setdefault(adjustment.word, adjustment)
        if (first.kind, first.amount, first.other) != (adjustment.kind, adjustment.amount, adjustment.other):
            raise ValueError(f"{adjustment.where}: {adjustment.word!r} is adjusted in {first.where} already: keep one of the two")
        added = math.fsum(each.amount for each in found.values() if each.kind == "add")
        if added >= 1:
            raise ValueError(f"{adjustment.where}: the added words take {added:.0%} of the whole: leave some for the other words")
    return tuple(found.values())


def _items(number: int, line: str) -> Iterator[Item]:
    start, at, sides = 0, 0, list[str]()
    while True:
        space = _SPACE.match(line, at)
        side = _SIDE.match(line, at if space is None else space.end())
        after = None if side is None else _AFTER.match(line, side.end())
        if side is None or after is None:
            raise ValueError(f"line {number}, {line[start:].strip()!r}: put quotation marks around a whole phrase, or leave them out")
        sides.append(" ".join((side["bare"] if side["quoted"] is None else side["quoted"]).split()))
        at = after.end()
        if after["arrow"] is None:
            if any(sides) or len(sides) > 1:
                yield Item(number, line[start : after.start()].strip(), tuple(sides))
            start, sides = at, []
        if after["end"] is not None:
            return


def _concept(item: Item) -> Concept:
    text, *replacements = item.sides
    if len(replacements) > 1 or not all(item.sides):
        raise ValueError(f"{item.where}: write 'concept -> replacement', or just 'concept'")
    return Concept(text, replacements[0] if replacements else None)


def _meant(concept: Concept) -> tuple[str | None, tuple[tuple[str, float], ...]]:
    return None if concept.replacement is None else plain(concept.replacement), concept.attributes


def _adjustment(item: Item) -> Adjustment:
    first, *others = map(plain, item.sides)
    if others:
        if len(others) > 1 or not all((first, *others)):
            raise ValueError(f"{item.where}: {_HOW}")
        return Adjustment(item.where, "replace", first, other=others[0])
    word, colon, value = (part.strip() for part in first.partition(":"))
    added = word.startswith("+")
    word = word.removeprefix("+").strip()
    if not colon or not word or not value:
        raise ValueError(f"{item.where}: {_HOW}")
    try:
        amount = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{item.where}: {value!r} is not a number: {_HOW}") from None
    if not math.isfinite(amount):
        raise ValueError(f"{item.where}: {value!r} is not a number that can be used: write a finite one, such as 0.5 or 2")
    if amount < 0:
        raise ValueError(f"{item.where}: words have no negative weights: write 0 to remove one")
    if added and not 0 < amount < 1:
        raise ValueError(f"{item.where}: a share lies between 0 and 1, as in `+{word}: 0.2`")
    return Adjustment(item.where, "add" if added else "scale", word, amount)
