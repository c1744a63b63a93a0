"""Concepts that are known because they were made: a few words mixed, with or without something that no word explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..decompose.decomposition import mix
from ..model import Conditioning, Model, Slot, TextEncoder, fill
from ..vocabulary import WORD_END, embeddings

HIDDEN = 3
"""Directions a perturbation is drawn from."""


@dataclass(frozen=True)
class Planted:
    """A concept made of ``words`` in the proportions ``shares``. token: the concept; plain: the words alone, without perturbation."""

    words: tuple[str, ...]
    shares: tuple[float, ...]
    token: Slot
    plain: Slot


def plant(text: TextEncoder, pool: Sequence[str], count: int, seed: int, hidden: Mapping[str, Tensor] | None = None) -> Planted:
    """``count`` words of ``pool`` with weights in proportion to 0.5 + U(0, 1), as one token at the table's mean length.

    text: the encoder whose token table is mixed from.
    pool: single tokens to draw from.
    count: how many.
    seed: of words, weights and perturbation.
    hidden: per encoder directions (n, width); a random one in their span, as long as the mixture itself, is added before rescaling.
    """
    generator = torch.Generator().manual_seed(seed)
    words = tuple(pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist())
    shares = 0.5 + torch.rand(count, generator=generator)
    shares /= shares.sum()
    rows = embeddings(text, [text.vocabulary[word + WORD_END] for word in words])
    norms = {name: float(table.norm(dim=1).mean()) for name, table in text.tables.items()}
    plain = {name: row[0] for name, row in mix(rows, norms, shares[None]).items()}
    token = plain
    if hidden is not None:
        token = {}
        for name, row in plain.items():
            aside = normalize(torch.randn(len(hidden[name]), generator=generator) @ hidden[name], dim=0)
            token[name] = norms[name] * normalize(row / norms[name] + aside, dim=-1)
    return Planted(words, tuple(shares.tolist()), token, plain)


@torch.no_grad()
def hidden_directions(text: TextEncoder, words: Sequence[str], template: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Orthonormal token directions outside the span of ``words`` that change the conditioning least: per encoder (3, width).

    How much a direction shows is measured by finite differences of the encoded template at twelve random mixtures of three words; no
    eval is spent. Raises ValueError when the words' span leaves fewer than three directions.
    """
    found: dict[str, Tensor] = {}
    ids = [text.vocabulary[word + WORD_END] for word in words]
    for name, rows in embeddings(text, ids).items():
        outside = torch.linalg.svd(rows.double())[2][torch.linalg.matrix_rank(rows) :].float()
        if len(outside) < HIDDEN:
            raise ValueError(f"{len(words)} words leave {len(outside)} of {rows.shape[1]} directions: give fewer words")
        shown = torch.zeros(len(outside), len(outside), dtype=torch.double)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(12):
            at = plant(text, words, 3, int(torch.randint(2**31, (1,), generator=generator))).plain
            length = float(at[name].norm())
            moved = torch.cat([at[name][None], at[name] + 0.3 * length * outside[:, None]])
            slot = {key: moved if key == name else row.expand(len(moved), 1, -1) for key, row in at.items()}
            context = text.encode([fill(template, [slot])]).context.flatten(1).double()
            change = context[1:] - context[0]
            shown += change @ change.T
        found[name] = torch.linalg.eigh(shown).eigenvectors[:, :HIDDEN].T.float() @ outside
    return found


def token_conditioning(model: Model, template: str, token: Slot) -> Conditioning:
    """The template with ``token`` as its concept, batch 1, detached."""
    with torch.no_grad():
        return model.text.encode([fill(template, [token])]).detach()


def recovered(planted: Planted, words: Sequence[str], shares: Sequence[float], pool: Sequence[str]) -> tuple[int, float]:
    """How many planted words stand among as many strongest found, and the correlation of all shares over ``pool``.

    The correlation is Pearson's over every word of the dictionary; words not found, or not planted, count with share 0.
    """
    strongest = sorted(zip(shares, words, strict=True), reverse=True)[: len(planted.words)]
    index = {word: i for i, word in enumerate(pool)}
    both = torch.zeros(2, len(pool))
    for row, (names, values) in enumerate(((planted.words, planted.shares), (words, shares))):
        for word, share in zip(names, values, strict=True):
            both[row, index[word]] = share
    return len({word for _, word in strongest} & set(planted.words)), float(torch.corrcoef(both)[0, 1])
