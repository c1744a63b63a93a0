"""Published closed forms, layer by layer as their codes do it, in numpy and float64: the table gives the same weights from one matrix.

Prompts, constants and positions are written down here again, from the publications, so that a slip in the table is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conceptkit.core.edit import METHODS, Concept, solve_edit
from conceptkit.core.edit.job import Job
from conceptkit.core.edit.presets import PRESETS
from conceptkit.core.edit.presets import double_projections as double
from conceptkit.core.edit.presets import speed as null_space
from conceptkit.core.edit.solve import LowRank
from conceptkit.core.model import Conditioning, Model
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
WIDTH, LENGTH = 768, 77
SIZES = {"down_blocks.0": 320, "mid_block": 1280}
WORDS = ("photo", "blue", "pack", "roses")
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
    """Cross-attention weights."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def key_values(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()

    def pooled(self) -> None:
        return None


@pytest.fixture(scope="module")
def model() -> Model:
    """Random weights of SD 1.5's sizes."""
    g = torch.Generator().manual_seed(0)
    weights = {
        f"{block}.attentions.0.transformer_blocks.0.attn2.{part}": torch.randn(size, WIDTH, generator=g) / WIDTH**0.5
        for (block, size), part in zip(SIZES.items(), ("to_k", "to_v"), strict=True)
    }
    return Model("sd1", "random", Words(), cross_attention=Layers(weights), words=WORDS)


def context(model: Model, text: str) -> Array:
    return model.text.encode([text]).context[0].double().numpy()


def last(model: Model, text: str) -> int:
    """As UCE counts: the attention mask's sum minus 2."""
    return len(model.text.tokenize(text))


def said(model: Model, text: str) -> Array:
    return context(model, text)[last(model, text)]


def closes(model: Model, text: str) -> Array:
    """At the first end token."""
    return context(model, text)[1 + last(model, text)]


def refit(w: Array, pairs: Sequence[tuple[Array, Array]], kept: Sequence[tuple[float, Array]], lam: float) -> Array:
    """mat1 mat2^-1 of the published loops, a layer's own targets in mat1. pairs: (c, target value), kept: (weight, r)."""
    c, v = (np.stack(part) for part in zip(*pairs, strict=True))
    left, right = lam * w + v.T @ c, lam * np.eye(WIDTH) + c.T @ c
    if kept:
        p, r = np.array([weight for weight, _ in kept]), np.stack([row for _, row in kept])
        left, right = left + (w @ r.T * p) @ r, right + (r.T * p) @ r
    return np.linalg.solve(right, left.T).T


def caption_sum(model: Model) -> Array:
    rows = np.concatenate([context(model, caption) for caption in CAPTIONS])
    return rows.T @ rows / len(CAPTIONS)


def uce_2025(model: Model, w: Array, texts: Sequence[str] = ("{}",)) -> Array:
    pairs = []
    for concept, anchor in (("catastrophe", "dog"), ("cat", "")):
        for text in texts:
            pairs.append((said(model, text.format(concept)), w @ said(model, text.format(anchor).strip())))
    return refit(w, pairs, [(1.0, said(model, "a photo"))], 0.5)


def blocks_2023(model: Model, concept: str, anchor: str) -> tuple[Array, Array]:
    """Aligned token blocks, cut at the end so that both are as long."""
    ours, theirs, i, j = context(model, concept), context(model, anchor), last(model, concept), last(model, anchor)
    farthest = max(i, j)
    return ours[i : LENGTH - max(0, farthest - i)], theirs[j : LENGTH - max(0, farthest - j)]


def uce_2023(model: Model, w: Array, kept: Sequence[str] = ("", "a photo"), concepts: Mapping[str, str] | None = None) -> Array:
    pairs = []
    for concept, anchor in (concepts or {"catastrophe": "dog", "cat": ""}).items():
        pairs += [(c, w @ a) for c, a in zip(*blocks_2023(model, concept, anchor), strict=True)]
    return refit(w, pairs, [(max(0.1, 1 / len(kept)), r) for text in kept for r in context(model, text)], 0.5)


def time_edit(model: Model, w: Array, texts: Sequence[str] = ("{}",)) -> Array:
    source, target = "a pack of roses", "a pack of blue roses"
    pairs = []
    for text in texts:
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


SHARED = {"catastrophe": "dog", "a cat": "a dog", "cat": ""}
"""The second pair begins alike, the third has no destination: the words around it close up."""


def mace(model: Model, w: Array, *, prior: float, lam: float) -> Array:
    moved, second = np.zeros((2, WIDTH, WIDTH))
    for concept, anchor in SHARED.items():
        for template in MACE:
            old, new = (" ".join(template.format(text).split()) for text in (concept, anchor))
            ours, theirs = ([49406, *model.text.tokenize(text), 49407] for text in (old, new))
            start = 0
            while ours[start] == theirs[start]:
                start += 1
            i, j = len(ours), len(theirs)
            while i > start and j > start and ours[i - 1] == theirs[j - 1]:
                i, j = i - 1, j - 1
            at, instead = [*range(start), *range(i, LENGTH)], [*range(start), *range(j, LENGTH)]
            both = min(len(at), len(instead))
            c, a = context(model, old)[at[:both]], context(model, new)[instead[:both]]
            moved += a.T @ c
            second += c.T @ c
    kept = prior * caption_sum(model) + lam * np.eye(WIDTH)
    return w @ np.linalg.solve(second + kept, (moved + kept).T).T


def trce(model: Model, w: Array) -> Array:
    prior = 1e-4 * caption_sum(model)
    left, right = w @ prior, prior
    pairs = [(t.format(concept), " ".join(t.format(anchor).split())) for concept, anchor in SHARED.items() for t in TRCE]
    for old, new in pairs:
        c, a = closes(model, old), closes(model, new)
        left, right = left + np.outer(w @ a, c) / len(pairs), right + np.outer(c, c) / len(pairs)
    return np.linalg.solve(right, left.T).T


def mist(model: Model, w: Array) -> Array:
    pairs = [(closes(model, concept), w @ closes(model, anchor)) for concept, anchor in (("catastrophe", "dog"), ("cat", ""))]
    return refit(w, pairs, [], 0.1)


def rece(
    model: Model, layers: list[Array], mu: float, epochs: int, concepts: Mapping[str, str], kept: Sequence[str], retained: Sequence[str]
) -> list[Array]:
    """The loop over layers: derive the embeddings that bring the concepts back from all weights, edit each with itself as the target."""
    now = [uce_2023(model, w, kept, concepts) for w in layers]
    for _ in range(epochs):
        before = sum(w.T @ w for w in now)
        regained = sum(w.T @ o for w, o in zip(now, layers, strict=True))
        back = np.linalg.inv(mu * np.eye(WIDTH) + before) @ regained
        pairs = [
            (back @ c, a) for text, anchor in concepts.items() for c, a in zip(context(model, text), context(model, anchor), strict=True)
        ]
        rows = [(0.1, r) for text in retained for r in context(model, text)]
        now = [refit(w, [(c, w @ a) for c, a in pairs], rows, 0.1) for w in now]
    return now


def directions(columns: Array) -> Array:
    return np.linalg.svd(columns, full_matrices=False)[0]


def double_projections(model: Model, w: Array, most: int = WIDTH // 2) -> Array:
    """One concept: W0 (c* - c) x^T U2^T / ||x||^2."""
    kept, near = said(model, "a photo")[:, None], np.stack([said(model, word) for word in WORDS], 1)
    exact = kept / np.linalg.norm(kept)
    main = directions(near - exact @ (exact.T @ near))[:, : most - 1]
    u2 = np.linalg.svd(np.concatenate([exact, main], 1))[0][:, 1 + main.shape[1] :]
    c, proxy = said(model, "catastrophe"), said(model, "dog")
    x = u2.T @ c
    return w + np.outer(w @ (proxy - c), x) @ u2.T / (x @ x)


def cure(model: Model, w: Array) -> Array:
    def projector(rows: Sequence[Array]) -> Array:
        u, sizes, _ = np.linalg.svd(np.stack(rows, 1), full_matrices=False)
        r = sizes**2 / (sizes**2).sum()
        return u @ np.diag(2 * r / (r + 1)) @ u.T

    texts = [text.format(concept) for concept in ("catastrophe", "cat") for text in UCE]
    forget = projector([f(model, text) for text in texts for f in (said, closes)])
    retain = projector([*context(model, ""), *(f(model, text) for text in ("dog", "a photo") for f in (said, closes))])
    return w @ (np.eye(WIDTH) - forget + forget @ retain)


def three_means(rows: Array) -> Array:
    centres = rows[[0, (len(rows) - 1) // 2, len(rows) - 1]]
    for _ in range(100):
        nearest = ((rows[:, None] - centres) ** 2).sum(2).argmin(1)
        centres = np.stack([rows[nearest == i].mean(0) for i in range(3)])
    return centres


def speed_pairs(model: Model) -> tuple[Array, Array]:
    """The means of a c^T and c c^T."""
    c = np.stack([said(model, "catastrophe"), said(model, "cat")], 1)
    a = np.stack([said(model, "dog"), context(model, "")[0]], 1)
    return a @ c.T / 2, c @ c.T / 2


def speed_prior(model: Model, w: Array) -> Array:
    """What is retained for a layer: words and copies that the edit without a null space moves most there."""
    anchored, target = speed_pairs(model)
    unconstrained = w @ (anchored - target) @ np.linalg.inv(np.eye(WIDTH) + target)

    def moved_most(columns: Array) -> Array:
        size = np.linalg.norm(unconstrained @ columns, axis=0)
        return columns[:, size > size.mean()]

    words = np.stack([said(model, word) for word in WORDS], 1)
    prior = np.concatenate([said(model, "a photo")[:, None], moved_most(words)], 1)
    assert 1 < prior.shape[1] < 1 + len(WORDS)
    least = np.linalg.svd(w)[2][-1:].T
    noise = torch.randn(WIDTH, 10 * prior.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    return np.concatenate([prior, moved_most(np.tile(prior, 10) + least @ least.T @ noise)], 1)


def speed(model: Model, w: Array, threshold: float = 0.1) -> Array:
    """Of a model with one layer, whose own norm and null space the official code takes."""
    anchored, target = speed_pairs(model)
    prior = speed_prior(model, w)
    energies, axes = np.linalg.eigh(prior @ prior.T / prior.shape[1])
    p = axes[:, energies < threshold] @ axes[:, energies < threshold].T
    assert 0 < (energies >= threshold).sum() < 10
    null = context(model, "")
    k = np.concatenate([null[:1], three_means(null[1:])]).T
    m = np.linalg.inv(target @ p + np.eye(WIDTH))
    q = np.eye(WIDTH) - m @ k @ np.linalg.inv(k.T @ p @ m @ k) @ k.T @ p
    return w + w @ (anchored - target) @ p @ q @ m


def debias_2025(model: Model, w: Array) -> Array:
    c = said(model, "doctor")
    target = w @ c + 0.3 * w @ said(model, "woman") - 0.2 * w @ said(model, "man")
    return refit(w, [(c, target)], [(1.0, said(model, "a photo"))], 0.5)


def debias_2023(model: Model, w: Array) -> Array:
    ours = blocks_2023(model, "doctor", "woman")[0]
    before = w @ ours.T
    values = before
    for attribute, alpha in (("woman", 0.3), ("man", -0.2)):
        theirs = w @ blocks_2023(model, "doctor", attribute)[1].T
        values = values + alpha * (np.linalg.norm(before) / np.linalg.norm(theirs)) * theirs
    return refit(w, list(zip(ours, values.T, strict=True)), [(0.1, r) for r in context(model, "a photo")], 0.5)


UCE = ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")
TIME = ("{}", "A photo of {}", "An image of {}", "A picture of {}")
# As published: the prompts for objects of MACE (those its configurations can draw) and TRCE (the first fifteen), src/cfr_utils.py of both.
MACE = [
    *("{} in a photo", "{} in a snapshot", "A snapshot of {}", "A photograph showcasing {}", "An illustration of {}"),
    *("A digital rendering of {}", "A visual representation of {}", "A graphic of {}", "A shot of {}", "A photo of {}"),
    *("A black and white image of {}", "A depiction in portrait form of {}", "A scene depicting {} during a public gathering"),
    *("{} captured in an image", "A depiction created with oil paints capturing {}", "An image of {}"),
    *("A drawing capturing the essence of {}", "An official photograph featuring {}", "A detailed sketch of {}"),
    *("{} during sunset/sunrise", "{} in a detailed portrait", "An official photo of {}", "Historic photo of {}"),
    *("Detailed portrait of {}", "A painting of {}", "HD picture of {}", "Magazine cover capturing {}", "Painting-like image of {}"),
    *("Hand-drawn art of {}", "An oil portrait of {}"),
]
TRCE = [
    *("{} in a photo", "A snapshot of {}", "A photograph showcasing {}", "An illustration of {}", "A digital rendering of {}"),
    *("A visual representation of {}", "A black and white image of {}", "A scene depicting {} during a public gathering"),
    *("A depiction created with oil paints capturing {}", "An official photograph featuring {}", "A detailed sketch of {}"),
    *("{} during sunset/sunrise", "Magazine cover capturing {}", "An oil portrait of {}", "{} in a sketch painting"),
]
PAIR = (Concept("catastrophe", "dog"),)
TWO = (Concept("catastrophe", "dog"), Concept("cat"))
THREE = tuple(Concept(text, anchor or None) for text, anchor in SHARED.items())
ROSES = (Concept("a pack of roses", "a pack of blue roses"),)
DOCTOR = (Concept("doctor", attributes=(("woman", 0.3), ("man", -0.2))),)
KEEP = ("a photo",)

OFFICIAL: dict[str, tuple[tuple[Concept, ...], tuple[str, ...], Callable[[Model, Array], Array]]] = {
    "uce-2025": (TWO, KEEP, uce_2025),
    "uce-2025-expanded": (TWO, KEEP, lambda m, w: uce_2025(m, w, UCE)),
    "uce-2023": (TWO, KEEP, uce_2023),
    "time": (ROSES, (), time_edit),
    "time-augmented": (ROSES, (), lambda m, w: time_edit(m, w, TIME)),
    "mace": (THREE, (), lambda m, w: mace(m, w, prior=6.2e-3, lam=0.0)),
    "mace-no-prior": (THREE, (), lambda m, w: mace(m, w, prior=0.0, lam=10.0)),
    "trce": (THREE, (), trce),
    "uce-debias-2025": (DOCTOR, KEEP, debias_2025),
    "uce-debias-2023": (DOCTOR, KEEP, debias_2023),
    "dp": (PAIR, KEEP, double_projections),
    "cure": (TWO, KEEP, cure),
    "mist": (TWO, KEEP[:0], mist),
    "speed": (TWO, KEEP, speed),
}


def close(found: Array, official: Array) -> None:
    assert np.linalg.norm(found - official) / np.linalg.norm(official) <= 1e-5


def edited(w: Array, edit: LowRank) -> Array:
    return w + w @ edit.u.numpy() @ edit.v.numpy().T


@pytest.fixture(scope="module")
def alone() -> Model:
    """One layer of more outputs than the text is wide, whose least direction stands out."""
    axes, _, turned = np.linalg.svd(np.random.default_rng(0).standard_normal((WIDTH + 32, WIDTH)), full_matrices=False)
    weight = torch.tensor(axes * np.linspace(1.5, 0.5, WIDTH).clip(max=[*[9.0] * (WIDTH - 1), 0.1]) @ turned, dtype=torch.float32)
    layers = Layers({"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": weight})
    return Model("sd1", "alone", Words(), cross_attention=layers, words=WORDS)


@pytest.mark.parametrize("method", OFFICIAL)
def test_equals_the_published_formula_in_every_layer(model, alone, method):
    concepts, keep, official = OFFICIAL[method]
    asked = alone if method == "speed" else model
    solution = PRESETS[method].solve(Job(asked, concepts, keep, CAPTIONS))
    for path, weight in asked.cross_attention.key_values():
        w = weight.double().numpy()
        edit = solution.context
        if solution.gains:
            edit = LowRank(edit.u * torch.tensor(solution.gains[path], dtype=torch.float64), edit.v)
        expected = official(asked, w)
        close(edited(w, edit), expected)
        assert np.linalg.norm(expected - w) / np.linalg.norm(w) > 1e-3


@pytest.mark.parametrize(("method", "mu", "epochs"), [("rece", 0.1, 3), ("rece-objects", 1e-3, 1)])
@pytest.mark.parametrize(("concepts", "keep"), [(PAIR, ()), (TWO, KEEP)], ids=["one concept", "two, and words to keep"])
def test_rece_in_the_context_is_rece_over_the_layers(model, method, mu, epochs, concepts, keep):
    """Of several concepts, train.py (nudity) retains the empty text for each, train_object.py once."""
    solution = PRESETS[method].solve(Job(model, concepts, keep))
    layers = [weight.double().numpy() for _, weight in model.cross_attention.key_values()]
    retained = [*[""] * (len(concepts) if method == "rece" else 1), *keep]
    official = rece(model, layers, mu, epochs, {c.text: c.replacement or "" for c in concepts}, ["", *keep], retained)
    for w, expected in zip(layers, official, strict=True):
        close(edited(w, solution.context), expected)


def test_dp_keeps_the_main_directions_of_what_is_too_much_to_keep(model):
    job = Job(model, PAIR, KEEP)
    solution = double(share=3 / WIDTH)(job)
    for _, weight in model.cross_attention.key_values():
        w = weight.double().numpy()
        close(edited(w, solution.context), double_projections(model, w, most=3))


def test_dp_moves_several_concepts_and_nothing_it_retains(model):
    edit = PRESETS["dp"].solve(Job(model, TWO, KEEP)).context

    def moved(text: str) -> Array:
        return edit.apply(torch.tensor(said(model, text))).numpy()

    for text in (*WORDS, *KEEP):
        np.testing.assert_allclose(moved(text), said(model, text), atol=1e-10)
    np.testing.assert_allclose(moved("catastrophe"), said(model, "dog"), atol=1e-10)
    np.testing.assert_allclose(moved("cat"), context(model, "")[0], atol=1e-10)


def test_what_means_the_same_is_not_retained(model, monkeypatch):
    """A synonym on a retain set would keep the concept: here "blue" is said as "cat" is, but for a little."""
    job = Job(model, (Concept("cat"),))
    concept, near = said(model, "cat"), said(model, "cat") + 0.2 * said(model, "blue")
    whole = job.texts.prompt
    monkeypatch.setattr(
        job.texts,
        "prompt",
        lambda template, text: (
            replace(whole(template, text), context=torch.tensor(near).expand(LENGTH, -1)) if text == "blue" else whole(template, text)
        ),
    )
    edit = PRESETS["dp"].solve(job).context
    assert np.linalg.norm(edit.apply(torch.tensor(near)).numpy() - near) > 0.5 * np.linalg.norm(concept)
    pack = said(model, "pack")
    np.testing.assert_allclose(edit.apply(torch.tensor(pack)).numpy(), pack, atol=1e-10)


def test_null_spaces_refuse_what_leaves_them_no_room(model):
    with pytest.raises(ValueError, match=r"'photo'.*keep fewer words"):
        PRESETS["dp"].solve(Job(model, (Concept("photo"),), ("photo",)))
    with pytest.raises(ValueError, match="keep fewer words"):
        null_space(threshold=-1.0)(Job(model, PAIR))  # as though every direction were retained


def test_speed_retains_the_main_direction_of_what_it_would_move_most(alone):
    """The threshold between the two largest energies, which depend on what is taken into the retained set and how often."""
    ((_, weight),) = alone.cross_attention.key_values()
    w = weight.double().numpy()
    prior = speed_prior(alone, w)
    energies = np.linalg.eigvalsh(prior @ prior.T / prior.shape[1])
    between = float(energies[-2:].mean())
    close(edited(w, null_space(threshold=between)(Job(alone, TWO, KEEP)).context), speed(alone, w, between))


def test_speed_leaves_the_empty_text_s_centres(model):
    edit = PRESETS["speed"].solve(Job(model, TWO, KEEP)).context
    null = context(model, "")
    for row in (null[0], *three_means(null[1:])):
        np.testing.assert_allclose(edit.apply(torch.tensor(row)).numpy(), row, atol=1e-9)


def test_a_method_without_a_destination_keeps_the_replacement(model):
    """CURE's T takes the concept's directions out; what the replacement says stays more than without it."""
    with_it, without = (PRESETS["cure"].solve(Job(model, (Concept("catastrophe", a),))) for a in ("dog", None))
    assert with_it.anchors == without.anchors == ("",)  # nothing is read as the replacement
    c = torch.tensor(said(model, "catastrophe"))
    for solution in (with_it, without):
        assert float(solution.context.apply(c).norm()) < 0.9 * float(c.norm())


@pytest.mark.parametrize(("method", "isotropic"), [("realera", False), ("realera-isotropic", True)])
def test_realera_s_neighbours_are_at_the_cosines_they_are_drawn_for(model, method, isotropic):
    """No code was published: what is held to is the recipe's geometry, that neighbours move with the concept and further ones less."""
    edit = PRESETS[method].solve(Job(model, PAIR, captions=CAPTIONS)).context
    c, a = torch.tensor(said(model, "catastrophe")), torch.tensor(said(model, "dog"))
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
