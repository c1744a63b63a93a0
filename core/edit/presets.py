"""The field's closed-form edits as rows of one table: which positions of a prompt are read as which, at what cost to what else.

Every row is the published objective; slips of the published code (targets that carry a bias, words counted as tokens, a preserve scale
that is applied twice, texts encoded again for every layer) are not repeated. Where code and paper, or two versions of the code, differ,
both are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..phrases import Concept
from .job import Job, Solution
from .layers import cross_attention, weights
from .solve import LowRank, Problem, minimise, response
from .texts import Prompt, Texts

Span: TypeAlias = Callable[[Prompt, Prompt], tuple[list[int], list[int]]]
"""Positions of the concept's prompt, and of the anchor's prompt they are to be read as, one by one."""


def last_token(concept: Prompt, anchor: Prompt) -> tuple[list[int], list[int]]:
    """The last sub-token; of an empty anchor the token before it, which is the start token in an empty prompt (as UCE counts)."""
    return [concept.last], [anchor.last]


def last_to_end(concept: Prompt, anchor: Prompt) -> tuple[list[int], list[int]]:
    """From the last sub-token through the padding, as far as the longer of both prompts reaches."""
    count = len(concept.context) - max(concept.last, anchor.last)
    return list(range(concept.last, concept.last + count)), list(range(anchor.last, anchor.last + count))


def every_position(concept: Prompt, anchor: Prompt) -> tuple[list[int], list[int]]:
    """All positions, one to one."""
    positions = list(range(len(concept.context)))
    return positions, positions


def first_end(concept: Prompt, anchor: Prompt) -> tuple[list[int], list[int]]:
    """The first end token."""
    return [concept.end], [anchor.end]


def around(concept: Prompt, anchor: Prompt) -> tuple[list[int], list[int]]:
    """Everything but the concept itself: what is before it, and what is after it as far as the longer of both prompts reaches."""
    count = len(concept.context) - 1 - max(concept.last, anchor.last)
    before = list(range(concept.first))
    after = range(1, count + 1)
    return before + [concept.last + i for i in after], before + [anchor.last + i for i in after]


def matched_tokens(concept: Prompt, anchor: Prompt) -> tuple[list[int], list[int]]:
    """All positions, each read as the next equal token of the anchor's prompt; the padding as what follows there.

    A token the anchor lacks, for which the published scan has no answer, is read as the token in its place.
    """
    length, found, reached = len(concept.context), [], 0
    for token in concept.ids:
        if token in anchor.ids[reached:]:
            reached += anchor.ids[reached:].index(token)
        found.append(min(reached, length - 1))
        reached += 1
    found += [min(position, length - 1) for position in range(reached, reached + length - len(found))]
    return list(range(length)), found


@dataclass(frozen=True)
class Recipe:
    """One row: the columns, what they are read as, and what everything else costs.

    templates: prompts around concept and anchor alike, which is the empty text for a concept without a replacement. mean: columns weigh 1/N
    instead of 1. ridge: lam. kept, always_kept, keep_weight: the texts to keep, which of their positions, and p from their number.
    captions: times the covariance of captions (mean over captions of the sum over positions).
    """

    span: Span
    ridge: float
    templates: tuple[str, ...] = ("{}",)
    mean: bool = False
    kept: Literal["last", "all"] = "last"
    always_kept: tuple[str, ...] = ()
    keep_weight: Callable[[int], float] = lambda n: 1.0
    captions: float = 0.0


@dataclass(frozen=True)
class Preset:
    """A method by name: its recipe and how it is solved. balances: moves shares between attributes instead of erasing."""

    title: str
    source: str
    description: str
    solve: Callable[[Job], Solution]
    balances: bool = False


def columns(texts: Texts, recipe: Recipe, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor, Tensor]:
    """C, A (d, N) and weights (N,) of a recipe."""
    left, right = [], []
    for concept in concepts:
        for template in recipe.templates:
            source = texts.prompt(template, concept.text)
            anchor = texts.prompt(template, concept.replacement or "")
            ours, theirs = recipe.span(source, anchor)
            left.append(source.context[ours])
            right.append(anchor.context[theirs])
    c, a = torch.cat(left).T, torch.cat(right).T
    return c, a, torch.full((c.shape[1],), 1 / c.shape[1] if recipe.mean else 1.0, dtype=torch.float64)


def problem(job: Job, recipe: Recipe) -> Problem:
    """The quadratic problem a recipe states."""
    c, a, w = columns(job.texts, recipe, job.concepts)
    kept = [*recipe.always_kept, *job.keep]
    rows = [_kept(job.texts.prompt("{}", text), recipe.kept) for text in kept]
    retained = torch.cat(rows).T if rows else None
    p = None if retained is None else torch.full((retained.shape[1],), recipe.keep_weight(len(kept)), dtype=torch.float64)
    preserve = recipe.captions * job.corpus.covariance if recipe.captions else None
    return Problem(c, a, w, recipe.ridge, preserve, retained, p)


def closed_form(recipe: Recipe) -> Callable[[Job], Solution]:
    """Solve a recipe as it stands."""

    def solve(job: Job) -> Solution:
        return Solution(minimise(problem(job, recipe)), _anchors(job))

    return solve


def rece(mu: float, epochs: int) -> Callable[[Job], Solution]:
    """Gong et al.'s loop: after each edit derive the embedding that brings the concept back, and edit that too, on the weights as they are.

    c' = (mu I + T^T G T)^-1 T^T G c with G = sum_l W_l^T W_l equals the published sum over layers; T <- T T_k.
    """
    empty = Recipe(every_position, ridge=0.1, always_kept=("",), kept="all", keep_weight=lambda n: 0.1)

    def solve(job: Job) -> Solution:
        found = minimise(problem(job, UCE_2023))
        stated = problem(job, empty)
        eye = torch.eye(job.width, dtype=torch.float64)
        for epoch in range(epochs):
            moved = eye + found.delta()
            back = moved.T @ job.gram.matrix
            derived = torch.linalg.solve(mu * eye + back @ moved, back @ stated.columns)
            step = minimise(Problem(derived, stated.anchors, stated.weights, stated.ridge, None, stated.retained, stated.retained_weights))
            found = found.compose(step)
            # As many columns as the text is wide say everything; the loop would add 77 a concept and epoch.
            if found.rank > job.width:
                found = LowRank(eye, found.delta().T)
            job.on_step(epoch + 1, epochs, {"rank": found.rank})
        return Solution(found, _anchors(job))

    return solve


def realera(
    *, isotropic: bool, count: int = 64, near: tuple[float, float] = (0.6, 0.9), far: tuple[float, float] = (0.2, 0.5)
) -> Callable[[Job], Solution]:
    """The closed-form stage: random neighbours of the concept, at cosines within ``near``, move with it; those within ``far`` stay.

    Cosines are exact by construction: e' = ||e|| (s e^ + sqrt(1 - s^2) g^) with g orthogonal to e. Drawn from captions unless
    ``isotropic``: isotropic neighbours say nothing to a linear layer and act as a decay towards zero. Figures are a reconstruction; no
    code was published.
    """
    recipe = Recipe(last_token, ridge=0.1)

    def solve(job: Job) -> Solution:
        stated = problem(job, recipe)
        generator = torch.Generator().manual_seed(job.seed)
        factor = None if isotropic else torch.linalg.cholesky(job.corpus.covariance + 1e-6 * torch.eye(job.width, dtype=torch.float64))

        def around(embedding: Tensor, cosines: tuple[float, float]) -> Tensor:
            noise = torch.randn(job.width, count, generator=generator, dtype=torch.float64)
            noise = noise if factor is None else factor @ noise
            unit = normalize(embedding, dim=0)[:, None]
            aside = normalize(noise - unit * (unit.T @ noise), dim=0)
            s = cosines[0] + (cosines[1] - cosines[0]) * torch.rand(count, generator=generator, dtype=torch.float64)
            return embedding.norm() * (unit * s + aside * (1 - s.square()).sqrt())

        pairs = list(zip(stated.columns.T, stated.anchors.T, strict=True))
        more = torch.cat([around(c, near) for c, _ in pairs], 1)
        anchors = torch.cat([a[:, None].expand(-1, count) for _, a in pairs], 1)
        beyond = torch.cat([around(c, far) for c, _ in pairs], 1)
        kept = beyond if stated.retained is None else torch.cat([stated.retained, beyond], 1)
        ones = torch.ones(kept.shape[1], dtype=torch.float64)
        weight = torch.full((more.shape[1],), 1 / count, dtype=torch.float64)
        ones[-beyond.shape[1] :] = 1 / count
        enlarged = stated.with_columns(more, anchors, weight)
        found = minimise(Problem(enlarged.columns, enlarged.anchors, enlarged.weights, recipe.ridge, None, kept, ones))
        return Solution(found, _anchors(job))

    return solve


def balance(recipe: Recipe, *, scaled: bool) -> Callable[[Job], Solution]:
    """UCE's debiasing targets W c + sum_p alpha_p s_lp W a_p, alpha from ``Concept.attributes``.

    scaled (2023): s_lp = ||W_l c||_F / ||W_l a_p||_F differs per layer and gives the edit gains; else (2025) s = 1.
    """

    def solve(job: Job) -> Solution:
        if not all(concept.attributes for concept in job.concepts):
            raise ValueError(
                "this method balances: give every concept attributes with shares, as in Concept('doctor', attributes=(('woman', 0.2),))"
            )
        stated = problem(job, recipe)
        down = response(stated)
        u, v, owners = [], [], []
        start = 0
        for concept in job.concepts:
            source = job.texts.prompt("{}", concept.text)
            positions, _ = recipe.span(source, source)
            stop = start + len(positions)
            for attribute, share in concept.attributes:
                target = job.texts.prompt("{}", attribute)
                ours, theirs = recipe.span(source, target)
                count = len(ours)
                u.append(share * target.context[theirs].T)
                v.append(down[:, start : start + count])
                owners.append((source.context[ours].T, target.context[theirs].T, count))
            start = stop
        found = LowRank(torch.cat(u, 1), torch.cat(v, 1))
        gains: dict[str, tuple[float, ...]] = {}
        if scaled:
            for path, weight in weights(cross_attention(job.model), job.width):
                w = weight.double()
                row: list[float] = []
                for ours_, theirs_, count in owners:
                    row += [float((w @ ours_).norm() / (w @ theirs_).norm())] * count
                gains[path] = tuple(row)
        return Solution(found, _anchors(job), gains=gains)

    return solve


def _anchors(job: Job) -> tuple[str, ...]:
    return tuple(concept.replacement or "" for concept in job.concepts)


def _kept(prompt: Prompt, which: Literal["last", "all"]) -> Tensor:
    return prompt.context if which == "all" else prompt.context[prompt.last : prompt.last + 1]


_UCE_2025_TEMPLATES = ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")
_ARTICLES = tuple(
    f"{noun} of {article}{{}}" for noun in ("a photo", "a picture", "a drawing", "an image", "a painting") for article in ("", "a ", "the ")
)
_THIRTY = (*_ARTICLES, *(f"{template} on a background" for template in _ARTICLES))

UCE_2023 = Recipe(last_to_end, ridge=0.5, kept="all", always_kept=("",), keep_weight=lambda n: max(0.1, 1 / n))
UCE_2025 = Recipe(last_token, ridge=0.5)
RECIPES: dict[str, Recipe] = {
    "uce-2025": UCE_2025,
    "uce-2025-expanded": Recipe(last_token, ridge=0.5, templates=_UCE_2025_TEMPLATES),
    "uce-2023": UCE_2023,
    "time": Recipe(matched_tokens, ridge=0.1),
    "time-augmented": Recipe(matched_tokens, ridge=0.1, templates=("{}", "A photo of {}", "An image of {}", "A picture of {}")),
    "mace": Recipe(around, ridge=0.0, templates=_THIRTY, captions=6.2e-3),
    "mace-no-prior": Recipe(around, ridge=10.0, templates=_THIRTY),
    "trce": Recipe(first_end, ridge=0.0, templates=_THIRTY[:15], mean=True, captions=1e-4),
}
"""The rows that are one problem each."""

_UCE = "Gandikota et al., Unified Concept Editing, WACV 2024"
_TIME = "Orgad, Kawar and Belinkov, Editing Implicit Assumptions in Text-to-Image Diffusion Models, ICCV 2023"
_MACE = "Lu et al., MACE, CVPR 2024"
_ABOUT: dict[str, tuple[str, str, str]] = {
    "uce-2025": ("UCE (2025 code)", _UCE, "the concept's last token alone"),
    "uce-2025-expanded": ("UCE (2025 code, prompts expanded)", _UCE, "the concept's last token in a few prompts"),
    "uce-2023": ("UCE (2023 code)", _UCE, "from the concept's last token to the end of the prompt; keeps the empty prompt"),
    "time": ("TIME", _TIME, "every token of the prompt, matched to its like in the replacement"),
    "time-augmented": ("TIME (augmented)", _TIME, "the same in four prompts"),
    "mace": ("MACE, stage 1", _MACE, "the words around the concept, in thirty prompts, against a caption prior"),
    "mace-no-prior": ("MACE, stage 1 without a prior", _MACE, "the words around the concept, in thirty prompts"),
    "trce": ("TRCE, stage 1", "TRCE, ICCV 2025", "the end token alone, in fifteen prompts, against a caption prior"),
}

PRESETS: dict[str, Preset] = {name: Preset(*_ABOUT[name], closed_form(recipe)) for name, recipe in RECIPES.items()} | {
    "realera": Preset("RealEra, stage 1", "arXiv 2410.09140", "the last token and caption-like neighbours of it", realera(isotropic=False)),
    "realera-isotropic": Preset(
        "RealEra, stage 1 (isotropic)", "arXiv 2410.09140", "the last token and random neighbours of it", realera(isotropic=True)
    ),
    "rece": Preset("RECE", "Gong et al., RECE, ECCV 2024", "UCE (2023), then three rounds of derived embeddings", rece(0.1, 3)),
    "rece-objects": Preset("RECE (objects, styles)", "Gong et al., RECE, ECCV 2024", "UCE (2023), then one round", rece(1e-3, 1)),
    "uce-debias-2025": Preset(
        "UCE balancing (2025 code)", _UCE, "adds attributes to the last token", balance(UCE_2025, scaled=False), balances=True
    ),
    "uce-debias-2023": Preset(
        "UCE balancing (2023 code)",
        _UCE,
        "adds attributes from the last token on, as strong as the concept is in each layer",
        balance(Recipe(last_to_end, ridge=0.5, kept="all", keep_weight=lambda n: 0.1), scaled=True),
        balances=True,
    ),
}
"""Published methods by name."""
