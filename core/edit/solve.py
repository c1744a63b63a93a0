"""The one solver: every closed-form edit of the text path is a quadratic problem with a single d x d matrix for an answer.

W' minimises sum_i w_i ||W' c_i - W a_i||^2 + tr((W' - W) S0 (W' - W)^T) subject to W' K = W K for every layer W at once when W' = W T,
T = I + U V^T; no layer appears in it. Everything here is float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model import NonFinite

SINGULAR = 1e-13
"""Ratio of the smallest to the largest pivot below which a system counts as singular."""

_MEND = "give a positive ridge (lam), or more captions to preserve"


@dataclass(frozen=True, eq=False)
class LowRank:
    """T = I + U V^T. u, v: (width, rank)."""

    u: Tensor
    v: Tensor

    @property
    def width(self) -> int:
        return self.u.shape[0]

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    @staticmethod
    def identity(width: int) -> LowRank:
        """T = I, with no columns."""
        return LowRank(torch.zeros(width, 0, dtype=torch.float64), torch.zeros(width, 0, dtype=torch.float64))

    def apply(self, x: Tensor) -> Tensor:
        """T x for rows x (..., width), in x's dtype and on its device; x itself when the rank is 0."""
        if not self.rank:
            return x
        u, v = self.u.to(x.device), self.v.to(x.device)
        return (x + (x.to(v.dtype) @ v) @ u.T).to(x.dtype)

    def delta(self) -> Tensor:
        """T - I, (width, width), float64."""
        return self.u.double() @ self.v.double().T

    def compose(self, after: LowRank) -> LowRank:
        """T_self T_after: the edit ``after`` solved on weights that carry this one. Rank is the sum of both."""
        u = torch.cat([self.u, after.u + self.u @ (self.v.T @ after.u)], 1)
        return LowRank(u, torch.cat([self.v, after.v], 1))

    def truncate(self, tolerance: float, rank: int, gram: Tensor | None = None, covariance: Tensor | None = None) -> LowRank:
        """The best approximation of the fewest columns, at most ``rank``, that loses at most ``tolerance`` of the edit.

        Measured by sum_l E ||W_l (T - T_r) c||^2 = ||G^1/2 (T - T_r) Sigma^1/2||_F^2, relative and rooted; G and Sigma (width, width)
        default to I. Eckart-Young on the factors, at the cost of two QR decompositions and an SVD of the present rank.
        """
        # Of the roots none is kept meanwhile: at full rank this is where most memory is taken.
        u = self.u.double() if gram is None else root(gram).T @ self.u.double()
        v = self.v.double() if covariance is None else root(covariance).T @ self.v.double()
        if self.rank < self.width:
            qu, ru = torch.linalg.qr(u)
            qv, rv = torch.linalg.qr(v)
            x, sizes, yt = torch.linalg.svd(ru @ rv.T)
            x, yt = qu @ x, yt @ qv.T
        else:
            u = u @ v.T
            del v
            x, sizes, yt = torch.linalg.svd(u)
        lost = sizes.square().flip(0).cumsum(0).flip(0)  # what dropping column i and all after it costs
        kept = min(int((lost > tolerance**2 * lost[:1]).sum()), rank) if len(sizes) else 0
        u, v = x[:, :kept] * sizes[:kept].sqrt(), yt[:kept].T * sizes[:kept].sqrt()
        del x, yt
        u = u if gram is None else torch.linalg.solve_triangular(root(gram).T, u, upper=True)
        v = v if covariance is None else torch.linalg.solve_triangular(root(covariance).T, v, upper=True)
        return LowRank(u, v)


@dataclass(frozen=True, eq=False)
class Problem:
    """What an edit must do, as columns of width d.

    columns c_i and anchors a_i (d, N) with weights w_i > 0 (N,): c_i is to be read as a_i. The cost of any other change is
    S0 = ridge I + preserve + retained diag(retained_weights) retained^T, with preserve (d, d) and retained (d, R). invariant K (d, k) must
    not change at all. second, moved: (d, d) sums of w c c^T and w (a - c) c^T over further columns, which are too many to keep.
    """

    columns: Tensor
    anchors: Tensor
    weights: Tensor
    ridge: float
    preserve: Tensor | None = None
    retained: Tensor | None = None
    retained_weights: Tensor | None = None
    invariant: Tensor | None = None
    second: Tensor | None = None
    moved: Tensor | None = None

    @property
    def width(self) -> int:
        return self.columns.shape[0]

    def cost(self) -> Tensor:
        """S0, (d, d)."""
        s0 = torch.zeros(self.width, self.width, dtype=torch.float64) if self.preserve is None else self.preserve.clone()
        s0.diagonal().add_(self.ridge)
        if self.retained is not None:
            s0 += (self.retained * _weights(self)) @ self.retained.T
        return s0

    def with_columns(self, columns: Tensor, anchors: Tensor, weights: Tensor) -> Problem:
        """The same problem with further columns."""
        return replace(
            self,
            columns=torch.cat([self.columns, columns], 1),
            anchors=torch.cat([self.anchors, anchors], 1),
            weights=torch.cat([self.weights, weights]),
        )


def minimise(problem: Problem) -> LowRank:
    """The minimiser T of a problem, of rank at most N and at most d, with T K = K.

    Three forms of one answer, the cheapest that fits: for few columns S0^-1 by Woodbury in the columns' own space (S0 = ridge I + few
    columns) or by Cholesky in d, then a system of size N; for more columns than d their two Gram matrices. Raises ValueError where the
    system is singular, NonFinite where the answer is no number.
    """
    count = problem.columns.shape[1]
    if count == 0 and problem.second is None:
        return LowRank.identity(problem.width)
    found = _by_gram(problem) if problem.second is not None or count > problem.width else _by_columns(problem)
    if not (torch.isfinite(found.u).all() and torch.isfinite(found.v).all()):
        raise NonFinite(f"the edit came out as NaN or infinity: {_MEND}, and check the text encoder's precision")
    return found


def response(problem: Problem) -> Tensor:
    """D (d, N) with T = I + (A - C) D^T: how much of each column an embedding is, whatever the anchors are. Raises as ``minimise`` does."""
    weighted = problem.columns * problem.weights
    return _within(problem, weighted, _cholesky(problem.cost() + weighted @ problem.columns.T))


def annihilate(edit: LowRank, subspace: Tensor, problem: Problem) -> LowRank:
    """P T with P the S0-orthogonal projector along ``subspace`` (d, k): no embedding is mapped onto any direction of it any more.

    range(P T) lies in {x : B^T S0^-1 x = 0}; P K = K because the part of B that K has to do with is taken out first. Rank at most rank(T)
    + k.
    """
    factor = _cholesky(problem.cost())
    k = problem.invariant
    if k is not None:
        xk = torch.cholesky_solve(k, factor)
        subspace = subspace - k @ _solve(k.T @ xk, xk.T @ subspace)
    x = torch.cholesky_solve(subspace, factor)
    down = _solve(subspace.T @ x, x.T).T
    # P = I - B D^T, so P T = I + (U - B D^T U) V^T - B D^T.
    u = torch.cat([edit.u - subspace @ (down.T @ edit.u), -subspace], 1)
    return LowRank(u, torch.cat([edit.v, down], 1))


def _by_columns(problem: Problem) -> LowRank:
    k = problem.invariant
    xc = _inverse_times(problem, problem.columns if k is None else torch.cat([problem.columns, k], 1))
    if k is not None:
        xc, xk = xc.tensor_split([problem.columns.shape[1]], 1)
        xc = xc - xk @ _solve(k.T @ xk, xk.T @ problem.columns)
    middle = torch.diag(1 / problem.weights) + problem.columns.T @ xc
    return LowRank(problem.anchors - problem.columns, _solve(middle, xc.T).T)


def _by_gram(problem: Problem) -> LowRank:
    weighted = problem.columns * problem.weights
    second = problem.cost().addmm_(weighted, problem.columns.T)
    if problem.second is not None:
        second += problem.second
    factor = _cholesky(second)
    del second
    moved = (problem.anchors - problem.columns) @ weighted.T
    if problem.moved is not None:
        moved += problem.moved
    return LowRank(torch.eye(problem.width, dtype=torch.float64), _within(problem, moved.T, factor))


def _within(problem: Problem, right: Tensor, factor: Tensor) -> Tensor:
    """S^-1 right, made orthogonal to the invariant columns."""
    x = torch.cholesky_solve(right, factor)
    k = problem.invariant
    if k is None:
        return x
    xk = torch.cholesky_solve(k, factor)
    return x.addmm_(xk, _solve(k.T @ xk, xk.T @ right), alpha=-1)


def _inverse_times(problem: Problem, right: Tensor) -> Tensor:
    """S0^-1 right."""
    retained = problem.retained
    columns = 0 if retained is None else retained.shape[1]
    if problem.preserve is not None or 2 * columns > problem.width:
        return torch.cholesky_solve(right, _cholesky(problem.cost()))
    if problem.ridge <= 0:
        raise ValueError(f"the system is singular: {_MEND}")
    if retained is None:
        return right / problem.ridge
    middle = torch.diag(problem.ridge / _weights(problem)) + retained.T @ retained
    return (right - retained @ _solve(middle, retained.T @ right)) / problem.ridge


def _weights(problem: Problem) -> Tensor:
    if problem.retained is None or problem.retained_weights is None:
        raise ValueError("retained columns need weights: give one a column")
    return problem.retained_weights


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if int(info) or not bool(pivots.min() > SINGULAR * pivots.max()):
        raise ValueError(f"the system is singular: {_MEND}")
    return factor


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """A symmetric positive definite system."""
    return torch.cholesky_solve(right, _cholesky(matrix))


def root(matrix: Tensor) -> Tensor:
    """A Cholesky factor L with L L^T = matrix + a little of its own scale, so that what nothing weighs keeps an answer.

    As little as rounding allows: sums of float32 products of few columns can come out slightly negative. Raises as ``minimise`` does.
    """
    scale = float(matrix.diagonal().mean())
    for share in (1e-9, 1e-7, 1e-5):
        raised = matrix.to(torch.float64, copy=True)
        raised.diagonal().add_(share * scale)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not int(failed):
            return factor
    raise ValueError(f"the system is singular: {_MEND}")
