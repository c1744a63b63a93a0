"""Published closed forms, re-derived layer by layer as their codes do it: the table gives the same weights from one matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from conceptkit.core.edit import METHODS, Concept, solve_edit
from conceptkit.core.edit.job import Job
from conceptkit.core.edit.presets import PRESETS, RECIPES
from conceptkit.core.model import Conditioning, Model
from torch import Tensor

WIDTH, LENGTH = 768, 77
SIZES = {"down_blocks.0": 320, "mid_block": 1280}
CAPTIONS = tuple(f"caption {i}" for i in range(12))


class Words:
    """A text encoder of random numbers at a real size: every position of a prompt has a context that depends on all words up to it."""

    vocabulary: Mapping[str, int] = {
        f"{word}</w>": i for i, word in enumerate(("a", "photo", "of", "pack", "blue", "roses", "cat", "dog", "doctor", "man"))
    }
    tables: Mapping[str, Tensor] = {"l": torch.randn(40000, 4, generator=torch.Generator().manual_seed(0))}

    def tokenize(self, text: str) -> list[int]:
        # Long words have two pieces, as in byte pair encoding.
        return [
            piece for word in text.split() for piece in ([self._id(word)] if len(word) < 6 else [self._id(word[:4]), self._id(word[4:])])
        ]

    def _id(self, piece: str) -> int:
        return sum(ord(letter) * 31**i for i, letter in enumerate(piece)) % 40000

    @staticmethod
    @cache
    def _column(state: int) -> Tensor:
        return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(state))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        rows = []
        for prompt in prompts:
            ids = [49406, *self.tokenize(prompt)] + [49407] * (LENGTH - 1 - len(self.tokenize(prompt)))
            state, row = 7, []
            for position, token in enumerate(ids):
                state = (state * 1000003 + token * 97 + position) % 2**31
                row.append(state)
            rows.append(torch.cat([self._column(state) for state in row]))
        return Conditioning(torch.stack(rows))


class Layers:
    """Random cross-attention weights of SD 1.5's sizes."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.weights = {
            f"{block}.attentions.0.transformer_blocks.0.attn2.{part}": torch.randn(size, WIDTH, generator=g) / WIDTH**0.5
            for (block, size), part in zip(SIZES.items(), ("to_k", "to_v"), strict=True)
        }

    def key_values(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()

    def pooled(self) -> None:
        return None


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("sd1", "random", Words(), None, cross_attention=Layers(), words=("photo", "blue", "pack", "roses"))


def context(model: Model, text: str) -> Tensor:
    return model.text.encode([text]).context[0].double()


def last(model: Model, text: str) -> int:
    """As UCE counts: the attention mask's sum minus 2."""
    return len(model.text.tokenize(text))


def refit(w: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], kept: Sequence[tuple[float, Tensor]], lam: float) -> Tensor:
    """mat1 mat2^-1 of the published loops, a layer's own targets in mat1. pairs: (c, target value), kept: (weight, r)."""
    c, v = (torch.stack(part) for part in zip(*pairs, strict=True))
    left, right = lam * w + v.T @ c, lam * torch.eye(WIDTH, dtype=torch.float64) + c.T @ c
    if kept:
        p, r = torch.tensor([weight for weight, _ in kept], dtype=torch.float64), torch.stack([row for _, row in kept])
        left, right = left + (w @ r.T * p) @ r, right + (r.T * p) @ r
    return torch.linalg.solve(right, left.T).T


def caption_sum(model: Model) -> Tensor:
    rows = torch.cat([context(model, caption) for caption in CAPTIONS])
    return rows.T @ rows / len(CAPTIONS)


def uce_2025(model: Model, w: Tensor, expand: bool = False) -> Tensor:
    texts = ["{}"] + (["image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"] if expand else [])
    pairs = []
    for concept, anchor in (("catastrophe", "dog"), ("cat", "")):
        for text in texts:
            ours, theirs = text.format(concept), text.format(anchor).strip()
            pairs.append((context(model, ours)[last(model, ours)], w @ context(model, theirs)[last(model, theirs)]))
    return refit(w, pairs, [(1.0, context(model, "a photo")[last(model, "a photo")])], 0.5)


def blocks_2023(model: Model, concept: str, anchor: str) -> tuple[Tensor, Tensor]:
    """Aligned token blocks, cut at the end so that both are as long."""
    ours, theirs, i, j = context(model, concept), context(model, anchor), last(model, concept), last(model, anchor)
    farthest = max(i, j)
    return ours[i : LENGTH - max(0, farthest - i)], theirs[j : LENGTH - max(0, farthest - j)]


def uce_2023(model: Model, w: Tensor) -> Tensor:
    pairs = []
    for concept, anchor in (("catastrophe", "dog"), ("cat", "")):
        ours, theirs = blocks_2023(model, concept, anchor)
        pairs += [(c, w @ a) for c, a in zip(ours, theirs, strict=True)]
    texts = ["", "a photo"]
    return refit(w, pairs, [(max(0.1, 1 / len(texts)), r) for text in texts for r in context(model, text)], 0.5)


def time_edit(model: Model, w: Tensor, augmented: bool = False) -> Tensor:
    source, target = "a pack of roses", "a pack of blue roses"
    pairs = []
    for text in ["{}"] + (["A photo of {}", "An image of {}", "A picture of {}"] if augmented else []):
        old, new = ([49406, *model.text.tokenize(text.format(t)), 49407] for t in (source, target))
        found, j = [], 0
        for token in old:
            while new[j] != token:
                j += 1
            found.append(j)
            j += 1
        while len(found) < LENGTH:
            found.append(min(j, LENGTH - 1))
            j += 1
        ours, theirs = context(model, text.format(source)), context(model, text.format(target))
        pairs += [(c, w @ theirs[k]) for c, k in zip(ours, found, strict=True)]
    return refit(w, pairs, [], 0.1)


def mace(model: Model, w: Tensor, prior: bool) -> Tensor:
    templates = METHOD_TEMPLATES["mace"]
    concept, anchor = "catastrophe", "dog"
    pairs = []
    for template in templates:
        ours, theirs = context(model, template.format(concept)), context(model, template.format(anchor))
        start = 1 + len(model.text.tokenize(template.split("{}")[0]))
        after_ours, after_theirs = start + len(model.text.tokenize(concept)), start + len(model.text.tokenize(anchor))
        count = LENGTH - max(after_ours, after_theirs)
        keep_ours = [*range(start), *range(after_ours, after_ours + count)]
        keep_theirs = [*range(start), *range(after_theirs, after_theirs + count)]
        pairs += [(ours[i], w @ theirs[j]) for i, j in zip(keep_ours, keep_theirs, strict=True)]
    columns = torch.stack([c for c, _ in pairs])
    values = torch.stack([v for _, v in pairs])
    left, right = values.T @ columns, columns.T @ columns
    if prior:
        sums = 6.2e-3 * caption_sum(model)
        left, right = left + w @ sums, right + sums
    else:
        left, right = left + 10 * w, right + 10 * torch.eye(WIDTH, dtype=torch.float64)
    return torch.linalg.solve(right, left.T).T


def trce(model: Model, w: Tensor) -> Tensor:
    templates = METHOD_TEMPLATES["trce"]
    ends = []
    for template in templates:
        ours, theirs = template.format("catastrophe"), template.format("dog")
        ends.append((context(model, ours)[1 + last(model, ours)], context(model, theirs)[1 + last(model, theirs)]))
    prior = 1e-4 * caption_sum(model)
    left, right = w @ prior, prior
    for c, a in ends:
        left, right = left + torch.outer(w @ a, c) / len(ends), right + torch.outer(c, c) / len(ends)
    return torch.linalg.solve(right, left.T).T


def rece(model: Model, layers: list[Tensor], mu: float, epochs: int) -> list[Tensor]:
    """The loop over layers: derive the embedding that brings the concept back from all weights, edit each with itself as the target."""
    concept, anchor = context(model, "catastrophe"), context(model, "dog")
    ours, theirs = blocks_2023(model, "catastrophe", "dog")
    null = context(model, "")
    now = [refit(w, [(c, w @ a) for c, a in zip(ours, theirs, strict=True)], [(1.0, r) for r in null], 0.5) for w in layers]
    for _ in range(epochs):
        before = sum(w.T @ w for w in now)
        regained = sum(w.T @ o for w, o in zip(now, layers, strict=True))
        derived = (torch.linalg.inv(mu * torch.eye(WIDTH, dtype=torch.float64) + before) @ regained @ concept.T).T
        now = [refit(w, [(c, w @ a) for c, a in zip(derived, anchor, strict=True)], [(0.1, r) for r in null], 0.1) for w in now]
    return now


def debias_2025(model: Model, w: Tensor) -> Tensor:
    i = last(model, "doctor")
    c = context(model, "doctor")[i]
    target = w @ c + 0.3 * w @ context(model, "woman")[last(model, "woman")] - 0.2 * w @ context(model, "man")[last(model, "man")]
    return refit(w, [(c, target)], [(1.0, context(model, "a photo")[last(model, "a photo")])], 0.5)


def debias_2023(model: Model, w: Tensor) -> Tensor:
    ours = blocks_2023(model, "doctor", "woman")[0]
    values = w @ ours.T
    for attribute, alpha in (("woman", 0.3), ("man", -0.2)):
        theirs = w @ blocks_2023(model, "doctor", attribute)[1].T
        values = values + alpha * (values0(w, ours).norm() / theirs.norm()) * theirs
    return refit(w, list(zip(ours, values.T, strict=True)), [(0.1, r) for r in context(model, "a photo")], 0.5)


def values0(w: Tensor, ours: Tensor) -> Tensor:
    return w @ ours.T


METHOD_TEMPLATES = {name: recipe.templates for name, recipe in RECIPES.items()}
PAIR = (Concept("catastrophe", "dog"),)
TWO = (Concept("catastrophe", "dog"), Concept("cat"))
ROSES = (Concept("a pack of roses", "a pack of blue roses"),)
DOCTOR = (Concept("doctor", attributes=(("woman", 0.3), ("man", -0.2))),)
KEEP = ("a photo",)

OFFICIAL: dict[str, tuple[tuple[Concept, ...], tuple[str, ...], Callable[[Model, Tensor], Tensor]]] = {
    "uce-2025": (TWO, KEEP, uce_2025),
    "uce-2025-expanded": (TWO, KEEP, lambda m, w: uce_2025(m, w, expand=True)),
    "uce-2023": (TWO, KEEP, uce_2023),
    "time": (ROSES, (), time_edit),
    "time-augmented": (ROSES, (), lambda m, w: time_edit(m, w, augmented=True)),
    "mace": (PAIR, (), lambda m, w: mace(m, w, prior=True)),
    "mace-no-prior": (PAIR, (), lambda m, w: mace(m, w, prior=False)),
    "trce": (PAIR, (), trce),
    "uce-debias-2025": (DOCTOR, KEEP, debias_2025),
    "uce-debias-2023": (DOCTOR, KEEP, debias_2023),
}


def close(found: Tensor, official: Tensor) -> None:
    assert float((found.double() - official).norm() / official.norm()) <= 1e-4


@pytest.mark.parametrize("method", OFFICIAL)
def test_equals_the_published_formula_in_every_layer(model, method):
    concepts, keep, official = OFFICIAL[method]
    solution = PRESETS[method].solve(Job(model, concepts, keep, CAPTIONS))
    for path, weight in model.cross_attention.key_values():
        w = weight.double()
        u = solution.context.u
        if solution.gains:
            u = u * torch.tensor(solution.gains[path], dtype=torch.float64)
        expected = official(model, w)
        close(w + (w @ u) @ solution.context.v.T, expected)
        assert float((expected - w).norm() / w.norm()) > 1e-3


@pytest.mark.parametrize(("method", "mu", "epochs"), [("rece", 0.1, 3), ("rece-objects", 1e-3, 1)])
def test_rece_in_the_context_is_rece_over_the_layers(model, method, mu, epochs):
    solution = PRESETS[method].solve(Job(model, PAIR))
    layers = [weight.double() for _, weight in model.cross_attention.key_values()]
    for w, expected in zip(layers, rece(model, layers, mu, epochs), strict=True):
        close(w + (w @ solution.context.u) @ solution.context.v.T, expected)


@pytest.mark.parametrize(("method", "isotropic"), [("realera", False), ("realera-isotropic", True)])
def test_realera_s_neighbours_are_at_the_cosines_they_are_drawn_for(model, method, isotropic):
    """No code was published: what is held to is the recipe's geometry, that neighbours move with the concept and further ones less."""
    edit = PRESETS[method].solve(Job(model, PAIR, captions=CAPTIONS)).context
    c, a = context(model, "catastrophe")[last(model, "catastrophe")], context(model, "dog")[last(model, "dog")]
    unit = c / c.norm()
    moved = []
    for cosine in (0.99, 0.75, 0.35):
        g = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        g = g - unit * (unit @ g)
        e = c.norm() * (cosine * unit + math.sqrt(1 - cosine**2) * g / g.norm())
        assert float(e @ unit / e.norm()) == pytest.approx(cosine)
        moved.append(float((edit.apply(e[None])[0] - e).norm()))
    assert moved[0] > moved[1] > moved[2]
    assert float((edit.apply(c[None])[0] - a).norm() / (c - a).norm()) < 0.5


def test_the_table_is_tested_as_a_whole():
    assert set(PRESETS) == {*OFFICIAL, "rece", "rece-objects", "realera", "realera-isotropic"}
    assert list(METHODS) == ["conceptkit", *PRESETS]


def test_an_unscaled_replacement_is_the_concept_moved_whole(model, tmp_path: Path):
    edit = solve_edit(model, ["cat -> dog"], method="uce-2025", captions=CAPTIONS, cache=tmp_path)
    assert edit.rank == 1
    assert edit.report is not None
    assert edit.report.concepts[0].text == "cat"
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"gram", "captions"}


def test_a_cache_that_cannot_be_written_or_read_costs_time_alone(model, tmp_path: Path, caplog):
    given = {"method": "uce-2025", "captions": CAPTIONS}
    plain = solve_edit(model, ["cat -> dog"], **given)
    (tmp_path / "file").touch()
    assert solve_edit(model, ["cat -> dog"], cache=tmp_path / "file", **given).content_hash() == plain.content_hash()
    assert "cannot be written" in caplog.text
    assert solve_edit(model, ["cat -> dog"], cache=tmp_path / "cache", **given).content_hash() == plain.content_hash()
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    for path, content in kept.items():
        path.write_bytes(content[:-8])
    assert solve_edit(model, ["cat -> dog"], cache=tmp_path / "cache", **given).content_hash() == plain.content_hash()
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == kept
