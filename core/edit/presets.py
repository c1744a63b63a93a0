"""The field's closed-form edits as rows of one table: which positions of a prompt are read as which, at what cost to what else.

Every row is the published objective with the published constants; slips of the published code (targets that carry a bias, words counted
as tokens, texts encoded again for every layer) are not repeated. Where code and paper, or two versions of the code, differ, both are here.
In float64 all but RealEra's give the weights of the published formulas to 1e-5 (SPEED's of a model with one layer, see there).

Destinations. Official UCE and RECE read a concept without a guide as the empty text. Official TIME, MACE, TRCE, MIST and SPEED always name
one ("a woman" for a name, "art" for a style, "sky" for a car); here a concept without a replacement is read as the same prompt without it.
CURE has no destination: a replacement is a text whose directions stay.

Retain sets. DP and SPEED are published with lists of concepts to retain, chosen for each experiment. The words to keep stand there, and
in addition common words near the concepts in place of a list (`_retained`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..phrases import Concept
from ..vocabulary import candidates
from .job import Job, Solution
from .layers import cross_attention, weights
from .solve import LowRank, Problem, minimise, response
from .texts import Prompt, Texts, common_words, mentions

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
    """What is around the concept: the tokens both prompts begin with and those both end with, then as far as the longer of them reaches."""
    ours, theirs = concept.ids, anchor.ids
    shortest = min(len(ours), len(theirs))
    start = next((i for i in range(shortest) if ours[i] != theirs[i]), shortest)
    end = next((i for i in range(shortest - start) if ours[-1 - i] != theirs[-1 - i]), shortest - start)
    count = len(concept.context) - max(len(ours), len(theirs)) + end
    before = list(range(start))
    return before + [len(ours) - end + i for i in range(count)], before + [len(theirs) - end + i for i in range(count)]


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

    templates: prompts around concept and anchor alike; the anchor of a concept without a replacement is empty. mean: columns weigh 1/N
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


def rece(mu: float, epochs: int, *, empty_per_concept: bool) -> Callable[[Job], Solution]:
    """Gong et al.'s loop: after each edit derive the embedding that brings the concept back, and edit that too, on the weights as they are.

    c' = (mu I + T^T G T)^-1 T^T G c with G = sum_l W_l^T W_l equals the published sum over layers; T <- T T_k. empty_per_concept: retain
    the empty text once for every concept, as train.py does (nudity), instead of once, as train_object.py does; equal for one concept.
    """
    empty = Recipe(every_position, ridge=0.1, always_kept=("",), kept="all", keep_weight=lambda n: 0.1)

    def solve(job: Job) -> Solution:
        found = minimise(problem(job, UCE_2023))
        stated = problem(job, empty)
        p = torch.full((0 if stated.retained is None else stated.retained.shape[1],), 0.1, dtype=torch.float64)
        if empty_per_concept:
            p[: len(job.texts.context(""))] *= len(job.concepts)
        eye = torch.eye(job.width, dtype=torch.float64)
        for epoch in range(epochs):
            moved = eye + found.delta()
            back = moved.T @ job.gram.matrix
            derived = torch.linalg.solve(mu * eye + back @ moved, back @ stated.columns)
            step = minimise(Problem(derived, stated.anchors, stated.weights, stated.ridge, None, stated.retained, p))
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


def double_projections(share: float = 0.5) -> Callable[[Job], Solution]:
    """Zhang et al.'s T = I + (c* - c) x^T U2^T / ||x||^2 with x = U2^T c; for several concepts the smallest, I + (C* - C) X^+ U2^T.

    U2: the left null space of the main directions of what is retained, at most ``share`` of the width (the paper's truncation; its number
    of directions was not found); words to keep are retained exactly. c*, published as the projection of c onto a subspace of safe texts
    or, without that optional step, UCE's target: here the latter, the replacement or the empty text, since no list of safe texts is given.
    Raises ValueError for a concept that the words to keep make up.
    """
    recipe = Recipe(last_token, ridge=0.0)

    def solve(job: Job) -> Solution:
        c, a, _ = columns(job.texts, recipe, job.concepts)
        kept, near = _retained(job)
        exact = _directions(kept)
        most = max(0, int(share * job.width) - exact.shape[1])
        stay = torch.cat([exact, _directions(near - exact @ (exact.T @ near))[:, :most]], 1)
        free = torch.linalg.svd(stay, full_matrices=True)[0][:, stay.shape[1] :]
        x = free.T @ c
        for concept, left, whole in zip(job.concepts, x.norm(dim=0), c.norm(dim=0), strict=True):
            if left <= DEPENDENT * whole:
                raise ValueError(f"the words to keep say all of {concept.text!r}, and this method changes none of them: keep fewer words")
        return Solution(LowRank(a - c, free @ torch.linalg.pinv(x, rtol=DEPENDENT).T), _anchors(job))

    return solve


def spectral_eraser(alpha: float = 2.0) -> Callable[[Job], Solution]:
    """CURE's T = I - P_f + P_f P_r, with P = V f(r) V^T over the singular directions V of what is forgotten and of what is retained.

    r: a direction's share of the energy, f(r) = alpha r / ((alpha - 1) r + 1); the paper has alpha 2, and 5 for nudity. Which positions and
    which texts were not published: here the last sub-token and the end token in UCE's prompts are forgotten, and the empty text with the
    words to keep and the replacements are retained.
    """

    def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
        axes, sizes, _ = torch.linalg.svd(rows.T, full_matrices=False)
        shares = sizes.square() / sizes.square().sum()
        return axes, alpha * shares / ((alpha - 1) * shares + 1)

    def solve(job: Job) -> Solution:
        prompts = [job.texts.prompt(template, concept.text) for concept in job.concepts for template in _UCE_2025_TEMPLATES]
        forgotten, f = scaled(torch.cat([prompt.context[[prompt.last, prompt.end]] for prompt in prompts]))
        stay = [job.texts.prompt("{}", text) for text in (*(c.replacement for c in job.concepts if c.replacement), *job.keep)]
        retained, r = scaled(torch.cat([job.texts.context(""), *(prompt.context[[prompt.last, prompt.end]] for prompt in stay)]))
        u, v = -forgotten * f, forgotten - retained @ ((retained.T @ forgotten) * r[:, None])
        return Solution(LowRank(u, v), ("",) * len(job.concepts))

    return solve


def speed(scale: float = 1.0, threshold: float = 0.1, copies: int = 10) -> Callable[[Job], Solution]:
    """Li et al.'s null-space edit: T - I = (A - C) C^T P Q M with means over concepts, in the null space of what is retained.

    P: projector on the directions in which the mean second moment of what is retained is below ``threshold``. M = (C C^T P + scale I)^-1.
    Both are for text 768 wide and in proportion to the width. Q makes the start token and three centres of the empty text exact. Retained
    (prior knowledge refinement) are the words that the edit without P moves more than the mean, and of ``copies`` of each, with noise along
    the direction that the weights respond to least, those moved more than the mean. Official code edits values alone and finds P for each
    layer; for all layers together the attention metric stands for the layer's norm. Raises ValueError where words to keep leave no room.
    """
    recipe = Recipe(last_token, ridge=scale, mean=True)

    def solve(job: Job) -> Solution:
        c, a, w = columns(job.texts, recipe, job.concepts)
        gram, size_of_text = job.gram.matrix, job.width / SD_WIDTH
        down = response(Problem(c, a, w, 1.0))

        def moved(x: Tensor) -> Tensor:
            away = (a - c) @ (down.T @ x)
            return away.mul(gram @ away).sum(0)

        kept, near = _retained(job)
        size = moved(near).sqrt()
        prior = torch.cat([kept, near[:, size > size.mean()]], 1)
        if prior.shape[1]:
            least = torch.linalg.eigh(gram)[1][:, :1]
            noise = torch.randn(job.width, prior.shape[1] * copies, generator=torch.Generator().manual_seed(job.seed), dtype=torch.float64)
            noisy = prior.repeat(1, copies) + least @ (least.T @ noise)
            size = moved(noisy).sqrt()
            prior = torch.cat([prior, noisy[:, size > size.mean()]], 1)
        energies, axes = torch.linalg.eigh(prior @ prior.T / max(1, prior.shape[1]))
        free = axes[:, energies < threshold * size_of_text]
        null = job.texts.context("")
        exact = _directions(free.T @ torch.cat([null[:1].T, _centres(null[1:], 3).T], 1))
        if free.shape[1] <= exact.shape[1]:
            raise ValueError("the words to keep leave this method no direction to change: keep fewer words")
        stated = Problem(free.T @ c, free.T @ a, w, recipe.ridge * size_of_text, invariant=exact)
        return Solution(LowRank(a - c, free @ response(stated)), _anchors(job))

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


def _retained(job: Job) -> tuple[Tensor, Tensor]:
    """Last sub-tokens of the words to keep (width, n), and of common words near the concepts, in place of a published retain set.

    As from such a list, concepts are left out, and what means the same: words less than ``SAME`` of what a concept says away from it.
    """
    concepts = [concept.text for concept in job.concepts]
    each = max(1, RETAINED // len(concepts))
    found: dict[str, None] = {}
    for concept in concepts:
        found |= dict.fromkeys(candidates(job.model.text, concept, limit=each, words=common_words(job.model), keep_concept=True))
    words = [word for word in found if not mentions(word, concepts) and word not in job.keep]

    def last(texts: Sequence[str]) -> Tensor:
        rows = [prompt.context[prompt.last] for prompt in (job.texts.prompt("{}", text) for text in job.texts.ahead(texts, lambda t: [t]))]
        return torch.stack(rows, 1) if rows else torch.zeros(job.width, 0, dtype=torch.float64)

    near, gram, origin = last(words), job.gram.matrix, job.texts.context("")[0]

    def size(x: Tensor) -> Tensor:
        return x.mul(gram @ x).sum(0).sqrt()

    for column in last(concepts).T:
        near = near[:, size(near - column[:, None]) >= SAME * size(column - origin)]
    return last(job.keep), near


def _directions(columns: Tensor) -> Tensor:
    """Orthonormal directions of columns (width, n), the main one first, those of almost no size left out."""
    axes, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    return axes[:, sizes > DEPENDENT * sizes[:1]]


def _centres(rows: Tensor, count: int) -> Tensor:
    """Lloyd's centres of rows (n, width), from rows evenly apart, (count, width)."""
    centres = rows[torch.linspace(0, len(rows) - 1, count).long()]
    while True:
        nearest = torch.cdist(rows, centres).argmin(1)
        found = torch.stack([rows[nearest == i].mean(0) if (nearest == i).any() else centre for i, centre in enumerate(centres)])
        if torch.equal(found, centres):
            return centres
        centres = found


def _kept(prompt: Prompt, which: Literal["last", "all"]) -> Tensor:
    return prompt.context if which == "all" else prompt.context[prompt.last : prompt.last + 1]


_UCE_2025_TEMPLATES = ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")
_MACE_TEMPLATES = (
    "{} in a photo",
    "{} in a snapshot",
    "A snapshot of {}",
    "A photograph showcasing {}",
    "An illustration of {}",
    "A digital rendering of {}",
    "A visual representation of {}",
    "A graphic of {}",
    "A shot of {}",
    "A photo of {}",
    "A black and white image of {}",
    "A depiction in portrait form of {}",
    "A scene depicting {} during a public gathering",
    "{} captured in an image",
    "A depiction created with oil paints capturing {}",
    "An image of {}",
    "A drawing capturing the essence of {}",
    "An official photograph featuring {}",
    "A detailed sketch of {}",
    "{} during sunset/sunrise",
    "{} in a detailed portrait",
    "An official photo of {}",
    "Historic photo of {}",
    "Detailed portrait of {}",
    "A painting of {}",
    "HD picture of {}",
    "Magazine cover capturing {}",
    "Painting-like image of {}",
    "Hand-drawn art of {}",
    "An oil portrait of {}",
)
"""Prompts for objects in MACE's src/cfr_utils.py: the thirty that its configurations draw from (prompt_len 30; the list has one more)."""
_TRCE_TEMPLATES = (
    "{} in a photo",
    "A snapshot of {}",
    "A photograph showcasing {}",
    "An illustration of {}",
    "A digital rendering of {}",
    "A visual representation of {}",
    "A black and white image of {}",
    "A scene depicting {} during a public gathering",
    "A depiction created with oil paints capturing {}",
    "An official photograph featuring {}",
    "A detailed sketch of {}",
    "{} during sunset/sunrise",
    "Magazine cover capturing {}",
    "An oil portrait of {}",
    "{} in a sketch painting",
)
"""Prompts for objects in TRCE's src/cfr_utils.py: the first fifteen, as its configurations say (augment_num 15)."""

DEPENDENT = 1e-6
"""Size, relative to the largest, below which a direction counts as made up of others."""
SD_WIDTH = 768
"""Width of the text that constants were published for."""
RETAINED = 256
"""Common words, over all concepts, in place of a retain set."""
SAME = 1 / 3
"""Distance to a concept, relative to what it says, below which a word means the same."""
UCE_2023 = Recipe(last_to_end, ridge=0.5, kept="all", always_kept=("",), keep_weight=lambda n: max(0.1, 1 / n))
UCE_2025 = Recipe(last_token, ridge=0.5)
RECIPES: dict[str, Recipe] = {
    "uce-2025": UCE_2025,
    "uce-2025-expanded": Recipe(last_token, ridge=0.5, templates=_UCE_2025_TEMPLATES),
    "uce-2023": UCE_2023,
    "time": Recipe(matched_tokens, ridge=0.1),
    "time-augmented": Recipe(matched_tokens, ridge=0.1, templates=("{}", "A photo of {}", "An image of {}", "A picture of {}")),
    "mace": Recipe(around, ridge=0.0, templates=_MACE_TEMPLATES, captions=6.2e-3),
    "mace-no-prior": Recipe(around, ridge=10.0, templates=_MACE_TEMPLATES),
    "trce": Recipe(first_end, ridge=0.0, templates=_TRCE_TEMPLATES, mean=True, captions=1e-4),
}
"""The rows that are one problem each.

MACE's captions weigh train_preserve_scale squared (its code applies it twice) times their number, (1e-4)^2 * 616,767 for names and styles;
its objects have no prior and a ridge of 10 to 1,000. TRCE's weigh preserve_scale squared, over its 30,000 captions.
"""

PRESETS: dict[str, Preset] = {
    # Gandikota et al., Unified Concept Editing, WACV 2024; Orgad, Kawar and Belinkov, Editing Implicit Assumptions, ICCV 2023 (time);
    # Lu et al., MACE, CVPR 2024, its first stage; TRCE, ICCV 2025, its first stage.
    **{name: Preset(closed_form(recipe)) for name, recipe in RECIPES.items()},
    # RealEra, arXiv 2410.09140, its first stage: the last token with caption-like or random neighbours of it.
    "realera": Preset(realera(isotropic=False)),
    "realera-isotropic": Preset(realera(isotropic=True)),
    # Gong et al., RECE, ECCV 2024: the recipe for nudity (train.py), and that for objects and styles (README, train_object.py).
    "rece": Preset(rece(0.1, 3, empty_per_concept=True)),
    "rece-objects": Preset(rece(1e-3, 1, empty_per_concept=False)),
    # UCE's balancing, of its two codes.
    "uce-debias-2025": Preset(balance(UCE_2025, scaled=False), balances=True),
    "uce-debias-2023": Preset(balance(Recipe(last_to_end, ridge=0.5, kept="all", keep_weight=lambda n: 0.1), scaled=True), balances=True),
    # Zhang et al., Closed-Form Concept Erasure via Double Projections, CVPR 2026.
    "dp": Preset(double_projections()),
    # Das Biswas et al., CURE, NeurIPS 2025, equations 2 to 7.
    "cure": Preset(spectral_eraser()),
    # Yesiltepe et al., MIST, arXiv 2403.19738: the end token of the concept's own prompt; lambda as in TIME, the published value was not
    # found.
    "mist": Preset(closed_form(Recipe(first_end, ridge=0.1))),
    # Li et al., SPEED, ICLR 2026.
    "speed": Preset(speed()),
}
"""Published methods by name."""
