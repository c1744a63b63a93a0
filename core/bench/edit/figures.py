"""Rows and bars of ``conceptkit bench edit``, from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr

from ...demo.world import shapes_world
from ..figures import Estimate, between, mean, share
from ..frame import Bar, Job, Result
from .cases import Case, Counts, cases, concept_of

DEFAULT = "conceptkit"
SURVIVE = ("instead", "part", "neighbour", "unrelated")
"""Sets of words that must be drawn as before."""
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


@dataclass(frozen=True)
class Seen:
    """What pictures showed: hits by set, and for words that should survive those of each picture."""

    hits: Mapping[str, Sequence[int]]
    survive: Mapping[str, Mapping[Case, int]]


def seen_of(job: Job, done: Mapping[str, Result]) -> Seen:
    hits = done[job.key]["hits"]
    listed = cases(shapes_world(), concept_of(job.arguments["concept"]), Counts(**job.arguments["counts"]))
    return Seen(hits, {key: dict(zip(listed[key], hits[key], strict=True)) for key in SURVIVE if key in hits})


def erase_row(
    set_: str, method: str, jobs: Sequence[Job], done: Mapping[str, Result], before: Mapping[str, Seen], cached: frozenset[str]
) -> dict[str, Any]:
    """Figures of a method over concepts: pictures of all concepts count alike.

    set_: the row's set.
    method: the row's method.
    jobs: the measurements of this row.
    done: results by job key.
    before: what the unedited model showed, by concept.
    cached: keys of results that this run did not measure.
    """
    row: dict[str, Any] = {"set": set_, "method": method, "concepts": len(jobs), "cached": len(cached & {job.key for job in jobs})}
    intervals: dict[str, Any] = {}
    names = [job.arguments["concept"] for job in jobs]
    sides = [before[name] for name in names if name in before], [seen_of(job, done) for job in jobs]
    for name, side, key in _PRESENCES:
        row[name], intervals[name] = presence([hit for seen in sides[side] for hit in seen.hits.get(key, [])])
    drops = [_drops(before.get(name), seen) for name, seen in zip(names, sides[1], strict=True)]
    for key in SURVIVE:
        row[f"{key}_drop"], intervals[f"{key}_drop"] = mean([drop for each in drops for drop in each.get(key, [])])
    row["seconds"] = statistics.fmean([done[job.key]["seconds"] for job in jobs])
    row["rank"] = statistics.fmean([done[job.key]["rank"] for job in jobs])
    row["n"] = sum(len(seen.hits.get("concept", [])) for seen in sides[1])
    row |= _said([done[job.key]["report"] for job in jobs])
    each = [_concept_figures(job, done, before.get(job.arguments["concept"]), drop) for job, drop in zip(jobs, drops, strict=True)]
    return {**row, "intervals": intervals, "each": each}


def ablation_row(
    name: str, jobs: Sequence[Job], done: Mapping[str, Result], before: Mapping[str, Seen], cached: frozenset[str]
) -> dict[str, Any]:
    """What pictures show of the concepts that are drawn, and the figures that need none, of those and of the further ones.

    name: of the ingredient left out.
    jobs: the measurements of this row.
    done: results by job key.
    before: what the unedited model showed, by concept.
    cached: keys of results that this run did not measure.
    """
    row = erase_row("ablation", name, jobs, done, before, cached)
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


def _concept_figures(job: Job, done: Mapping[str, Result], before: Seen | None, drops: Mapping[str, Sequence[int]]) -> dict[str, Any]:
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


def presence(hits: Sequence[int]) -> Estimate:
    """The share of images that show their word."""
    return share(sum(hits), len(hits))


def _drops(before: Seen | None, after: Seen) -> dict[str, list[int]]:
    """Presence before less presence after, of each picture that was drawn both times."""
    earlier = {} if before is None else before.survive
    return {
        key: [earlier[key][case] - hit for case, hit in seen.items() if case in earlier.get(key, {})] for key, seen in after.survive.items()
    }


def _regenerable(result: Result) -> float | None:
    """How much of the concept a plausible embedding could bring back, by the report."""
    return max((concept["regenerable_plausible"] for concept in result["report"].get("concepts", [])), default=None)


def certificate_row(results: Sequence[Result]) -> list[dict[str, Any]]:
    """How the regenerability of edits ranks with what the attacks measured bring back."""
    row: dict[str, Any] = {"set": "certificate"}
    for name, edits, key in (("rank_corr", "edits", "derived"), ("rank_corr_learned", "edits_learned", "learned")):
        known = [result for result in results if _regenerable(result) is not None and result["hits"].get(key)]
        said, seen = [_regenerable(result) for result in known], [statistics.fmean(result["hits"][key]) for result in known]
        varied = len(set(said)) > 1 and len(set(seen)) > 1
        row[name], row[edits] = float(spearmanr(said, seen).statistic) if varied else None, len(known)
    return [row] if row["rank_corr"] is not None else []


def joint_rows(jobs: Sequence[Job], done: Mapping[str, Result]) -> list[dict[str, Any]]:
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
            row[name], intervals[name] = presence(hits["hits"][key])
        for key in ("neighbour", "unrelated"):
            lost = [earlier - later for earlier, later in zip(before["hits"][key], result["hits"][key], strict=True)]
            row[f"{key}_drop"], intervals[f"{key}_drop"] = mean(lost)
        # A picture of a colour shows some shape, erased or not: what counts is that there are no more of them.
        more = [later - earlier for earlier, later in zip(before["hits"]["mistaken"], result["hits"]["mistaken"], strict=True)]
        row["mistaken_rise"], intervals["mistaken_rise"] = mean(more)
        each = len(result["hits"]["concept"]) // count
        words = next(job.arguments["concepts"] for job in jobs if len(job.arguments["concepts"]) == count)
        shown = [statistics.fmean(result["hits"]["concept"][i * each : (i + 1) * each]) for i in range(count)]
        row["each"] = [{"concept": word, "after": {"concept": part}} for word, part in zip(words, shown, strict=True)]
        rows.append({**row, "intervals": intervals})
    return rows


def kinds_row(job: Job, words: Sequence[Mapping[str, Any]], scenes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
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


def bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """What the default method must reach, on what was measured."""
    erased = next((row for row in rows if (row["set"], row.get("method")) == ("erase", DEFAULT)), None)
    speeds = {row["size"]: row for row in rows if row["set"] == "speed"}
    found = [] if erased is None else list(_erase_bars(erased))
    found += [bar for row in rows if (row["set"], row.get("method")) == ("joint", DEFAULT) for bar in _joint_bars(row)]
    found += [
        Bar(f"{row['world']}: shapes, things and people are read as one, at least 0.75", f"{row['plain']:.3f}", row["plain"] >= 0.75)
        for row in rows
        if row["set"] == "kinds"
    ]
    found += [bar for size, row in speeds.items() for bar in _speed_bars(size, row)]
    certificate = next((row for row in rows if row["set"] == "certificate"), None)
    if certificate is not None:
        found.append(
            Bar(
                "regenerability ranks at least 20 edits as the pictures do (rank correlation above 0)",
                f"{certificate['rank_corr']:.2f} over {certificate['edits']} edits",
                certificate["rank_corr"] > 0 if certificate["edits"] >= 20 else None,
            )
        )
    return found


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
    worst = _worst(row["each"], key)
    return f"{row[key]:.3f} ({between(row['intervals'][key])})" + ("" if worst is None else f"; {worst}")


def _worst(each: Sequence[Mapping[str, Any]], key: str) -> str | None:
    """The concept that does worst by a figure after the edit."""
    name = {"presence_after": "concept", "synonym_after": "synonym", "pair_after": "pair", "attributed_after": "attributed"}.get(key)
    known = [(figures["after"][name], figures["concept"]) for figures in each if name in figures["after"]]
    return f"worst {max(known)[1]}, {max(known)[0]:.3f}" if known else None
