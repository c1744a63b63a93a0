"""Rows and bars of ``conceptkit bench decompose``, from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...score import split_half_floor, total_variation
from ..figures import Estimate, between, mean, share
from ..frame import Bar, Job
from .methods import BASELINES, DEFAULT, PUBLISHED

COLUMNS = (
    *("method", "set", "world", "half", "n", "draws", "cached", "recall_at_k", "weight_corr", "r2_heldout"),
    *("related", "coverage", "related_doubles", "tv", "tv_floor"),
    *("oracle_r2", "oracle_tv", "perturbation_effect", "evals", "evals_max", "seconds", "peak_mb"),
)
"""Of every row, null where meaningless; then ``intervals`` (95 %) and ``each``, what was measured one by one."""


def planted_row(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a planted set from what each draw measured."""
    planted = sum(len(draw["planted"]) for draw in draws)
    hits = sum(draw["hits"] for draw in draws)
    estimates = {
        "recall_at_k": share(hits, planted),
        "weight_corr": mean([draw["weight_corr"] for draw in draws]),
        "r2_heldout": mean([draw["r2"] for draw in draws]),
        "perturbation_effect": mean([draw["perturbation_effect"] for draw in draws]),
    }
    return {
        "n": planted,
        **_named(estimates),
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
    related = {"related": share(sum(word["hits"] for word in single), n)} if n else {}
    if of_doubles:
        related["related_doubles"] = share(sum(word["hits"] for word in doubles), of_doubles)
    if n:
        related["coverage"] = share(sum(word["hits"] for word in single), sum(word["made_of"] for word in single))
    means = {"r2_heldout": "r2", **{key: key for key in ("tv", "tv_floor", "oracle_r2", "oracle_tv")}}
    estimates = related | {name: mean([word[key] for word in each]) for name, key in means.items()}
    return {"n": n, **_named(estimates), **_costs(words), "each": each}


def method_row(
    method: str, set_: str, world: str, half: str | None, jobs: Sequence[Job], cached: frozenset[str], figures: Mapping[str, Any]
) -> dict[str, Any]:
    given = {"method": method, "set": set_, "world": world, "half": half, "draws": len(jobs), "cached": len(cached & {j.key for j in jobs})}
    values: dict[str, Any] = {**given, **{key: value for key, value in figures.items() if not key.endswith("_interval")}}
    intervals = {key.removesuffix("_interval"): value for key, value in figures.items() if key.endswith("_interval")}
    return {**{key: values.get(key) for key in COLUMNS}, "intervals": intervals, "each": figures["each"]}


def _costs(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    evals = [draw["method_evals"] for draw in draws]
    seconds = mean([draw["seconds"] for draw in draws])
    return {**_named({"evals": mean(evals), "seconds": seconds}), "evals_max": max(evals)}


def _named(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Each estimate by its name, and its interval as ``NAME_interval``."""
    return {key: value for name, (figure, interval) in estimates.items() for key, value in ((name, figure), (f"{name}_interval", interval))}


def bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """What the default method must reach, on what was measured."""
    return [*_planted_bars(rows), *_natural_bars(rows, "shapes"), *_natural_bars(rows, "second"), *_baseline_bars(rows), _memory(rows)]


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
    return f"{row[key]:.3f} ({between(row['intervals'][key])}, n = {row['n'] if key != 'weight_corr' else row['draws']})"


def _over(value: float | None, floor: float | None, judged: Sequence[Mapping[str, Any]], each: Sequence[Mapping[str, Any]]) -> str:
    names = {word["word"] for word in judged}
    rest = [word["word"] for word in each if word["word"] not in names]
    figure = "no word" if value is None else f"{value:.3f}" + (f", floor {floor:.3f}" if floor is not None else "")
    return f"{figure} over {len(judged)} of {len(each)} words" + (f"; not judged: {', '.join(rest)}" if rest else "")
