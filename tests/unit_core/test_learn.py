"""Learning a token from images: it lowers the error, is reproducible, cancels cleanly, and refuses what it cannot use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conceptkit.core.demo import render
from conceptkit.core.demo.world import shapes_world
from conceptkit.core.edit import solve_edit
from conceptkit.core.hosts.diffusers import load_model
from conceptkit.core.learn import invert_concept
from conceptkit.core.model import Model, NonFinite, Slot, UnsupportedModel, fill
from conceptkit.core.vocabulary import embeddings, token_of
from torch import Tensor

FEW: Mapping[str, Any] = {"steps": 2, "batch": 1}


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model("demo")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Renders of a robin, (4, 3, height, width)."""
    drawn, world = np.random.default_rng(0), shapes_world()
    renders = render.draw_batch([world.picture_of("robin", drawn) for _ in range(4)])
    return torch.from_numpy(renders).float().div(255).movedim(-1, 1)


def started(model: Model, word: str = "thing") -> dict[str, Tensor]:
    return embeddings(model.text, [token_of(model.text, word)])


@torch.no_grad()
def error(model: Model, images: Tensor, token: Slot) -> float:
    """What is minimised, at noise of its own."""
    assert model.autoencoder is not None
    sigma = model.denoiser.training_sigmas[::40][:, None, None, None]
    latents = model.autoencoder.encode(images)[torch.arange(len(sigma)) % len(images)]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(99))
    prompt = model.text.encode([fill("a photo of a {}", [token])])
    return float(((model.denoise(latents + sigma * noise, sigma.flatten(), prompt) - latents) / sigma).square().mean())


def test_it_lowers_the_error(demo: Model, images: Tensor) -> None:
    before, heard = demo.meter.evals, []
    token = invert_concept(demo, images, steps=20, batch=4, on_step=lambda *step: heard.append(step))
    assert demo.meter.evals - before == 3 * 4 * 20
    assert {name: tuple(row.shape) for name, row in token.items()} == {name: (1, row.shape[1]) for name, row in started(demo).items()}
    assert not any(row.requires_grad for row in token.values())
    # More than half the way from where it started to what the model's own word for the images reaches.
    assert error(demo, images, token) < (error(demo, images, started(demo)) + error(demo, images, started(demo, "robin"))) / 2
    assert [step[:2] for step in heard] == [(i + 1, 20) for i in range(20)] and all(step[2]["loss"] > 0 for step in heard)


def test_the_same_seed_gives_the_same_token_and_another_another(demo: Model, images: Tensor) -> None:
    state = torch.get_rng_state()
    first, again, other = (invert_concept(demo, images, seed=seed, **FEW) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():  # as where a node calls it
        assert all(torch.equal(first[name], row) for name, row in invert_concept(demo, images, seed=3, **FEW).items())


def test_templates_are_used_in_turn(demo: Model, images: Tensor) -> None:
    one, two = ("a photo of a {}",), ("a photo of a {}", "a drawing of a {}")
    alike, apart = ([invert_concept(demo, images, templates=used, steps=steps, batch=1)["l"] for used in (one, two)] for steps in (1, 2))
    # The rate of a single step is the whole of one, that of the first of two steps as well: they differ from the second on.
    assert torch.equal(*alike) and not torch.equal(*apart)


def test_a_token_is_learned_through_an_edit(demo: Model, images: Tensor) -> None:
    edit = solve_edit(demo, ["robin"], method="uce-2025")
    plain, through = (invert_concept(demo, images, transform=t, **FEW) for t in (None, edit.apply_to_conditioning))
    same = invert_concept(demo, images, transform=lambda conditioning: conditioning, **FEW)
    assert torch.equal(plain["l"], same["l"]) and not torch.equal(plain["l"], through["l"])


def test_a_cancelled_run_leaves_the_model_as_it_was(demo: Model, images: Tensor) -> None:
    tables = {name: table.clone() for name, table in demo.text.tables.items()}

    def cancel(step: int, total: int, metrics: Mapping[str, float], /) -> None:
        raise InterruptedError

    prompt = demo.text.encode(["a photo of a robin"]).context.detach()
    calls = demo.meter.calls
    with pytest.raises(InterruptedError):
        invert_concept(demo, images, on_step=cancel, **FEW)
    assert demo.meter.calls - calls == 1
    assert all(torch.equal(table, tables[name]) and not table.requires_grad for name, table in demo.text.tables.items())
    assert torch.equal(demo.text.encode(["a photo of a robin"]).context.detach(), prompt)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": "zzqqzz"}, "not a single token"),
        ({"templates": ()}, "there is no template"),
        ({"templates": ("a photo",)}, "must contain {} once"),
        ({"steps": 0}, "must be positive"),
        ({"batch": 0}, "must be positive"),
        ({"rate": 0.0}, "must be positive"),
        ({"rate": float("nan")}, "must be positive"),
    ],
)
def test_what_cannot_be_done_is_said(demo: Model, images: Tensor, wrong: dict[str, Any], message: str) -> None:
    before = demo.meter.evals
    with pytest.raises(ValueError, match=message):
        invert_concept(demo, images, **FEW | wrong)
    assert demo.meter.evals == before


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda images: images[:0], "give at least one"),
        (lambda images: images[0], "give at least one"),
        (lambda images: images[:, :1], "give at least one"),
        (lambda images: images * 255, "divide 8-bit images by 255"),
        (lambda images: images * float("nan"), "outside"),
    ],
)
def test_images_that_nothing_can_be_learned_from(demo: Model, images: Tensor, made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        invert_concept(demo, made(images), **FEW)


def test_what_a_model_must_have_and_give(demo: Model, images: Tensor) -> None:
    with pytest.raises(UnsupportedModel, match="connect the VAE"):
        invert_concept(replace(demo, autoencoder=None), images, **FEW)
    with pytest.raises(NonFinite, match="NaN or infinity"):
        invert_concept(demo, images, transform=lambda conditioning: conditioning.map(lambda rows: rows * float("nan")), **FEW)

    def steep(rows: Tensor) -> Tensor:
        """The rows as they are, with a gradient that is NaN."""
        return rows + 0 * (rows - rows.detach()).sqrt()

    with pytest.raises(NonFinite, match="in step 1 of 2: use a lower rate"):
        invert_concept(demo, images, transform=lambda conditioning: conditioning.map(steep), **FEW)
