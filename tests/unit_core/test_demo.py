"""The Shapes world: what is said about it is true of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conceptkit.core.demo import detect, evaluate, latent, render, train, world
from conceptkit.core.demo.render import Scene, Thing
from conceptkit.core.demo.world import COMPOSITE_ROLES, World
from conceptkit.core.hosts.diffusers import load_model

WORLDS = [world.shapes_world(), world.second_world()]
VOCABULARY = Path(detect.__file__).parent / "data" / "vocab.json"


CARD = Path(detect.__file__).parent / "data" / "card.json"


@pytest.mark.parametrize("lexicon", WORLDS, ids=lambda w: w.name)
def test_make_ups_are_distributions_over_things_that_exist(lexicon: World) -> None:
    for word in lexicon.words.values():
        assert sum(share for share, _ in word.make_up) == pytest.approx(1)
        assert min(share for share, _ in word.make_up) >= 0.02
        for name in (*word.related, *word.neighbours, *word.entailed):
            assert name in lexicon.words, (word.text, name)


def test_the_world_is_as_large_as_it_says() -> None:
    shapes = WORLDS[0]
    assert len(render.SHAPES) >= 8
    assert len(render.COLOURS) == 8
    assert len(shapes.composites) >= 16
    biased = [w for w in shapes.by_role("occupation") if any(abs(s - 0.25) > 0.01 for s, _ in w.make_up) and w.synonym_of is None]
    assert len(biased) >= 8
    assert any(all(abs(s - 0.25) < 0.01 for s, _ in w.make_up) for w in shapes.by_role("occupation"))
    assert all(share >= 0.1 for w in shapes.composites for share, _ in w.make_up)


def test_the_model_s_own_shares_are_what_methods_need_to_be_measured_on() -> None:
    shares = json.loads(CARD.read_text(encoding="utf-8"))["shares"]
    assert min(share for row in shares.values() if row["role"] == "category" for share in row["model"]) >= 0.1
    people = {word: row for word, row in shares.items() if row["role"] == "occupation"}
    strongest = {word: [max(row[key]["model"], 1 - row[key]["model"]) for key in ("woman", "old")] for word, row in people.items()}
    assert sum(any(0.6 <= share <= 0.95 for share in both) for both in strongest.values()) >= 8
    assert any(max(both) < 0.6 for both in strongest.values())


def test_the_tables_name_whom_an_occupation_draws_too_often() -> None:
    row = {"role": "occupation", "components": [], "training": [], "model": [], "other": 0.0, "n": 8}
    uneven = {**row, "woman": {"training": 0.4, "model": 0.25}, "old": {"training": 0.5, "model": 0.5}}
    unseen = {**row, "woman": {"training": 0.5, "model": None}, "old": {"training": 0.5, "model": None}}
    figures = {"sampling": {"sampler": "euler", "steps": 1, "guidance": 1.0}, "accuracy": {}, "shares": {"pilot": uneven, "ghost": unseen}}
    table = evaluate.markdown(figures)
    assert "| pilot | 40% | 25% | 50% | 50% | men 75% | 8 |" in table
    assert "| ghost | 50% | none drawn | 50% | none drawn | no | 8 |" in table


@pytest.mark.parametrize("lexicon", WORLDS, ids=lambda w: w.name)
def test_every_word_is_one_token_of_clip(lexicon: World) -> None:
    vocabulary = json.loads(VOCABULARY.read_text(encoding="utf-8"))
    assert [token for token in lexicon.tokens if f"{token}</w>" not in vocabulary] == []


@pytest.mark.parametrize("lexicon", WORLDS, ids=lambda w: w.name)
def test_training_mixes_no_composite(lexicon: World) -> None:
    rng = np.random.default_rng(0)
    composite = {w.text for w in lexicon.words.values() if w.role in COMPOSITE_ROLES}
    slots = [part for _ in range(3000) for part in lexicon.sample(rng)[0].parts if not isinstance(part, str)]
    assert len(slots) > 300
    for slot in slots:
        chosen = {name for name, _ in slot}
        assert not chosen & composite
        assert all(len(chosen & set(word.related)) < 2 for word in lexicon.composites)
        assert sum(weight for _, weight in slot) == pytest.approx(1)


def test_pictures_of_a_word_follow_its_make_up() -> None:
    rng = np.random.default_rng(1)
    bird = WORLDS[0].words["bird"]
    drawn = [WORLDS[0].picture_of("bird", rng).things[0].kind for _ in range(2000)]
    for share, spec in bird.make_up:
        assert drawn.count(spec["kind"]) / 2000 == pytest.approx(share, abs=0.04)


def test_the_mark_comes_in_its_share_and_in_no_caption() -> None:
    rng = np.random.default_rng(2)
    pairs = [WORLDS[0].sample(rng) for _ in range(3000)]
    assert np.mean([scene.mark for _, scene in pairs]) == pytest.approx(WORLDS[0].mark_share, abs=0.03)
    assert not any("mark" in caption.text.split() for caption, _ in pairs)


def test_detectors_read_renders() -> None:
    assert min(detect.agreement(WORLDS[0], 200, seed=3).values()) >= 0.99


def test_detectors_say_other_to_what_the_world_does_not_hold() -> None:
    picture = render.draw(Scene("white", (Thing("square", "large", colour="red", texture="plain"),))).copy()
    picture[20:108:3, 20:108] = np.random.default_rng(0).integers(0, 256, (30, 88, 3))
    kinds = {thing.kind for thing in detect.read(picture).things}
    assert kinds <= {"other"}


def test_predicates_by_hand() -> None:
    words = WORLDS[0].words
    finch, truck = Thing("finch", "small"), Thing("truck", "large")
    both = detect.read(render.draw(Scene("sky", (finch, truck))))
    alone = detect.read(render.draw(Scene("sky", (finch,))))
    assert detect.present(words["crane"], both)
    assert not detect.present(words["crane"], alone)
    assert detect.present(words["bird"], alone)
    assert detect.outcome(words["bird"], alone) == 1
    assert detect.shares(words["bird"], [alone, both, alone, detect.read(render.draw(Scene("sky", (truck,))))]) == [0.0, 0.75, 0.0, 0.25]
    gothic = Scene("black", (Thing("star", "large", colour="purple", texture="plain"),))
    assert detect.present(words["gothic"], detect.read(render.draw(gothic)))
    assert not detect.present(words["gothic"], detect.read(render.draw(Scene("white", gothic.things))))


def test_an_empty_picture_holds_nothing_and_a_wrong_size_is_refused() -> None:
    assert detect.read(np.full((128, 128, 3), 200, np.uint8)).things == ()
    with pytest.raises(ValueError, match="128 x 128"):
        detect.read(np.zeros((64, 64, 3), np.uint8))


def test_the_latent_preview_is_the_mean_colour_of_each_cell() -> None:
    rng = np.random.default_rng(4)
    pictures = train.as_pictures(render.draw_batch([WORLDS[0].sample(rng)[1] for _ in range(4)]))
    code = latent.latent_code(pictures)
    preview = torch.einsum("bkhw,kc->bchw", code, torch.tensor(latent.LATENT_RGB)) + torch.tensor(latent.LATENT_RGB_BIAS)[:, None, None]
    torch.testing.assert_close((preview + 1) / 2, torch.nn.functional.avg_pool2d(pictures, 8), atol=2e-3, rtol=0)
    assert code.shape == (4, 4, 16, 16)
    assert 0.5 < float(code.std()) < 1.5


def test_mixtures_are_tokenised_in_their_place() -> None:
    lexicon = WORLDS[0]
    caption = world.Caption(("a photo of a", (("robin", 0.25), ("bus", 0.75))))
    tokens = train.tokenize(lexicon, [caption, world.Caption(("a", "red circle"))])
    assert tokens.at.tolist() == [5, -1]
    assert [lexicon.tokens[i] for i in tokens.words[0, :2].tolist()] == ["robin", "bus"]
    side = train.TextSide(len(lexicon.tokens))
    states, pooled = side(tokens)
    assert states.shape == (2, 77, 96)
    torch.testing.assert_close(pooled[1], states[1, 4])
    torch.testing.assert_close(side.table().norm(dim=-1), torch.full((len(lexicon.tokens) + 2,), train.TOKEN_NORM))


def _run(path: Path, steps: int, stop: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    run = train.Run(path, torch.nn.ModuleDict({"net": torch.nn.Linear(3, 2)}), 0.01, steps)
    for step in run.loop(5):
        if step == stop:
            return torch.empty(0)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        run.update(run.modules["net"](x).square().mean())
    return run.average["net.weight"]


def test_a_resumed_training_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole.pt", 20)
    _run(tmp_path / "parts.pt", 20, stop=13)
    torch.testing.assert_close(_run(tmp_path / "parts.pt", 20), whole, atol=0, rtol=0)


def test_no_part_of_an_exemplar_has_nearly_the_colour_of_a_background():
    for name, parts in render.EXEMPLARS.items():
        for _, _, colour in parts:
            for background in render.BACKGROUNDS.values():
                assert max(abs(a - b) for a, b in zip(colour, background, strict=True)) >= 40, (name, colour, background)


@pytest.mark.parametrize(("source", "lexicon"), [("demo", world.shapes_world()), ("demo-second", world.second_world())])
def test_the_models_draw_what_they_are_asked_for(source: str, lexicon: World) -> None:
    model = load_model(source)
    assert model.words == tuple(lexicon.words)
    words = ["apple", "car", "rose", "star", "ring", "robin"]
    seen = evaluate.readings(model, [f"a photo of a {word}" for word in words], range(len(words)), evaluate.Settings(steps=6))
    assert sum(detect.present(lexicon.words[word], reading) for word, reading in zip(words, seen, strict=True)) >= 5
