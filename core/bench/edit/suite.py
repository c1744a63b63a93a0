"""The suite ``edit``: what is measured in either profile, and how the measurements make rows.

Sets: ``erase``, concepts of the demo model by every method; ``speed``, random weights of real sizes against the published loops;
``joint``, several concepts in one call; ``kinds``, what is read in the place of every word of both worlds; ``ablation``, the default
method without each of its ingredients; ``certificate``, whether the figure that needs no picture ranks edits as the pictures do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ...demo.world import second_world, shapes_world
from ...edit import METHODS
from .. import Profile
from ..frame import Bar, Job, Result
from ..worlds import sampling_evals, source_digests, weights_digest
from .cases import Counts, concept_of, of_kinds
from .figures import DEFAULT, ablation_row, bars, certificate_row, erase_row, joint_rows, kinds_row, seen_of
from .measures import (
    ABLATIONS,
    measure_ablation,
    measure_before,
    measure_edit,
    measure_joint,
    measure_kinds,
    measure_scenes,
    planned,
    planned_joint,
)
from .speed import COLUMNS, measure_speed, measure_verb

QUICK_METHODS = (DEFAULT, "uce-2025", "rece-objects", "dp", "trce", "rece")
"""In order of importance. rece-objects is RECE as its README has it for objects and styles; rece is its recipe for nudity, a second row."""
CONCEPTS = ("circle -> square", "red -> green", "robin", "gothic")
MORE_CONCEPTS = ("star", "blue -> yellow", "apple -> car", "castle", "bird -> flower", "joy", "festive")
DRAWN = ("concept", "synonym", "attributed", "pair", "instead", "part", "neighbour", "unrelated")
SETS = (*DRAWN, "derived", "learned")
BEFORE = (*DRAWN, "chance", "replacement", "learned")
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
STORED_AS: Mapping[Callable[..., Result], str] = {
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


def erasing() -> tuple[str, ...]:
    """The methods that erase, the default first."""
    return tuple(name for name, preset in METHODS.items() if not preset.balances)


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
        """The methods that this suite measures, the default first."""
        return self.methods or (QUICK_METHODS if self.profile == "quick" else erasing())

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
        evals = planned(shapes_world(), concept_of(asked["concept"]), counts, sets)
        asked |= {"counts": asdict(counts), "sets": list(sets)}
        return self._job(part, measure, self._on_demo(asked), evals, (weights_digest(self.model), *self._digests), baseline=baseline)

    def _asked(self, method: str | None) -> bool:
        return method is None or (method in self.measured and (method == DEFAULT or self.profile == "full"))

    def _joint(self, method: str | None, call: Sequence[str]) -> Job:
        evals = planned_joint(shapes_world(), call, self.size.joint)
        asked = self._on_demo({"method": method, "concepts": list(call), "counts": asdict(self.size.joint)})
        part = "joint, before" if method is None else f"joint, {method}"
        code = () if method is None else self._digests
        return self._job(part, measure_joint, asked, evals, (weights_digest(self.model), *code), baseline=method != DEFAULT)

    def _kinds(self, world: str, measure: Callable[..., Result]) -> Job:
        known, model = (shapes_world(), self.model) if world == "shapes" else (second_world(), "demo-second")
        asked = {"model": model, "world": world, "pictures": self.size.kinds}
        evals = sampling_evals(self.size.kinds * len(of_kinds(known)))
        before = measure is measure_scenes
        depends = (weights_digest(model), *(() if before else self._digests))
        return self._job("kinds, before" if before else "kinds", measure, asked, evals, depends, baseline=before)

    @property
    def _digests(self) -> tuple[str, ...]:
        return source_digests("edit", _CODE)

    def _before(self, concept: str) -> Job:
        evals = planned(shapes_world(), concept_of(concept), self.size.counts, BEFORE)
        asked = self._on_demo({"concept": concept, "counts": asdict(self.size.counts)})
        return self._job("before the edit", measure_before, asked, evals, (weights_digest(self.model),), baseline=True)

    def _speed(self, size: str) -> Job:
        # The key is new each time: seconds of another day or machine say nothing.
        asked = {"size": size, "threads": THREADS, "methods": size == "sd15" or self.profile == "full", "layers": self.size.official_layers}
        return self._job("speed", measure_speed, asked, 0, (os.urandom(8).hex(),), exclusive=True)

    def _verb(self) -> Job:
        asked = {"model": self.model, "threads": THREADS}
        return self._job("speed", measure_verb, asked, 0, (os.urandom(8).hex(),), exclusive=True)

    def _job(
        self, part: str, measure: Callable[..., Result], asked: Mapping[str, Any], evals: int, depends: Sequence[str], **how: bool
    ) -> Job:
        return Job(part, STORED_AS[measure], measure, asked, evals, (str(PROTOCOL), *depends), **how)

    def _on_demo(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "world": "shapes", **arguments}

    def rows(self, done: Mapping[str, Result], cached: frozenset[str]) -> list[dict[str, Any]]:
        """A row a method (``erase``), a size (``speed``) and an ingredient (``ablation``), and one for the certificate."""
        before = {job.arguments["concept"]: seen_of(job, done) for job in self._jobs if job.measure is measure_before and job.key in done}
        edits = [job for job in self._jobs if job.measure is measure_edit and job.key in done]
        rows = []
        for method in self.measured:
            mine = [job for job in edits if job.part == f"erase, {method}"]
            if mine:
                rows.append(erase_row("erase", method, mine, done, before, cached))
        rows += joint_rows([job for job in self._jobs if job.measure is measure_joint], done)
        scenes = {job.arguments["world"]: done[job.key]["scene"] for job in self._jobs if job.measure is measure_scenes and job.key in done}
        rows += [kinds_row(job, done[job.key]["words"], scenes) for job in self._jobs if job.measure is measure_kinds and job.key in done]
        for name in self._ablations:
            mine = [job for job in self._jobs if job.measure is measure_ablation and job.arguments["method"] == name and job.key in done]
            if mine:
                rows.append(ablation_row(name, mine, done, before, cached))
        return [*rows, *self._speed_rows(done), *certificate_row([done[job.key] for job in edits])]

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
        return bars(rows)
