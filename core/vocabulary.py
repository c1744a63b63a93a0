"""Which words a concept may be taken apart into: whole-word tokens, without the concept and its near-copies."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .model import TextEncoder
from .phrases import parse_list

WORD_END = "</w>"
"""What CLIP's vocabulary appends to the last piece of a word."""

_FUNCTION_WORDS = (
    "a am an as at be by do go he if in is it me my no of on or so to up us we "
    "about above after again against all also although always among and another any anyone anything are around because been before "
    "being below between both but can cannot could did does doing done down during each either else ever every everyone everything few "
    "for from further get gets getting goes going gone got had has have having her here hers herself him himself his how however into "
    "isn its itself just let lets like made make makes making many may might more most much must myself neither never nor not nothing now "
    "off often once one only onto other others our ours ourselves out over own per perhaps quite rather really same see she should since "
    "some someone something such than that the their theirs them themselves then there these they this those though through thru too "
    "toward towards under until upon very via was were what whatever when where whether which while who whom whose why will with within "
    "without would yet you your yours yourself yourselves"
)
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English function words: they place and relate things in a sentence but name nothing that can be seen."""

NEAR_COPY = 0.9
"""Cosine of two token embeddings above which a word counts as a spelling of the concept itself."""

_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "dice": "die",
}


def stem(word: str) -> str:
    """``word`` without the commonest English inflections (plural, possessive, -ed, -ing, -er, -est, -ly, -ish, -y), lower case.

    Two forms of one word share a stem; the stem itself need not be a word. Short words keep at least three letters.
    """
    word = unicodedata.normalize("NFKC", word).lower().removesuffix("'s").removesuffix("\u2019s")
    word = _IRREGULAR.get(word, word)
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending) and len(word) - len(ending) >= 2:
            word = word.removesuffix(ending) + instead
            break
    else:
        if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
            word = word[:-1]
    for ending in ("ing", "est", "ish", "ed", "er", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            if word[-1] == word[-2] and word[-1] not in "aeiouls":
                word = word[:-1]
            break
    for ending in ("e", "y", "i"):
        if word.endswith(ending) and len(word) > 3:
            word = word[:-1]
            break
    return word[:-1] + "v" if word.endswith("f") else word


def whole_words(text: TextEncoder) -> dict[str, int]:
    """Every vocabulary entry that is a visible English word by itself, with its token id, in order of ids.

    Alphabetic, lower case, at least three letters, not a stop word. CLIP's vocabulary numbers commoner words first.
    """
    words: dict[str, int] = {}
    for token, index in sorted(text.vocabulary.items(), key=lambda entry: entry[1]):
        word = token.removesuffix(WORD_END)
        if word != token and len(word) >= 3 and word.isascii() and word.isalpha() and word == word.lower() and word not in STOP_WORDS:
            words[word] = index
    return words


def is_known(text: TextEncoder, concept: str) -> bool:
    """Whether any word of ``concept`` means something to the tokenizer: it joins at least some of the word's letters to a larger piece."""
    for word in concept.split():
        visible = "".join(letter for letter in word if unicodedata.category(letter)[0] in "LNS")
        if visible and (visible.lower() + WORD_END in text.vocabulary or len(text.tokenize(visible)) < len(visible.encode())):
            return True
    return False


def token_of(text: TextEncoder, word: str) -> int:
    """The id of the one whole token ``word`` is, whatever its case. Raises ValueError when it is none or several."""
    index = text.vocabulary.get(word.strip().lower() + WORD_END)
    if index is None:
        raise ValueError(f"{word!r} is not a single token of this text encoder: choose a common single word")
    return index


def embeddings(text: TextEncoder, ids: Sequence[int]) -> dict[str, Tensor]:
    """Per text encoder the token embeddings of ``ids``: (len(ids), width), float32."""
    return {name: table[torch.as_tensor(ids, dtype=torch.long, device=table.device)] for name, table in text.tables.items()}


def similarity(text: TextEncoder, ids: Sequence[int], others: Sequence[int]) -> Tensor:
    """Cosines between the token embeddings of ``ids`` and ``others``, averaged over the text encoders: (len(ids), len(others)), CPU."""
    ours, theirs = embeddings(text, ids), embeddings(text, others)
    return torch.stack([(normalize(ours[name], dim=1) @ normalize(theirs[name], dim=1).T).cpu() for name in ours]).mean(0)


def candidates(
    text: TextEncoder,
    concept: str | None,
    *,
    limit: int,
    words: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    keep_concept: bool = False,
) -> dict[str, int]:
    """The words of `choose_candidates`, with nothing left out for being a name or offensive."""
    return choose_candidates(
        text, concept, limit=limit, words=words, exclude=exclude, keep_concept=keep_concept, exclude_unsafe=False
    ).words


@dataclass(frozen=True)
class Candidates:
    """``words`` with their token ids, and what was left out of them, in one phrase for people (empty when nothing was)."""

    words: dict[str, int]
    excluded: str


def choose_candidates(
    text: TextEncoder,
    concept: str | None,
    *,
    limit: int,
    words: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    exclude_unsafe: bool = True,
    keep_concept: bool = False,
) -> Candidates:
    """The words ``concept`` may be taken apart into, with their token ids: at most ``limit``, nearest token embedding first.

    text: the text encoder whose vocabulary is chosen from.
    concept: a word or a phrase; None, for a pseudo-token without a name, leaves nothing out as its copy and keeps vocabulary order.
    limit: how many words at most. A list no longer than that keeps its own order.
    words: the pool, each one whole token: a sequence, or a str that `parse_list` reads. None takes all `whole_words`.
    exclude: single words that are left out, given alike.
    exclude_unsafe: leaves out personal names and offensive words (`is_unsafe`).
    keep_concept: leaves in what is otherwise left out: words that share a stem with a word of the concept, begin with one (from four
        letters on), or whose embedding has cosine > 0.9 with a one-token concept.

    Raises ValueError when a given word is no single token of this text encoder, an excluded one is several words, or nothing is left.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if words is None:
        pool = whole_words(text)
    else:
        listed = [word.lower() for word in parse_list(words)]
        pieces = [word for word in listed if word + WORD_END not in text.vocabulary]
        if pieces:
            raise ValueError(f"not a single token of this text encoder: {', '.join(pieces[:10])}. Take these words off the candidate list")
        pool = {word: text.vocabulary[word + WORD_END] for word in listed}
    barred = [word.lower() for word in parse_list(exclude)]
    phrases = [word for word in barred if " " in word]
    if phrases:
        raise ValueError(f"candidates are single words, so {phrases[0]!r} excludes none: separate its words by commas or lines")
    asked = set(barred) & set(pool)
    unsafe = {word for word in pool if is_unsafe(word)} - asked if exclude_unsafe else set()
    pool = {word: index for word, index in pool.items() if word not in asked and word not in unsafe}
    own = [] if concept is None else text.tokenize(concept)
    near: dict[str, float] = {}
    copies: list[str] = []
    if pool and own:
        cosines = similarity(text, list(pool.values()), own)
        near = dict(zip(pool, cosines.amax(1).tolist(), strict=True))
        if not keep_concept and concept is not None:
            copies = [word for word in pool if _is_copy(word, concept, near[word] if len(own) == 1 else 0.0)]
            pool = {word: index for word, index in pool.items() if word not in copies}
    if not pool:
        raise ValueError(f"no candidate words are left: {'exclude fewer words' if asked else 'give a longer list of candidates'}")
    excluded = _phrase(concept, copies, len(unsafe), len(asked))
    if len(pool) > limit:
        ranked = sorted(pool, key=lambda word: (-near.get(word, 0.0), pool[word]))[:limit]
        pool = {word: pool[word] for word in ranked}
    return Candidates(pool, excluded)


def _is_copy(word: str, concept: str, cosine: float) -> bool:
    parts = [part.lower() for part in concept.split()]
    starts = tuple(part for part in parts if len(part) >= 4)
    return word in parts or stem(word) in {stem(part) for part in parts} or word.startswith(starts) or cosine > NEAR_COPY


def _phrase(concept: str | None, copies: Sequence[str], unsafe: int, asked: int) -> str:
    parts = []
    if copies:
        shown = ", ".join(copies[:5]) + (", …" if len(copies) > 5 else "")
        parts.append(f"{len(copies)} form{'s' * (len(copies) > 1)} of {concept!r} ({shown})")
    if unsafe:
        parts.append(
            f"{unsafe} personal name{'s' * (unsafe > 1)} and offensive words" if unsafe > 1 else "1 personal name or offensive word"
        )
    if asked:
        parts.append(f"{asked} word{'s' * (asked > 1)} by request")
    return "; ".join(parts)


def digest(word: str) -> str:
    """What ``data/offensive.txt`` holds of a word: the first 12 hexadecimal digits of the SHA-256 of it in lower case.

    To add a word, append its digest to that file; to find one, compare digests.
    """
    return sha256(word.strip().lower().encode()).hexdigest()[:12]


def is_unsafe(word: str) -> bool:
    """Whether ``word`` is a personal name or an offensive word by the lists in ``data``, or the plural of one."""
    names, offensive = _listed("names.txt"), _listed("offensive.txt")
    word = word.lower()
    return any(form in names or digest(form) in offensive for form in {word, word.removesuffix("s")})


@cache
def _listed(name: str) -> frozenset[str]:
    lines = (Path(__file__).parent / "data" / name).read_text("utf-8").splitlines()
    return frozenset(" ".join(line for line in lines if not line.startswith("#")).split())
