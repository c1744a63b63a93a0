"""Decomposing concepts of the demo model whose words are known, and what the words found show: the measurements themselves.

Every function here is a job's: plain arguments in, plain data out, one measurement.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...decompose import Decomposition, decompose_concept
from ...decompose.fidelity import explained
from ...decompose.mixture import Mixture, SimplexDescent
from ...decompose.states import States, distances, harvest
from ...demo import detect
from ...demo.evaluate import GUIDANCE
from ...demo.render import SIDE
from ...demo.world import World
from ...gradient import vjp
from ...model import Conditioning, Model
from ...vocabulary import WORD_END, is_unsafe, whole_words
from ..frame import Result
from ..planted import hidden_directions, plant, recovered, token_conditioning
from ..worlds import STEPS, TEMPLATE, WORLDS, load, readings

DECOYS = 500
FIDELITY_PICTURES = 4
"""Pictures on whose states held-out R2 is measured: one set of seeds for every method, none of them a method's own."""
ORACLE = 160
"""Gradient steps of the oracle, on batches of 8 states."""
_CONCEPT_SEED, _WORDS_SEED, _ORACLE_SEED, _FIDELITY_SEED = 10_000, 20_000, 30_000, 40_000


def measure_planted(
    model: str,
    world: str,
    method: str,
    set_: str,
    draw: int,
    options: Mapping[str, Any] = MappingProxyType({}),
    decoys: int = DECOYS,
) -> Result:
    """Plant a mixture, decompose it, and compare.

    model: "demo", or a checkpoint in its layout.
    world: the name of the model's world.
    method: of ``decompose_concept``; an option of that name goes before it.
    set_: "planted", with a perturbation that no word explains, or "planted_exact".
    draw: which mixture: of two to six words in turn.
    options: of ``decompose_concept``.
    decoys: words of the dictionary that the model was never trained on.
    """
    loaded, known = load(model), WORLDS[world]()
    before = loaded.meter.evals
    plain = [word.text for word in known.words.values() if word.synonym_of is None]
    perturbed = set_ == "planted"
    hidden = hidden_directions(loaded.text, list(known.words), TEMPLATE) if perturbed else None
    planted = plant(loaded.text, plain, 2 + draw % 5, 7_000 + draw + 1_000 * perturbed, hidden)
    dictionary = _dictionary(model, known, _synonyms(known, planted.words), decoys)
    asked = {"method": method, "words": 6, "seed": draw, **options}
    result, seconds = _timed(loaded, planted.token, dictionary, **asked)
    concept = token_conditioning(loaded, TEMPLATE, planted.token)
    others = [result.apply(loaded.text), *([token_conditioning(loaded, TEMPLATE, planted.plain)] if perturbed else [])]
    scores = fidelity(loaded, concept, others, _FIDELITY_SEED)
    hits, correlation = recovered(planted, result.words, result.shares, dictionary)
    return {
        **_cost(result, seconds),
        "evals": loaded.meter.evals - before,
        "planted": [list(pair) for pair in zip(planted.words, planted.shares, strict=True)],
        "hits": hits,
        "weight_corr": correlation,
        "r2": scores[0],
        "perturbation_effect": 1 - scores[1] if perturbed else None,
    }


def measure_natural(
    model: str, world: str, method: str, set_: str, word: str, pictures: int, options: Mapping[str, Any] = MappingProxyType({})
) -> Result:
    """Decompose a composite word, and read what its words generate.

    model: "demo", or a checkpoint in its layout.
    world: the name of the model's world.
    method: of ``decompose_concept``; an option of that name goes before it.
    set_: "natural", or "natural_decoys" to choose among untrained words as well.
    word: a composite word of the world.
    pictures: images of its words' mixture that are read; 0 measures none.
    options: of ``decompose_concept``.
    """
    loaded, known = load(model), WORLDS[world]()
    before = loaded.meter.evals
    dictionary = _dictionary(model, known, {word} | _synonyms(known, [word]), DECOYS if set_ == "natural_decoys" else 0)
    asked = {"method": method, "words": 5, "seed": 0, **options}
    result, seconds = _timed(loaded, word, dictionary, **asked)
    mixture = result.apply(loaded.text)
    (r2,) = fidelity(loaded, loaded.text.encode([TEMPLATE.replace("{}", word)]), [mixture], _FIDELITY_SEED)
    right = known.right_words(word)
    judged = [found for found in result.words if found not in result.fillers][: judged_count(known, word)]
    return {
        **_cost(result, seconds),
        "fillers": list(result.fillers),
        "outcomes": outcomes(loaded, known, word, mixture, pictures, _WORDS_SEED) if pictures else None,
        "r2": r2,
        "hits": len(right.intersection(judged)),
        "judged": len(judged),
        "evals": loaded.meter.evals - before,
    }


def measure_concept(model: str, world: str, word: str, pictures: int) -> Result:
    """What the concept itself draws: the model's own shares."""
    loaded = load(model)
    before = loaded.meter.evals
    prompt = loaded.text.encode([TEMPLATE.replace("{}", word)])
    return {"outcomes": outcomes(loaded, WORLDS[world](), word, prompt, pictures, _CONCEPT_SEED), "evals": loaded.meter.evals - before}


def measure_oracle(model: str, world: str, word: str, pictures: int) -> Result:
    """What any mixture of the known words could reach: a long descent over all of them, started at the right ones, none dropped."""
    loaded, known = load(model), WORLDS[world]()
    before = loaded.meter.evals
    teacher = loaded.text.encode([TEMPLATE.replace("{}", word)])
    words = _dictionary(model, known, {word} | _synonyms(known, [word]), 0)
    mixture = Mixture.of(loaded, TEMPLATE, {w: loaded.text.vocabulary[w + WORD_END] for w in words})
    generator = torch.Generator().manual_seed(0)
    states = _states(loaded, teacher, range(_ORACLE_SEED + 5_000, _ORACLE_SEED + 5_008))
    related = torch.tensor([float(w in known.words[word].related) for w in words])

    def missed(alpha: Tensor, batch: States, rows: slice) -> Tensor:
        part = batch[rows]
        return part.distance(loaded.denoise(part.x, part.sigma, mixture.encode(alpha[None]))) / len(batch)

    descent = SimplexDescent(0.8 * related / related.sum() + 0.2 / len(words), ORACLE, rate=0.05)
    for _ in range(ORACLE):
        batch = states[torch.randint(len(states), (8,), generator=generator)]
        alpha = descent.alpha.requires_grad_()
        descent.step(vjp(partial(missed, alpha, batch), [alpha], len(batch))[1][0])
    with torch.no_grad():
        found = mixture.encode(descent.alpha[None])
    (r2,) = fidelity(loaded, teacher, [found], _FIDELITY_SEED)
    strongest = descent.alpha.topk(min(8, len(words)))
    return {
        "r2": r2,
        "outcomes": outcomes(loaded, known, word, found, pictures, _ORACLE_SEED) if pictures else None,
        "found": [[words[i], round(value, 4)] for i, value in zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)],
        "evals": loaded.meter.evals - before,
    }


def fidelity(model: Model, concept: Conditioning, others: Sequence[Conditioning], seed: int) -> list[float]:
    """Held-out R2 of each conditioning on the concept's own states from ``seed`` on, all on the same states."""
    states = _states(model, concept, range(seed, seed + FIDELITY_PICTURES))
    return [explained(distances(model, states, other), states) for other in others]


def _states(model: Model, concept: Conditioning, seeds: Sequence[int]) -> States:
    """What sampling a concept meets, as every image here is sampled."""
    cells, empty = SIDE // model.require_denoiser().downscale, model.text.encode([""])
    return harvest(model, concept, empty, seeds, height=cells, width=cells, steps=STEPS, guidance=GUIDANCE)


def outcomes(model: Model, world: World, word: str, prompt: Conditioning, count: int, seed: int) -> list[int]:
    """Which component of the word's make-up each of ``count`` pictures of ``prompt`` shows, by the exact detectors; -1 for none.

    model: the model that generates.
    world: its world, which knows the make-up.
    word: the composite word.
    prompt: what is sampled.
    count: images.
    seed: of the first; each further one adds one.
    """
    negative, seeds = model.text.encode([""]), range(seed, seed + count)
    return [detect.outcome(world.words[word], reading) for reading in readings(model, prompt, negative, seeds)]


def judged_count(world: World, word: str) -> int:
    """How many of the words found for ``word`` are judged."""
    return min(5, len(world.words[word].related))


def _cost(result: Decomposition, seconds: float) -> dict[str, Any]:
    found = [[word, share] for word, share in zip(result.words, result.shares, strict=True)]
    return {
        "found": found,
        "method_evals": result.evals,
        "calls": result.calls,
        "seconds": seconds,
        "r2_reported": result.r2 if result.fidelity else None,
    }


def _timed(model: Model, concept: Any, dictionary: Sequence[str], *, method: str, **options: Any) -> tuple[Decomposition, float]:
    start = time.perf_counter()
    result = decompose_concept(
        model,
        concept,
        method=method,
        template=TEMPLATE,
        candidates=dictionary,
        # What the text method finds costs nothing; its budgets pay for measuring it, which is done here for every method alike.
        budget="fast" if method == "text" else "default",
        height=SIDE,
        width=SIDE,
        **options,
    )
    return result, round(time.perf_counter() - start, 2)


def _dictionary(model: str, world: World, out: set[str], decoys: int) -> list[str]:
    """The world's words but for ``out``, then the decoys: words the model was never trained on."""
    known = set(world.tokens)
    others = [word for word in _safe_words(model) if word not in known]
    chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(1))[:decoys].tolist()
    return [*(word for word in world.words if word not in out), *(others[i] for i in chosen)]


@lru_cache(maxsize=1)
def _safe_words(model: str) -> tuple[str, ...]:
    """The whole words of a model's vocabulary without those left out by default; half a second, so once a process."""
    return tuple(word for word in whole_words(load(model).text) if not is_unsafe(word))


def _synonyms(world: World, words: Iterable[str]) -> set[str]:
    """The other names of ``words``."""
    given = set(words)
    meant = {world.words[word].synonym_of or word for word in given}
    return {word.text for word in world.words.values() if word.synonym_of in meant or word.text in meant} - given
