"""``conceptkit verify``: whether decomposing works on a model nobody here has seen, on one page that can be posted."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import __version__
from ..decompose import Decomposition, decompose_concept
from ..decompose.task import Budget
from ..model import Model
from ..score import mean_interval, wilson
from ..vocabulary import is_unsafe, whole_words
from .frame import peak_mb
from .planted import Planted, plant, recovered

POOL = 500
"""Words that mixtures are planted from and looked for among: the model's own, else the commonest of the vocabulary."""


@dataclass(frozen=True)
class Draw:
    """One planted mixture and what was found of it."""

    planted: Planted
    found: Decomposition
    hits: int
    weight_corr: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """What was measured of a model. peak_mb: of this process; device_mb: the most a CUDA device held for it; None where not known."""

    model: str
    family: str
    device: str
    side: int
    budget: str
    pool: int
    draws: tuple[Draw, ...]
    concepts: tuple[Decomposition, ...]
    seconds: float
    peak_mb: float | None
    device_mb: float | None


def verify(
    model: Model, concepts: Sequence[str], *, draws: int, side: int, budget: Budget, seed: int, on_part: Callable[[str], None]
) -> Report:
    """Plant ``draws`` exact mixtures of two to four words and take each apart, then the ``concepts``.

    model: any that can be decomposed.
    concepts: words and phrases of which nothing is known.
    draws: how many mixtures; 0 leaves recall unmeasured.
    side: of the images sampled, in pixels.
    budget: of every decomposition.
    seed: of the mixtures and of the decompositions.
    on_part: hears what is about to be done.

    Raises whatever ``decompose_concept`` raises.
    """
    start = time.perf_counter()
    pool = list(model.words or [word for word in whole_words(model.text) if not is_unsafe(word)][:POOL])
    device = model.require_denoiser().device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    measured = []
    for draw in range(draws):
        on_part(f"planted mixture {draw + 1} of {draws}")
        planted = plant(model.text, pool, 2 + draw % 3, seed + draw)
        began = time.perf_counter()
        found = decompose_concept(model, planted.token, words=5, candidates=pool, budget=budget, seed=seed + draw, height=side, width=side)
        hits, correlation = recovered(planted, found.words, found.shares, pool)
        measured.append(Draw(planted, found, hits, correlation, time.perf_counter() - began))
    found_concepts = []
    for concept in concepts:
        on_part(f"taking {concept!r} apart")
        found_concepts.append(decompose_concept(model, concept, budget=budget, seed=seed, height=side, width=side))
    return Report(
        model=model.name,
        family=model.family,
        device=torch.cuda.get_device_name(device) if cuda else str(device),
        side=side,
        budget=budget,
        pool=len(pool),
        draws=tuple(measured),
        concepts=tuple(found_concepts),
        seconds=time.perf_counter() - start,
        peak_mb=peak_mb(),
        device_mb=torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None,
    )


def markdown(report: Report, picture: str | None) -> str:
    """The report as a page; ``picture``: the file name of the pictures beside it."""
    planted = sum(len(draw.planted.words) for draw in report.draws)
    lines = [f"# ConceptKit {__version__} on {report.model}", ""]
    memory = [f"{value:,.0f} MiB {where}" for value, where in ((report.peak_mb, "of memory"), (report.device_mb, "on the device")) if value]
    lines += [
        f"{report.family}, {report.side} x {report.side} pixels, budget {report.budget}, {report.device}; "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}. "
        f"All of it took {report.seconds / 60:.1f} minutes" + (f" and at most {' and '.join(memory)}." if memory else "."),
        "",
    ]
    if report.draws:
        hits = sum(draw.hits for draw in report.draws)
        low, high = wilson(hits, planted)
        lines += [
            "## Planted mixtures",
            "",
            f"Words of {report.pool} were mixed into one token, and the token taken apart: the right answer is known.",
            "",
            "| figure | value | 95 % interval | n |",
            "|---|---|---|---|",
            f"| recall of the planted words | {hits / planted:.2f} | {low:.2f} to {high:.2f} | {planted} words |",
        ]
        for name, values, digits in (
            ("correlation of the shares", [draw.weight_corr for draw in report.draws], 2),
            ("R² on pictures not fitted", [draw.found.r2 for draw in report.draws], 3),
            ("evals", [draw.found.evals for draw in report.draws], 0),
            ("seconds", [draw.seconds for draw in report.draws], 1),
        ):
            interval = mean_interval([float(value) for value in values])
            shown = f"{interval[0]:,.{digits}f} to {interval[1]:,.{digits}f}" if interval else ""
            lines.append(f"| {name} | {statistics.fmean(values):,.{digits}f} | {shown} | {len(values)} draws |")
        lines += ["", "| planted | found | R² |", "|---|---|---|"]
        for draw in report.draws:
            sides = (zip(draw.planted.words, draw.planted.shares, strict=True), zip(draw.found.words, draw.found.shares, strict=True))
            cells = [", ".join(f"{share:.0%} {word}" for word, share in side) for side in sides]
            lines.append(f"| {cells[0]} | {cells[1]} | {draw.found.r2:.3f} |")
        lines.append("")
    for found in report.concepts:
        lines += [f"## {found.concept}", "", "| word | share | R² lost without it |", "|---|---|---|"]
        losses = [""] * len(found.words) if found.importance is None else [f"{lost:.3f}" for lost in found.importance]
        lines += [f"| {word} | {share:.1%} | {lost} |" for word, share, lost in zip(found.words, found.shares, losses, strict=True)]
        doubt = "" if found.reliable else " These words do not explain it well."
        lines += ["", f"R² {found.r2:.3f} on pictures not fitted, {found.evals:,} evals in {found.calls:,} calls.{doubt}", ""]
    if picture is not None:
        lines += [f"![Each concept above what its words draw, from the same noise]({picture})", ""]
    return "\n".join(lines)
