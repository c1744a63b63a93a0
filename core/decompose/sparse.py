"""Sparse non-negative least squares: which few atoms add up to a target, under a metric that is known only roughly.

Nothing here evaluates the model; everything is double precision and deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FILTERS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""tau of the flattened spectra: from nearly what the model shows to nearly the geometry of the embeddings."""
PENALTIES = (0.1, 0.03, 0.01)
"""l1 penalties, as fractions of the smallest one that leaves no word."""


def proposals(rows: Tensor, values: Tensor, atoms: Tensor, token: Tensor | None, count: int) -> tuple[list[Tensor], Tensor]:
    """Distinct weight vectors (words,) with at most ``count`` non-zeros for which atoms.T @ weights nearly satisfies rows @ w = values.

    rows: (equations, width); values: (equations,); atoms: (words, width); token: (width,), a w known to satisfy them, if any. Weights
    sum to 1. The second result says how much the words were wanted over all problems solved, (words,).

    A few directions of w dominate what is seen, by orders of magnitude, and any large dictionary can imitate those with the wrong
    words; the weak directions tell words apart but are also where a target lies outside the dictionary. So the equations' singular
    values s are flattened to s / sqrt(s^2 + tau mean(s^2)) for several tau, and entirely where a token is known; each problem is solved
    with several l1 penalties, and each solution is polished by exchanging words. The caller judges the proposals by the model itself.
    """
    rows, values, atoms = rows.double(), values.double(), atoms.double()
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    kept = singular > 1e-6 * singular[0]
    left, singular, right = left[:, kept], singular[kept], right[kept]
    target, directions = (left.T @ values) / singular, right @ atoms.T
    powers = [singular / (singular.square() + tau * singular.square().mean()).sqrt() for tau in FILTERS]
    problems = [(power[:, None] * directions, power * target) for power in powers]
    if token is not None:
        problems.append((atoms.T.contiguous(), token.double()))
    found: dict[tuple[int, ...], Tensor] = {}
    wanted = torch.zeros(len(atoms))
    for matrix, goal in problems:
        for weights, solution in sparse_solutions(matrix, goal, count, PENALTIES):
            found.setdefault(tuple(solution.nonzero()[:, 0].tolist()), solution)
            wanted += weights + solution
    return list(found.values()), wanted


def sparse_solutions(matrix: Tensor, target: Tensor, count: int, penalties: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights x >= 0 with sum 1, float32, along whose ray matrix @ x comes near ``target``: of the lasso, and of ``count`` columns.

    One pair per l1 penalty; the second is fitted to the largest weights of the first after exchanging columns while that helps.
    """
    for weights in _lasso_path(matrix, target, penalties):
        support = exchange(matrix, target, weights.topk(min(count, len(weights))).indices.tolist())
        solution = torch.zeros(matrix.shape[1], dtype=torch.double)
        solution[support] = small_nnls(matrix[:, support], target)
        if float(solution.sum()) > 0:
            yield (weights / weights.sum()).float(), (solution / solution.sum()).float()


def _lasso_path(matrix: Tensor, target: Tensor, penalties: Sequence[float], steps: int = 400) -> Iterator[Tensor]:
    """Non-negative lasso by accelerated proximal gradient with restarts (Beck and Teboulle 2009), from each penalty to the next.

    Penalties are fractions of the smallest one that makes every weight 0.
    """
    moment = matrix.T @ target
    bound = float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    top = float(moment.max().clamp_min(1e-300))
    x = torch.zeros_like(moment)
    for penalty in penalties:
        y, momentum = x, 1.0
        for _ in range(steps):
            following = (y - (matrix.T @ (matrix @ y) - moment + penalty * top) / bound).clamp_min(0)
            if float((y - following) @ (following - x)) > 0:
                momentum, following = 1.0, (x - (matrix.T @ (matrix @ x) - moment + penalty * top) / bound).clamp_min(0)
            faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            y = following + (momentum - 1) / faster * (following - x)
            x, momentum = following, faster
        yield x


def small_nnls(matrix: Tensor, target: Tensor, ridge: float = 1e-12) -> Tensor:
    """argmin ||matrix x - target||^2 over x >= 0 for a handful of columns, by exact coordinate descent on the normal equations."""
    gram = matrix.T @ matrix
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-300)
    moment = matrix.T @ target
    x: Tensor = torch.linalg.solve(gram, moment)
    if bool((x >= 0).all()):
        return x
    x = x.clamp_min(0)
    scale = gram.diagonal()
    for _ in range(300):
        before = x.clone()
        for index in range(len(x)):
            x[index] = (x[index] - (gram[index] @ x - moment[index]) / scale[index]).clamp_min(0)
        if float((x - before).abs().max()) <= 1e-10 * float(x.abs().max()):
            break
    return x


def exchange(matrix: Tensor, target: Tensor, support: list[int], sweeps: int = 24, tries: int = 3) -> list[int]:
    """``support`` after exchanging one column at a time for as long as that brings non-negative combinations closer to ``target``."""

    def miss(columns: list[int]) -> float:
        return float((matrix[:, columns] @ small_nnls(matrix[:, columns], target) - target).square().sum())

    best = miss(support)
    for _ in range(sweeps):
        for position in range(len(support)):
            others = support[:position] + support[position + 1 :]
            chosen = next((c for c in _additions(matrix, target, others, tries) if miss([*others, c]) < best * (1 - 1e-6)), None)
            if chosen is not None:
                support, best = [*others, chosen], miss([*others, chosen])
                break
        else:
            break
    return support


def _additions(matrix: Tensor, target: Tensor, support: list[int], count: int) -> list[int]:
    """The columns that would shorten the residual of ``support`` most, if their weight is positive."""
    residual, free = target, matrix
    if support:
        chosen = matrix[:, support]
        residual = target - chosen @ small_nnls(chosen, target)
        basis = torch.linalg.qr(chosen).Q
        free = matrix - basis @ (basis.T @ matrix)
    length = free.square().sum(0)
    gain = (free.T @ residual).clamp_min(0).square() / length.clamp_min(1e-300)
    gain[length < 1e-8 * matrix.square().sum(0)] = 0
    gain[support] = -1
    return gain.topk(min(count, len(gain))).indices.tolist()
