"""Decomposition on a small analytic world: a frozen random text transformer and an exact denoiser of a conditional mixture of Gaussians."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conceptkit.core.artifact import ArtifactError
from conceptkit.core.decompose import Decomposition, Settings, decompose_concept
from conceptkit.core.decompose.decomposition import FILLS_IN
from conceptkit.core.decompose.mixture import Mixture, SimplexDescent
from conceptkit.core.decompose.search import Evidence, Search, padded
from conceptkit.core.decompose.shown import Shown, show
from conceptkit.core.decompose.sparse import LeastSquares, nnls, small_nnls
from conceptkit.core.decompose.states import States, distances, harvest
from conceptkit.core.decompose.surrogate import Surrogate, flat
from conceptkit.core.decompose.text import PromptSpace
from conceptkit.core.model import Conditioning, Meter, Model, NonFinite, OutOfMemory, Slot
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize, softmax

WIDTH, WORDS, TOKENS = 24, 60, 8
NAMES = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(WORDS)]
SMALL = Settings(pictures=3, validation=1, heldout=1, steps=8, rows=64)


class Text:
    """Two frozen random attention layers over token embeddings; ``widths`` names the encoders."""

    def __init__(self, names: Sequence[str] = ("l",)) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.vocabulary = {f"{word}</w>": index for index, word in enumerate(["a", "photo", "of", *NAMES])}
        self.vocabulary |= dict.fromkeys("xyz?!", 0)
        self.tables = {name: normalize(draw(WORDS + 3, WIDTH), dim=1) for name in names}
        self.layers = [[draw(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(4)] for _ in range(2)]
        self.position = draw(TOKENS, WIDTH) * 0.06

    def tokenize(self, text: str) -> list[int]:
        pieces = [[f"{word}</w>"] if f"{word}</w>" in self.vocabulary else list(word) for word in text.lower().split()]
        return [self.vocabulary.get(piece, 0) for word in pieces for piece in word]

    def _encode(self, prompt: Sequence[str | Slot], name: str) -> Tensor:
        parts = []
        for piece in prompt:
            rows = self.tables[name][self.tokenize(piece)] if isinstance(piece, str) else piece[name]
            parts.append(rows if rows.ndim == 3 else rows[None])
        batch = max(len(part) for part in parts)
        h = torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)
        h = torch.cat([h, h.new_zeros(batch, TOKENS - h.shape[1], WIDTH)], dim=1) + self.position
        mask = torch.full((TOKENS, TOKENS), -math.inf).triu(1)
        for query, key, value, expand in self.layers:
            z = 4 * normalize(h, dim=-1)
            h = h + softmax((z @ query) @ (z @ key).transpose(1, 2) / WIDTH**0.5 + mask, -1) @ (z @ value) / 3
            h = h + torch.tanh(4 * normalize(h, dim=-1) @ expand) / 3
        return h

    def encode(self, prompts: Sequence[str | Sequence[str | Slot]]) -> Conditioning:
        parts = [(p,) if isinstance(p, str) else p for p in prompts]
        return Conditioning(torch.cat([torch.cat([self._encode(p, name) for p in parts]) for name in self.tables], dim=-1))


class Denoiser:
    """x0 given the last context row: 12 Gaussians whose weights and common shift depend on it; the posterior mean is exact."""

    latent_channels, downscale, side, device = 2, 8, 32, torch.device("cpu")
    cells, scale = 4, 0.35

    def __init__(self, text: Text, broken: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        size, width = self.latent_channels * self.cells**2, WIDTH * len(text.tables)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        survival = torch.cumprod(1 - betas, 0)
        self.training_sigmas = ((1 - survival) / survival).sqrt().float()
        self.means = 0.6 * torch.randn(12, size, generator=generator)
        self.logits = torch.randn(width, 12, generator=generator) * 2 / width**0.5
        self.shift = torch.randn(width, size, generator=generator) / width**0.5
        words = text.encode([f"a photo of a {word}" for word in NAMES[:20]]).context[:, -1]
        self.centre, self.spread = words.mean(0), float(words.std())
        # the empty prompt should look like an average word, not like something apart from all words
        self.apart = normalize(text.encode([""]).context[0, -1] - self.centre, dim=0)
        self.broken = broken

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        features = (conditioning.context[:, -1] - self.centre) / self.spread
        features = features - (features @ self.apart)[:, None] * self.apart
        means = self.means + (features @ self.shift)[:, None]
        variance = self.scale**2 + sigma[:, None] ** 2
        y = x.flatten(1)[:, None]
        weight = softmax(torch.log_softmax(features @ self.logits, 1) - (y - means).square().sum(2) / (2 * variance), 1)
        x0 = (weight[..., None] * (means + (self.scale**2 / variance)[..., None] * (y - means))).sum(1).view_as(x)
        return x0 * math.nan if self.broken else x0


def world(encoders: Sequence[str] = ("l",), before_call: Callable[[], None] = lambda: None, broken: bool = False) -> Model:
    text = Text(encoders)
    return Model("sd1", "analytic", text, Denoiser(text, broken), before_call=before_call)  # type: ignore[arg-type]


def planted(model: Model, words: Sequence[str], weights: Sequence[float]) -> Slot:
    ids = [model.text.vocabulary[f"{word}</w>"] for word in words]
    return {
        name: table.norm(dim=1).mean() * normalize(torch.tensor(weights) @ table[ids], dim=0)[None]
        for name, table in model.text.tables.items()
    }


def take_apart(model: Model, concept: str | Slot, **options: object) -> Decomposition:
    options = {"candidates": NAMES, "height": 32, "width": 32, "settings": vars(SMALL), **options}
    return decompose_concept(model, concept, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("encoders", "count"), [(("l",), 2), (("l",), 4), (("l", "g"), 5)])
def test_a_planted_mixture_is_recovered_within_the_budget(encoders: tuple[str, ...], count: int) -> None:
    """The default method must find the words and their weights within 1,500 evals, with one alpha over all encoders."""
    model = world(encoders)
    for draw in range(2):
        generator = torch.Generator().manual_seed(10 * count + draw)
        words = [NAMES[i] for i in torch.randperm(WORDS, generator=generator)[:count]]
        weights = normalize(0.5 + torch.rand(count, generator=generator), p=1, dim=0)
        found = take_apart(model, planted(model, words, weights.tolist()), words=6, seed=draw)
        shares = dict(zip(found.words, found.shares, strict=True))
        assert set(found.words) >= set(words) and found.r2 > 0.98 and found.reliable
        assert max(abs(shares[word] - float(weight)) for word, weight in zip(words, weights, strict=True)) < 0.05
        assert found.evals <= 1500


def test_the_result_is_a_point_of_the_simplex_that_says_what_it_cost() -> None:
    model = world()
    before = {name: table.clone() for name, table in model.text.tables.items()}
    steps: list[tuple[int, int]] = []
    found = take_apart(model, "waa", words=3, on_step=lambda step, total, metrics: steps.append((step, total)))
    assert "waa" not in found.words and 1 <= len(found.words) <= 3 and len(set(found.words)) == len(found.words)
    assert (found.alpha >= 0).all() and float(found.alpha.sum()) == pytest.approx(1, abs=1e-6)
    assert found.importance is not None and list(found.importance) == sorted(found.importance, reverse=True)
    few = [word for word, lost in zip(found.words, found.importance, strict=True) if lost < FILLS_IN]
    assert list(found.fillers) == [word for word in few if word != found.words[0]]
    assert (found.evals, found.calls) == (model.meter.evals, model.meter.calls)
    assert all(0 <= step <= total for step, total in steps) and steps[-1][0] == steps[-1][1] and steps == sorted(steps)
    assert all(torch.equal(table, before[name]) for name, table in model.text.tables.items())
    assert found.concept == "waa" and "waa" in found.summary() and found.restarts and any(a.kept for a in found.restarts)
    assert set(found.seeds).isdisjoint(found.heldout_seeds)


def test_same_inputs_same_bits_whatever_the_global_state() -> None:
    results = []
    for state in (0, 1):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        results.append(take_apart(world(), "wab", seed=7))
        assert torch.equal(torch.get_rng_state(), before)
    first, second = results
    assert first.words == second.words and torch.equal(first.alpha, second.alpha)
    assert first.fidelity == second.fidelity and first.importance == second.importance
    assert first.seeds != take_apart(world(), "wab", seed=8).seeds


def test_permuting_the_dictionary_permutes_the_answer() -> None:
    model = world()
    concept = planted(model, ["wac", "wbb", "wbz"], [0.5, 0.3, 0.2])
    first, second = (take_apart(model, concept, candidates=names) for names in (NAMES, NAMES[::-1]))
    assert first.words == second.words and torch.allclose(first.alpha, second.alpha, atol=1e-3)


def test_the_concept_itself_takes_nearly_everything_when_left_in() -> None:
    found = take_apart(world(), "wad", keep_concept=True)
    assert found.words[0] == "wad" and found.shares[0] > 0.9 and found.r2 > 0.98 and found.importance[0] > 0.9


def test_what_is_reported_is_measured_on_images_that_did_not_choose_it() -> None:
    """R2 on the held-out images, importance on the validation images: what the words show together and no longer show without the word."""
    model = world()
    concept = planted(model, ["wac", "wbb"], [0.6, 0.4])
    found = take_apart(model, concept)
    pool = {word: model.text.vocabulary[f"{word}</w>"] for word in found.words}
    mixture = Mixture.of(model, found.template, pool)
    teacher, empty = model.text.encode([["a photo of a ", concept]]), model.text.encode([""])
    seeds = [*found.seeds, *found.heldout_seeds]
    states = harvest(model, teacher, empty, seeds, height=4, width=4, steps=SMALL.steps, guidance=SMALL.guidance)
    heldout, chose = states[states.picture >= len(found.seeds)], states[states.picture == len(found.seeds) - 1]
    r2 = 1 - float(distances(model, heldout, mixture.encode(found.alpha[None])).sum() / heldout.gap.sum())
    assert r2 == pytest.approx(found.r2, abs=1e-4)
    effects = [(s.teacher - s.empty) / s.sigma for s in (chose[i : i + 1] for i in range(len(chose)))]

    def shown(words: Sequence[str]) -> float:
        left = 0.0
        for index, target in enumerate(effects):
            s = chose[index : index + 1]
            columns = [(model.denoise(s.x, s.sigma, model.text.encode([f"a photo of a {word}"])) - s.empty) / s.sigma for word in words]
            matrix = torch.stack([column.flatten() for column in columns], 1)
            left += float((matrix @ small_nnls(matrix, target.flatten()).float() - target.flatten()).square().sum())
        return 1 - left / float(sum(target.square().sum() for target in effects))

    assert found.importance is not None
    for word, lost in zip(found.words, found.importance, strict=True):
        rest = [other for other in found.words if other != word]
        assert shown(found.words) - (shown(rest) if rest else 0) == pytest.approx(lost, abs=2e-3)


def effects(*columns: Sequence[float]) -> Shown:
    """Words and, last, a concept with these effects at a single state."""
    rows = torch.tensor(columns, dtype=torch.double)
    return Shown((rows @ rows.T)[None])


def test_words_show_what_no_other_word_shows() -> None:
    """Two orthogonal words make the concept up; a third is their mean and a fourth points the other way."""
    shown = effects([1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [-1, 0, 0], [2, 1, 0])
    sets = padded([(0, 1), (0,), (1,), (2,), (3,), (0, 1, 2, 3)])
    assert torch.allclose(shown.r2(sets), torch.tensor([1, 0.8, 0.2, 0.9, 0.0, 1.0], dtype=torch.double), atol=1e-9)
    assert shown.lost((0, 1)) == pytest.approx((0.8, 0.2)) and shown.lost((0, 1, 2)) == pytest.approx((0.1, 0, 0), abs=1e-9)
    assert shown.first(2) == [(2,), (2, 0)]
    wider = shown.extended(6)
    assert wider.known.tolist() == [True] * 4 + [False] * 2
    assert torch.equal(wider.r2(sets), shown.r2(sets)) and float(wider.r2(torch.tensor([[5]]))[0]) == 0


def test_each_state_has_weights_of_its_own() -> None:
    """Half of the states show one word and half another: neither alone, both together show all."""
    first, second = effects([1, 0], [0, 1], [1, 0]), effects([1, 0], [0, 1], [0, 1])
    shown = Shown(torch.cat([first.gram, second.gram]))
    assert shown.r2(torch.tensor([[0, -1], [1, -1], [0, 1]])).tolist() == pytest.approx([0.5, 0.5, 1.0])


def test_words_are_looked_at_once_a_state_and_weighed_by_what_it_stands_for() -> None:
    model = world()
    states = harvest(model, model.text.encode(["a photo of a waa"]), model.text.encode([""]), [1], height=4, width=4, steps=4, guidance=2.0)
    prompts, before = model.text.encode([f"a photo of a {word}" for word in ["waa", *NAMES[1:20]]]), model.meter.evals
    shown = show(model, prompts, states, torch.tensor([1.0, 2.0, 3.0, 4.0]), lambda: None)
    assert model.meter.evals - before == 20 * 4 and shown.gram.shape == (4, 21, 21)
    own = states.gap.double() * torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.allclose(shown.gram[:, 20, 20], own, rtol=1e-4) and torch.allclose(shown.gram[:, 0, 20], own, rtol=1e-3)
    assert float(shown.r2(torch.tensor([[0]]))[0]) == pytest.approx(1, abs=1e-4)


def test_the_pseudo_token_stands_in_any_template() -> None:
    model = world()
    found = take_apart(model, "wae", words=3)
    token = found.token
    for name, table in model.text.tables.items():
        assert float(token[name].norm()) == pytest.approx(float(table.norm(dim=1).mean()), rel=1e-5)
    expected = model.text.encode([["photo of ", token]])
    assert torch.equal(found.apply(model.text, "photo of {}").context, expected.context)
    assert torch.equal(found.apply(model.text).context, model.text.encode([["a photo of a ", token, ""]]).context)
    assert torch.equal(found.to("cpu").token["l"], token["l"])


def test_a_phrase_is_taken_apart_too_without_its_own_words() -> None:
    found = take_apart(world(), "waf wag", words=4)
    assert not {"waf", "wag"} & set(found.words) and math.isfinite(found.r2)


def test_a_search_that_fails_says_so() -> None:
    """Two candidates that have nothing to do with the concept: nothing explains it, and the result does not claim to."""
    found = take_apart(world(), "wah", candidates=["wai", "waj"])
    assert not found.reliable and "do not explain" in found.summary()


def test_cancelling_stops_within_one_call() -> None:
    class Cancel(Exception):
        pass

    for last in (0, 5, 20, 25, 40):
        checks = 0

        meter = Meter()

        def stop(last: int = last, meter: Meter = meter) -> None:
            nonlocal checks
            if meter.calls == last:
                checks += 1
                raise Cancel

        model = replace(world(before_call=stop), meter=meter)
        with pytest.raises(Cancel):
            take_apart(model, "wab")
        assert model.meter.calls == last and checks == 1

    def refuse(step: int, total: int, metrics: object) -> None:
        raise Cancel

    model = world()
    with pytest.raises(Cancel):
        take_apart(model, "wab", on_step=refuse)
    assert model.meter.calls == 1


def test_bad_input_is_named() -> None:
    model = world()
    with pytest.raises(ValueError, match="empty"):
        take_apart(model, "  ")
    with pytest.raises(ValueError, match="known"):
        take_apart(model, "?!")
    for template in ("a photo", "a {} of {}"):
        with pytest.raises(ValueError, match="must contain"):
            take_apart(model, "waa", template=template)
    with pytest.raises(ValueError, match="no candidate words are left"):
        take_apart(model, "waa", candidates=["waa"])
    with pytest.raises(ValueError, match="at least 1 word"):
        take_apart(model, "waa", words=0)
    with pytest.raises(ValueError, match="too small"):
        take_apart(model, "waa", height=4)
    with pytest.raises(NonFinite):
        take_apart(world(broken=True), "waa")
    assert model.meter.calls == 0


def in_double(model: Model) -> Model:
    """The same world in double precision, where finite differences can be fine."""
    text, denoiser = model.text, model.denoiser
    assert isinstance(text, Text) and isinstance(denoiser, Denoiser)
    text.tables = {name: table.double() for name, table in text.tables.items()}
    text.layers = [[matrix.double() for matrix in layer] for layer in text.layers]
    text.position = text.position.double()
    for name in ("means", "logits", "shift", "centre", "apart"):
        setattr(denoiser, name, getattr(denoiser, name).double())
    return model


def some_words(model: Model, names: Sequence[str] = NAMES[:5]) -> Mixture:
    return Mixture.of(model, "a photo of a {}", {word: model.text.vocabulary[f"{word}</w>"] for word in names})


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """d function / d at, (..., len(at)), by central differences."""
    with torch.no_grad():
        sides = torch.eye(len(at), dtype=at.dtype) * step
        return torch.stack([(function(at + side) - function(at - side)) / (2 * step) for side in sides], dim=-1)


def test_gradients_with_respect_to_alpha_match_finite_differences() -> None:
    model = in_double(world(("l", "g")))
    mixture = some_words(model)
    states = harvest(model, model.text.encode(["a photo of a wba"]), model.text.encode([""]), [3], height=4, width=4, steps=5, guidance=2.0)
    batch = states[1:4]

    def loss(alpha: Tensor) -> Tensor:
        return batch.distance(model.denoise(batch.x, batch.sigma, mixture.encode(alpha[None]))).sum()

    alpha = torch.tensor([0.4, 0.1, 0.2, 0.2, 0.1], dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(alpha), alpha)
    assert torch.allclose(gradient, finite_differences(loss, alpha.detach()), rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    # only the direction of the combination matters
    assert float(gradient @ alpha.detach()) == pytest.approx(0, abs=1e-9 * float(gradient.abs().max()))
    assert torch.allclose(mixture.encode(alpha[None]).context, mixture.encode(3 * alpha[None]).context, atol=1e-12)


def test_the_surrogate_s_equations_are_its_derivatives_and_vanish_along_alpha() -> None:
    model = in_double(world(("l", "g")))
    mixture = some_words(model)
    truth = torch.tensor([0.6, 0.0, 0.4, 0.0, 0.0], dtype=torch.double)
    with torch.no_grad():
        target = flat(mixture.encode(truth[None]))[0]
    rows = torch.randn(12, len(target), generator=torch.Generator().manual_seed(0), dtype=torch.double)
    token = torch.cat([normalize(truth @ words, dim=0) for words in mixture.embeddings.values()])
    surrogate = Surrogate(mixture, rows, rows @ target, token)
    alpha = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1], dtype=torch.double)
    system, goal = surrogate.equations(alpha)
    jacobian = finite_differences(lambda a: surrogate.residual(a[None])[0], alpha)
    scale = float(jacobian.norm())
    assert torch.allclose(system[:-1], jacobian, atol=0.05 * scale)  # by finite differences of a step that float32 allows
    assert torch.allclose(goal[:-1], system[:-1] @ alpha - surrogate.residual(alpha[None])[0])
    assert torch.allclose(system[-1], goal[-1].expand(5)) and float((jacobian @ alpha).norm()) < 1e-6 * scale
    # and where the words are the concept's nothing is left, whatever the scale of alpha
    assert torch.allclose(surrogate.r2(torch.stack([truth, 7 * truth])), torch.ones(2, dtype=torch.double), atol=1e-10)
    assert torch.allclose(surrogate.cosine(torch.stack([truth, 7 * truth])), torch.ones(2, dtype=torch.double))


@pytest.mark.parametrize("start", [[4, 7], [2, 5, 7], [9]])
def test_a_search_goes_to_the_planted_words_from_where_some_are_wrong_or_too_many(start: list[int]) -> None:
    surrogate, truth = planted_pair()
    nothing = Shown(torch.zeros(1, 13, 13, dtype=torch.double))
    search = Search(surrogate, nothing, Evidence(12, predictions=24, shown=0, embedding=0), 3, lambda: None)
    search.add([torch.zeros(12).index_fill(0, torch.tensor(start), 1 / len(start))])
    search.run()
    assert all(len(words) <= 3 for words in search.found) and search.best(1) == [(2, 7)]
    assert torch.allclose(search.found[2, 7][0], truth, atol=1e-2)


def test_a_search_around_words_to_keep_never_lets_go_of_them() -> None:
    surrogate, _ = planted_pair()
    nothing = Shown(torch.zeros(1, 13, 13, dtype=torch.double))
    search = Search(surrogate, nothing, Evidence(12, predictions=24, shown=0, embedding=0), 3, lambda: None, kept=(5,))
    search.add([torch.zeros(12).index_fill(0, torch.tensor([4, 5]), 0.5)])
    search.run()
    assert set(search.best(1)[0]) > {5} and all(5 in words for words in search.judged())


def planted_pair() -> tuple[Surrogate, Tensor]:
    """A surrogate of twelve words for which the third and the eighth in equal shares explain everything."""
    mixture = some_words(world(), NAMES[:12])
    truth = torch.zeros(12).index_fill(0, torch.tensor([2, 7]), 0.5)
    with torch.no_grad():
        target, empty = flat(mixture.encode(truth[None]))[0], flat(mixture.model.text.encode([""]))[0]
    rows = torch.randn(20, len(target), generator=torch.Generator().manual_seed(1))
    scale = (rows @ (empty - target)).norm()
    return Surrogate(mixture, rows / scale, rows @ target / scale), truth


def test_the_codes_of_prompts_add_up_to_the_concept_s() -> None:
    atoms = torch.randn(9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    code = PromptSpace(atoms, 2 * atoms[1] + atoms[3], torch.zeros(9, dtype=torch.double)).code(4)
    assert set(code.nonzero()[:, 0].tolist()) >= {1, 3} and float(code[1]) == pytest.approx(2 / 3, abs=0.02)


def test_a_result_worse_than_no_words_says_that_it_explains_nothing() -> None:
    found = take_apart(world(), planted(world(), ["wac", "wbb"], [0.6, 0.4]), words=2)
    assert found.fidelity is not None and "explains nothing" not in found.summary()
    poor = replace(found, fidelity=replace(found.fidelity, heldout=-0.5))
    assert "explains nothing (R2 -0.50)" in poor.summary() and "do not explain" in poor.summary()


def test_polishing_never_loses_and_keeps_to_its_words() -> None:
    model = world()
    mixture = some_words(model, NAMES[:12])
    with torch.no_grad():
        target = flat(model.text.encode(["a photo of a wbc"]))[0]
    rows = torch.randn(20, len(target), generator=torch.Generator().manual_seed(1)) / 20
    surrogate = Surrogate(mixture, rows, rows @ target)
    starts = torch.zeros(6, 12)
    for index in range(6):
        starts[index, torch.randperm(12, generator=torch.Generator().manual_seed(index))[: index + 1]] = 1 / (index + 1)
    polished, scores = surrogate.polish(starts)
    assert bool((scores >= surrogate.r2(starts)).all()) and torch.allclose(scores, surrogate.r2(polished))
    assert bool((polished >= 0).all()) and torch.allclose(polished.sum(1), torch.ones(6)) and bool((polished[starts == 0] == 0).all())


def test_evidence_wants_few_words_that_explain_much_in_every_view() -> None:
    def weigh(r2: float = 0.9, shown: float = 0.8, cosine: float = 0.6, size: int = 3, candidates: int = 100) -> float:
        columns = (torch.tensor([value], dtype=torch.double) for value in (r2, shown, cosine))
        return float(Evidence(candidates)(*columns, torch.tensor([size]))[0])

    for worse in (dict(r2=0.8), dict(shown=0.7), dict(cosine=0.5), dict(size=4), dict(candidates=200)):
        assert weigh(**worse) < weigh()  # type: ignore[arg-type]
    assert weigh(size=3) - weigh(size=4) == pytest.approx(math.log(100))
    assert all(math.isfinite(weigh(r2, shown, cosine)) for r2 in (-3.0, 1.0) for shown in (0.0, 1.0) for cosine in (0.0, 1.0))
    left_out = Evidence(100, predictions=0, shown=0, embedding=0)
    assert float(left_out(*(torch.ones(1, dtype=torch.double) for _ in range(3)), torch.tensor([1]))[0]) == pytest.approx(-math.log(100))


def test_a_stopped_run_goes_on_from_what_it_paid_for(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    path = tmp_path / "run"
    whole = take_apart(world(), "wab")
    harvested = 2 * (SMALL.pictures + SMALL.validation + SMALL.heldout) * SMALL.steps
    for spent in (harvested + 1, whole.evals // 2, whole.evals - 40):
        path.unlink(missing_ok=True)
        model = world()

        def stop(step: int, total: int, metrics: object, model: Model = model, spent: int = spent) -> None:
            if model.meter.evals >= spent:
                raise Stop

        with pytest.raises(Stop):
            take_apart(model, "wab", checkpoint=path, on_step=stop)
        with pytest.raises(ArtifactError, match="other inputs"):
            take_apart(world(), "wab", checkpoint=path, seed=1)
        model, saved = world(), json.loads(safe_open(path, "pt").metadata()["conceptkit"])["evals"]
        resumed = take_apart(model, "wab", checkpoint=path)
        assert harvested <= saved <= spent and model.meter.evals == whole.evals - saved and not path.exists()
        assert resumed.content_hash() == whole.content_hash()


def test_a_gradient_too_large_for_memory_is_taken_in_parts() -> None:
    class Narrow(Denoiser):
        """Room for ``room`` gradients at once."""

        room = 2

        def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            if conditioning.context.requires_grad and len(x) > self.room:
                raise torch.OutOfMemoryError
            return super().denoise(x, sigma, conditioning)

    text = Text()
    narrow = Narrow(text)
    found = take_apart(Model("sd1", "analytic", text, narrow), "wab")  # type: ignore[arg-type]
    assert found.words == take_apart(world(), "wab").words
    narrow.room = 0
    with pytest.raises(OutOfMemory, match="smaller images"):
        take_apart(Model("sd1", "analytic", text, narrow), "wab")  # type: ignore[arg-type]


def test_a_text_encoder_short_of_memory_is_asked_for_less_at_once() -> None:
    class Short(Text):
        """Room for ``room`` prompts at once."""

        room = 5

        def encode(self, prompts: Sequence[str | Sequence[str | Slot]]) -> Conditioning:
            encoded = super().encode(prompts)
            if len(prompts) == 1 and len(encoded) > self.room:
                raise torch.OutOfMemoryError
            return encoded

    def seen(text: Text) -> list[Tensor]:
        mixture = Mixture.of(replace(world(), text=text), "a photo of a {}", {name: text.vocabulary[f"{name}</w>"] for name in NAMES})  # type: ignore[arg-type]
        rows = torch.randn(30, TOKENS * WIDTH, generator=torch.Generator().manual_seed(2))
        alpha = torch.full((WORDS,), 1 / WORDS)
        surrogate = Surrogate(mixture, rows, torch.zeros(len(rows)))
        return [surrogate.residual(torch.eye(WORDS)), *surrogate.equations(alpha)]

    for less, whole in zip(seen(Short()), seen(Text()), strict=True):
        assert (less - whole).norm() < 1e-3 * whole.norm()  # differences in float32
    Short.room = 0
    with pytest.raises(OutOfMemory, match="a prompt in the text encoder does not fit"):
        seen(Short())


@pytest.mark.parametrize(
    "held", [10**9, True, "shown", ["rows"], ["shown", {}], ["shown", "rows", "found"], ["shown", "rows", "found", "more"]]
)
def test_a_checkpoint_that_claims_to_hold_what_it_does_not_is_refused(tmp_path: Path, held: object) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, total: int, metrics: object) -> None:
        if step >= total // 3:
            raise Stop

    path = tmp_path / "run"
    with pytest.raises(Stop):
        take_apart(world(), "wab", checkpoint=path, on_step=stop)
    tensors, header = load_file(path), json.loads(safe_open(path, "pt").metadata()["conceptkit"])
    save_file(tensors, path, {"conceptkit": json.dumps(header | {"held": held})})
    with pytest.raises(ArtifactError, match="make it again"):
        take_apart(world(), "wab", checkpoint=path)


def test_states_hold_what_the_sampler_saw_with_or_without_guidance() -> None:
    model = world()
    teacher, empty = model.text.encode(["a photo of a waa"]), model.text.encode([""])
    for guidance in (1.0, 3.0):
        states = harvest(model, teacher, empty, [1, 2, 3], height=4, width=4, steps=5, guidance=guidance, batch=2)
        assert len(states) == 15 and states.picture.bincount().tolist() == [5, 5, 5]
        assert torch.allclose(states.teacher, model.denoise(states.x, states.sigma, teacher), atol=1e-5)
        assert torch.allclose(states.empty, model.denoise(states.x, states.sigma, empty), atol=1e-5)
        noise = (states.x - states.empty) / states.sigma.view(-1, 1, 1, 1) - (states.x - states.teacher) / states.sigma.view(-1, 1, 1, 1)
        assert torch.allclose(states.gap, noise.square().flatten(1).sum(1), rtol=1e-3)
    assert float(distances(model, states, teacher).sum()) < 1e-6 * float(states.gap.sum())


def test_a_concept_that_the_model_ignores_is_refused() -> None:
    class Deaf(Denoiser):
        def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            return super().denoise(x, sigma, conditioning.map(torch.zeros_like))

    text = Text()
    with pytest.raises(ValueError, match="ignores 'waa'"):
        take_apart(Model("sd1", "deaf", text, Deaf(text)), "waa")  # type: ignore[arg-type]


def test_small_nnls_meets_its_optimality_conditions() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(12, 5, generator=generator, dtype=torch.double)
        target = torch.randn(12, generator=generator, dtype=torch.double)
        x = small_nnls(matrix, target)
        slope = matrix.T @ (matrix @ x - target)
        assert (x >= 0).all() and bool((slope >= -1e-6).all()) and abs(float(slope @ x)) < 1e-6


def test_nnls_of_a_batch_agrees_with_one_by_one_and_leaves_padding_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(30, 12, 4, generator=generator, dtype=torch.double)
    matrices[:, :, 3] = 0
    targets = torch.randn(30, 12, generator=generator, dtype=torch.double)
    found = nnls(matrices.mT @ matrices, (matrices.mT @ targets[..., None])[..., 0], sweeps=200)
    for matrix, target, x in zip(matrices, targets, found, strict=True):
        assert torch.allclose(x[:3], small_nnls(matrix[:, :3], target), atol=1e-6) and float(x[3]) == 0


def test_additions_are_the_columns_that_shorten_the_residual_most() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(15, 30, generator=generator, dtype=torch.double)
    chosen = [4, 17]
    target = 3 * matrix[:, chosen].sum(1) + torch.randn(15, generator=generator, dtype=torch.double)

    def left(columns: list[int]) -> tuple[float, float]:
        weights = torch.linalg.lstsq(matrix[:, columns], target[:, None]).solution
        return float((matrix[:, columns] @ weights - target[:, None]).norm()), float(weights[-1])

    problem = LeastSquares(matrix, target)
    used = [c for c, weight in zip(chosen, problem.fit(chosen).tolist(), strict=True) if weight > 0]
    assert used == chosen  # else the comparison below would not be the same problem
    others = {c: left([*chosen, c]) for c in range(30) if c not in chosen}
    expected = sorted((c for c, (_, weight) in others.items() if weight > 0), key=lambda c: others[c][0])
    assert problem.additions(chosen, 4) == expected[:4]


def test_exchange_never_loses_and_finds_a_planted_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(20, 80, generator=generator, dtype=torch.double)
    target = matrix[:, 11] + 0.5 * matrix[:, 42]
    assert sorted(LeastSquares(matrix, target).exchange([3, 4])[0]) == [11, 42]
    assert sorted(LeastSquares(matrix, target).exchange([42, 11])[0]) == [11, 42]


def test_simplex_descent_stays_on_the_simplex_and_reaches_a_vertex() -> None:
    descent = SimplexDescent(torch.full((6,), 1 / 6), 60)
    for _ in range(60):
        descent.step(torch.tensor([3.0, 1.0, -1.0, 2.0, 3.0, 0.0]))
        assert bool((descent.alpha >= 0).all()) and float(descent.alpha.sum()) == pytest.approx(1, abs=1e-5)
    assert int(descent.alpha.argmax()) == 2 and float(descent.alpha.max()) > 0.9


def test_states_select_by_mask_and_slice() -> None:
    states = States(
        torch.zeros(4, 1, 1, 1), torch.arange(4.0) + 1, torch.zeros(4, 1, 1, 1), torch.ones(4, 1, 1, 1), torch.tensor([0, 0, 1, 1])
    )
    assert states[states.picture == 1].sigma.tolist() == [3, 4] and len(states[:3]) == 3
    assert states.gap.tolist() == pytest.approx([1, 1 / 4, 1 / 9, 1 / 16])
