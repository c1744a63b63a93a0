"""The one parser of lists: what separates, what repeats, what a comment is, and that no item is lost, invented or misread silently."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from conceptkit.core.edit import Concept
from conceptkit.core.edit.job import Job
from conceptkit.core.phrases import items, parse_adjustments, parse_concepts, parse_list, plain
from conceptkit.core.vocabulary import choose_candidates
from hypothesis import example, given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
PARSERS = (parse_list, parse_concepts, parse_adjustments)

words = st.text("abcABCß", min_size=1, max_size=4)
phrases = st.lists(words, min_size=1, max_size=3).map(" ".join)
marked = st.lists(st.one_of(words, st.sampled_from([",", ";", "#", "->", ", "])), min_size=1, max_size=5).map(" ".join)
"""Phrases that hold what would separate them, unless they are quoted."""
separators = st.sampled_from([",", ";", "\n", " , ", "\r\n", ",,", "\n\n", ";\n", "\u3001", " # a, b -> c\n"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" \n,;\n# nothing\n", ()),
        ("circle, square", ("circle", "square")),
        ("circle\nsquare;red", ("circle", "square", "red")),
        ("  red   bird ,\tring", ("red bird", "ring")),
        ("Circle, circle\nCIRCLE, ring", ("Circle", "ring")),
        ("circle # round, square\nring", ("circle", "ring")),
        ("C#, b#c", ("C#", "b#c")),
        ('"a dog, running", cat', ("a dog, running", "cat")),
        ('"one # two -> three; four"', ("one # two -> three; four",)),
        ('12" disc, vinyl', ('12" disc', "vinyl")),
        ("\u201ca dog, running\u201d\uff0ccat\uff1bbird", ("a dog, running", "cat", "bird")),
        ("well-being, rock-and-roll", ("well-being", "rock-and-roll")),
        ('"", " ", x', ("x",)),
    ],
)
def test_what_separates_and_what_does_not(text, expected):
    assert parse_list(text) == expected
    assert [concept.text for concept in parse_concepts(text)] == list(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("circle -> square, red -> green", (Concept("circle", "square"), Concept("red", "green"))),
        ("circle->square\nred", (Concept("circle", "square"), Concept("red"))),
        ("circle => square; red --> green; ring \u2192 moon", tuple(map(Concept, ("circle", "red", "ring"), ("square", "green", "moon")))),
        ('"a dog, running" -> "a cat; asleep"', (Concept("a dog, running", "a cat; asleep"),)),
        ("circle -> square, Circle ->  Square", (Concept("circle", "square"),)),
    ],
)
def test_concepts_with_replacements(text, expected):
    assert parse_concepts(text) == expected


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_concepts, "circle\n-> square", "line 2, '-> square': write 'concept -> replacement'"),
        (parse_concepts, "red, circle ->, ring", "line 1, 'circle ->': write"),
        (parse_concepts, "a -> b -> c", "line 1, 'a -> b -> c': write"),
        (parse_concepts, "circle, circle -> square", "'circle' is listed twice, as 'circle' and as 'circle -> square'"),
        (parse_concepts, "circle -> ring\ncircle -> square", "listed twice"),
        (parse_concepts, [Concept("circle"), "Circle -> ring"], "listed twice"),
        (parse_list, "ring, moon -> sun", "line 1, 'moon -> sun': an arrow has no meaning in this list"),
        *((parse, '\n"a dog, b', "line 2, '\"a dog, b': put quotation marks around a whole phrase") for parse in PARSERS),
        *((parse, 'x: 1, "a" dog', "line 1, '\"a\" dog': put quotation marks") for parse in PARSERS),
    ],
)
def test_what_cannot_be_read_is_named(parse, text, message):
    with pytest.raises(ValueError) as refusal:
        parse(text)
    assert message in str(refusal.value)


def distinct(listed):
    """The first of each phrase, whatever its case and spaces."""
    found = {}
    for phrase in listed:
        found.setdefault(plain(phrase), " ".join(phrase.split()))
    return tuple(found.values())


@given(st.lists(st.tuples(phrases, separators), max_size=8))
def test_items_come_out_in_order_without_repeats_whatever_separates_them(typed):
    """Against a reference that never sees the text: what was joined is what comes out."""
    listed = [phrase for phrase, _ in typed]
    assert parse_list("".join(map("".join, typed))) == distinct(listed)


@given(st.lists(st.tuples(marked, separators), max_size=6))
@example([("a # b", ","), ("->", ";")])
def test_quoted_phrases_come_out_as_they_are(typed):
    text = "".join(f'"{phrase}"{separator}' for phrase, separator in typed)
    assert parse_list(text) == distinct([phrase for phrase, _ in typed])
    pairs = "".join(f'"{phrase}" -> "{phrase}"{separator}' for phrase, separator in typed)
    assert [(c.text, c.replacement) for c in parse_concepts(pairs)] == [(phrase, phrase) for phrase in distinct([p for p, _ in typed])]


@given(st.lists(marked, max_size=6))
def test_a_sequence_holds_phrases_as_they_are_and_reading_it_again_changes_nothing(listed):
    once = parse_list(listed)
    assert once == distinct(listed) == parse_list(once) == parse_list(iter(listed))


@given(st.lists(phrases, max_size=6), st.lists(phrases, max_size=6))
def test_concepts_are_read_alike_from_a_text_from_arguments_and_from_objects(listed, others):
    with contextlib.suppress(ValueError):
        text = [f"{a} -> {b}" for a, b in zip(listed, others, strict=False)] + listed[len(others) :]
        found = parse_concepts("\n".join(text))
        assert found == parse_concepts(", ".join(text)) == parse_concepts(text) == parse_concepts(found)
        assert found == parse_concepts([concept if i % 2 else str(concept) for i, concept in enumerate(found)])


@given(st.text('ab ,;#"->=\n\u2192\u201c', max_size=40))
def test_any_text_is_read_or_refused_and_nothing_is_lost(text):
    """Every letter outside of comments is in an item, and an item's text is on its line."""
    try:
        found = items(text)
    except ValueError:
        assert '"' in text or "\u201c" in text, "only quotation marks make a list unreadable"
        return
    lines = text.replace("\u201c", '"').splitlines()
    assert all(item.text in lines[item.line - 1] for item in found)
    if "#" not in text:
        assert "".join("".join(item.sides) for item in found).count("a") == text.count("a")
    for parse in (parse_list, parse_concepts):
        with contextlib.suppress(ValueError):
            parsed = parse(text)
            assert len({plain(str(entry)) for entry in parsed}) == len(parsed)


class Text:
    """Words of one token."""

    def __init__(self):
        self.vocabulary = {f"{word}</w>": index for index, word in enumerate(["ring", "moon", "star", "r", "i"])}
        self.tables = {"l": torch.eye(5)}

    def tokenize(self, text):
        return [self.vocabulary[f"{word}</w>"] for word in text.split() if f"{word}</w>" in self.vocabulary]


@pytest.mark.parametrize("given", ["moon, Star", "moon\nstar;moon", ["moon", " STAR "]])
def test_a_text_is_never_split_into_letters(given):
    assert list(choose_candidates(Text(), "ring", limit=9, words=given).words) == ["moon", "star"]
    left = choose_candidates(Text(), "ring", limit=9, words="ring, moon, star, r, i", exclude=given)
    assert list(left.words) == ["r", "i"] and left.excluded.endswith("2 words by request")


def test_words_that_would_exclude_nothing_are_refused():
    with pytest.raises(ValueError, match="'moon star' excludes none: separate its words by commas or lines"):
        choose_candidates(Text(), "ring", limit=9, words="ring, moon, star", exclude="moon star")
    with pytest.raises(ValueError, match="not a single token of this text encoder: moon star"):
        choose_candidates(Text(), "ring", limit=9, words="moon star")
    with pytest.raises(ValueError, match="exclude fewer words"):
        choose_candidates(Text(), "ring", limit=9, words="moon", exclude="moon")


def test_captions_are_no_text():
    class Model:
        text = Text()

    with pytest.raises(ValueError, match="give a list of texts"):
        Job(Model(), (), captions="a moon")  # type: ignore[arg-type]


def test_lists_are_read_nowhere_else():
    """A separator written elsewhere is a second parser."""
    for path in [*ROOT.glob("core/**/*.py"), *ROOT.glob("nodes/*.py")]:
        source = path.read_text("utf-8")
        if path.name != "phrases.py":
            assert '.split(",")' not in source and "[,\\n]" not in source and "[^,\\s]" not in source, path
