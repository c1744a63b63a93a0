"""Adjusting by lines of text, and pictures word by word."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conceptkit.core.decompose import Decomposition
from conceptkit.core.decompose.adjust import adjust, parse_adjustments
from conceptkit.core.decompose.pictures import picture_sheet, word_pictures
from conceptkit.core.model import Conditioning, Model
from hypothesis import given
from hypothesis import strategies as st

WORDS = ["a", "bird", "robin", "finch", "raven", "crow", "flame"]


class Text:
    """A prompt is the sum of its words' rows."""

    def __init__(self) -> None:
        self.vocabulary = {f"{word}</w>": index for index, word in enumerate(WORDS)}
        self.tables = {"l": torch.randn(len(WORDS), 8, generator=torch.Generator().manual_seed(0))}

    def encode(self, prompts):
        rows = []
        for prompt in prompts:
            parts = [prompt] if isinstance(prompt, str) else prompt
            texts = [self.tables["l"][self.vocabulary[f"{word}</w>"]][None] for p in parts if isinstance(p, str) for word in p.split()]
            rows.append(sum([*texts, *(p["l"] for p in parts if not isinstance(p, str))], torch.zeros(1, 8)))
        return Conditioning(torch.stack(rows))


def found(words=("robin", "finch", "raven"), shares=(0.5, 0.3, 0.2)):
    ids = [WORDS.index(word) for word in words]
    return Decomposition(
        concept="bird",
        template="a {}",
        words=tuple(words),
        ids=tuple(ids),
        alpha=torch.tensor(shares),
        importance=None,
        fidelity=None,
        embeddings={"l": Text().tables["l"][ids]},
        norms={"l": 2.0},
        method="text",
        seed=0,
        seeds=(),
        heldout_seeds=(),
        settings={},
        candidates=5,
        restarts=(),
        evals=0,
        calls=0,
    )


def shares(decomposition):
    return {word: round(share, 4) for word, share in zip(decomposition.words, decomposition.shares, strict=True)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"robin": 0.5, "finch": 0.3, "raven": 0.2}),
        ("robin: 1\nFinch : 1.0", {"robin": 0.5, "finch": 0.3, "raven": 0.2}),
        ("robin: 0", {"finch": 0.6, "raven": 0.4}),
        ("robin: 0\nfinch: 2", {"finch": 0.75, "raven": 0.25}),
        ("+flame: 20%", {"robin": 0.4, "finch": 0.24, "flame": 0.2, "raven": 0.16}),
        ("+ flame : 0.2 # hot\n\n# nothing", {"robin": 0.4, "finch": 0.24, "flame": 0.2, "raven": 0.16}),
        ("raven -> crow", {"robin": 0.5, "finch": 0.3, "crow": 0.2}),
        ("raven->finch", {"robin": 0.5, "finch": 0.5}),
        ("+flame: 0.5\nrobin: 0", {"flame": 0.5, "finch": 0.3, "raven": 0.2}),
        ("+flame: 20%\n+crow: 20%", {"robin": 0.3, "flame": 0.2, "crow": 0.2, "finch": 0.18, "raven": 0.12}),
        ("+crow: 20%; +flame: 20%", {"robin": 0.3, "crow": 0.2, "flame": 0.2, "finch": 0.18, "raven": 0.12}),
        ("+crow: 20%, raven -> crow", {"robin": 0.5, "finch": 0.3, "crow": 0.2}),
        ("+robin: 20%, +crow: 50%, finch: 0", {"crow": 0.5, "raven": 0.3, "robin": 0.2}),
        ("robin: 0, Robin : 0.0", {"finch": 0.6, "raven": 0.4}),
    ],
)
def test_lines_do_what_they_say(text, expected):
    assert shares(adjust(found(), Text(), parse_adjustments(text))) == expected


def test_no_change_is_the_same_object():
    before = found()
    assert adjust(before, Text(), parse_adjustments("robin: 1\nraven: 100%")) is before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("robin", r"line 1, 'robin': write `word: factor`, `\+word: share` or `old -> new`"),
        ("\n: 2", "line 2, ': 2': write"),
        ("robin:", "line 1, 'robin:': write"),
        ("-> crow", "line 1, '-> crow': write"),
        ("robin: x", "line 1, 'robin: x': 'x' is not a number"),
        ("robin: nan", "line 1, 'robin: nan': 'nan' is not a number that can be used: write a finite one"),
        ("robin: -inf", "'-inf' is not a number that can be used"),
        ("robin: -1", "write 0 to remove one"),
        ("+crow: 0", r"a share lies between 0 and 1, as in `\+crow: 0.2`"),
        ("+crow: 100%", "a share lies between 0 and 1"),
        ("robin: 2\nfinch: 1\nrobin: 3", "line 3, 'robin: 3': 'robin' is adjusted in line 1, 'robin: 2' already: keep one of the two"),
        ("robin: 0,5", "line 1, '5': write"),
        ("+crow: 60%\n+flame: 40%", r"line 2, '\+flame: 40%': the added words take 100% of the whole"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_adjustments(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("robin: 1\ncrow: 2", "line 2, 'crow: 2': 'crow' is none of the words, which are robin, finch, raven"),
        ("crow -> flame", "line 1, 'crow -> flame': 'crow' is none of the words"),
        ("raven -> zebra", "line 1, 'raven -> zebra': 'zebra' is not a single token"),
        ("+zebra: 0.1", r"line 1, '\+zebra: 0.1': 'zebra' is not a single token"),
        ("robin: 0\nfinch: 0\nraven: 0", "no word is left"),
        ("+robin: 0.1, +finch: 0.1, +raven: 0.1", "no other word is left beside 'robin', 'finch', 'raven': add another one"),
    ],
)
def test_a_line_that_cannot_be_done_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        adjust(found(), Text(), parse_adjustments(text))


@given(st.text(alphabet="robin fch+:->#%.0123\n", max_size=60))
def test_any_text_is_read_or_refused_with_its_line(text):
    with contextlib.suppress(Named):
        assert all(a.word and a.amount >= 0 for a in parsed(text))


class Named(Exception):
    """Refused with the line's number."""


def parsed(text):
    try:
        return parse_adjustments(text)
    except ValueError as error:
        if not str(error).startswith("line "):
            raise
        raise Named from error


class Flat:
    """x0 is everywhere what the prompt's first channels say, whatever the noise."""

    latent_channels, downscale, device = 4, 8, torch.device("cpu")
    training_sigmas = torch.linspace(0.1, 10.0, 20)

    def denoise(self, x, sigma, conditioning):
        return conditioning.context[:, 0, :4, None, None].expand_as(x).clone()


class Identity:
    def decode(self, latents):
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_pictures_come_in_order_and_each_is_of_its_own_prompt():
    text, seen = Text(), []
    model = Model("sd1", "flat", text, Flat(), Identity())
    drawn = word_pictures(
        model, found(), seeds=[3, 4], height=16, width=24, steps=2, guidance=1, on_step=lambda step, total, _: seen.append((step, total))
    )
    rows = text.tables["l"]
    prompts = [rows[0] + rows[1], rows[0] + found().token["l"][0], *(rows[0] + rows[i] for i in (2, 3, 4))]
    assert [batch.shape for batch in drawn] == [(2, 3, 16, 24)] * 5
    for batch, prompt in zip(drawn, prompts, strict=True):
        torch.testing.assert_close(batch, prompt[:3].clamp(0, 1)[None, :, None, None].expand_as(batch))
    assert seen == [(step, 10) for step in range(1, 11)]
    assert model.meter.evals == 5 * 2 * 2
    height, width, _ = picture_sheet(found(), drawn, [3, 4]).shape
    assert height > 2 * 16 and width > 5 * 24


def test_pictures_need_an_autoencoder():
    with pytest.raises(ValueError, match="connect the VAE"):
        word_pictures(Model("sd1", "flat", Text(), Flat()), found(), seeds=[0], height=16, width=16)
