"""Candidate words: what counts as a word, what is too close to the concept, and how a limit is met."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conceptkit.core.vocabulary import candidates, choose_candidates, digest, is_known, is_unsafe, similarity, stem, token_of, whole_words
from torch.nn.functional import normalize

TOKENS = [
    f"{word}</w>" for word in ("a", "the", "with", "bird", "birds", "birding", "robin", "Robin", "finch", "2024", "red", "reddish", "crane")
]
TOKENS += ["rob", "in</w>"]
TOKENS += [f"filler{a}{b}</w>" for a in "abcde" for b in "abcde"] + [f"{c}" for c in "bcdxyz"] + [f"{c}</w>" for c in "bcdxyz"]


class Text:
    """A text encoder of whole words; an unknown word falls into its letters."""

    def __init__(self, tokens: list[str] = TOKENS) -> None:
        self.vocabulary = {token: index for index, token in enumerate(tokens)}
        generator = torch.Generator().manual_seed(0)
        self.tables = {name: torch.randn(len(tokens), width, generator=generator) for name, width in (("l", 16), ("g", 24))}

    def tokenize(self, text: str) -> list[int]:
        ids = []
        for word in text.lower().split():
            pieces = [word + "</w>"] if word + "</w>" in self.vocabulary else list(word)
            ids += [self.vocabulary.get(piece, 0) for piece in pieces]
        return ids


def test_whole_words_are_visible_lower_case_words_in_vocabulary_order() -> None:
    words = whole_words(Text())  # type: ignore[arg-type]
    assert list(words)[:5] == ["bird", "birds", "birding", "robin", "finch"]
    assert not {"a", "the", "with", "Robin", "rob", "in", "2024", "x"} & set(words)
    assert all(Text().vocabulary[word + "</w>"] == index for word, index in words.items())


@pytest.mark.parametrize(
    "forms",
    [
        "bird birds",
        "run runs running",
        "red redder reddish",
        "baby babies",
        "wolf wolves",
        "wave waves",
        "wife wives",
        "man men",
        "box boxes",
        "happy happier happiest",
        "glass glasses",
        "horse horses",
        "paint painter painting painted",
        "person people",
        "church churches",
    ],
)
def test_inflections_share_a_stem(forms: str) -> None:
    assert len({stem(form) for form in forms.split()}) == 1


@pytest.mark.parametrize(
    "pair", ["bird robin", "king ring", "bus bush", "star start", "car card", "cat caterer", "circle circus", "fish finch"]
)
def test_different_words_keep_different_stems(pair: str) -> None:
    first, second = pair.split()
    assert stem(first) != stem(second)


def test_the_concept_and_its_near_copies_are_left_out_unless_kept() -> None:
    text = Text()
    assert not {"bird", "birds", "birding"} & set(candidates(text, "Bird", limit=100))  # type: ignore[arg-type]
    assert {"bird", "birds", "birding"} <= set(candidates(text, "bird", limit=100, keep_concept=True))  # type: ignore[arg-type]
    assert not {"red", "reddish", "bird", "birds"} & set(candidates(text, "red bird", limit=100))  # type: ignore[arg-type]
    for name, table in text.tables.items():
        table[text.vocabulary["robin</w>"]] = 2 * table[text.vocabulary["finch</w>"]]
        assert name
    assert "robin" not in candidates(text, "finch", limit=100)  # type: ignore[arg-type]
    assert "finch" in candidates(text, "crane", limit=100, words=["finch", "robin"])  # type: ignore[arg-type]


def test_a_limit_keeps_the_nearest_embeddings() -> None:
    text = Text()
    words = candidates(text, "crane", limit=7)  # type: ignore[arg-type]
    everything = candidates(text, "crane", limit=1000)  # type: ignore[arg-type]
    cosines = dict(zip(everything, similarity(text, list(everything.values()), text.tokenize("crane"))[:, 0].tolist(), strict=True))  # type: ignore[arg-type]
    assert list(words) == sorted(everything, key=lambda word: -cosines[word])[:7]
    l, g = (normalize(text.tables[name], dim=1) for name in "lg")  # noqa: E741
    i, j = text.vocabulary["robin</w>"], text.vocabulary["crane</w>"]
    assert cosines["robin"] == pytest.approx(float((l[i] @ l[j] + g[i] @ g[j]) / 2), abs=1e-6)


def test_a_given_list_is_kept_in_order_and_checked() -> None:
    text = Text()
    assert list(candidates(text, "crane", limit=10, words=["red", "Finch", "bird", "red"])) == ["red", "finch", "bird"]  # type: ignore[arg-type]
    assert list(candidates(text, None, limit=10, words=["red", "bird"], exclude=["Bird"])) == ["red"]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not a single token.*flamingo"):
        candidates(text, "crane", limit=10, words=["red", "flamingo"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no candidate words are left"):
        candidates(text, "bird", limit=10, words=["birds", "bird"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit"):
        candidates(text, "bird", limit=0)  # type: ignore[arg-type]


def test_a_concept_is_known_when_the_tokenizer_joins_its_letters() -> None:
    text = Text()
    assert is_known(text, "bird") and is_known(text, "Bird!") and is_known(text, "xyz bird") and is_known(text, "x")  # type: ignore[arg-type]
    assert not is_known(text, "xyz") and not is_known(text, "  ") and not is_known(text, "?!")  # type: ignore[arg-type]


def test_names_and_offensive_words_are_left_out_unless_wanted_and_the_result_says_so() -> None:
    text = Text([*TOKENS, "obama</w>", "marias</w>", "shit</w>"])
    chosen = choose_candidates(text, "bird", limit=100, exclude=["red", "missing"])  # type: ignore[arg-type]
    assert not {"obama", "marias", "shit", "red", "bird", "birds"} & set(chosen.words)
    assert chosen.excluded == "3 forms of 'bird' (bird, birds, birding); 3 personal names and offensive words; 1 word by request"
    open_ = choose_candidates(text, "bird", limit=100, exclude_unsafe=False, keep_concept=True)  # type: ignore[arg-type]
    assert {"obama", "marias", "shit", "bird"} <= set(open_.words) and open_.excluded == ""
    listed = choose_candidates(text, "bird", limit=9, words=["obama", "finch"])  # type: ignore[arg-type]
    assert list(listed.words) == ["finch"] and listed.excluded == "1 personal name or offensive word"


def test_what_counts_as_unsafe() -> None:
    assert all(is_unsafe(word) for word in ("Michael", "maria", "picasso", "einsteins", "Fuck", "bitches"))
    ordinary = "robin rose violet swift homer iris jade hunter turner grace gates viola roman moses ring cross class mass glass bass"
    assert [word for word in ordinary.split() if is_unsafe(word)] == ["moses"]


def test_offensive_words_stand_in_the_repository_as_digests_only(root: Path) -> None:
    lines = (root / "core" / "data" / "offensive.txt").read_text("utf-8").splitlines()
    digests = " ".join(line for line in lines if not line.startswith("#")).split()
    assert len(digests) > 100 and len(set(digests)) == len(digests) and all(re.fullmatch("[0-9a-f]{12}", entry) for entry in digests)
    assert digest("Shit ") == digest("shit") and digest("shit") in digests and digest("ship") not in digests


def test_a_token_is_looked_up_by_its_word() -> None:
    text = Text()
    assert token_of(text, " Bird ") == text.vocabulary["bird</w>"]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="single token"):
        token_of(text, "flamingo")  # type: ignore[arg-type]


def test_words_come_in_the_order_of_their_ids_whatever_the_vocabulary_s() -> None:
    text, shuffled = Text(), Text()
    shuffled.vocabulary = dict(reversed(shuffled.vocabulary.items()))
    assert list(whole_words(text).items()) == list(whole_words(shuffled).items())  # type: ignore[arg-type]
