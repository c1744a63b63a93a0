"""What a model's words are to a concept, by its text alone, and that of several concepts none takes another's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from conceptkit.core.bench.edit.cases import of_a_kind
from conceptkit.core.bench.edit.measures import measure_kinds
from conceptkit.core.demo.world import shapes_world
from conceptkit.core.edit import Concept, solve_edit
from conceptkit.core.edit.job import Job, Parts
from conceptkit.core.edit.joint import DEFAULT, _targets, anchors
from conceptkit.core.edit.report import Report
from conceptkit.core.edit.words import SYNONYM, Words
from conceptkit.core.hosts.diffusers import load_model
from conceptkit.core.model import Model
from hypothesis import given, settings
from hypothesis import strategies as st

WORLD = shapes_world()
WORDS = tuple(word.text for word in WORLD.by_role("shape", "exemplar", "category", "occupation", "sex", "colour"))


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model("demo")


@pytest.fixture(scope="module")
def asked(demo: Model) -> Callable[..., Job]:
    """Jobs on the demo model that share what was encoded and what was found of each word."""
    first = Job(demo, ())
    gram, known = first.gram, Words(first)

    def job(concepts: Sequence[str], parts: Parts = "keep", keep: tuple[str, ...] = ()) -> Job:
        listed = [Concept(*(part.strip() for part in concept.split("->"))) for concept in concepts]
        made = Job(demo, tuple(listed), keep, parts=parts)
        made.__dict__ |= {"texts": first.texts, "gram": gram, "words": known}
        return made

    return job


def test_what_a_word_is_to_a_concept(asked: Callable[..., Job]) -> None:
    words = asked([]).words
    assert words.kin("circle").synonyms == ("disk",) and words.kin("doctor").synonyms == ("physician",)
    assert {"robin", "raven"} <= set(words.kin("bird").parts) and "finch" in words.kin("bird").bound
    assert "bird" in words.kin("robin").holders and "raven" not in words.kin("robin").parts
    assert "joy" in words.kin("star").holders and "vehicle" in words.kin("car").holders
    for concept in ("circle", "bird", "doctor"):
        kin = words.kin(concept)
        sorted_out = [*kin.synonyms, *kin.bound, *kin.others]
        assert len(set(sorted_out)) == len(sorted_out) == len(words.looked_at(concept)) and concept not in sorted_out
        assert set(kin.parts) | set(kin.holders) <= set(kin.bound)


@pytest.mark.parametrize("pair", [("circle", "square"), ("man", "woman"), ("red", "crimson"), ("robin", "raven"), ("circle", "disk")])
def test_no_concept_is_read_as_another_of_the_call(asked: Callable[..., Job], pair: tuple[str, str]) -> None:
    meant = {WORLD.words[text].synonym_of or text for text in pair}
    for target in _targets(asked(pair), DEFAULT):
        anchor = WORLD.words[target.anchor]
        assert (anchor.synonym_of or anchor.text) not in meant
        # Nor is a word kept that is erased with the other.
        kept = {WORLD.words[word].synonym_of or word for word in (*target.siblings, *target.related)}
        assert not kept & meant


@settings(max_examples=25, deadline=None)
@given(concepts=st.lists(st.sampled_from(WORDS), min_size=2, max_size=5, unique=True))
def test_of_any_concepts_none_takes_another_s_place(asked: Callable[..., Job], concepts: list[str]) -> None:
    job = asked(concepts)
    targets = _targets(job, DEFAULT)
    erased = {*concepts, *(word for target in targets for word in target.synonyms)}
    for target in targets:
        assert target.anchor and not {target.anchor, *target.siblings, *target.related} & erased
        for concept in concepts:
            kin = job.words.kin(concept)
            assert float(job.words.distances(concept, [target.anchor])) > SYNONYM
            assert target.anchor not in (*kin.parts, *kin.holders)
    # A word that means the same as two concepts goes with one of them.
    assert len(erased) == len(concepts) + sum(len(target.synonyms) for target in targets)


@pytest.mark.parametrize(("model", "world", "before"), [("demo", "shapes", 23 / 52), ("demo-second", "second", 15 / 39)])
def test_what_is_drawn_instead_is_of_the_concept_s_kind(model: str, world: str, before: float) -> None:
    """before: what the word that costs other texts least reached, of those as far from the concept as now."""
    words = measure_kinds(model, world, 0)["words"]
    plain = [word["kind"] for word in words if word["role"] in ("shape", "exemplar", "occupation")]
    assert sum(word["kind"] for word in words) / len(words) >= before + 0.2
    assert sum(plain) / len(plain) >= 0.75


def test_words_that_were_read_as_another_kind(asked: Callable[..., Job]) -> None:
    for concept in ("doctor", "moon", "heart", "castle"):
        (anchor,) = anchors(asked([concept]))
        assert of_a_kind(WORLD, concept, anchor), f"{concept} is read as {anchor}"


def test_the_words_of_a_phrase_neither_go_with_it_nor_take_its_place(asked: Callable[..., Job]) -> None:
    for phrase in ("red circle", "circle and square"):
        (target,) = _targets(asked([phrase]), DEFAULT)
        assert target.anchor and not {target.anchor, *target.synonyms} & set(phrase.split())


def test_a_kind_is_a_role_without_what_is_part_of_it() -> None:
    assert of_a_kind(WORLD, "doctor", "woman") and of_a_kind(WORLD, "doctor", "person") and not of_a_kind(WORLD, "doctor", "physician")
    assert of_a_kind(WORLD, "circle", "box") and not of_a_kind(WORLD, "circle", "disk") and not of_a_kind(WORLD, "circle", "red")
    assert of_a_kind(WORLD, "bird", "car") and not of_a_kind(WORLD, "bird", "robin") and not of_a_kind(WORLD, "robin", "bird")
    assert not of_a_kind(WORLD, "circle", "") and not of_a_kind(WORLD, "circle", "unheard")


def test_parts_stay_unless_asked_to_go(asked: Callable[..., Job]) -> None:
    (kept,), (erased,) = (_targets(asked(["bird"], parts), DEFAULT) for parts in ("keep", "erase"))
    assert {"robin", "raven"} <= set(kept.related) and not kept.synonyms
    assert {"robin", "raven"} <= set(erased.synonyms) and not {"robin", "raven"} & {*erased.related, *erased.siblings}
    (robin,) = _targets(asked(["robin"], "erase"), DEFAULT)
    assert "bird" in robin.related and "bird" not in robin.synonyms
    (named,) = _targets(asked(["bird"], "erase", keep=("robin",)), DEFAULT)
    assert "robin" not in named.synonyms and "raven" in named.synonyms


def test_parts_are_moved_less_where_they_stay_and_the_report_names_them(demo: Model) -> None:
    kept, erased = (solve_edit(demo, ["bird"], parts=parts) for parts in ("keep", "erase"))
    assert kept.report is not None and erased.report is not None
    moved = {word.word: word.shift for word in kept.report.related}
    assert {"robin", "raven"} <= set(moved) and moved["robin"] < 0.3
    assert not {"robin", "raven"} & {word.word for word in (*kept.report.neighbours, *erased.report.related)}
    assert "parts and wider words: " in kept.summary() and "robin with bird" in erased.summary()
    assert (kept.settings["parts"], erased.settings["parts"]) == ("keep", "erase")
    assert Report.from_json(kept.report.to_json()) == kept.report


def test_parts_that_make_no_sense(demo: Model) -> None:
    with pytest.raises(ValueError, match="parts is 'all': choose one of keep, erase"):
        solve_edit(demo, ["bird"], parts="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'uce-2025' erases no parts of a concept"):
        solve_edit(demo, ["bird"], method="uce-2025", parts="erase")


@pytest.mark.parametrize("method", ["conceptkit", "uce-2025"])
def test_a_replacement_that_brings_an_erased_word_back_is_named(demo: Model, method: str) -> None:
    edit = solve_edit(demo, ["circle -> box", "square", "robin -> bird"], method=method)
    assert edit.report is not None
    said = {(clash.concept, clash.anchor, clash.word): clash.same for clash in edit.report.clashes}
    assert said["circle", "box", "square"] is True and said["robin", "bird", "robin"] is False
    about = [warning for warning in edit.warnings if "replacement" in warning]
    assert "'circle' is read as 'box', which means the same as 'square', and that is erased: name another replacement" in about
    assert "'robin' is read as 'bird', which is in some images 'robin', and that is erased: name another replacement" in about
    assert Report.from_json(edit.report.to_json()) == edit.report


def test_what_is_drawn_instead_is_said(demo: Model) -> None:
    edit = solve_edit(demo, ["circle", "square"])
    assert all(f", {anchor} instead" in edit.headline() for anchor in edit.anchors) and not edit.report.clashes  # type: ignore[union-attr]
    assert f"circle (read as {edit.anchors[0]!r})" in edit.summary() and "disk with circle" in edit.summary()
    assert "instead" not in replace(edit, anchors=("", "")).headline()
