"""``conceptkit bench edit``: is a concept gone, is everything else still there, can it be brought back, and how long does it take?

Sets: ``erase``, concepts of the demo model by every method; ``speed``, random weights of real sizes against the published loops;
``joint``, several concepts in one call; ``kinds``, what is read in the place of every word of both worlds; ``ablation``, the default
method without each of its ingredients; ``certificate``, whether the figure that needs no picture ranks edits as the pictures do.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo.world import second_world, shapes_world
from .decompose import _digest, weights_digest
from .edit_speed import COLUMNS, measure_speed, measure_verb
from .erasure import (
    ABLATIONS,
    STEPS,
    Case,
    Counts,
    cases,
    measure_ablation,
    measure_before,
    measure_edit,
    measure_joint,
    measure_kinds,
    measure_scenes,
    of_kinds,
    planned,
    planned_joint,
)
from .frame import Bar, Job, Profile, Result

if TYPE_CHECKING:
    from ..edit import Concept

DEFAULT = "conceptkit"
QUICK_METHODS = (DEFAULT, "uce-2025", "rece-objects", "dp", "trce", "rece")
"""In order of importance. rece-objects is RECE as its README has it for objects and styles; rece is its recipe for nudity, a second row."""
CONCEPTS = ("circle -> square", "red -> green", "robin", "gothic")
MORE_CONCEPTS = ("star", "blue -> yellow", "apple -> car", "castle", "bird -> flower", "joy", "festive")
DRAWN = ("concept", "synonym", "attributed", "pair", "instead", "part", "neighbour", "unrelated")
SETS = (*DRAWN, "derived", "learned")
BEFORE = (*DRAWN, "chance", "replacement", "learned")
SURVIVE = ("instead", "part", "neighbour", "unrelated")
"""Sets of words that must be drawn as before."""
ABLATED = ("concept", "synonym", "attributed", "pair", "instead", "part", "neighbour", "derived")
"""What is drawn with each ablation, of the concepts of ``quick``."""
JOINT = (
    ("circle", "square"),
    ("circle", "square", "robin", "raven", "doctor"),
    ("circle", "square", "robin", "raven", "doctor", "driver", "red", "daisy", "car", "truck"),
)
"""Concepts of one call, pairs among them that are each other's nearest words."""
JOINT_METHODS = (DEFAULT, "uce-2025")
CERTIFIED = MORE_CONCEPTS[:4]
"""Of which ``quick`` draws the derived attack alone, for the certificate."""
STRENGTHS = (0.25, 0.5, 0.75)
"""Of the default method, further edits for the certificate."""
THREADS = 2
"""Of the speed measurements, ours and the published loops' alike."""
PROTOCOL = 2
"""Raised whenever what a job measures changes, so that older results are not taken for it."""
KINDS: Mapping[Callable[..., Result], str] = {
    measure_before: "erasure.measure_before",
    measure_edit: "erasure.measure_edit",
    measure_ablation: "erasure.measure_ablation",
    measure_joint: "erasure.measure_joint",
    measure_kinds: "erasure.measure_kinds",
    measure_scenes: "erasure.measure_scenes",
    measure_speed: "edit_speed.measure_speed",
    measure_verb: "edit_speed.measure_verb",
}
"""What the results of each are stored as."""
CERTIFICATE = "erase, for the certificate"
_CODE = ("context_edit.py", "erase.py", "job.py", "joint.py", "layers.py", "presets.py", "report.py", "solve.py", "texts.py", "words.py")


@dataclass(frozen=True)
class Size:
    """How much a profile measures. counts, joint, ablation: pictures, those of several concepts in one call and of the ablation.
    official_layers: layers of each height that the published loops are timed on. kinds: pictures of each word that something else is
    drawn for."""

    concepts: tuple[str, ...]
    counts: Counts
    joint: Counts
    ablation: Counts
    official_layers: int
    kinds: int
    limit: int | None


SIZES: Mapping[Profile, Size] = {
    "quick": Size(CONCEPTS, Counts(64, 12, 4, 16, 40), Counts(64, 12, 12, 0, 0), Counts(20, 6, 0, 8, 0), 2, 4, 150_000),
    "full": Size(
        (*CONCEPTS, *MORE_CONCEPTS), Counts(128, 48, 8, 64, 120), Counts(128, 24, 24, 0, 0), Counts(64, 24, 0, 32, 0), 1000, 8, None
    ),
}


@dataclass(frozen=True)
class EditSuite:
    """The suite for a model of the first world; ``methods``: which to measure, those of the profile unless given."""

    profile: Profile = "quick"
    model: str = "demo"
    methods: tuple[str, ...] = ()

    name = "edit"

    @property
    def size(self) -> Size:
        return SIZES[self.profile]

    @property
    def limit(self) -> int | None:
        return self.size.limit

    @cached_property
    def measured(self) -> tuple[str, ...]:
        """The methods that erase, the default first."""
        from ..edit import METHODS

        every = tuple(name for name, preset in METHODS.items() if not preset.balances)
        return self.methods or (QUICK_METHODS if self.profile == "quick" else every)

    @cached_property
    def _jobs(self) -> tuple[Job, ...]:
        jobs = [self._speed(size) for size in ("sd15", "sdxl")] + [self._verb()]
        jobs += [self._erase(DEFAULT, concept) for concept in self.size.concepts if DEFAULT in self.measured]
        jobs += [self._before(concept) for concept in self.size.concepts]
        worlds = ("shapes", "second") if DEFAULT in self.measured else ()
        jobs += [self._kinds(world, measure) for measure in (measure_kinds, measure_scenes) for world in worlds]
        jobs += [self._joint(method, call) for method in (DEFAULT, None, *JOINT_METHODS[1:]) if self._asked(method) for call in JOINT]
        jobs += [self._erase(method, concept) for method in self.measured if method != DEFAULT for concept in self.size.concepts]
        if self.profile == "quick":
            jobs += [self._certified(method, concept) for method in self.measured for concept in CERTIFIED]
        jobs += [self._ablation(name, concept) for name in self._ablations for concept in (*CONCEPTS, *MORE_CONCEPTS)]
        if self.profile == "full":
            jobs += [self._erase(DEFAULT, concept, strength) for strength in STRENGTHS for concept in self.size.concepts]
            jobs += [self._erase(DEFAULT, concept, hard=True) for concept in self.size.concepts]
        return tuple(jobs)

    @property
    def _ablations(self) -> tuple[str, ...]:
        return tuple(ABLATIONS) if DEFAULT in self.measured else ()

    def jobs(self) -> Sequence[Job]:
        """Everything the profile measures, in order of importance."""
        return self._jobs

    def _erase(self, method: str, concept: str, strength: float = 1.0, *, hard: bool = False) -> Job:
        asked = {"method": method, "concept": concept, "strength": strength, "hard": hard}
        default, further = method == DEFAULT, hard or strength != 1
        # Learning costs most, and is what the default is judged by; of edits for the certificate alone only the attacks are drawn.
        sets = ("derived", "learned") if further else SETS if default or self.profile == "full" else SETS[:-1]
        part = CERTIFICATE if further else f"erase, {method}"
        return self._edited(part, measure_edit, asked, self.size.counts, sets, baseline=not default)

    def _certified(self, method: str, concept: str) -> Job:
        asked = {"method": method, "concept": concept, "strength": 1.0, "hard": False}
        return self._edited(CERTIFICATE, measure_edit, asked, self.size.counts, ("derived",), baseline=True)

    def _ablation(self, name: str, concept: str) -> Job:
        # Further concepts are measured without a picture.
        sets = ABLATED if concept in CONCEPTS else ()
        return self._edited("ablation", measure_ablation, {"method": name, "concept": concept}, self.size.ablation, sets, baseline=True)

    def _edited(
        self,
        part: str,
        measure: Callable[..., Result],
        asked: dict[str, Any],
        counts: Counts,
        sets: Sequence[str],
        *,
        baseline: bool = False,
    ) -> Job:
        evals = planned(shapes_world(), _concept(asked["concept"]), counts, sets)
        asked |= {"counts": asdict(counts), "sets": list(sets)}
        key = (str(PROTOCOL), weights_digest(self.model), *self._digests)
        return Job(part, KINDS[measure], measure, self._on_demo(asked), evals, key, baseline=baseline)

    def _asked(self, method: str | None) -> bool:
        return method is None or (method in self.measured and (method == DEFAULT or self.profile == "full"))

    def _joint(self, method: str | None, call: Sequence[str]) -> Job:
        evals = planned_joint(shapes_world(), call, self.size.joint)
        asked = self._on_demo({"method": method, "concepts": list(call), "counts": asdict(self.size.joint)})
        part = "joint, before" if method is None else f"joint, {method}"
        code = () if method is None else self._digests
        return Job(
            part,
            KINDS[measure_joint],
            measure_joint,
            asked,
            evals,
            (str(PROTOCOL), weights_digest(self.model), *code),
            baseline=method != DEFAULT,
        )

    def _kinds(self, world: str, measure: Callable[..., Result]) -> Job:
        known, model = (shapes_world(), self.model) if world == "shapes" else (second_world(), "demo-second")
        asked = {"model": model, "world": world, "pictures": self.size.kinds}
        evals = 2 * STEPS * self.size.kinds * len(of_kinds(known))
        before = measure is measure_scenes
        key = (str(PROTOCOL), weights_digest(model), *(() if before else self._digests))
        return Job("kinds, before" if before else "kinds", KINDS[measure], measure, asked, evals, key, baseline=before)

    @property
    def _digests(self) -> tuple[str, ...]:
        return tuple(_digest(Path(__file__).parents[1] / "edit" / name) for name in _CODE)

    def _before(self, concept: str) -> Job:
        evals = planned(shapes_world(), _concept(concept), self.size.counts, BEFORE)
        asked = self._on_demo({"concept": concept, "counts": asdict(self.size.counts)})
        return Job(
            "before the edit",
            KINDS[measure_before],
            measure_before,
            asked,
            evals,
            (str(PROTOCOL), weights_digest(self.model)),
            baseline=True,
        )

    def _speed(self, size: str) -> Job:
        # The key is new each time: seconds of another day or machine say nothing.
        asked = {"size": size, "threads": THREADS, "methods": size == "sd15" or self.profile == "full", "layers": self.size.official_layers}
        return Job("speed", KINDS[measure_speed], measure_speed, asked, 0, (str(PROTOCOL), os.urandom(8).hex()), exclusive=True)

    def _verb(self) -> Job:
        asked = {"model": self.model, "threads": THREADS}
        return Job("speed", KINDS[measure_verb], measure_verb, asked, 0, (str(PROTOCOL), os.urandom(8).hex()), exclusive=True)

    def _on_demo(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "world": "shapes", **arguments}

    def rows(self, done: Mapping[str, Result], cached: frozenset[str]) -> list[dict[str, Any]]:
        """A row a method (``erase``), a size (``speed``) and an ingredient (``ablation``), and one for the certificate."""
        before = {job.arguments["concept"]: _seen(job, done) for job in self._jobs if job.measure is measure_before and job.key in done}
        edits = [job for job in self._jobs if job.measure is measure_edit and job.key in done]
        rows = []
        for method in self.measured:
            mine = [job for job in edits if job.part == f"erase, {method}"]
            if mine:
                rows.append(_erase_row("erase", method, mine, done, before, cached))
        rows += _joint_rows([job for job in self._jobs if job.measure is measure_joint], done)
        scenes = {job.arguments["world"]: done[job.key]["scene"] for job in self._jobs if job.measure is measure_scenes and job.key in done}
        rows += [_kinds_row(job, done[job.key]["words"], scenes) for job in self._jobs if job.measure is measure_kinds and job.key in done]
        for name in self._ablations:
            mine = [job for job in self._jobs if job.measure is measure_ablation and job.arguments["method"] == name and job.key in done]
            if mine:
                rows.append(_ablation_row(name, mine, done, before, cached))
        return [*rows, *self._speed_rows(done), *_certificate_row([done[job.key] for job in edits])]

    def _speed_rows(self, done: Mapping[str, Result]) -> list[dict[str, Any]]:
        """A row a size of ``LAYERS``, and one of the whole verb on the model itself."""
        rows: list[dict[str, Any]] = []
        for job in self._jobs:
            figures = {key: value for key, value in done.get(job.key, {}).items() if key != "evals"}
            if figures and job.measure is measure_speed:
                rows.append({"set": "speed", "size": job.arguments["size"], "columns": COLUMNS, **figures})
            if figures and job.measure is measure_verb:
                rows.append({"set": "speed", "size": self.model, **{f"verb_{key}": value for key, value in figures.items()}})
        return rows

    def bars(self, rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
        """What the default method must reach, on what was measured."""
        erased = next((row for row in rows if (row["set"], row.get("method")) == ("erase", DEFAULT)), None)
        speeds = {row["size"]: row for row in rows if row["set"] == "speed"}
        bars = [] if erased is None else list(_erase_bars(erased))
        bars += [bar for row in rows if (row["set"], row.get("method")) == ("joint", DEFAULT) for bar in _joint_bars(row)]
        bars += [
            Bar(f"{row['world']}: shapes, things and people are read as one, at least 0.75", f"{row['plain']:.3f}", row["plain"] >= 0.75)
            for row in rows
            if row["set"] == "kinds"
        ]
        bars += [bar for size, row in speeds.items() for bar in _speed_bars(size, row)]
        certificate = next((row for row in rows if row["set"] == "certificate"), None)
        if certificate is not None:
            bars.append(
                Bar(
                    "regenerability ranks at least 20 edits as the pictures do (rank correlation above 0)",
                    f"{certificate['rank_corr']:.2f} over {certificate['edits']} edits",
                    certificate["rank_corr"] > 0 if certificate["edits"] >= 20 else None,
                )
            )
        return bars


def _concept(line: str) -> Concept:
    from ..edit import parse_concepts

    return parse_concepts(line)[0]


@dataclass(frozen=True)
class _Seen:
    """What pictures showed: hits by set, and for words that should survive those of each picture."""

    hits: Mapping[str, Sequence[int]]
    survive: Mapping[str, Mapping[Case, int]]


def _seen(job: Job, done: Mapping[str, Result]) -> _Seen:
    hits = done[job.key]["hits"]
    listed = cases(shapes_world(), _concept(job.arguments["concept"]), Counts(**job.arguments["counts"]))
    return _Seen(hits, {key: dict(zip(listed[key], hits[key], strict=True)) for key in SURVIVE if key in hits})


_PRESENCES = (
    ("presence_before", 0, "concept"),
    ("presence_after", 1, "concept"),
    ("synonym_before", 0, "synonym"),
    ("synonym_after", 1, "synonym"),
    ("attributed_before", 0, "attributed"),
    ("attributed_after", 1, "attributed"),
    ("pair_before", 0, "pair"),
    ("pair_after", 1, "pair"),
    ("chance", 0, "chance"),
    ("replacement_before", 0, "replacement"),
    ("replacement_presence", 1, "replacement"),
    ("recovery_derived", 1, "derived"),
    ("recovery_learned", 1, "learned"),
    ("learned_before", 0, "learned"),
)
"""A row's presences: the name, before (0) or after (1) the edit, and what was drawn."""


def _erase_row(
    set_: str, method: str, jobs: Sequence[Job], done: Mapping[str, Result], before: Mapping[str, _Seen], cached: frozenset[str]
) -> dict[str, Any]:
    """Figures of a method over concepts: pictures of all concepts count alike."""
    row: dict[str, Any] = {"set": set_, "method": method, "concepts": len(jobs), "cached": len(cached & {job.key for job in jobs})}
    intervals: dict[str, Any] = {}
    names = [job.arguments["concept"] for job in jobs]
    sides = [before[name] for name in names if name in before], [_seen(job, done) for job in jobs]
    for name, side, key in _PRESENCES:
        row[name], intervals[name] = _presence([hit for seen in sides[side] for hit in seen.hits.get(key, [])])
    drops = [_drops(before.get(name), seen) for name, seen in zip(names, sides[1], strict=True)]
    for key in SURVIVE:
        row[f"{key}_drop"], intervals[f"{key}_drop"] = _mean([drop for each in drops for drop in each.get(key, [])])
    row["seconds"] = statistics.fmean([done[job.key]["seconds"] for job in jobs])
    row["rank"] = statistics.fmean([done[job.key]["rank"] for job in jobs])
    row["n"] = sum(len(seen.hits.get("concept", [])) for seen in sides[1])
    row |= _said([done[job.key]["report"] for job in jobs])
    each = [_concept_figures(job, done, before.get(job.arguments["concept"]), drop) for job, drop in zip(jobs, drops, strict=True)]
    return {**row, "intervals": intervals, "each": each}


def _ablation_row(
    name: str, jobs: Sequence[Job], done: Mapping[str, Result], before: Mapping[str, _Seen], cached: frozenset[str]
) -> dict[str, Any]:
    """What pictures show of the concepts that are drawn, and the figures that need none, of those and of the further ones."""
    row = _erase_row("ablation", name, jobs, done, before, cached)
    for suffix, results in (
        ("", [done[job.key] for job in jobs if job.arguments["sets"]]),
        ("_further", [done[job.key] for job in jobs if not job.arguments["sets"]]),
    ):
        figures = _said([result["report"] for result in results])
        for key in ("beside", "synonym", "padding"):
            known = [result["left"][key] for result in results if key in result["left"]]
            figures |= {f"trace_{key}": statistics.fmean(known)} if known else {}
        figures |= {"prompts": statistics.fmean(result["prompts"] for result in results)} if results else {}
        row |= {f"{key}{suffix}": value for key, value in figures.items()}
    return row


def _concept_figures(job: Job, done: Mapping[str, Result], before: _Seen | None, drops: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What was measured of one concept: presence by what was drawn, and mean drops."""
    result = done[job.key]
    return {
        "concept": job.arguments["concept"],
        "before": {} if before is None else {key: statistics.fmean(hits) for key, hits in before.hits.items() if hits},
        "after": {key: statistics.fmean(hits) for key, hits in result["hits"].items() if hits},
        "drops": {key: statistics.fmean(values) for key, values in drops.items() if values},
        "pictures": {key: len(hits) for key, hits in result["hits"].items()},
        "regenerable": _regenerable(result),
        "seconds": result["seconds"],
        "rank": result["rank"],
    }


def _said(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the reports of edits say without a picture, on average: what is left, how far words nearby move, captions, the empty prompt."""
    known = [report for report in reports if report.get("concepts") and report.get("neighbours")]
    if not known:
        return {}
    return {
        "trace": statistics.fmean(concept["trace"] for report in known for concept in report["concepts"]),
        "near_shift": statistics.fmean(word["shift"] for report in known for word in report["neighbours"]),
        "distortion": statistics.fmean(report["distortion"] for report in known),
        "null_drift": statistics.fmean(report["null_drift"] for report in known),
    }


def _drops(before: _Seen | None, after: _Seen) -> dict[str, list[int]]:
    """Presence before less presence after, of each picture that was drawn both times."""
    earlier = {} if before is None else before.survive
    return {
        key: [earlier[key][case] - hit for case, hit in seen.items() if case in earlier.get(key, {})] for key, seen in after.survive.items()
    }


def _presence(hits: Sequence[int]) -> tuple[float | None, list[float] | None]:
    from ..score import wilson

    return (statistics.fmean(hits), list(wilson(sum(hits), len(hits)))) if hits else (None, None)


def _mean(values: Sequence[float]) -> tuple[float | None, list[float] | None]:
    from ..score import mean_interval

    interval = mean_interval(values)
    return (statistics.fmean(values), None if interval is None else list(interval)) if values else (None, None)


def _regenerable(result: Result) -> float | None:
    """How much of the concept a plausible embedding could bring back, by the report."""
    return max((concept["regenerable_plausible"] for concept in result["report"].get("concepts", [])), default=None)


def _certificate_row(results: Sequence[Result]) -> list[dict[str, Any]]:
    """How the regenerability of edits ranks with what the attacks measured bring back."""
    from scipy.stats import spearmanr

    row: dict[str, Any] = {"set": "certificate"}
    for name, edits, key in (("rank_corr", "edits", "derived"), ("rank_corr_learned", "edits_learned", "learned")):
        known = [result for result in results if _regenerable(result) is not None and result["hits"].get(key)]
        said, seen = [_regenerable(result) for result in known], [statistics.fmean(result["hits"][key]) for result in known]
        varied = len(set(said)) > 1 and len(set(seen)) > 1
        row[name], row[edits] = float(spearmanr(said, seen).statistic) if varied else None, len(known)
    return [row] if row["rank_corr"] is not None else []


def _joint_rows(jobs: Sequence[Job], done: Mapping[str, Result]) -> list[dict[str, Any]]:
    """A row a method and call: presence of the concepts and of one another, and what others lose, before and after alike."""
    known = {(job.arguments["method"], len(job.arguments["concepts"])): done[job.key] for job in jobs if job.key in done}
    rows = []
    for (method, count), result in known.items():
        before = known.get((None, count))
        if method is None or before is None:
            continue
        row: dict[str, Any] = {"set": "joint", "method": method, "concepts": count}
        row |= {"seconds": result["seconds"], "anchors": result["anchors"]}
        intervals: dict[str, Any] = {}
        for name, hits, key in (
            ("presence_before", before, "concept"),
            ("presence_after", result, "concept"),
            ("mistaken_before", before, "mistaken"),
            ("mistaken_after", result, "mistaken"),
            ("synonym_after", result, "synonym"),
        ):
            row[name], intervals[name] = _presence(hits["hits"][key])
        for key in ("neighbour", "unrelated"):
            lost = [earlier - later for earlier, later in zip(before["hits"][key], result["hits"][key], strict=True)]
            row[f"{key}_drop"], intervals[f"{key}_drop"] = _mean(lost)
        # A picture of a colour shows some shape, erased or not: what counts is that there are no more of them.
        more = [later - earlier for earlier, later in zip(before["hits"]["mistaken"], result["hits"]["mistaken"], strict=True)]
        row["mistaken_rise"], intervals["mistaken_rise"] = _mean(more)
        each = len(result["hits"]["concept"]) // count
        words = next(job.arguments["concepts"] for job in jobs if len(job.arguments["concepts"]) == count)
        shown = [statistics.fmean(result["hits"]["concept"][i * each : (i + 1) * each]) for i in range(count)]
        row["each"] = [{"concept": word, "after": {"concept": share}} for word, share in zip(words, shown, strict=True)]
        rows.append({**row, "intervals": intervals})
    return rows


def _joint_bars(row: Mapping[str, Any]) -> Iterable[Bar]:
    """Those of one concept, but for neighbours: of ten concepts in a text 96 wide, every tenth direction is taken."""
    count = row["concepts"]
    for name, label, limit in (
        ("presence_after", "each is drawn after", 0.05),
        ("mistaken_rise", "another of them is drawn instead, more than before", 0.05),
        ("synonym_after", "under synonyms", 0.05),
        ("unrelated_drop", "unrelated words lose", 0.03),
        ("neighbour_drop", "nearest neighbours lose", 0.05 if count < 10 else 0.1),
    ):
        yield Bar(f"{count} at once: {label}, at most {limit:g}", _figure(row, name), None if row[name] is None else row[name] <= limit)


def _kinds_row(job: Job, words: Sequence[Mapping[str, Any]], scenes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """How many words are read as one of their kind, by role, and what pictures show of that; scenes: by world, of the unedited model."""
    row: dict[str, Any] = {"set": "kinds", "world": job.arguments["world"], "n": len(words)}
    row["kind"] = statistics.fmean(word["kind"] for word in words)
    # Of moods, styles and words for two things at once no two are quite of a kind.
    row["plain"] = statistics.fmean(word["kind"] for word in words if word["role"] in ("shape", "exemplar", "occupation"))
    roles = dict.fromkeys(word["role"] for word in words)
    row["roles"] = {role: statistics.fmean(word["kind"] for word in words if word["role"] == role) for role in roles}
    for key in ("shown", "scene", "same"):
        hits = [hit for word in words for hit in word.get(key, [])]
        row |= {key: statistics.fmean(hits)} if hits else {}
    before = scenes.get(row["world"])
    row |= {"scene_before": statistics.fmean(before)} if before else {}
    return {**row, "each": {word["word"]: word["anchor"] for word in words}}


def _erase_bars(row: Mapping[str, Any]) -> Iterable[Bar]:
    for name, label, met in (
        ("presence_before", "the concept is drawn before, at least 0.9", lambda x: x >= 0.9),
        ("presence_after", "the concept is drawn after, at most 0.05", lambda x: x <= 0.05),
        ("synonym_after", "under synonyms, at most 0.05", lambda x: x <= 0.05),
        ("attributed_after", "with an attribute, by its synonyms too, at most 0.05", lambda x: x <= 0.05),
        ("pair_after", "in prompts of two things, at most 0.05", lambda x: x <= 0.05),
        ("unrelated_drop", "unrelated words lose at most 0.03", lambda x: x <= 0.03),
        ("neighbour_drop", "nearest neighbours lose at most 0.05", lambda x: x <= 0.05),
        ("part_drop", "parts, asked for by name, lose at most 0.1", lambda x: x <= 0.1),
        ("instead_drop", "what replaces it, and its synonyms, lose at most 0.05", lambda x: x <= 0.05),
    ):
        yield Bar(label, _figure(row, name), None if row[name] is None else met(row[name]))
    value, best = row["replacement_presence"], row["replacement_before"]
    if value is not None and best is not None:
        label = "the replacement is drawn, at least 0.9 of what its own prompt draws"
        yield Bar(label, f"{_figure(row, 'replacement_presence')}, its own prompt {best:.3f}", value >= 0.9 * best)


def _speed_bars(size: str, row: Mapping[str, Any]) -> Iterable[Bar]:
    if "verb_seconds" in row:
        yield Bar(f"{size}: the whole verb, report included, at most 0.3 s", f"{row['verb_seconds']:.3g}", row["verb_seconds"] <= 0.3)
        return
    limits = {
        "sd15": {"seconds": 0.5, "gram_seconds": 1.0, "peak_mb": 150, "rece_seconds": 0.5, "default_seconds": 5.0, "default_peak_mb": 150},
        "sdxl": {"seconds": 2.0, "gram_seconds": 20.0, "peak_mb": 600, "default_peak_mb": 600},
    }[size]
    for name, limit in limits.items():
        if name in row:
            yield Bar(f"{size}: {name} at most {limit:g}", f"{row[name]:.3g}", row[name] <= limit)
    low, high = row["official_range"]
    figure = f"{row['official_ratio']:.0f} times ({low:.0f} to {high:.0f})"
    yield Bar(f"{size}: at least 20 times as fast as published", figure, row["official_ratio"] >= 20)


def _figure(row: Mapping[str, Any], key: str) -> str:
    if row[key] is None:
        return "not measured"
    low, high = row["intervals"][key] or (float("nan"), float("nan"))
    worst = _worst(row["each"], key)
    return f"{row[key]:.3f} ({low:.3f} to {high:.3f})" + ("" if worst is None else f"; {worst}")


def _worst(each: Sequence[Mapping[str, Any]], key: str) -> str | None:
    """The concept that does worst by a figure after the edit."""
    name = {"presence_after": "concept", "synonym_after": "synonym", "pair_after": "pair", "attributed_after": "attributed"}.get(key)
    known = [(figures["after"][name], figures["concept"]) for figures in each if name in figures["after"]]
    return f"worst {max(known)[1]}, {max(known)[0]:.3f}" if known else None
