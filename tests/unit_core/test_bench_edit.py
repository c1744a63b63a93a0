"""The edit suite: what it draws and judges, its arithmetic, its bars, and that its speed figures compare the same edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptkit.core.bench import Profile, frame, worlds
from conceptkit.core.bench.edit import attacks, measures, speed
from conceptkit.core.bench.edit import suite as suite_module
from conceptkit.core.bench.edit.cases import Counts, cases, joint_cases, neighbours, parts, synonyms, unrelated
from conceptkit.core.bench.edit.figures import DEFAULT, SURVIVE
from conceptkit.core.bench.edit.measures import ABLATIONS, planned, planned_joint
from conceptkit.core.bench.edit.suite import BEFORE, CONCEPTS, DRAWN, JOINT, QUICK_METHODS, SETS, EditSuite
from conceptkit.core.demo import detect
from conceptkit.core.demo.world import shapes_world
from conceptkit.core.edit import METHODS, Concept, ContextEdit, parse_concepts, solve_edit
from conceptkit.core.edit.joint import DEFAULT as SETTINGS
from conceptkit.core.edit.joint import FRAMES
from conceptkit.core.edit.solve import LowRank, Problem, minimise
from conceptkit.core.edit.texts import TEMPLATES
from conceptkit.core.hosts.diffusers import load_model

COUNTS = Counts(4, 2, 1, 2, 1)
WORLD = shapes_world()


@pytest.mark.parametrize("line", [*CONCEPTS, *suite_module.MORE_CONCEPTS])
def test_only_words_that_should_survive_are_drawn_for_survival(line: str) -> None:
    (concept,) = parse_concepts(line)
    word = WORLD.words[concept.text]
    listed = cases(WORLD, concept, COUNTS)
    survivors = {case.word for name in ("neighbour", "unrelated") for case in listed[name]}
    assert len(survivors) >= 10
    assert not survivors & {word.text, concept.replacement, *word.related, *word.entailed}
    assert not any(WORLD.words[text].synonym_of == word.text for text in survivors)
    assert len(neighbours(WORLD, word)) >= 2 and not set(neighbours(WORLD, word)) & set(unrelated(WORLD, concept))
    assert all(case.word == word.text for name in ("concept", "synonym", "attributed", "pair", "chance") for case in listed[name])
    assert all(case.word == concept.replacement or WORLD.words[case.word].synonym_of == concept.replacement for case in listed["instead"])
    assert all(case.word in case.prompt.split() for name in SURVIVE for case in listed[name])
    assert {case.word for case in listed["part"]} == set(parts(WORLD, word)) and not set(parts(WORLD, word)) & survivors
    assert all(word.text in case.prompt.split() for case in listed["pair"])
    assert len({case for part in listed.values() for case in part}) == sum(map(len, listed.values()))


def test_parts_are_of_composites_and_composites_hold_their_parts() -> None:
    assert parts(WORLD, WORLD.words["bird"]) == ["robin", "finch", "raven"]
    assert parts(WORLD, WORLD.words["robin"]) == ["bird"] and parts(WORLD, WORLD.words["doctor"]) == []
    assert parts(WORLD, WORLD.words["disk"]) == [] and set(parts(WORLD, WORLD.words["red"])) == {"anger", "gothic", "festive"}


@pytest.mark.parametrize("line", [*CONCEPTS, *suite_module.MORE_CONCEPTS])
def test_no_prompt_is_one_that_the_method_solves_for(line: str) -> None:
    (concept,) = parse_concepts(line)
    listed = cases(WORLD, concept, Counts(64, 2, 1, 2, 1))

    def wording(prompt: str) -> str:
        return " ".join("_" if word in WORLD.words else word for word in prompt.split())

    solved = {" ".join("_" if "{" in part else part for part in frame.split()) for frame in (*FRAMES, *TEMPLATES)}
    asked = {wording(case.prompt) for name in ("attributed", "pair", "instead") for case in listed[name]}
    assert not asked & solved
    if WORLD.words[concept.text].role in ("shape", "colour", "exemplar"):
        said = {word for case in listed["attributed"] for word in case.prompt.split()}
        assert said >= {concept.text, *synonyms(WORLD, concept.text)} and len(listed["attributed"]) == 32
        assert len(listed["instead"]) == (16 if concept.replacement and WORLD.words[concept.replacement].role != "texture" else 0)


@pytest.mark.parametrize("call", JOINT)
def test_of_several_concepts_none_is_counted_as_surviving(call: tuple[str, ...]) -> None:
    listed = joint_cases(WORLD, call, Counts(8, 3, 1, 2, 1))
    words = [WORLD.words[text] for text in call]
    gone = {name for word in words for name in (word.text, *synonyms(WORLD, word.text), *word.related, *parts(WORLD, word))}
    assert len(listed["concept"]) == 2 * len(call) and {case.word for case in listed["concept"]} == set(call)
    assert {WORLD.words[case.prompt.split()[-1]].synonym_of for case in listed["synonym"]} <= set(call)
    survivors = [{case.word for case in listed[name]} for name in ("neighbour", "unrelated")]
    assert all(survivors) and not survivors[0] & survivors[1] and not gone & (survivors[0] | survivors[1])
    assert planned_joint(WORLD, call, Counts(8, 3, 1, 2, 1)) == 24 * sum(map(len, listed.values()))


def test_concepts_of_one_call_are_drawn_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    square = detect.ThingReading("square", "large", "red", "plain", None, None, frozenset(), 0.0)
    monkeypatch.setattr(detect, "read", lambda picture: detect.Reading("white", (square,), False))
    monkeypatch.setattr(worlds, "STEPS", 2)
    counts = {"concept": 4, "neighbour": 1, "unrelated": 0, "attack": 1, "learn": 1}
    found = {method: measures.measure_joint("demo", "shapes", method, ["circle", "square"], counts) for method in (None, "uce-2025")}
    assert all(result["evals"] == planned_joint(WORLD, ("circle", "square"), Counts(**counts)) for result in found.values())
    assert all(result["hits"]["concept"] == [0, 1] and result["hits"]["mistaken"] == [1, 0] for result in found.values())
    suite = EditSuite("quick", methods=(DEFAULT,))
    jobs = [job for job in suite.jobs() if job.measure is measures.measure_joint and len(job.arguments["concepts"]) == 2]
    after = {"concept": [0] * 16 + [1] * 16, "mistaken": [0] * 32, "synonym": [0], "neighbour": [1, 0], "unrelated": [1]}
    before = {"concept": [1] * 32, "mistaken": [1] * 32, "synonym": [1], "neighbour": [1, 1], "unrelated": [1]}
    done = {
        job.key: {"hits": before if job.arguments["method"] is None else after, "anchors": ["star", "heart"], "seconds": 1.0, "evals": 0}
        for job in jobs
    }
    rows = suite.rows(done, frozenset())
    (row,) = [row for row in rows if row["set"] == "joint"]
    assert (row["method"], row["concepts"], row["presence_before"], row["presence_after"]) == (DEFAULT, 2, 1, 0.5)
    assert (row["mistaken_before"], row["mistaken_after"], row["neighbour_drop"], row["unrelated_drop"]) == (1, 0, 0.5, 0)
    bars = {bar.bar: bar for bar in suite.bars(rows)}
    drawn = bars["2 at once: each is drawn after, at most 0.05"]
    assert not drawn.met and drawn.value.endswith("worst square, 1.000")
    assert row["mistaken_rise"] == -1 and bars["2 at once: another of them is drawn instead, more than before, at most 0.05"].met
    assert not bars["2 at once: nearest neighbours lose, at most 0.05"].met


def test_what_is_drawn_instead_is_counted_by_role() -> None:
    suite = EditSuite(methods=(DEFAULT,))
    job = next(job for job in suite.jobs() if job.measure is measures.measure_kinds and job.arguments["world"] == "shapes")
    kinds = (("shape", True), ("shape", True), ("style", False), ("style", False))
    words = [{"word": f"word {i}", "role": role, "anchor": "x", "kind": kind} for i, (role, kind) in enumerate(kinds)]
    (row,) = [row for row in suite.rows({job.key: {"words": words, "evals": 0}}, frozenset()) if row["set"] == "kinds"]
    assert row["kind"] == 0.5 and row["plain"] == 1 and row["roles"] == {"shape": 1, "style": 0} and "scene" not in row
    (bar,) = [bar for bar in suite.bars([row]) if "read as one" in bar.bar]
    assert bar.met


def test_concepts_are_of_many_kinds_and_some_are_replaced() -> None:
    concepts = parse_concepts([*CONCEPTS, *suite_module.MORE_CONCEPTS])
    roles = {WORLD.words[concept.text].role for concept in concepts}
    assert len(concepts) >= 10 and {"shape", "colour", "exemplar", "category", "abstract", "style"} <= roles
    assert any(concept.replacement for concept in concepts) and not all(concept.replacement for concept in concepts)
    assert any(case.word == "circle" and case.prompt == "a photo of a disk" for case in cases(WORLD, Concept("circle"), COUNTS)["synonym"])


def test_what_is_planned_is_what_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "read", lambda picture: detect.Reading("white", (), False))
    monkeypatch.setattr(worlds, "STEPS", 2)
    monkeypatch.setattr(attacks, "LEARN_PICTURES", 2)
    concept, counts = Concept("circle", "square"), {"concept": 1, "neighbour": 1, "unrelated": 0, "attack": 1, "learn": 1}
    sets = ["concept", "derived", "learned"]
    found = measures.measure_edit("demo", "shapes", "uce-2025", "circle -> square", 1.0, False, counts, sets)
    assert found["evals"] == planned(WORLD, concept, Counts(**counts), sets) == 4 * 3 + 24
    assert set(found["hits"]) == {*sets, "replacement"} and all(len(hits) == 1 for hits in found["hits"].values())
    assert found["report"]["concepts"][0]["text"] == "circle"


def test_the_plan_fits_the_profile_and_judges_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "DATA", tmp_path)  # as on weights that nothing was measured on
    suite = EditSuite()
    plan = frame.plan(suite, None)
    assert plan.evals <= 150_000 == suite.limit
    assert suite.measured == QUICK_METHODS and {"rece-objects", "rece", "dp"} < set(QUICK_METHODS)
    parts = [job.part for job in plan.fresh]
    assert next(part for part in parts if part.startswith("erase")) == f"erase, {DEFAULT}"
    assert parts.count("speed") == 3
    assert parts.count(f"erase, {DEFAULT}") == 4 == parts.count("before the edit")
    ours = ("kinds", f"erase, {DEFAULT}", f"joint, {DEFAULT}")
    assert all(job.baseline == (job.part not in ours) for job in plan.fresh if not job.exclusive)
    assert parts.count("kinds") == 2 and parts.count(f"joint, {DEFAULT}") == len(JOINT) == parts.count("joint, before")
    assert all(job.exclusive == job.part.startswith("speed") for job in suite.jobs())
    assert all(set(job.arguments["sets"]) == set(SETS) for job in plan.fresh if job.part == f"erase, {DEFAULT}")


def test_the_full_profile_covers_every_method_and_twenty_edits() -> None:
    suite = EditSuite("full")
    assert set(suite.measured) == {name for name, preset in METHODS.items() if not preset.balances}
    edits = [job for job in suite.jobs() if job.measure is measures.measure_edit]
    assert len(edits) >= 20 and len({job.key for job in suite.jobs()}) == len(suite.jobs())
    assert {job.arguments["concept"] for job in edits} == {*CONCEPTS, *suite_module.MORE_CONCEPTS}
    assert suite.size.counts.concept == 128 and EditSuite().size.counts.concept == 64
    assert BEFORE[: len(DRAWN)] == SETS[: len(DRAWN)] == DRAWN


def test_ablations_change_settings_that_there_are() -> None:
    assert [name for name, changes in ABLATIONS.items() if not changes] == ["the default"]
    for changes in ABLATIONS.values():
        assert all(getattr(SETTINGS, name) != value for name, value in changes.items())


def test_every_ablation_draws_the_same_pictures() -> None:
    jobs = [job for job in EditSuite().jobs() if job.measure is measures.measure_ablation]
    drawn = {concept: {str({**job.arguments, "method": ""}) for job in jobs if job.arguments["concept"] == concept} for concept in CONCEPTS}
    assert all(len(asked) == 1 for asked in drawn.values())
    assert {job.arguments["concept"] for job in jobs if job.evals} == set(CONCEPTS)
    assert {job.arguments["concept"] for job in jobs if not job.evals} == set(suite_module.MORE_CONCEPTS)
    assert len(jobs) == 11 * len(ABLATIONS) and all(set(job.arguments["sets"]) <= set(SETS) for job in jobs)


def test_an_ablation_without_pictures_says_what_is_left() -> None:
    def left(name: str) -> dict[str, Any]:
        return dict(measures.measure_ablation("demo", "shapes", name, "circle -> square", asdict(COUNTS), []))

    whole, without = left("the default"), left("without prompts with other words")
    assert whole["evals"] == 0 and whole["hits"] == {}
    assert set(whole["left"]) == {"beside", "synonym", "padding"}
    assert 1.2 * whole["left"]["beside"] < without["left"]["beside"]
    assert whole["prompts"] > without["prompts"] > 0


def result(suite: EditSuite, job: frame.Job, present: dict[str, float], regenerable: float = 0.5) -> dict[str, Any]:
    """What a job would have measured, were ``present`` the share of pictures that show their word."""
    (concept,) = parse_concepts(job.arguments["concept"])
    counts = Counts(**job.arguments["counts"])
    listed = {name: len(part) for name, part in cases(WORLD, concept, counts).items()}
    listed |= {"derived": counts.attack, "learned": counts.attack, "replacement": counts.concept if concept.replacement else 0}
    hits = {name: [int(i < present[name] * n) for i in range(n)] for name, n in listed.items() if name in present and n}
    report = {
        "concepts": [{"text": concept.text, "trace": 0.25, "regenerable_plausible": regenerable}],
        "neighbours": [{"word": "one", "shift": 0.5}, {"word": "two", "shift": 0.25}],
        "distortion": 0.125,
        "null_drift": 0.0,
    }
    return {"hits": hits, "seconds": 0.25, "rank": 8, "report": report, "evals": 0}


def test_rows_and_bars_from_known_pictures() -> None:
    suite = EditSuite(methods=(DEFAULT,))
    done = {}
    for job in suite.jobs():
        if job.measure is measures.measure_before:
            done[job.key] = result(suite, job, dict.fromkeys(BEFORE, 1.0) | {"chance": 0.0})
        elif job.measure is measures.measure_edit:
            after = {"concept": 0.0, "synonym": 0.25, "pair": 0.0, "neighbour": 0.5, "unrelated": 1.0, "replacement": 1.0}
            done[job.key] = result(suite, job, after | {"derived": 1.0, "learned": 0.5})
        elif job.measure is measures.measure_ablation:
            drawn = {"concept": 1.0, "neighbour": 1.0} if job.arguments["sets"] else {}
            left = {"beside": 0.5, "padding": 0.25} if job.arguments["concept"] in CONCEPTS else {"beside": 1.0, "padding": 0.25}
            done[job.key] = {**result(suite, job, drawn), "left": left, "prompts": 10}
    rows = suite.rows(done, frozenset())
    row = rows[0]
    assert (row["set"], row["method"], row["n"], row["concepts"]) == ("erase", DEFAULT, 4 * 64, 4)
    assert row["presence_before"] == 1 and row["presence_after"] == 0 and row["synonym_after"] == 0.25
    assert row["neighbour_drop"] == pytest.approx(0.5) and row["unrelated_drop"] == 0
    assert (row["trace"], row["near_shift"], row["distortion"], row["null_drift"]) == (0.25, 0.375, 0.125, 0.0)
    assert row["recovery_derived"] == 1 and row["recovery_learned"] == 0.5 and row["learned_before"] == 1
    low, high = row["intervals"]["presence_after"]
    assert low == pytest.approx(0, abs=1e-9) and 0.01 < high < 0.03
    assert {entry["concept"] for entry in row["each"]} == set(CONCEPTS)
    without = [entry for entry in rows if entry["set"] == "ablation"]
    assert [entry["method"] for entry in without] == list(ABLATIONS)
    assert all(entry["presence_after"] == 1 and entry["neighbour_drop"] == 0 for entry in without)
    assert all((entry["n"], entry["concepts"], entry["prompts"]) == (4 * 20, 11, 10) for entry in without)
    assert (without[1]["trace_beside"], without[1]["trace_beside_further"], without[1]["trace_padding"]) == (0.5, 1.0, 0.25)
    bars = {bar.bar: bar.met for bar in suite.bars(rows)}
    assert bars["the concept is drawn after, at most 0.05"] and bars["unrelated words lose at most 0.03"]
    assert not bars["under synonyms, at most 0.05"] and not bars["nearest neighbours lose at most 0.05"]
    assert bars["the replacement is drawn, at least 0.9 of what its own prompt draws"]


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_the_certificate_is_a_rank_correlation(profile: Profile) -> None:
    suite = EditSuite(profile)
    edits = [job for job in suite.jobs() if job.measure is measures.measure_edit]
    shares = {job.key: i / len(edits) for i, job in enumerate(edits)}
    done = {job.key: result(suite, job, {"derived": shares[job.key]}, regenerable=shares[job.key]) for job in edits}
    (row,) = [row for row in suite.rows(done, frozenset()) if row["set"] == "certificate"]
    assert row["rank_corr"] > 0.99 and row["edits"] == len(edits) >= 20 and row["rank_corr_learned"] is None
    assert suite.bars([row])[0].met
    assert suite.bars([{**row, "edits": 19}])[0].met is None


def test_speed_rows_compare_like_with_like() -> None:
    suite = EditSuite()
    found = {}
    for job in suite.jobs():
        if job.measure is speed.measure_speed:
            found[job.key] = {"seconds": 0.5, "peak_mb": 100.0, "gram_seconds": 0.5, "threads": 2, "evals": 0}
            found[job.key] |= {"official_seconds": 10.0, "official_ratio": 21.0, "official_range": [6.0, 23.0], "vectorised_ratio": 5.0}
            found[job.key] |= {"rece_seconds": 0.6, "default_seconds": 4.0, "default_peak_mb": 151.0} if job.arguments["methods"] else {}
        if job.measure is speed.measure_verb:
            found[job.key] = {"seconds": 0.25, "first_seconds": 0.5, "official_seconds": 0.03, "official_ratio": 0.1, "evals": 0}
    rows = suite.rows(found, frozenset())
    assert [row["size"] for row in rows] == ["sd15", "sdxl", "demo"]
    assert (rows[2]["verb_seconds"], rows[2]["verb_first_seconds"], rows[2]["verb_official_seconds"]) == (0.25, 0.5, 0.03)
    assert [bar.value for bar in suite.bars(rows) if "as published" in bar.bar] == ["21 times (6 to 23)"] * 2
    bars = {bar.bar: bar.met for bar in suite.bars(rows)}
    assert bars["demo: the whole verb, report included, at most 0.3 s"]
    assert bars["sd15: at least 20 times as fast as published"] and not bars["sd15: rece_seconds at most 0.5"]
    assert not bars["sd15: default_peak_mb at most 150"] and "sdxl: default_peak_mb at most 600" not in bars


def test_the_published_loops_and_the_solver_find_the_same_weights(tmp_path: Path) -> None:
    width, columns = 24, 5
    generator = torch.Generator().manual_seed(0)
    weight, c, a = (torch.randn(size, generator=generator) for size in ((16, width), (width, columns), (width, columns)))
    found = minimise(Problem(c.double(), a.double(), torch.ones(columns, dtype=torch.float64), speed.RIDGE))
    ours = weight.double() @ (torch.eye(width, dtype=torch.float64) + found.u @ found.v.T)
    for loop in speed.LOOPS.values():
        theirs = loop(weight, c, a).double()
        assert float((theirs - ours).norm() / ours.norm()) < 1e-4


def test_speed_is_measured_on_stored_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = speed.StoredLayers(tmp_path / "layers", 32, {16: 2, 8: 2}).write()
    shapes = [tuple(weight.shape) for _, weight in layers.key_values()]
    assert shapes == [(16, 32), (16, 32), (8, 32), (8, 32)]
    assert len({path for path, _ in layers.key_values()}) == 4
    again = list(layers.key_values())
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(layers.key_values(), again, strict=True))
    monkeypatch.setattr(speed, "LAYERS", {"tiny": ("sd1", 32, {16: 2, 8: 2})})
    threads = torch.get_num_threads()
    try:
        found = speed.measure_speed("tiny", 1, methods=False, layers=1, pairs=3)
    finally:
        torch.set_num_threads(threads)
    assert found["seconds"] > 0 and found["gram_seconds"] > 0 and "default_seconds" not in found and found["pairs"] == 3
    assert found["official_seconds"] > 0 and found["vectorised_range"][0] <= found["vectorised_ratio"] <= found["vectorised_range"][1]


def test_both_sides_are_timed_in_turns_and_compared_pair_by_pair() -> None:
    """A machine that slows down between rounds slows both: medians of either side say 3 times, every pair says twice."""
    ours, theirs = iter([1.0, 2.0, 30.0]), iter([2.0, 6.0, 60.0])
    order: list[str] = []

    def timed(name: str, seconds: Iterator[float]) -> Callable[[], float]:
        return lambda: order.append(name) or next(seconds)

    found = speed._medians(speed._in_turns({"": timed("ours", ours), "official": timed("theirs", theirs)}, 3))
    assert order == ["ours", "theirs"] * 3
    assert found == {"seconds": 2.0, "official_seconds": 6.0, "official_ratio": 2.0, "official_range": [2.0, 3.0], "pairs": 3}


def test_layers_left_out_of_the_timing_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of each height is timed; the seconds are those of all: 3 of the first height and 5 of the second, a second each."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(speed, "LOOPS", {"official": lambda weight, c, a: asked.append(tuple(weight.shape))})
    monkeypatch.setattr(speed, "_seconds", lambda run: (run(), 1.0)[1])
    loops = speed._published({16: 3, 8: 5}, 1, torch.zeros(4, 2), torch.zeros(4, 2))
    assert loops["official"]() == 8.0
    assert asked == [(16, 4), (8, 4)]


def test_the_published_edit_of_a_whole_model_is_the_solver_s() -> None:
    model = load_model("demo")
    with torch.no_grad():
        theirs = speed.uce_as_published(model, "circle", "square")
    patches = solve_edit(model, "circle -> square", method="uce-2025").weight_patches(model.cross_attention)
    weights = dict(model.cross_attention.key_values())
    ours = {path: weights[path] + patch.up @ patch.down for path, patch in patches}
    assert theirs.keys() == ours.keys()
    assert max(float((theirs[path] - weight.float()).norm() / weight.float().norm()) for path, weight in ours.items()) < 1e-3


def test_an_unedited_model_needs_no_adversary() -> None:
    model = load_model("demo")
    with torch.no_grad():
        context = model.text.encode(["a photo of a circle"]).context[0]
    factors = torch.zeros(context.shape[1], 1)
    edit = ContextEdit("sd1", LowRank(factors, factors))
    found = attacks.adversary(model, edit, context)
    assert found.shape == context.shape
    assert float((found - context).norm() / context.norm()) < 1e-2
