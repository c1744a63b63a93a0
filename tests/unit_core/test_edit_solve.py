"""The solver: what it returns is the minimiser it says it is, in every form it is computed in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conceptkit.core.edit.report import Adversary, distortion, shift, trace
from conceptkit.core.edit.solve import LowRank, Problem, annihilate, minimise, root
from hypothesis import given
from hypothesis import strategies as st


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stated(width: int, count: int, *, invariant: int = 0, retained: int = 0, preserve: bool = False, seed: int = 0) -> Problem:
    spread = draw(seed + 5, width, width)
    return Problem(
        columns=draw(seed, width, count),
        anchors=draw(seed + 1, width, count),
        weights=draw(seed + 2, count).abs() + 0.1,
        ridge=0.3,
        preserve=spread @ spread.T / width if preserve else None,
        retained=draw(seed + 3, width, retained) if retained else None,
        retained_weights=torch.full((retained,), 0.7, dtype=torch.float64) if retained else None,
        invariant=draw(seed + 4, width, invariant) if invariant else None,
    )


def objective(problem: Problem, delta: torch.Tensor, layer: torch.Tensor) -> float:
    missed = layer @ (delta @ problem.columns + problem.columns - problem.anchors)
    change = layer @ delta
    return float((missed.square() * problem.weights).sum() + (change @ problem.cost() * change).sum())


problems = st.builds(
    stated,
    st.integers(6, 14),
    st.integers(1, 30),
    invariant=st.integers(0, 3),
    retained=st.integers(0, 9),
    preserve=st.booleans(),
    seed=st.integers(0, 10**6),
)


@given(problems)
def test_the_karush_kuhn_tucker_conditions_hold(problem):
    """The gradient of the objective vanishes but for what the constraint holds it by, and the constraint is met."""
    delta = minimise(problem).delta()
    gradient = (delta @ problem.columns + problem.columns - problem.anchors) * problem.weights @ problem.columns.T + delta @ problem.cost()
    size = float(((problem.columns - problem.anchors) * problem.weights @ problem.columns.T).norm())
    k = problem.invariant
    if k is not None:
        assert float((delta @ k).norm()) <= 1e-9 * float(k.norm()) * (1 + float(delta.norm()))
        axes, _ = torch.linalg.qr(k)
        gradient = gradient - gradient @ axes @ axes.T
    assert float(gradient.norm()) <= 1e-9 * size


@given(problems)
def test_nothing_nearby_is_better_for_any_layer(problem):
    delta = minimise(problem).delta()
    layer = draw(9, 4, problem.width)
    best = objective(problem, delta, layer)
    aside = draw(10, problem.width, problem.width) * 1e-2
    if problem.invariant is not None:
        axes, _ = torch.linalg.qr(problem.invariant)
        aside = aside - aside @ axes @ axes.T
    assert objective(problem, delta + aside, layer) >= best
    assert objective(problem, delta - aside, layer) >= best


@given(problems)
def test_the_rank_is_bounded_by_the_columns(problem):
    found = minimise(problem)
    assert found.rank <= min(problem.columns.shape[1], problem.width)
    sizes = torch.linalg.svdvals(found.delta())
    assert int((sizes > 1e-9 * sizes[0]).sum()) <= min(problem.columns.shape[1], problem.width)


@pytest.mark.parametrize("count", [3, 40])
def test_retained_columns_are_a_preserve_covariance(count):
    few = stated(12, count, retained=4, invariant=1)
    whole = replace(few, retained=None, retained_weights=None, preserve=0.7 * few.retained @ few.retained.T)
    torch.testing.assert_close(minimise(few).delta(), minimise(whole).delta(), rtol=1e-9, atol=1e-10)


def test_a_repeated_column_is_one_of_its_summed_weight_in_either_form():
    once = stated(8, 3, invariant=1, preserve=True)
    often = replace(once, columns=once.columns.repeat(1, 5), anchors=once.anchors.repeat(1, 5), weights=once.weights.repeat(5) / 5)
    assert often.columns.shape[1] > often.width >= once.columns.shape[1]
    torch.testing.assert_close(minimise(often).delta(), minimise(once).delta(), rtol=1e-9, atol=1e-10)


def test_every_layer_has_the_same_answer():
    """W T is the minimiser that is found for the layer alone, by its own normal equations."""
    problem = stated(10, 4, retained=3)
    found = torch.eye(10, dtype=torch.float64) + minimise(problem).delta()
    for seed in (20, 21):
        layer = draw(seed, 7, 10)
        s = problem.cost() + problem.columns * problem.weights @ problem.columns.T
        kept = layer @ problem.cost() + layer @ problem.anchors * problem.weights @ problem.columns.T
        torch.testing.assert_close(layer @ found, torch.linalg.solve(s, kept.T).T, rtol=1e-9, atol=1e-9)


def test_large_weights_reach_the_anchor():
    problem = replace(stated(12, 3), weights=torch.full((3,), 1e8, dtype=torch.float64))
    torch.testing.assert_close(minimise(problem).apply(problem.columns.T), problem.anchors.T, rtol=1e-6, atol=1e-6)


def test_no_columns_are_the_identity():
    assert minimise(stated(5, 0)).rank == 0


@pytest.mark.parametrize("count", [2, 30])
def test_a_singular_system_says_what_mends_it(count):
    problem = replace(stated(8, count), ridge=0.0)
    problem = replace(problem, columns=problem.columns * torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)[:, None])
    with pytest.raises(ValueError, match="positive ridge"):
        minimise(problem)


def test_infinite_columns_are_refused():
    problem = stated(6, 2)
    with pytest.raises((ArithmeticError, ValueError), match="ridge"):
        minimise(replace(problem, columns=problem.columns * float("inf")))


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(0, 2))
def test_an_annihilated_subspace_is_out_of_reach(seed, count, invariant):
    problem = stated(10, count, preserve=True, invariant=invariant, seed=seed)
    subspace = draw(seed + 50, 10, 2)
    found = annihilate(minimise(problem), subspace, problem)
    whole = torch.eye(10, dtype=torch.float64) + found.delta()
    assert found.rank <= count + 2
    sizes = torch.linalg.svdvals(whole)
    assert float(sizes[-2]) < 1e-10 * float(sizes[0])
    if invariant:
        torch.testing.assert_close(whole @ problem.invariant, problem.invariant, rtol=1e-8, atol=1e-8)
    else:
        reached = subspace.T @ torch.linalg.solve(problem.cost(), whole)
        assert float(reached.norm()) < 1e-8


def test_composing_is_multiplying_and_truncating_is_best():
    first, second = (LowRank(draw(s, 9, 3), draw(s + 1, 9, 3)) for s in (0, 2))
    eye = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(eye + first.compose(second).delta(), (eye + first.delta()) @ (eye + second.delta()))

    spread = draw(7, 9, 9)
    gram, covariance = spread @ spread.T + eye, spread.T @ spread + eye
    both = first.compose(second)

    def size(delta: torch.Tensor) -> float:
        return float((gram @ delta @ covariance * delta).sum().sqrt())

    for rank in range(7):
        short = both.truncate(0.0, rank, gram, covariance)
        assert short.rank == min(rank, 6)
        factor_g, factor_c = torch.linalg.cholesky(gram), torch.linalg.cholesky(covariance)
        sizes = torch.linalg.svdvals(factor_g.T @ both.delta() @ factor_c)
        assert size(both.delta() - short.delta()) == pytest.approx(float(sizes[rank:].norm()), abs=1e-6)
    for tolerance in (1e-3, 0.1, 0.5):
        short = both.truncate(tolerance, 64, gram, covariance)
        assert size(both.delta() - short.delta()) <= tolerance * size(both.delta()) * (1 + 1e-6)


def test_truncating_keeps_what_is_exact():
    problem = stated(12, 40, invariant=2, preserve=True)
    found = minimise(problem).truncate(0.3, 4, torch.eye(12, dtype=torch.float64), problem.preserve)
    assert found.rank <= 4
    torch.testing.assert_close(found.apply(problem.invariant.T), problem.invariant.T, rtol=1e-9, atol=1e-9)


def gram_of(*layers: torch.Tensor) -> torch.Tensor:
    return sum(layer.T @ layer for layer in layers)


def test_the_traces_are_those_of_the_layers():
    layers = [draw(s, 6, 8) for s in range(3)]
    gram, edit = gram_of(*layers), LowRank(draw(3, 8, 2), draw(4, 8, 2))
    c, a, n = draw(5, 8, 2), draw(6, 8, 2), draw(7, 8, 2)
    whole = torch.eye(8, dtype=torch.float64) + edit.delta()
    pairs = [((w @ whole @ c - w @ a, w @ (c - a))) for w in layers]
    assert trace(edit, c, a, gram) == pytest.approx(
        sum(float((x * y).sum()) for x, y in pairs) / sum(float((y * y).sum()) for _, y in pairs)
    )
    moved = sum(float((w @ edit.delta() @ c).square().sum()) for w in layers)
    said = sum(float((w @ (c - n)).square().sum()) for w in layers)
    assert shift(edit, c, n, gram) == pytest.approx((moved / said) ** 0.5)
    captions = draw(8, 500, 8)
    changed = sum(float((captions @ (w @ edit.delta()).T).square().sum()) for w in layers)
    assert distortion(edit, captions.T @ captions, gram) == pytest.approx(
        changed / sum(float((captions @ w.T).square().sum()) for w in layers)
    )


def test_the_adversary_finds_what_no_other_embedding_beats():
    gram, spread = gram_of(draw(0, 20, 8)), draw(1, 8, 8)
    covariance = spread @ spread.T + 0.1 * torch.eye(8, dtype=torch.float64)
    edit = minimise(Problem(c := draw(2, 8, 1), a := draw(3, 8, 1), torch.ones(1, dtype=torch.float64), 0.1))
    adversary = Adversary(edit, gram, covariance)
    found = adversary.derive(c[:, 0])
    inside = torch.linalg.inv(covariance)

    def miss(e: torch.Tensor) -> float:
        d = edit.apply(e[None])[0] - c[:, 0]
        return float(d @ gram @ d)

    radius = float(c[:, 0] @ inside @ c[:, 0])
    assert float(found @ inside @ found) <= radius * (1 + 1e-6)
    ball = torch.linalg.cholesky(covariance)
    for seed in range(200):
        other = found + 0.1 * ball @ draw(seed, 8)
        other = other * min(1.0, (radius / float(other @ inside @ other)) ** 0.5)
        assert miss(other) >= miss(found) * (1 - 1e-9)
    assert 0 <= adversary.plausible(c[:, 0], a[:, 0]) <= adversary.anything(c[:, 0], a[:, 0]) == 1.0


def test_a_hard_edit_cannot_be_undone_by_any_embedding():
    problem = stated(10, 1, preserve=True)
    gram = gram_of(draw(30, 25, 10))
    away = problem.columns - problem.anchors
    found = annihilate(minimise(problem), away, problem)
    c, a = problem.columns[:, 0], problem.anchors[:, 0]
    adversary = Adversary(found, gram, torch.eye(10, dtype=torch.float64))
    best = torch.linalg.lstsq(
        torch.linalg.cholesky(gram).T @ (torch.eye(10, dtype=torch.float64) + found.delta()), torch.linalg.cholesky(gram).T @ c[:, None]
    )
    missed = found.apply(best.solution.T)[0] - c
    expected = 1 - float((missed @ gram @ missed) / ((c - a) @ gram @ (c - a))) ** 0.5
    assert adversary.anything(c, a) == pytest.approx(max(0.0, expected), abs=1e-6)
    assert adversary.anything(c, a) < 0.99
    assert adversary.plausible(c, a) <= adversary.anything(c, a) + 1e-6


@pytest.mark.parametrize("count", [4, 64])
def test_the_root_of_what_few_columns_span(count):
    columns = 1e3 * draw(0, 64, count).float()
    matrix = (columns @ columns.T).double()
    factor = root(matrix)
    assert float((factor @ factor.T - matrix).norm() / matrix.norm()) < 1e-4
    with pytest.raises(ValueError, match="singular"):
        root(-matrix)
