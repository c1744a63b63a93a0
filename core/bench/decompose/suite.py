"""The suite ``decompose``: what is measured in either profile, and how the measurements make rows.

Sets: ``planted``, mixtures of two to six known words with a perturbation that no word explains; ``planted_exact``, without it, both found
among the world's words and 500 that the model was never trained on; ``natural``, the world's composite words, found among the words the
model knows; ``natural_decoys``, with the 500. The concept and its synonyms are never in the dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from ...demo.world import second_world, shapes_world
from .. import Profile
from ..frame import Bar, Job, Result
from ..worlds import STEPS, WORLDS, halves, sampling_evals, source_digests, weights_digest
from .figures import bars, method_row, natural_row, planted_row
from .measures import DECOYS, FIDELITY_PICTURES, ORACLE, judged_count, measure_concept, measure_natural, measure_oracle, measure_planted
from .methods import ABLATIONS, AS, BASELINES, DEFAULT, METHODS, PLANNED, SOURCES

Set: TypeAlias = Literal["planted", "planted_exact", "natural", "natural_decoys", "natural_ablation"]
PROTOCOL = 1
"""Raised whenever what a job measures changes, so that older results are not taken for it."""
ABLATION_DRAWS = range(100, 106)
"""Planted draws of the ablation, none of them judged."""
ABLATION_DECOYS = (0, 100, DECOYS)
"""Sizes of their dictionaries beside the world's words, in turn."""
STORED_AS: Mapping[Callable[..., Result], str] = {
    measure_planted: "decompose.measure_planted",
    measure_natural: "decompose.measure_natural",
    measure_concept: "decompose.measure_concept",
    measure_oracle: "decompose.measure_oracle",
}
"""What the results of each are stored as."""


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
        code = source_digests("decompose", SOURCES.get(method, ()))
        # The first draw of each method in a process of its own measures its memory; the baselines' runs are long enough for one each.
        isolated = method in BASELINES or (arguments.get("set_") == "planted" and arguments.get("draw") == 0)
        given = {"model": model, "world": world, **arguments}
        if method in AS:
            steps = {"sampler_steps": self.size.baseline_steps} if method in BASELINES else {}
            given["options"] = {"method": method, **AS[method], "settings": {**steps, **AS[method].get("settings", {})}}
        baseline = method in ("", *BASELINES)
        return Job(
            part,
            STORED_AS[measure],
            measure,
            given,
            evals,
            (str(PROTOCOL), weights_digest(model), *code),
            baseline=baseline,
            isolated=isolated,
        )

    def _planned_evals(self, method: str) -> int:
        return PLANNED[method] + (640 * self.size.baseline_steps if method in BASELINES else 0)

    def _planted(self, method: str, set_: Set, draw: int, decoys: int = DECOYS) -> Job:
        evals = self._planned_evals(method) + (4 if set_ == "planted" else 3) * FIDELITY_PICTURES * STEPS
        ablation = {"decoys": decoys} if draw in ABLATION_DRAWS else {}
        return self._job(f"{method}, {set_}", measure_planted, evals, "shapes", method=method, set_=set_, draw=draw, **ablation)

    def _natural(self, method: str, word: str, pictures: int, world: str = "shapes", set_: Set = "natural") -> Job:
        evals = self._planned_evals(method) + 3 * FIDELITY_PICTURES * STEPS + sampling_evals(pictures)
        part = f"{method}, {set_}" + (", second world" if world == "second" else "")
        return self._job(part, measure_natural, evals, world, method=method, set_=set_, word=word, pictures=pictures)

    def _concept(self, word: str, pictures: int, world: str = "shapes") -> Job:
        return self._job("the concepts' own pictures", measure_concept, sampling_evals(pictures), world, word=word, pictures=pictures)

    def _oracle(self, word: str, pictures: int, world: str = "shapes") -> Job:
        evals = 3 * 8 * ORACLE + sampling_evals(8) + 3 * FIDELITY_PICTURES * STEPS + sampling_evals(pictures)
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
                yield method_row(method, set_, "shapes", None, jobs, cached, {**row, "peak_mb": peak})
        for world in WORLDS:
            tuned, held_out = halves(WORLDS[world]())
            groups = {"held out": held_out, "tuned": tuned} if world == "shapes" else {"held out": (*held_out, *tuned)}
            for set_ in ("natural", "natural_decoys", "natural_ablation"):
                theirs = [job for job in mine if (job.arguments.get("set_"), job.arguments["world"]) == (set_, world)]
                for half, words in groups.items():
                    jobs = [job for job in theirs if job.arguments["word"] in words]
                    if jobs:
                        figures = natural_row([self._known(job, done) for job in jobs])
                        yield method_row(method, set_, world, half, jobs, cached, {**figures, "peak_mb": peak})

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
                    strongest = [name for name, _ in oracle["found"]][: judged_count(known, word)]
                    right = len(known.right_words(word).intersection(strongest)) / len(strongest)
                    beside |= {"oracle_r2": oracle["r2"], "oracle_outcomes": oracle["outcomes"], "oracle_related": right}
        if job.arguments["set_"] != "natural":  # what the known words alone can reach says nothing of what these can
            beside |= {"concept_outcomes": None, "oracle_r2": None, "oracle_outcomes": None}
        known = WORLDS[world]()
        made = {"double": known.words[word].role == "double", "made_of": judged_count(known, word)}
        return {"word": word, **done[job.key], **beside, **made}

    def bars(self, rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
        return bars(rows)
