"""Sparse non-negative least squares: which few atoms add up to a target.

Nothing here evaluates the model; everything is double precision and deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PENALTIES = (0.1, 0.03, 0.01)
"""l1 penalties, as fractions of the smallest one that leaves no word."""

_Array: TypeAlias = NDArray[np.float64]


def sparse_solutions(matrix: Tensor, target: Tensor, count: int, penalties: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights x >= 0 with sum 1, float32, along whose ray matrix @ x comes near ``target``: of the lasso, and of ``count`` columns.

    One pair per l1 penalty; the second is fitted to the largest weights of the first after exchanging columns while that helps.
    """
    problem = LeastSquares(matrix, target)
    for weights in problem.lasso(penalties):
        largest = np.argsort(-weights, kind="stable")[:count]
        support, fitted = problem.exchange(largest.tolist())
        solution = np.zeros_like(weights)
        solution[support] = fitted
        if solution.sum() > 0:
            yield torch.from_numpy(weights / weights.sum()).float(), torch.from_numpy(solution / solution.sum()).float()


class LeastSquares:
    """min ||matrix @ x - target||^2 over x >= 0 with few non-zeros. matrix: (equations, columns); target: (equations,)."""

    def __init__(self, matrix: Tensor, target: Tensor) -> None:
        self._matrix: _Array = np.ascontiguousarray(matrix.double().numpy())
        self._target: _Array = target.double().numpy()
        self._moment: _Array = self._matrix.T @ self._target
        self._lengths: _Array = np.square(self._matrix).sum(0)
        self._grams: dict[int, _Array] = {}

    def fit(self, columns: Sequence[int]) -> _Array:
        """The best weights of the given columns."""
        chosen = list(columns)
        return _nnls(self._gram(chosen)[:, chosen], self._moment[chosen])

    def miss(self, columns: Sequence[int]) -> float:
        """||matrix @ x - target||^2 at those weights."""
        chosen = list(columns)
        return float(np.square(self._matrix[:, chosen] @ self.fit(chosen) - self._target).sum())

    def additions(self, columns: Sequence[int], count: int) -> list[int]:
        """The columns that would shorten the residual of ``columns`` most, of those whose weight would be positive."""
        chosen = list(columns)
        gain, length = self._moment.copy(), self._lengths.copy()
        if chosen:
            rows = self._gram(chosen)
            gain -= self.fit(chosen) @ rows
            length -= (rows * (np.linalg.inv(_stable(rows[:, chosen])) @ rows)).sum(0)
        usable = length > 1e-8 * self._lengths
        score = np.where(usable, np.square(gain.clip(min=0)) / np.where(usable, length, 1), 0)
        score[chosen] = -1
        return [int(j) for j in np.argsort(-score, kind="stable")[:count] if score[j] > 0]

    def exchange(self, columns: Sequence[int], sweeps: int = 24, tries: int = 3) -> tuple[list[int], _Array]:
        """Columns after exchanging one at a time for as long as that shortens the residual, and their weights."""
        support = list(columns)
        best = self.miss(support)
        for _ in range(sweeps):
            for position in range(len(support)):
                others = support[:position] + support[position + 1 :]
                better = next(((m, c) for c in self.additions(others, tries) if (m := self.miss([*others, c])) < best * (1 - 1e-6)), None)
                if better is not None:
                    best, support = better[0], [*others, better[1]]
                    break
            else:
                break
        return support, self.fit(support)

    def lasso(self, penalties: Sequence[float], steps: int = 400) -> Iterator[_Array]:
        """Non-negative lasso by accelerated proximal gradient with restarts (Beck and Teboulle 2009), from each penalty to the next.

        Penalties are fractions of the smallest one that makes every weight 0.
        """
        matrix, moment = self._matrix, self._moment
        bound = max(self._bound, 1e-300)
        top = max(float(moment.max()), 1e-300)
        x = np.zeros_like(moment)
        for penalty in penalties:
            y, momentum, drift = x, 1.0, moment - penalty * top
            for _ in range(steps):
                following = (y - (matrix.T @ (matrix @ y) - drift) / bound).clip(min=0)
                if (y - following) @ (following - x) > 0:
                    momentum, following = 1.0, (x - (matrix.T @ (matrix @ x) - drift) / bound).clip(min=0)
                faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
                y = following + (momentum - 1) / faster * (following - x)
                x, momentum = following, faster
            yield x

    @cached_property
    def _bound(self) -> float:
        return float(np.linalg.norm(self._matrix, 2)) ** 2

    def _gram(self, columns: list[int]) -> _Array:
        """Products of the given columns with all, (len(columns), all)."""
        for column in columns:
            if column not in self._grams:
                self._grams[column] = self._matrix.T @ self._matrix[:, column]
        return np.stack([self._grams[column] for column in columns])


def nnls(gram: Tensor, moment: Tensor, sweeps: int = 60) -> Tensor:
    """argmin x^T G x - 2 m^T x over x >= 0 for each of a batch, by cyclic coordinate descent. gram: (..., k, k); moment: (..., k); k small.

    Columns of zeros get 0. At the minimum x^T G x = m^T x.
    """
    x, slope = torch.zeros_like(moment), -moment
    size = gram.diagonal(dim1=-2, dim2=-1)
    size = size.clamp_min(torch.finfo(size.dtype).tiny)
    for _ in range(sweeps):
        for column in range(moment.shape[-1]):
            moved = (x[..., column] - slope[..., column] / size[..., column]).clamp_min(0)
            slope = slope + gram[..., :, column] * (moved - x[..., column])[..., None]
            x[..., column] = moved
    return x


def small_nnls(matrix: Tensor, target: Tensor) -> Tensor:
    """argmin ||matrix x - target||^2 over x >= 0 for a handful of columns, double."""
    columns, goal = matrix.double().numpy(), target.double().numpy()
    return torch.from_numpy(_nnls(columns.T @ columns, columns.T @ goal))


def _nnls(gram: _Array, moment: _Array) -> _Array:
    """Lawson and Hanson's method on the triangular factor of the normal equations, which are small."""
    from scipy.optimize import nnls  # slow to import, and not needed to list a node

    factor = np.linalg.cholesky(_stable(gram))
    found: tuple[Any, float] = nnls(factor.T, np.linalg.solve(factor, moment))
    return np.asarray(found[0], dtype=np.float64)


def _stable(gram: _Array) -> _Array:
    """With a ridge far below the columns' lengths, so that repeated and zero columns do no harm."""
    size = len(gram)
    return gram + (1e-12 * np.trace(gram) / size + 1e-300) * np.eye(size)
