"""``conceptkit bench decompose``: are the words a method finds the right ones, and how much of the concept do they explain?

Sets: ``planted``, mixtures of two to six known words with a perturbation that no word explains; ``planted_exact``, without it, both found
among the world's words and 500 that the model was never trained on; ``natural``, the world's composite words, found among the words the
model knows; ``natural_decoys``, with the 500. The concept and its synonyms are never in the dictionary.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..demo.render import SIDE
from ..demo.world import World, second_world, shapes_world
from .frame import Bar, Job, Profile, Result

if TYPE_CHECKING:
    from torch import Tensor

    from ..decompose import Decomposition
    from ..decompose.states import States
    from ..model import Conditioning, Model

Set: TypeAlias = Literal["planted", "planted_exact", "natural", "natural_decoys", "natural_ablation"]

WORLDS: Mapping[str, Callable[[], World]] = {"shapes": shapes_world, "second": second_world}
METHODS = ("distilled", "text", "conceptor", "conceptor-tuned")
"""Measured unless others are named."""
DEFAULT, BASELINES = METHODS[0], METHODS[2:]
TEMPLATE = "a photo of a {}"
DECOYS = 500
STEPS = 12
"""Of DPM++ 2M, wherever the bench samples: 24 evals a picture with guidance."""
FIDELITY_PICTURES = 4
"""Pictures on whose states held-out R2 is measured: one set of seeds for every method, none of them a method's own."""
ORACLE = 160
"""Gradient steps of the oracle, on batches of 8 states."""
TUNED: Mapping[str, float] = {"guidance": 3.0, "rate": 1e-2, "kept": 6, "steps": 450, "refit": 50}
"""The baseline's settings that do best on this model: chosen on planted draws from 1000 on and natural words of the tuned half."""
PROTOCOL = 1
"""Raised whenever what a job measures changes, so that older results are not taken for it."""
ABLATIONS: Mapping[str, Mapping[str, float]] = {
    "without-shown": {"shown_count": 0},
    "without-embedding": {"embedding_count": 0},
    "without-predictions": {"predictions_count": 0},
    "without-fillers": {"fills": 0},
    "without-linearising-anew": {"again": 0},
    "without-refining": {"refined": 0},
    "half-the-rows": {"rows": 48},
    "half-the-words-looked-at": {"shown": 16},
    "quarter-of-the-words-searched": {"searched": 64},
}
"""The default method without one of its ingredients, or with less of it: settings."""
ABLATION_DRAWS = range(100, 106)
"""Planted draws of the ablation, none of them judged."""
ABLATION_DECOYS = (0, 100, DECOYS)
"""Sizes of their dictionaries beside the world's words, in turn."""
_SHARED = ("decompose.py", "fidelity.py", "decomposition.py", "mixture.py", "shown.py", "sparse.py", "states.py", "task.py", "text.py")
_DISTILLED = (*_SHARED, "distilled.py", "search.py", "surrogate.py")
SOURCES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("distilled", *ABLATIONS), _DISTILLED),
    "text": _SHARED,
    **dict.fromkeys(BASELINES, ("conceptor.py",)),
}
"""The files of core/decompose that a method's results depend on. A baseline, which takes hours, is measured again for its own file alone:
a change in what it shares with the others that changes its results must raise ``PROTOCOL``."""
AS: Mapping[str, Mapping[str, Any]] = {
    "conceptor": {"words": 50},
    "conceptor-tuned": {"method": "conceptor", "settings": TUNED},
    **{name: {"method": "distilled", "settings": settings} for name, settings in ABLATIONS.items()},
}
"""How a row's method is called, where not by its name alone: options of ``decompose_concept``. The published result keeps 50 words."""
PLANNED: Mapping[str, int] = {**dict.fromkeys(("distilled", *ABLATIONS), 1_700), "text": 0, "conceptor": 10_296, "conceptor-tuned": 9_240}
"""Evals a decomposition spends at most, the images of the baselines apart: they sample 320, at 2 evals a step."""
PUBLISHED = 41_000
"""Evals of the baseline as published: 120 pictures, 500 steps of 6, and 10 validations of 20 pictures, each picture in 50 guided steps."""
_CONCEPT_SEED, _WORDS_SEED, _ORACLE_SEED, _FIDELITY_SEED = 10_000, 20_000, 30_000, 40_000


@dataclass(frozen=True)
class Size:
    """How much a profile measures.

    planted, exact: draws; pictures: per natural word; text_pictures: of what ``text`` finds; second_pictures: per word of the second
    world; baseline_*: how many of these the expensive baseline gets, and the sampler steps of its pictures.
    """

    planted: int
    exact: int
    pictures: int
    text_pictures: int
    second_pictures: int
    baseline_planted: int
    baseline_exact: int
    baseline_natural: int
    baseline_steps: int
    limit: int | None


SIZES: Mapping[Profile, Size] = {
    "quick": Size(14, 6, 48, 0, 0, 4, 2, 2, 12, 150_000),
    "full": Size(60, 30, 256, 256, 256, 6, 3, 4, 50, None),
}


@dataclass(frozen=True)
class DecomposeSuite:
    """The suite for a model and, if there is one, a model of the second world; ``methods``: which to measure."""

    profile: Profile = "quick"
    model: str = "demo"
    second: str | None = None
    methods: tuple[str, ...] = METHODS

    name = "decompose"

    @property
    def size(self) -> Size:
        return SIZES[self.profile]

    @property
    def limit(self) -> int | None:
        return self.size.limit

    @cached_property
    def _jobs(self) -> tuple[Job, ...]:
        size, cheap = self.size, tuple(method for method in self.methods if method not in (*BASELINES, *ABLATIONS))
        tuned, held_out = halves(shapes_world())
        words = [*held_out, *tuned]
        baseline_words = [held_out[i * len(held_out) // size.baseline_natural] for i in range(size.baseline_natural)]
        dear = tuple(method for method in self.methods if method in BASELINES)
        jobs: list[Job] = []
        for method in cheap:
            jobs += [self._planted(method, "planted", draw) for draw in range(size.planted)]
            jobs += [self._planted(method, "planted_exact", draw) for draw in range(size.exact)]
            pictures = size.pictures if method == DEFAULT else size.text_pictures
            jobs += [self._natural(method, word, pictures) for word in words]
            jobs += [self._natural(method, word, 0, set_="natural_decoys") for word in held_out]
        jobs += [self._concept(word, size.pictures) for word in words]
        jobs += [self._planted(method, "planted", draw) for draw in range(min(2, size.baseline_planted)) for method in dear]
        jobs += [self._oracle(word, size.pictures) for word in words]
        if self.second is not None:
            others = [word for half in halves(second_world()) for word in half]
            jobs += [self._natural(method, word, size.second_pictures, "second") for method in cheap for word in others]
            if size.second_pictures:
                jobs += [self._concept(word, size.second_pictures, "second") for word in others]
            jobs += [self._oracle(word, size.second_pictures, "second") for word in others]
        jobs += [self._planted(method, "planted", draw) for draw in range(2, size.baseline_planted) for method in dear]
        jobs += [self._natural(method, word, size.pictures) for word in baseline_words for method in dear]
        jobs += [self._planted(method, "planted_exact", draw) for draw in range(size.baseline_exact) for method in dear]
        ablated = tuple(method for method in self.methods if method in ABLATIONS)
        for method in (*(DEFAULT for _ in ablated[:1]), *ablated):
            jobs += [self._planted(method, "planted", draw, ABLATION_DECOYS[draw % 3]) for draw in ABLATION_DRAWS]
            jobs += [self._natural(method, word, 0, set_="natural_ablation") for word in tuned]
            if self.second is not None:
                jobs += [self._natural(method, word, 0, "second", "natural_ablation") for word in halves(second_world())[0]]
        return tuple(jobs)

    def jobs(self) -> Sequence[Job]:
        """Everything the profile measures, the default method first."""
        return self._jobs

    def _job(self, part: str, measure: Callable[..., Result], evals: int, world: str, **arguments: Any) -> Job:
        model = self.model if world == "shapes" or self.second is None else self.second
        method = arguments.get("method", "")
        code = [_digest(Path(__file__).parents[1] / "decompose" / name) for name in SOURCES.get(method, ())]
        # The first draw of each method in a process of its own measures its memory; the baselines' runs are long enough for one each.
        isolated = method in BASELINES or (arguments.get("set_") == "planted" and arguments.get("draw") == 0)
        given = {"model": model, "world": world, **arguments}
        if method in AS:
            steps = {"sampler_steps": self.size.baseline_steps} if method in BASELINES else {}
            given["options"] = {"method": method, **AS[method], "settings": {**steps, **AS[method].get("settings", {})}}
        baseline = method in ("", *BASELINES)
        return Job(part, measure, given, evals, (str(PROTOCOL), weights_digest(model), *code), baseline=baseline, isolated=isolated)

    def _planned_evals(self, method: str) -> int:
        return PLANNED[method] + (640 * self.size.baseline_steps if method in BASELINES else 0)

    def _planted(self, method: str, set_: Set, draw: int, decoys: int = DECOYS) -> Job:
        evals = self._planned_evals(method) + (4 if set_ == "planted" else 3) * FIDELITY_PICTURES * STEPS
        ablation = {"decoys": decoys} if draw in ABLATION_DRAWS else {}
        return self._job(f"{method}, {set_}", measure_planted, evals, "shapes", method=method, set_=set_, draw=draw, **ablation)

    def _natural(self, method: str, word: str, pictures: int, world: str = "shapes", set_: Set = "natural") -> Job:
        evals = self._planned_evals(method) + 3 * FIDELITY_PICTURES * STEPS + 2 * STEPS * pictures
        part = f"{method}, {set_}" + (", second world" if world == "second" else "")
        return self._job(part, measure_natural, evals, world, method=method, set_=set_, word=word, pictures=pictures)

    def _concept(self, word: str, pictures: int, world: str = "shapes") -> Job:
        return self._job("the concepts' own pictures", measure_concept, 2 * STEPS * pictures, world, word=word, pictures=pictures)

    def _oracle(self, word: str, pictures: int, world: str = "shapes") -> Job:
        evals = 3 * 8 * ORACLE + 2 * STEPS * 8 + 3 * FIDELITY_PICTURES * STEPS + 2 * STEPS * pictures
        return self._job("oracle", measure_oracle, evals, world, word=word, pictures=pictures)

    def rows(self, done: Mapping[str, Result], cached: frozenset[str]) -> list[dict[str, Any]]:
        """One row per method and set, natural words in halves: those the defaults may be tuned on, and those held out."""
        return [row for method in self.methods for row in self._rows_of(method, done, cached)]

    def _rows_of(self, method: str, done: Mapping[str, Result], cached: frozenset[str]) -> Iterable[dict[str, Any]]:
        mine = [job for job in self._jobs if job.arguments.get("method") == method and job.key in done]
        peaks = [done[job.key].get("peak_mb") for job in mine]
        peak = max((value for value in peaks if value is not None), default=None)
        for set_ in ("planted", "planted_exact", "planted_ablation"):
            ablation = set_ == "planted_ablation"
            named = "planted" if ablation else set_
            jobs = [job for job in mine if job.arguments.get("set_") == named and ("decoys" in job.arguments) is ablation]
            if jobs:
                row = planted_row([{"draw": job.arguments["draw"], **done[job.key]} for job in jobs])
                yield _row(method, set_, "shapes", None, jobs, cached, {**row, "peak_mb": peak})
        for world in WORLDS:
            tuned, held_out = halves(WORLDS[world]())
            groups = {"held out": held_out, "tuned": tuned} if world == "shapes" else {"held out": (*held_out, *tuned)}
            for set_ in ("natural", "natural_decoys", "natural_ablation"):
                theirs = [job for job in mine if (job.arguments.get("set_"), job.arguments["world"]) == (set_, world)]
                for half, words in groups.items():
                    jobs = [job for job in theirs if job.arguments["word"] in words]
                    if jobs:
                        figures = natural_row([self._known(job, done) for job in jobs])
                        yield _row(method, set_, world, half, jobs, cached, {**figures, "peak_mb": peak})

    def _known(self, job: Job, done: Mapping[str, Result]) -> dict[str, Any]:
        """What was measured of one natural word: the method's result, beside the concept's own pictures and the oracle."""
        word, world = job.arguments["word"], job.arguments["world"]
        beside: dict[str, Any] = {"concept_outcomes": None, "oracle_r2": None, "oracle_outcomes": None, "oracle_related": None}
        for other in self._jobs:
            if other.key in done and other.arguments.get("word") == word and other.arguments["world"] == world:
                if other.measure is measure_concept:
                    beside["concept_outcomes"] = done[other.key]["outcomes"]
                elif other.measure is measure_oracle:
                    oracle, known = done[other.key], WORLDS[world]()
                    strongest = [name for name, _ in oracle["found"]][: _judged(known, word)]
                    right = len(known.right_words(word).intersection(strongest)) / len(strongest)
                    beside |= {"oracle_r2": oracle["r2"], "oracle_outcomes": oracle["outcomes"], "oracle_related": right}
        if job.arguments["set_"] != "natural":  # what the known words alone can reach says nothing of what these can
            beside |= {"concept_outcomes": None, "oracle_r2": None, "oracle_outcomes": None}
        known = WORLDS[world]()
        made = {"double": known.words[word].role == "double", "made_of": _judged(known, word)}
        return {"word": word, **done[job.key], **beside, **made}

    def bars(self, rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
        """What the default method must reach, on what was measured."""
        return [*_planted_bars(rows), *_natural_bars(rows, "shapes"), *_natural_bars(rows, "second"), *_baseline_bars(rows), _memory(rows)]


def halves(world: World) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The composite words in two halves, every other one: those defaults may be chosen on, and those that are held out for reporting."""
    words = tuple(word.text for word in world.composites)
    return words[::2], words[1::2]


def measure_planted(
    model: str,
    world: str,
    method: str,
    set_: str,
    draw: int,
    options: Mapping[str, Any] = MappingProxyType({}),
    decoys: int = DECOYS,
) -> Result:
    """Plant a mixture, take it apart, and compare. Two to six words in turn by ``draw``; options: of ``decompose_concept``; decoys: words
    of the dictionary that the model was never trained on."""
    from .planted import hidden_directions, plant, recovered, token_conditioning

    loaded, known = _model(model), WORLDS[world]()
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
    """Take a composite word apart, and look at what its words draw; options: of ``decompose_concept``."""
    loaded, known = _model(model), WORLDS[world]()
    before = loaded.meter.evals
    dictionary = _dictionary(model, known, {word} | _synonyms(known, [word]), DECOYS if set_ == "natural_decoys" else 0)
    asked = {"method": method, "words": 5, "seed": 0, **options}
    result, seconds = _timed(loaded, word, dictionary, **asked)
    mixture = result.apply(loaded.text)
    (r2,) = fidelity(loaded, loaded.text.encode([TEMPLATE.replace("{}", word)]), [mixture], _FIDELITY_SEED)
    right = known.right_words(word)
    judged = [found for found in result.words if found not in result.fillers][: _judged(known, word)]
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
    loaded = _model(model)
    before = loaded.meter.evals
    prompt = loaded.text.encode([TEMPLATE.replace("{}", word)])
    return {"outcomes": outcomes(loaded, WORLDS[world](), word, prompt, pictures, _CONCEPT_SEED), "evals": loaded.meter.evals - before}


def measure_oracle(model: str, world: str, word: str, pictures: int) -> Result:
    """What any mixture of the known words could reach: a long descent over all of them, started at the right ones, none dropped."""
    import torch

    from ..decompose.mixture import Mixture, SimplexDescent
    from ..decompose.states import harvest
    from ..gradient import vjp
    from ..vocabulary import WORD_END

    loaded, known = _model(model), WORLDS[world]()
    before = loaded.meter.evals
    teacher, empty = loaded.text.encode([TEMPLATE.replace("{}", word)]), loaded.text.encode([""])
    words = _dictionary(model, known, {word} | _synonyms(known, [word]), 0)
    mixture = Mixture.of(loaded, TEMPLATE, {w: loaded.text.vocabulary[w + WORD_END] for w in words})
    cells, generator = SIDE // loaded.require_denoiser().downscale, torch.Generator().manual_seed(0)
    seeds = range(_ORACLE_SEED + 5_000, _ORACLE_SEED + 5_008)
    states = harvest(loaded, teacher, empty, seeds, height=cells, width=cells, steps=STEPS, guidance=_guidance())
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
    from ..decompose.fidelity import explained
    from ..decompose.states import distances, harvest

    cells = SIDE // model.require_denoiser().downscale
    seeds = range(seed, seed + FIDELITY_PICTURES)
    empty = model.text.encode([""])
    states = harvest(model, concept, empty, seeds, height=cells, width=cells, steps=STEPS, guidance=_guidance())
    return [explained(distances(model, states, other), states) for other in others]


def outcomes(model: Model, world: World, word: str, prompt: Conditioning, count: int, seed: int, batch: int = 16) -> list[int]:
    """Which component of the word's make-up each of ``count`` pictures of ``prompt`` shows, by the exact detectors; -1 for none."""
    from ..demo import detect
    from ..sampling import draw

    negative, seeds = model.text.encode([""]), range(seed, seed + count)
    pictures = draw(model, prompt, negative, seeds, height=SIDE, width=SIDE, steps=STEPS, guidance=_guidance(), batch=batch)
    return [detect.outcome(world.words[word], detect.read(picture)) for picture in pictures.movedim(1, -1).numpy()]


def planted_row(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a planted set from what each draw measured."""
    planted = sum(len(draw["planted"]) for draw in draws)
    hits = sum(draw["hits"] for draw in draws)
    effects = [draw["perturbation_effect"] for draw in draws if draw["perturbation_effect"] is not None]
    return {
        "n": planted,
        **_share("recall_at_k", hits, planted),
        **_mean("weight_corr", [draw["weight_corr"] for draw in draws]),
        **_mean("r2_heldout", [draw["r2"] for draw in draws]),
        **_mean("perturbation_effect", effects),
        **_costs(draws),
        "each": [
            {
                "draw": draw["draw"],
                "planted": draw["planted"],
                "found": draw["found"],
                "recall": draw["hits"] / len(draw["planted"]),
                **{key: draw[key] for key in ("weight_corr", "r2", "perturbation_effect")},
                "evals": draw["method_evals"],
            }
            for draw in draws
        ],
    }


def natural_row(words: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of natural words from what was measured of each."""
    from ..score import split_half_floor, total_variation

    each = []
    for word in words:
        own, drawn, oracle = word["concept_outcomes"], word["outcomes"], word["oracle_outcomes"]
        each.append(
            {
                "word": word["word"],
                "double": word["double"],
                "found": word["found"],
                "fillers": word.get("fillers", []),
                "related": word["hits"] / word["judged"],
                "coverage": word["hits"] / word["made_of"],
                "oracle_related": word["oracle_related"],
                "r2": word["r2"],
                "oracle_r2": word["oracle_r2"],
                "tv": total_variation(drawn, own) if drawn and own else None,
                "tv_floor": split_half_floor(own) if own else None,
                "oracle_tv": total_variation(oracle, own) if oracle and own else None,
                "pictures": len(drawn) if drawn else 0,
                "evals": word["method_evals"],
            }
        )
    single, doubles = ([word for word in words if word["double"] is double] for double in (False, True))
    n = sum(word["judged"] for word in single)
    of_doubles = sum(word["judged"] for word in doubles)
    return {
        "n": n,
        **(_share("related", sum(word["hits"] for word in single), n) if n else {}),
        **(_share("related_doubles", sum(word["hits"] for word in doubles), of_doubles) if of_doubles else {}),
        **(_share("coverage", sum(word["hits"] for word in single), sum(word["made_of"] for word in single)) if n else {}),
        **_mean("r2_heldout", [word["r2"] for word in each]),
        **{k: v for key in ("tv", "tv_floor", "oracle_r2", "oracle_tv") for k, v in _mean(key, [w[key] for w in each]).items()},
        **_costs(words),
        "each": each,
    }


COLUMNS = (
    *("method", "set", "world", "half", "n", "draws", "cached", "recall_at_k", "weight_corr", "r2_heldout"),
    *("related", "coverage", "related_doubles", "tv", "tv_floor"),
    *("oracle_r2", "oracle_tv", "perturbation_effect", "evals", "evals_max", "seconds", "peak_mb"),
)
"""Of every row, null where meaningless; then ``intervals`` (95 %) and ``each``, what was measured one by one."""


def _row(
    method: str, set_: str, world: str, half: str | None, jobs: Sequence[Job], cached: frozenset[str], figures: Mapping[str, Any]
) -> dict[str, Any]:
    given = {"method": method, "set": set_, "world": world, "half": half, "draws": len(jobs), "cached": len(cached & {j.key for j in jobs})}
    values: dict[str, Any] = {**given, **{key: value for key, value in figures.items() if not key.endswith("_interval")}}
    intervals = {key.removesuffix("_interval"): value for key, value in figures.items() if key.endswith("_interval")}
    return {**{key: values.get(key) for key in COLUMNS}, "intervals": intervals, "each": figures["each"]}


def _share(name: str, hits: int, of: int) -> dict[str, Any]:
    from ..score import wilson

    return {name: hits / of, f"{name}_interval": list(wilson(hits, of))}


def _mean(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    from ..score import mean_interval

    given = [value for value in values if value is not None]
    interval = mean_interval(given)
    return {name: statistics.fmean(given) if given else None, f"{name}_interval": list(interval) if interval else None}


def _costs(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    evals = [draw["method_evals"] for draw in draws]
    return {**_mean("evals", evals), "evals_max": max(evals), **_mean("seconds", [draw["seconds"] for draw in draws])}


def _judged(world: World, word: str) -> int:
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
    from ..decompose import decompose_concept

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
    import torch

    known = set(world.tokens)
    others = [word for word in _safe_words(model) if word not in known]
    chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(1))[:decoys].tolist()
    return [*(word for word in world.words if word not in out), *(others[i] for i in chosen)]


@lru_cache(maxsize=1)
def _safe_words(model: str) -> tuple[str, ...]:
    """The whole words of a model's vocabulary without those left out by default; half a second, so once a process."""
    from ..vocabulary import is_unsafe, whole_words

    return tuple(word for word in whole_words(_model(model).text) if not is_unsafe(word))


def _synonyms(world: World, words: Iterable[str]) -> set[str]:
    """The other names of ``words``."""
    given = set(words)
    meant = {world.words[word].synonym_of or word for word in given}
    return {word.text for word in world.words.values() if word.synonym_of in meant or word.text in meant} - given


def _planted_bars(rows: Sequence[Mapping[str, Any]]) -> Iterable[Bar]:
    row = next((row for row in rows if (row["method"], row["set"]) == (DEFAULT, "planted")), None)
    if row is None:
        return
    for key, name in (("recall_at_k", "recall"), ("weight_corr", "weight correlation")):
        yield Bar(f"planted, {name} at least 0.90", _figure(row, key), row[key] >= 0.9)
    yield Bar(
        "planted, every draw within 1,500 evals", f"{row['evals']:,.0f} on average, at most {row['evals_max']:,}", row["evals_max"] <= 1500
    )


def _natural_bars(rows: Sequence[Mapping[str, Any]], world: str) -> Iterable[Bar]:
    for row in rows:
        if (row["method"], row["world"]) != (DEFAULT, world) or not row["set"].startswith("natural"):
            continue
        label = f"{row['set']}, " + (f"{row['half']} words" if world == "shapes" else "second world")
        if row["set"] == "natural_ablation":
            continue
        doubles = "" if row["related_doubles"] is None else f"; words for two things at once: {row['related_doubles']:.2f}"
        if row["related"] is not None:
            figure = _figure(row, "related") + doubles
            yield Bar(f"{label}: related at least 0.9 over all words for one thing", figure, row["related"] >= 0.9)
        if row["set"] == "natural_decoys":
            continue
        judged = [w for w in row["each"] if w["oracle_r2"] is not None and w["oracle_r2"] >= 0.9]
        value = statistics.fmean([w["r2"] for w in judged]) if judged else None
        yield Bar(
            f"{label}: held-out R2 at least 0.9 where the oracle's is",
            _over(value, None, judged, row["each"]),
            None if value is None else value >= 0.9,
        )
        judged = [w for w in row["each"] if w["tv"] is not None and w["oracle_tv"] is not None and w["oracle_tv"] <= w["tv_floor"] + 0.1]
        value, floor = (statistics.fmean([w[key] for w in judged]) if judged else None for key in ("tv", "tv_floor"))
        yield Bar(
            f"{label}: tv at most floor + 0.1 where the oracle has it",
            _over(value, floor, judged, row["each"]),
            None if value is None or floor is None else value <= floor + 0.1,
        )


def _baseline_bars(rows: Sequence[Mapping[str, Any]]) -> Iterable[Bar]:
    """Against the published baseline, and against the stronger of its rows in each figure."""
    found = {row["method"]: {draw["draw"]: draw for draw in row["each"]} for row in rows if row["set"] == "planted"}
    ours = found.get(DEFAULT, {})
    theirs = {method: sorted(found[method].keys() & ours.keys()) for method in BASELINES if method in found}
    theirs = {method: draws for method, draws in theirs.items() if draws}
    if not theirs:
        return

    def mean(method: str, draws: Sequence[int], key: str) -> float:
        return statistics.fmean([found[method][draw][key] for draw in draws])

    for key, name in (("recall", "recall"), ("r2", "held-out R2")):
        strongest = max(theirs, key=lambda method: mean(method, theirs[method], key))
        mine, other = (mean(method, theirs[strongest], key) for method in (DEFAULT, strongest))
        yield Bar(
            f"planted, better {name} than {BASELINES[0]}, published or tuned",
            f"{mine:.2f} against {other:.2f} ({strongest}) on the same {len(theirs[strongest])} draws",
            mine > other,
        )
    draws = next(iter(theirs.values()))
    mine = mean(DEFAULT, draws, "evals")
    spent = ", ".join(f"{method} {mean(method, theirs[method], 'evals'):,.0f}" for method in theirs)
    yield Bar(
        f"at most 1/20 of the evals {BASELINES[0]} was published with",
        f"1/{PUBLISHED / mine:.1f} ({mine:,.0f} against {PUBLISHED:,}; spent here: {spent})",
        mine * 20 <= PUBLISHED,
    )


def _memory(rows: Sequence[Mapping[str, Any]]) -> Bar:
    peak = next((row["peak_mb"] for row in rows if row["method"] == DEFAULT and row["peak_mb"] is not None), None)
    return Bar("peak memory at most 1 GiB", "not measured" if peak is None else f"{peak:,.0f} MiB", None if peak is None else peak <= 1024)


def _figure(row: Mapping[str, Any], key: str) -> str:
    low, high = row["intervals"][key] or (float("nan"), float("nan"))
    return f"{row[key]:.3f} ({low:.3f} to {high:.3f}, n = {row['n'] if key != 'weight_corr' else row['draws']})"


def _over(value: float | None, floor: float | None, judged: Sequence[Mapping[str, Any]], each: Sequence[Mapping[str, Any]]) -> str:
    names = {word["word"] for word in judged}
    rest = [word["word"] for word in each if word["word"] not in names]
    figure = "no word" if value is None else f"{value:.3f}" + (f", floor {floor:.3f}" if floor is not None else "")
    return f"{figure} over {len(judged)} of {len(each)} words" + (f"; not judged: {', '.join(rest)}" if rest else "")


def weights_digest(model: str) -> str:
    """A digest of the weights in a demo model's file, and of those it stands beside."""
    from ..hosts.diffusers import DEMO, DEMOS

    names = [DEMOS["demo"], DEMOS[model]] if model in DEMOS else []
    files = [DEMO / name for name in dict.fromkeys(names)] or [Path(model)]
    return hashlib.sha256("".join(_digest(file) for file in files).encode()).hexdigest()[:16]


@lru_cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "missing"


@lru_cache(maxsize=1)
def _model(source: str) -> Model:
    import torch

    from ..hosts.diffusers import load_model

    if os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(1)
    return load_model(source)


def _guidance() -> float:
    from ..demo.evaluate import GUIDANCE

    return GUIDANCE
