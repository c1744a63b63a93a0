"""Prompts as columns: where a concept stands in a prompt, what its positions are read as, and the captions that must keep their meaning."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from string import punctuation
from typing import TypeVar

import torch
from torch import Tensor

from ..model import Model, TextEncoder
from ..vocabulary import is_known, stem, whole_words
from .layers import cached

T = TypeVar("T")

BATCH = 16
"""Prompts a call."""
MEMORY = 24 << 20
"""Bytes of contexts that are kept for another question: all prompts of one concept in the demo model, half of them in SD 1.5. Encoding is
most of what an edit costs."""


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


def parse_concepts(lines: str | Iterable[str]) -> tuple[Concept, ...]:
    """Concepts, one a line: ``circle`` or ``circle -> square``. Raises ValueError for an empty line or an arrow without a side.

    A text that is empty as a whole holds no concepts.
    """
    if isinstance(lines, str):
        lines = lines.strip().splitlines()
    concepts = []
    for number, line in enumerate(lines, 1):
        text, arrow, replacement = (part.strip() for part in line.partition("->"))
        if not text:
            raise ValueError(f"line {number} names no concept: delete the line, or write the concept in it")
        if arrow and (not replacement or "->" in replacement):
            raise ValueError(f"line {number} ({line.strip()!r}) must read 'concept -> replacement', or just 'concept'")
        concepts.append(Concept(text, replacement or None))
    return tuple(concepts)


def check_concepts(text: TextEncoder, concepts: Sequence[Concept], keep: Sequence[str]) -> None:
    """Raises ValueError for concepts that cannot be meant: unknown, named twice, kept as well, or equal to their replacement."""
    kept = {_plain(word) for word in keep}
    seen: set[str] = set()
    for concept in concepts:
        name = _plain(concept.text)
        if not name:
            raise ValueError("an empty text is no concept: delete the empty line")
        if name in seen:
            raise ValueError(f"{concept.text!r} is listed twice: delete one of the two lines")
        seen.add(name)
        if name in kept:
            raise ValueError(f"{concept.text!r} is to be erased and kept: take it off one of the two lists")
        if concept.replacement is not None and _plain(concept.replacement) == name:
            raise ValueError(f"{concept.text!r} is to be replaced by itself: name another replacement, or none")
    if any(not _plain(word) for word in keep):
        raise ValueError("the keep list has an empty entry: delete the empty line")
    for concept in concepts:
        if concept.replacement is not None and _plain(concept.replacement) in seen:
            raise ValueError(f"{concept.replacement!r} replaces {concept.text!r} and is erased itself: name another replacement")
        said = [("concept", concept.text), ("replacement", concept.replacement), *(("attribute", a) for a, _ in concept.attributes)]
        for role, words in said:
            if words is not None and not is_known(text, words):
                raise ValueError(_unknown(role, words))
    for word in keep:
        if not is_known(text, word):
            raise ValueError(_unknown("word to keep", word))


def words_of(text: str) -> list[str]:
    """The words of ``text`` in lower case, without punctuation around them."""
    return [word for part in text.lower().split() if (word := part.strip(punctuation))]


def _unknown(role: str, words: str) -> str:
    return f"the text encoder does not know the {role} {words!r}: check the spelling, or use a commoner word"


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt. context: (positions, width) float64; first, last: of the concept's sub-tokens (last < first where it is empty);
    end: position of the first end token; ids: with start and end."""

    context: Tensor
    first: int
    last: int
    end: int
    ids: tuple[int, ...]
    pooled: Tensor | None = None


@dataclass(eq=False)
class Texts:
    """A text encoder that is not asked twice for what is still in memory; contexts come out as float64 on the CPU."""

    encoder: TextEncoder
    encodes: int = 0
    _ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _contexts: dict[str, Tensor] = field(default_factory=dict)
    _pooled: dict[str, Tensor | None] = field(default_factory=dict)

    def load(self, prompts: Iterable[str]) -> None:
        """Encode those of ``prompts`` that are not in memory, batched; the oldest others make room for them."""
        wanted = dict.fromkeys(prompts)
        missing = [prompt for prompt in wanted if prompt not in self._contexts]
        if missing and self._contexts:
            room = MEMORY // (4 * next(iter(self._contexts.values())).numel()) - len(missing)
            others = [prompt for prompt in self._contexts if prompt not in wanted]
            for prompt in others[: max(0, len(self._contexts) - max(0, room))]:
                del self._contexts[prompt]
        for i in range(0, len(missing), BATCH):
            part = missing[i : i + BATCH]
            with torch.no_grad():
                encoded = self.encoder.encode(part)
            context = encoded.context.detach().float().cpu()
            pooled = None if encoded.pooled is None else encoded.pooled.detach().cpu().double()
            for row, prompt in enumerate(part):
                self._contexts[prompt] = context[row]
                self._pooled[prompt] = None if pooled is None else pooled[row]
            self.encodes += len(part)

    def ahead(self, items: Sequence[T], prompts: Callable[[T], Iterable[str]], count: int = BATCH) -> Iterator[T]:
        """``items`` one by one, the ``prompts`` of each in memory; those of ``count`` items are encoded together."""
        for first in range(0, len(items), count):
            part = items[first : first + count]
            self.load(prompt for item in part for prompt in prompts(item))
            yield from part

    def tokens(self, text: str) -> tuple[int, ...]:
        """The ids of ``text``, without start and end; none of an empty one."""
        if text not in self._ids:
            self._ids[text] = tuple(self.encoder.tokenize(text)) if text.strip() else ()
        return self._ids[text]

    def context(self, prompt: str) -> Tensor:
        """(positions, width)."""
        if prompt not in self._contexts:
            self.load([prompt])
        return self._contexts[prompt].double()

    def pooled(self, prompt: str) -> Tensor | None:
        """(pooled width,), where the model has a pooled text."""
        if prompt not in self._pooled:
            self.load([prompt])
        return self._pooled[prompt]

    def prompt(self, template: str, concept: str) -> Prompt:
        """``template`` with ``concept`` at its ``{}`` (an empty concept leaves the words around it), and where it stands."""
        text = fill(template, concept)
        before, _, _ = template.partition("{}")
        ids = self.tokens(text)
        first = 1 + len(self.tokens(before.strip()))
        last = first + len(self.tokens(concept)) - 1
        return Prompt(self.context(text), first, last, 1 + len(ids), (-1, *ids, -2), self.pooled(text))


def fill(template: str, concept: str) -> str:
    """``template`` with ``concept`` in it, single-spaced; " " and "" as a whole prompt stay as they are."""
    return concept if template == "{}" else " ".join(template.replace("{}", concept).split())


TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "a drawing of a {}",
    "a {}",
    "{}",
    "a photo of a large {}",
    "a photo of the {}",
    "one {}",
)
"""Prompts around a concept, alone."""

CAPTIONS = 256
"""Captions a corpus is made of where none is given."""

_COMMON = 2000  # CLIP lists commoner words first


def common_words(model: Model) -> tuple[str, ...]:
    """The model's own words where it says which it knows, else the commonest whole words of its vocabulary."""
    return model.words if model.words is not None else tuple(islice(whole_words(model.text), _COMMON))


def mentions(text: str, words: Iterable[str]) -> bool:
    """Whether ``text`` says any of ``words`` (or phrases), inflected or not."""
    said = [stem(word) for word in text.split()]
    for phrase in words:
        parts = [stem(word) for word in phrase.split()]
        if any(said[i : i + len(parts)] == parts for i in range(len(said) - len(parts) + 1)):
            return True
    return False


def caption_corpus(model: Model, count: int = CAPTIONS, *, seed: int = 0) -> tuple[str, ...]:
    """Captions made of the model's common words, alone and in pairs: what its text encoder is asked to say about anything at all."""
    words = common_words(model)
    if len(words) < 2:
        raise ValueError("the text encoder has too few whole words to make captions of: give captions")
    rng = random.Random(seed)
    singles = list(words) if len(words) <= count // 2 else rng.sample(words, count // 2)
    captions = [f"a photo of a {word}" for word in singles]
    while len(captions) < count:
        first, second = rng.sample(words, 2)
        captions.append(rng.choice(("a photo of a {} and a {}", "a picture of a {} {}", "a {} on a {}", "{} {}")).format(first, second))
    return tuple(captions)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Second moments of a caption corpus: covariance (width, width) = mean over captions of sum over positions c c^T, and the pooled
    texts' (mean of p p^T), float64. key: a hash of encoder and captions."""

    covariance: Tensor
    pooled: Tensor | None
    key: str


def corpus(texts: Texts, captions: Sequence[str], cache: Path | None = None) -> Corpus:
    """The second moments of captions, found in ``cache`` or computed. The encoder is known by what it makes of a few probes."""
    if not captions:
        raise ValueError("the caption list is empty: give captions, or none for the pack's own")
    probe = ["", captions[0], captions[-1]]
    texts.load(probe)
    digest = hashlib.sha256("\n".join(captions).encode())
    for text in probe:
        digest.update(texts.context(text).float().numpy().tobytes())
    width, pooled_row = texts.context("").shape[1], texts.pooled("")
    key = digest.hexdigest()

    def compute() -> dict[str, Tensor]:
        total = torch.zeros(width, width, dtype=torch.float64)
        pooled = None if pooled_row is None else torch.zeros(len(pooled_row), len(pooled_row), dtype=torch.float64)
        for i in range(0, len(captions), BATCH):
            # Not remembered: a corpus is larger than what it is for.
            with torch.no_grad():
                encoded = texts.encoder.encode(list(captions[i : i + BATCH]))
            # In float64, from which captions that mention a concept are taken out again without a trace.
            rows = encoded.context.detach().cpu().double().flatten(0, 1)
            total.addmm_(rows.T, rows)
            if pooled is not None and encoded.pooled is not None:
                row = encoded.pooled.detach().cpu().double()
                pooled += row.T @ row
            texts.encodes += len(encoded)
        found = {"covariance": total / len(captions)}
        return found if pooled is None else {**found, "pooled": pooled / len(captions)}

    shapes: dict[str, tuple[int, ...]] = {"covariance": (width, width)}
    if pooled_row is not None:
        shapes["pooled"] = (len(pooled_row), len(pooled_row))
    found = cached(cache, f"captions-{key[:16]}", {"key": key}, shapes, compute)
    return Corpus(found["covariance"], found.get("pooled"), key)
