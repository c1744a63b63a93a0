"""The bench frame's promises (plan first, never exceeded, resumable, schema, intervals) and the decomposition suite's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptkit.core import bench, score
from conceptkit.core.bench import frame, planted, worlds
from conceptkit.core.bench.decompose import measures, methods
from conceptkit.core.bench.decompose import suite as suite_module
from conceptkit.core.bench.decompose.figures import COLUMNS, method_row, natural_row, planted_row
from conceptkit.core.bench.decompose.methods import BASELINES
from conceptkit.core.bench.decompose.suite import SIZES, DecomposeSuite
from conceptkit.core.bench.edit import suite as edit_suite
from conceptkit.core.bench.frame import Bar, Job
from conceptkit.core.bench.worlds import halves
from conceptkit.core.decompose import Decomposition
from conceptkit.core.demo.world import second_world, shapes_world
from conceptkit.core.hosts.diffusers import load_model
from conceptkit.tests.unit_core.measures import slowly
from hypothesis import given
from hypothesis import strategies as st


def measure(value: int, log: str = "") -> dict[str, Any]:
    if log:
        with Path(log).open("a") as file:
            file.write(f"{value}\n")
    if value < 0:
        raise ValueError("negative")
    return {"evals": value, "square": value**2}


@dataclass(frozen=True)
class Tiny:
    """A suite of squares."""

    listed: tuple[Job, ...]
    limit: int | None = None
    name = "tiny"
    profile = "quick"

    def jobs(self) -> Sequence[Job]:
        return self.listed

    def rows(self, done: Mapping[str, Any], cached: frozenset[str]) -> list[dict[str, Any]]:
        return [{"square": done[job.key]["square"], "cached": job.key in cached} for job in self.listed if job.key in done]

    def bars(self, rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
        return [Bar("some row", str(len(rows)), bool(rows))]


def job(value: int, **fields: Any) -> Job:
    arguments = {"value": value, **fields.pop("arguments", {})}
    return Job("squares", "squares", measure, arguments, fields.pop("evals", abs(value)), **fields)


def test_the_plan_is_said_first_and_not_exceeded(tmp_path: Path) -> None:
    log = tmp_path / "log"
    suite = Tiny(tuple(job(value, arguments={"log": str(log)}) for value in (3, 6, 5)), limit=8)
    said: list[tuple[str, bool]] = []
    report = frame.run(suite, None, processes=0, say=lambda line: said.append((line, log.exists())))
    lines = [line for line, _ in said]
    planned = next(i for i, line in enumerate(lines) if line.startswith("planned: at most 8 evals"))
    assert not any(begun for _, begun in said[: planned + 1])
    assert any("left out" in line and "squares, 1 x" in line for line in lines[:planned])
    assert log.read_text().split() == ["3", "5"]  # six more evals would not have fitted, five do
    assert report["run"]["evals"] == 8 == report["run"]["planned_evals"] and report["run"]["left_out"] == 1
    assert [row["square"] for row in report["rows"]] == [9, 25]
    assert frame.plan(suite, None, whole=True).evals == 14


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    broken = Tiny((job(2, arguments={"log": str(log)}), job(-1, arguments={"log": str(log)})))
    with pytest.raises(ValueError, match="negative"):
        frame.run(broken, tmp_path / "parts", processes=0, say=str)
    whole = Tiny((broken.listed[0], job(7, arguments={"log": str(log)})))
    report = frame.run(whole, tmp_path / "parts", processes=0, say=str)
    assert log.read_text().split() == ["2", "-1", "7"]
    assert report["rows"] == [{"square": 4, "cached": True}, {"square": 49, "cached": False}]
    assert report["run"]["cached"] == 1 and report["run"]["planned_evals"] == 7


def test_a_result_is_found_by_all_it_depends_on() -> None:
    assert job(3).key == job(3).key == job(3, evals=99).key
    assert len({job(3).key, job(4).key, job(3, depends=("weights",)).key, job(3, isolated=True).key}) == 4
    moved = Job("squares", "squares", slowly, {"value": 3}, 3)
    assert moved.key == job(3).key != replace(moved, kind="cubes").key  # wherever the function lives, and whatever it is called


def test_processes_change_nothing_but_the_memory_that_is_measured(tmp_path: Path) -> None:
    # Measured by dict itself, which other processes can import: they return their arguments.
    alone = Job("squares", "squares", dict, {"evals": 3, "square": 9}, 3, isolated=True)
    last = Job("squares", "squares", dict, {"evals": 4, "square": 16}, 4, exclusive=True)
    said: list[str] = []
    suite = Tiny((last, Job("squares", "squares", dict, {"evals": 2, "square": 4}, 2), alone))
    report = frame.run(suite, tmp_path, processes=2, say=said.append)
    assert [row["square"] for row in report["rows"]] == [16, 4, 9]
    assert [line for line in said if line.startswith("[3/3]") and "16" in line]
    peak = json.loads((tmp_path / f"{alone.key}.json").read_text())["result"]["peak_mb"]
    assert peak is None or 1 < peak < 4096


def test_a_failure_does_not_lose_what_other_processes_measured(tmp_path: Path) -> None:
    wrong, slow = (Job("sleeps", "sleeps", slowly, {"seconds": seconds}, 1) for seconds in (-1.0, 1.0))
    with pytest.raises(ValueError, match="non-negative"):
        frame.run(Tiny((wrong, slow)), tmp_path, processes=2, say=str)
    assert [path.stem for path in tmp_path.iterdir()] == [slow.key]


def test_shipped_baselines_are_read_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Tiny((job(2, baseline=True), job(3)))
    frame.run(suite, tmp_path / "parts", processes=0, say=str)
    assert frame.ship(suite, tmp_path / "parts", tmp_path / "data") == 1
    monkeypatch.setattr(frame, "DATA", tmp_path / "data")
    plan = frame.plan(suite, None)
    assert [job.arguments["value"] for job in plan.fresh] == [3] and list(plan.known) == [suite.listed[0].key]


def test_suites_are_found_by_being_there() -> None:
    entries = bench.suites()
    assert {"decompose", "edit"} <= set(entries)
    for name, entry in entries.items():
        suite = entry.make("quick", "demo", entry.listed)
        assert suite.name == name and suite.profile == "quick" and entry.about.endswith(".")
        with pytest.raises(ValueError, match="there is no method magic: choose from "):
            entry.make("quick", "demo", "magic")


def test_what_results_are_stored_under_never_changes() -> None:
    """Else what was measured in hours, and shipped, is no longer found."""
    job = Job("any", "decompose.measure_concept", dict, {"word": "bird", "pictures": 48}, 0, ("1", "weights"))
    assert job.key == "82372a8308c9e594dd2409e3c7afa3e3"
    decompose = ("planted", "natural", "concept", "oracle")
    assert list(suite_module.STORED_AS.values()) == [f"decompose.measure_{name}" for name in decompose]
    edit = ("before", "edit", "ablation", "joint", "kinds", "scenes")
    assert list(edit_suite.STORED_AS.values()) == [
        *(f"erasure.measure_{name}" for name in edit),
        *("edit_speed.measure_speed", "edit_speed.measure_verb"),
    ]


def test_shards_make_one_whole(tmp_path: Path) -> None:
    suite = Tiny(tuple(job(value) for value in range(1, 9)))
    counts = [frame.run(suite, tmp_path, processes=0, say=str, shard=(index, 3))["run"]["measured"] for index in range(3)]
    assert sum(counts) == 8 and max(counts) < 8
    whole = frame.run(suite, tmp_path, processes=0, say=str)
    assert whole["run"]["measured"] == 0 and [row["square"] for row in whole["rows"]] == [value**2 for value in range(1, 9)]


def test_the_report_s_schema() -> None:
    report = frame.run(Tiny((job(2),)), None, processes=0, say=str)
    assert list(report)[:5] == ["suite", "version", "profile", "machine", "rows"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert "met  some row: 1" in frame.summary(report)


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilson_holds_the_share(hits: int, of: int) -> None:
    hits = min(hits, of)
    low, high = score.wilson(hits, of)
    assert 0 <= low <= hits / of + 1e-12 and hits / of - 1e-12 <= high <= 1


def test_wilson_by_hand() -> None:
    assert score.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_a_bootstrap_interval_holds_the_mean(values: list[float]) -> None:
    interval = score.mean_interval(values, resamples=200)
    assert interval is not None
    assert interval[0] - 1e-6 <= sum(values) / len(values) <= interval[1] + 1e-6
    assert score.mean_interval(values[:1]) is None


def test_total_variation_by_hand() -> None:
    assert score.total_variation([0, 0, 1, 1], [0, 0, 1, -1]) == pytest.approx(0.25)
    assert score.total_variation([0, 1], [2, 2]) == 1 and score.total_variation([1, 0], [0, 1]) == 0
    assert score.split_half_floor([0] * 9) == 0
    # Four pictures, two of each outcome: one in three random halvings is pure, the others are even.
    assert score.split_half_floor([0, 0, 1, 1], splits=3000) == pytest.approx(1 / 3, abs=0.03)
    with pytest.raises(ValueError, match="two images"):
        score.split_half_floor([1])


@pytest.fixture(scope="module")
def text():
    return load_model("demo").text


def test_planted_mixtures_are_what_they_say(text) -> None:
    words = [word.text for word in shapes_world().words.values() if word.synonym_of is None]
    made = planted.plant(text, words, 3, 5)
    assert planted.recovered(made, made.words, made.shares, words) == (3, pytest.approx(1))
    assert planted.recovered(made, made.words[:1], (1.0,), words)[0] == 1
    found, correlation = planted.recovered(made, [w for w in words if w not in made.words][:3], (0.5, 0.3, 0.2), words)
    assert found == 0 and correlation < 0
    assert planted.plant(text, words, 3, 5).shares == made.shares and planted.plant(text, words, 3, 6).words != made.words


def test_a_perturbation_is_as_long_as_the_mixture_and_outside_the_words_span(text) -> None:
    words = list(shapes_world().words)
    hidden = planted.hidden_directions(text, words, "a photo of a {}")
    rows = torch.stack([text.tables["l"][text.vocabulary[f"{word}</w>"]] for word in words])
    assert float((rows @ hidden["l"].T).abs().max()) < 1e-4 * float(rows.norm(dim=1).mean())
    made = planted.plant(text, words, 2, 1, hidden)
    plain, token = made.plain["l"][0], made.token["l"][0]
    assert float(token.norm()) == pytest.approx(float(plain.norm()), rel=1e-4)
    assert float(torch.cosine_similarity(plain, token, dim=0)) == pytest.approx(0.5**0.5, abs=1e-3)


def test_natural_words_and_their_right_answers() -> None:
    for world in (shapes_world(), second_world()):
        tuned, held_out = halves(world)
        assert sorted(tuned + held_out) == sorted(word.text for word in world.composites) and not set(tuned) & set(held_out)
    assert shapes_world().right_words("anger") == {"red", "crimson", "cross", "triangle"}


MEASURES = (measures.measure_planted, measures.measure_natural)


def natural(word: str, **fields: Any) -> dict[str, Any]:
    base = {"found": [["robin", 0.6], ["finch", 0.4]], "hits": 2, "judged": 2, "r2": 0.95, "method_evals": 1000, "seconds": 2.0}
    outcomes = {"outcomes": [0, 0, 1, 1] * 6, "concept_outcomes": [0, 1] * 12, "oracle_outcomes": [0, 1] * 12, "oracle_r2": 0.97}
    outcomes |= {"oracle_related": 1.0, "double": False, "made_of": 2}
    return {"word": word, **base, **outcomes, **fields}


def test_a_natural_row() -> None:
    words = [natural("bird"), natural("fruit", outcomes=[-1] * 24, hits=0, r2=0.5), natural("joy", outcomes=None, made_of=3)]
    row = natural_row([*words, natural("crane", double=True, hits=1, outcomes=None)])
    assert row["related"] == pytest.approx(4 / 6) and row["n"] == 6  # words for two things at once are apart
    assert row["related_doubles"] == 0.5 and row["coverage"] == pytest.approx(4 / 7) and row["each"][2]["coverage"] == pytest.approx(2 / 3)
    assert row["related_interval"][0] < 4 / 6 < row["related_interval"][1]
    assert [word["tv"] for word in row["each"]] == [0, 1, None, None] and row["tv"] == 0.5
    assert row["oracle_tv"] == 0 and 0 < row["tv_floor"] < 0.4
    assert row["evals"] == 1000 == row["evals_max"]


def draw(number: int, **fields: Any) -> dict[str, Any]:
    base = {"planted": [["red", 0.7], ["star", 0.3]], "found": [["red", 1.0]], "hits": 2, "weight_corr": 0.95, "r2": 0.9}
    return {"draw": number, **base, "perturbation_effect": None, "method_evals": 1200, "seconds": 3.0, **fields}


def row_of(method: str, set_: str, figures: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return method_row(method, set_, "shapes", fields.pop("half", None), [], frozenset(), {**figures, "peak_mb": None, **fields})


def test_rows_have_every_column_and_their_intervals_hold_the_estimates() -> None:
    figures = planted_row([draw(0), draw(1, hits=1, weight_corr=0.5)])
    row = row_of("distilled", "planted", figures)
    assert tuple(row) == (*COLUMNS, "intervals", "each")
    assert row["recall_at_k"] == 0.75 and row["related"] is None and row["tv"] is None
    for name, interval in row["intervals"].items():
        assert interval is None or interval[0] <= row[name] <= interval[1]
    assert json.dumps(row, allow_nan=False)


def test_bars_are_judged_where_the_oracle_reaches_them() -> None:
    suite = DecomposeSuite()
    words = [natural("bird"), natural("fruit", oracle_r2=0.4, r2=0.1, oracle_outcomes=[-1] * 24, outcomes=[-1] * 24)]
    words += [natural("joy", hits=0, oracle_related=2 / 3), natural("crane", double=True, hits=1)]
    rows = [row_of("distilled", "planted", planted_row([draw(0), draw(1, method_evals=1501)]))]
    rows += [row_of("distilled", "natural", natural_row(words), half="held out")]
    rows += [row_of("conceptor", "planted", planted_row([draw(1, hits=1, r2=0.5, method_evals=40_000)]))]
    bars = {bar.bar: bar for bar in suite.bars(rows)}
    judged = next(bar for name, bar in bars.items() if "held-out R2 at least" in name)
    assert judged.met is True and "3 of 4 words; not judged: fruit" in judged.value
    judged = next(bar for name, bar in bars.items() if "related at least" in name)
    # every word for one thing, whatever the oracle says of it
    assert judged.met is False and judged.value.startswith("0.667") and "n = 6" in judged.value
    assert "two things at once: 0.50" in judged.value
    assert next(bar for name, bar in bars.items() if "tv at most" in name).met is True
    assert bars["planted, every draw within 1,500 evals"].met is False
    better = bars["planted, better recall than conceptor, published or tuned"]
    assert better.met is True and "0.50 (conceptor) on the same 1 draws" in better.value
    assert bars["at most 1/20 of the evals conceptor was published with"].met is True
    assert bars["peak memory at most 1 GiB"].met is None


def test_the_ablation_is_measured_where_it_is_asked_for_on_dictionaries_of_every_size() -> None:
    name = next(iter(methods.ABLATIONS))
    jobs = [job for job in DecomposeSuite(second="demo-second", methods=(name,)).jobs() if job.measure in MEASURES]
    assert {job.arguments["method"] for job in jobs} == {"distilled", name}  # beside the whole method, on the same words
    assert {job.arguments["decoys"] for job in jobs if "draw" in job.arguments} == set(suite_module.ABLATION_DECOYS)
    assert {job.arguments["world"] for job in jobs} == {"shapes", "second"}
    assert not set(halves(shapes_world())[1]) & {job.arguments.get("word") for job in jobs}  # nothing that is held out
    assert all("decoys" not in job.arguments for job in DecomposeSuite().jobs())


def test_the_stronger_baseline_is_the_one_to_beat() -> None:
    """In each figure by itself, over the draws that both sides have."""
    rows = [row_of("distilled", "planted", planted_row([draw(0, hits=1), draw(1), draw(2)]))]
    rows += [row_of("conceptor", "planted", planted_row([draw(0, hits=2, r2=-1.0), draw(1, hits=2, r2=0.1)]))]
    rows += [row_of("conceptor-tuned", "planted", planted_row([draw(1, hits=0, r2=0.95), draw(7, r2=-9.0)]))]
    bars = {bar.bar: bar for bar in DecomposeSuite().bars(rows)}
    recall = bars["planted, better recall than conceptor, published or tuned"]
    assert recall.met is False and recall.value == "0.75 against 1.00 (conceptor) on the same 2 draws"
    r2 = bars["planted, better held-out R2 than conceptor, published or tuned"]
    assert r2.met is False and r2.value == "0.90 against 0.95 (conceptor-tuned) on the same 1 draws"
    alone = [bar for bar in DecomposeSuite().bars(rows[:1]) if "conceptor" in bar.bar]
    assert alone == []


def test_baselines_are_called_as_published_and_as_tuned_at_the_same_evals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both rows run the one method: what differs is in the job, so that its hash follows; neither is planned to spend more."""
    called: list[dict[str, Any]] = []

    def recorded(*given: Any, **options: Any) -> Decomposition:
        called.append(options)
        raise InterruptedError

    monkeypatch.setattr(measures, "decompose_concept", recorded)
    suite = DecomposeSuite(methods=BASELINES)
    for set_ in ("planted", "natural"):
        jobs = {
            method: next(job for job in suite.jobs() if (job.arguments.get("method"), job.arguments.get("set_")) == (method, set_))
            for method in BASELINES
        }
        for method, job in jobs.items():
            with pytest.raises(InterruptedError):
                job.measure(**job.arguments)
            settings = called[-1]["settings"]
            assert called[-1]["method"] == "conceptor" and settings["sampler_steps"] == 12
            assert (method == "conceptor") is (set(settings) == {"sampler_steps"})
            assert job.baseline and job.isolated
        published, tuned = called[-2:]
        assert published["words"] == 50 and tuned["words"] == (6 if set_ == "planted" else 5)
        assert jobs["conceptor-tuned"].evals <= jobs["conceptor"].evals


def test_quick_fits_and_never_drops_the_default_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(frame, "DATA", tmp_path)
    plan = frame.plan(DecomposeSuite(), None)
    assert plan.evals <= 150_000 == SIZES["quick"].limit
    assert {job.arguments.get("method") for job in plan.dropped} <= {None, *BASELINES}
    assert all(job.baseline for job in plan.dropped)
    assert {job.measure.__name__ for job in plan.fresh} >= {"measure_planted", "measure_natural", "measure_concept"}
    assert frame.plan(DecomposeSuite("full"), None).dropped == ()


@dataclass(frozen=True)
class Measured:
    """A suite that has run: its report, and the folder of its single measurements."""

    suite: DecomposeSuite
    report: dict[str, Any]
    parts: Path

    def results(self, function: str) -> list[dict[str, Any]]:
        jobs = [job for job in self.suite.jobs() if job.measure.__name__ == function]
        return [json.loads((self.parts / f"{job.key}.json").read_text())["result"] for job in jobs]


@pytest.fixture(scope="module")
def little(thrifty: dict[str, int]) -> Iterator[None]:
    """As little of everything as a measurement takes."""
    whole = measures.decompose_concept

    def less(*given: Any, **options: Any) -> Decomposition:
        settings = thrifty if options["method"] == "distilled" else {}
        return whole(*given, **options | {"settings": settings, "words": 2})

    size = replace(SIZES["quick"], planted=3, exact=1, pictures=2, text_pictures=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "decompose_concept", less)
        for name, value in (("FIDELITY_PICTURES", 1), ("STEPS", 2), ("DECOYS", 6), ("ORACLE", 2), ("SIZES", {"quick": size})):
            for module in (worlds, measures, suite_module):
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def measured(little: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """All kinds of measurements of a random model, of one natural word, by the cheapest method."""
    suite = DecomposeSuite(model=str(checkpoint), methods=("text",))
    wanted = [job for job in suite.jobs() if job.arguments.get("word", "crane") == "crane" and not job.isolated]
    suite.__dict__["_jobs"] = tuple(wanted)
    parts = tmp_path_factory.mktemp("parts")
    return Measured(suite, frame.run(suite, parts, processes=0, say=str), parts)


def test_measurements_of_a_random_model(measured: Measured, checkpoint: Path) -> None:
    made = measures.measure_planted(str(checkpoint), "shapes", "distilled", "planted", 0)
    assert len(made["planted"]) == 2 and made["method_evals"] > 0
    three, four, exact = measured.results("measure_planted")
    assert [len(result["planted"]) for result in (three, four, exact)] == [3, 4, 2]
    for result in (made, three, four, exact):
        assert 0 <= result["hits"] <= len(result["planted"]) and result["r2"] <= 1
        assert result["evals"] > result["method_evals"] >= 0
    assert made["perturbation_effect"] > 0 < three["perturbation_effect"] and exact["perturbation_effect"] is None
    word, _ = measured.results("measure_natural")
    for result in (word, *measured.results("measure_oracle"), *measured.results("measure_concept")):
        assert len(result["outcomes"]) == 2 and set(result["outcomes"]) <= {-1, 0}
        assert result["evals"] >= 8
    assert "crane" not in [w for w, _ in word["found"]]


def test_a_whole_suite_on_a_random_model(measured: Measured) -> None:
    report = measured.report
    assert {(row["set"], row["half"]) for row in report["rows"]} == {
        ("planted", None),
        ("planted_exact", None),
        *((set_, "held out") for set_ in ("natural", "natural_decoys")),
    }
    assert all(tuple(row)[: len(COLUMNS)] == COLUMNS for row in report["rows"])
    assert report["run"]["evals"] <= report["run"]["planned_evals"]
    assert frame.plan(measured.suite, measured.parts).fresh == ()
