"""The model linearised in what its cross-attention reads, and the search for words under it, which costs no evals.

Near the concept's own conditioning c* a denoiser answers nearly linearly; the text encoder between a token and its conditioning does not,
and linearised there, wrong words look right. So only the denoiser is linearised, at a conditioning c0 and by random projections v of its
noise prediction's residual r:

    y(alpha) = v r(c0) + G (c(alpha) - c0),    G = v dr/dc at c0    (3 evals a row),

while c(alpha) is the text encoder itself. Then sum y^2 estimates what a mixture of words leaves unexplained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..model import Conditioning, in_chunks
from .mixture import Mixture, SimplexDescent
from .sparse import LeastSquares, small_nnls, sparse_solutions

_PENALTIES = (0.3, 0.1, 0.03, 0.01)
_RATE = 0.03
_BUMP = 0.02
"""Step of the finite differences in alpha: text encoders are smooth, and float32 leaves five digits of it."""
_TRIES, _POLISHED = 4, 6
"""Words tried in the place of each word, and how many of the resulting sets are looked at closely."""
_BEAM = 2
"""How many sets words are left out of at a time."""
_SUMMITS = 3
"""How many of the likeliest sets the search must have looked around at before it ends."""


def flat(conditioning: Conditioning) -> Tensor:
    """All numbers of a conditioning side by side, (batch, size)."""
    context = conditioning.context.flatten(1)
    return context if conditioning.pooled is None else torch.cat([context, conditioning.pooled.to(context)], dim=1)


@dataclass(frozen=True)
class Surrogate:
    """y(c) = rows @ flat(c) - offsets, with rows (n, size) and offsets (n,) scaled so that sum y^2 is the unexplained share.

    token: the concept's direction, the unit embeddings of all encoders side by side, (width,), or None where it is not one token; with
    ``pull``, pull * (direction of the mixture - token) joins the residual, which draws the search towards words near the concept's own
    embedding.
    """

    mixture: Mixture
    rows: Tensor
    offsets: Tensor
    token: Tensor | None = None
    pull: float = 0.0
    chunk: int = 32

    def residual(self, alphas: Tensor) -> Tensor:
        """y for each row of alphas (batch, words): (batch, n), or n + width with a pull. Double, CPU."""
        with torch.no_grad():
            y = self._in_chunks(lambda part: flat(self.mixture.encode(part)) @ self.rows.T - self.offsets, alphas).cpu().double()
            return y if self.token is None or not self.pull else torch.cat([y, self._pulled(alphas, self.token)], dim=1)

    def r2(self, alphas: Tensor) -> Tensor:
        """1 - sum y^2 for each row of alphas, (batch,): an estimate of R2, less the penalty for leaving the token."""
        return 1 - self.residual(alphas).square().sum(1)

    def cosine(self, alphas: Tensor) -> Tensor:
        """Cosine between each mixture and the concept's embedding, (batch,), never below 0; 0 without a token."""
        if self.token is None:
            return torch.zeros(len(alphas), dtype=torch.double)
        cosines = self._direction(alphas) @ self.token.double() / len(self.mixture.embeddings)
        return cosines.clamp_min(0)

    def discord(self, alphas: Tensor) -> Tensor:
        """How far each row's shares are from what its words matter, (batch,): Kullback-Leibler divergence of the one from the other, nats.

        What a word matters is the R2 lost without it, from 0.005 to 1. A word of large share that hardly matters only makes the others
        weaker; where two sets of words explain the same, the one without such words is the better answer.
        """
        whole, parts = self.r2(alphas).tolist(), [_each_left_out(alpha) for alpha in alphas]
        found = torch.zeros(len(alphas), dtype=torch.double)
        if not sum(map(len, parts)):
            return found
        left = self.r2(torch.cat(parts)).split([len(part) for part in parts])
        for row, (alpha, r2, without) in enumerate(zip(alphas, whole, left, strict=True)):
            if len(without):
                matters = (r2 - without).clamp(0.005, 1.0)
                shares = alpha[alpha > 0].double() / alpha.double().sum()
                found[row] = (shares * (shares * matters.sum() / matters).log()).sum()
        return found

    def equations(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Gauss-Newton's equations in the weights of all words at ``alpha``: (n + 1, words), (n + 1,).

        y does not change with the scale of alpha, so its differential vanishes along alpha and the sum of the weights is set by an
        equation of its own.
        """
        width = sum(rows.shape[1] for rows in self.mixture.embeddings.values())
        # a backward pass through the text encoder costs about twice a forward pass
        parts = [self._jacobian_by_columns(alpha) if width < 2 * len(self.rows) else self._jacobian_by_rows(alpha)]
        if self.token is not None and self.pull:
            parts.append(self.pull * torch.cat(list(self._turning(alpha).values())))
        return with_gauge(torch.cat(parts), self.residual(alpha[None])[0], alpha)

    def descend(self, steps: int, pulse: Callable[[], None]) -> Tensor:
        """Where a few steps of descent over all words at once lead from equal weights, (words,).

        Stopped early, it spreads the weight over what the concept looks like most; carried on, over what imitates it best.
        """
        count = len(self.mixture)
        descent = SimplexDescent(torch.full((count,), 1 / count), steps, rate=_RATE)
        for _ in range(steps):
            pulse()
            alpha = descent.alpha.requires_grad_()
            with torch.enable_grad():
                loss = (flat(self.mixture.encode(alpha[None])) @ self.rows.T - self.offsets).square().sum()
            descent.step(torch.autograd.grad(loss, alpha)[0])
        return descent.alpha

    def polish(self, alphas: Tensor, rounds: int = 3) -> tuple[Tensor, Tensor]:
        """Each row of alphas after Gauss-Newton on the weights of its own words, with a line search, and its `r2`."""
        alphas, scores = alphas.clone(), self.r2(alphas)
        active = torch.arange(len(alphas))
        for _ in range(rounds):
            supports = [alphas[i].nonzero()[:, 0] for i in active]
            eye = torch.eye(alphas.shape[1])
            probes = [torch.cat([alphas[i][None], alphas[i] + _BUMP * eye[s]]) for i, s in zip(active, supports, strict=True)]
            values = self.residual(torch.cat(probes)).split([len(p) for p in probes])
            lines = []
            for i, support, y in zip(active, supports, values, strict=True):
                matrix, target = with_gauge((y[1:] - y[0]).T / _BUMP, y[0], alphas[i][support])
                goal = _on(support, small_nnls(matrix, target), alphas[i])
                lines += [goal, alphas[i] + 0.4 * (goal - alphas[i])]
            reached, which = self.r2(torch.stack(lines)).view(-1, 2).max(1)
            gain = reached - scores[active]
            for row, i in enumerate(active.tolist()):
                if gain[row] > 0:
                    alphas[i], scores[i] = lines[2 * row + int(which[row])], reached[row]
            active = active[gain > 1e-3]
            if not len(active):
                break
        return alphas, scores

    def _direction(self, alphas: Tensor) -> Tensor:
        rows = self.mixture.embeddings.values()
        return torch.cat([normalize(alphas.double() @ e.cpu().double(), dim=1) for e in rows], dim=1)

    def _pulled(self, alphas: Tensor, token: Tensor) -> Tensor:
        return self.pull * (self._direction(alphas) - token.double())

    def _turning(self, alpha: Tensor) -> dict[str, Tensor]:
        """d direction / d alpha = (E - u (u . E)) / |alpha E| with each encoder's unit direction u, (width, words)."""
        found = {}
        for name, rows in self.mixture.embeddings.items():
            atoms = rows.cpu().double()
            mixed = alpha.cpu().double() @ atoms
            unit = normalize(mixed, dim=0)
            found[name] = ((atoms - (atoms @ unit)[:, None] * unit) / mixed.norm()).T
        return found

    def _jacobian_by_rows(self, alpha: Tensor) -> Tensor:
        """d y / d alpha, (n, words): one backward pass through the text encoder a row."""

        def gradients(rows: Tensor) -> Tensor:
            each = alpha.expand(len(rows), -1).clone().requires_grad_()
            with torch.enable_grad():
                total = (flat(self.mixture.encode(each)) * rows).sum()
            return torch.autograd.grad(total, each)[0].cpu().double()

        return self._in_chunks(gradients, self.rows)

    def _jacobian_by_columns(self, alpha: Tensor) -> Tensor:
        """The same by finite differences in each number of the token, chained with how the token turns with alpha."""
        total = torch.zeros(len(self.rows), len(alpha), dtype=torch.double)
        with torch.no_grad():
            token = self.mixture.tokens(alpha[None])
            for name, turning in self._turning(alpha).items():
                row, length = token[name][0], self.mixture.norms[name]
                moved = torch.cat([row, row + _BUMP * length * torch.eye(row.shape[1]).to(row)])

                def seen(part: Tensor, name: str = name) -> Tensor:
                    slot = {key: value.expand(len(part), 1, -1) for key, value in token.items()} | {name: part[:, None]}
                    return (flat(self.mixture.encode_tokens(slot)) @ self.rows.T).cpu().double()

                values = self._in_chunks(seen, moved)
                total += ((values[1:] - values[0]) / _BUMP).T @ turning
        return total

    def _in_chunks(self, work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        return in_chunks(work, rows, self.chunk, "a prompt in the text encoder")


class Search:
    """Sets of at most ``count`` words that a surrogate finds good; ``found`` maps each set to its weights and score.

    ``pulse`` runs between steps; raising from it ends the search.
    """

    def __init__(self, surrogate: Surrogate, count: int, pulse: Callable[[], None]) -> None:
        self.surrogate, self.count, self._pulse = surrogate, count, pulse
        self.found: dict[tuple[int, ...], tuple[float, Tensor]] = {}

    def best(self, size: int | None = None) -> Tensor | None:
        """The best weights found, of ``size`` words if given."""
        of_size = [entry for words, entry in self.found.items() if size is None or len(words) == size]
        return max(of_size, key=lambda entry: entry[0])[1] if of_size else None

    def run(self, starts: Iterable[Tensor], rounds: int = 2) -> None:
        """Solve for sparse weights from each start until they repeat; then exchange words; then do the same with ever fewer words.

        A start of few words is itself found, and so is what is left when its words are left out one after the other.
        """
        for start in starts:
            size = int((start > 0).sum())
            if size <= self.count:
                self.add([start])
            if size <= 3 * self.count:
                self._thin(start)
            if size <= self.count or size == len(start):
                self._solve(start, rounds)
        alpha = self.best()
        while alpha is not None:
            alpha = self._exchange(alpha, rounds)
            support = alpha.nonzero()[:, 0].tolist()
            if len(support) < 2:
                break
            self.add(_each_left_out(alpha))
            alpha, rounds = self.best(len(support) - 1), 1

    def approach(self, starts: Iterable[Tensor]) -> None:
        """Solve for sparse weights from each start, and exchange words once: a first step, not all that `run` does."""
        for start in starts:
            self.add([start])
            self._solve(start, 2)
        best = self.best()
        if best is not None:
            self._exchange(best, 1)

    def add(self, alphas: Iterable[Tensor]) -> None:
        """Polish those whose words are new, and keep them."""
        fresh = {_words(alpha): alpha for alpha in alphas if _words(alpha) not in self.found}
        if not fresh:
            return
        self._pulse()
        polished, scores = self.surrogate.polish(torch.stack(list(fresh.values())), 2)
        for given, alpha, score in zip(fresh, polished, scores.tolist(), strict=True):
            for words in {given, _words(alpha)}:  # weights may have become 0
                if words not in self.found or self.found[words][0] < score:
                    self.found[words] = score, alpha

    def take(self, found: Mapping[tuple[int, ...], Tensor]) -> None:
        """Keep the weights of those sets that are new, as they are."""
        fresh = {words: alpha for words, alpha in found.items() if words not in self.found}
        if fresh:
            scores = self.surrogate.r2(torch.stack(list(fresh.values()))).tolist()
            self.found |= {words: (score, alpha) for (words, alpha), score in zip(fresh.items(), scores, strict=True)}

    def ascend(self, evidence: Callable[[Tensor, Tensor], Tensor], pull: float) -> None:
        """From the likeliest sets found, exchange, add and leave out one word at a time for as long as that leads to likelier ones.

        evidence: of weights (n, words) and their R2 (n,), the larger the likelier, (n,). Words to add are those that shorten the residual
        most under a pull.
        """

        def judged(names: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
            scores, alphas = zip(*(self.found[words] for words in names), strict=True)
            return dict(zip(names, evidence(torch.stack(alphas), torch.tensor(scores)).tolist(), strict=True))

        likely, pulled = judged(list(self.found)), replace(self.surrogate, pull=pull)
        done: set[tuple[int, ...]] = set()
        while todo := [words for words in sorted(likely, key=likely.__getitem__)[-_SUMMITS:] if words not in done]:
            done.add(todo[-1])
            self._pulse()
            alpha = self.found[todo[-1]][1]
            problem, support = LeastSquares(*pulled.equations(alpha)), list(todo[-1])
            bases = [support[:i] + support[i + 1 :] for i in range(len(support))] + [support] * (len(support) < self.count)
            grown = [[*base, column] for base in bases if base for column in problem.additions(base, _TRIES)]
            options = [_on(torch.tensor(columns), torch.from_numpy(problem.fit(columns)), alpha) for columns in grown]
            proposed = {_words(option): option for option in (*options, *_each_left_out(alpha)) if _words(option) not in self.found}
            if not proposed:
                continue
            fresh = torch.stack(list(proposed.values()))
            self.add(fresh[evidence(fresh, self.surrogate.r2(fresh)).topk(min(_POLISHED, len(fresh))).indices])
            likely |= judged([words for words in self.found if words not in likely])

    def _thin(self, alpha: Tensor) -> None:
        """Leave out one word after the other, the most useless first, with ``_BEAM`` sets going on at a time."""
        level = [alpha]
        while level:
            self._pulse()
            proposed = {_words(fewer): fewer for each in level for fewer in _each_left_out(each)}
            if not proposed:
                return
            options = torch.stack(list(proposed.values()))
            options = options[self.surrogate.r2(options).topk(min(2 * _BEAM, len(options))).indices]
            polished, scores = self.surrogate.polish(options, 2)
            for each, score in zip(polished, scores.tolist(), strict=True):
                if len(_words(each)) <= self.count and score > self.found.get(_words(each), (-torch.inf, each))[0]:
                    self.found[_words(each)] = score, each
            level = list(polished[scores.topk(min(_BEAM, len(scores))).indices])

    def _solve(self, alpha: Tensor, rounds: int) -> None:
        for _ in range(rounds):
            self._pulse()
            options = []
            for lasso, solution in sparse_solutions(*self.surrogate.equations(alpha), self.count, _PENALTIES):
                near = 0.5 * strongest(alpha, 2 * self.count)
                options += [solution, strongest(near + 0.5 * solution, self.count), strongest(0.5 * alpha + 0.5 * lasso, self.count)]
            self.add(options)
            best = self.best()
            if best is None or _words(best) == _words(alpha):
                break
            alpha = best

    def _exchange(self, alpha: Tensor, rounds: int) -> Tensor:
        """Replace one word at a time for as long as that helps."""
        for _ in range(rounds):
            self._pulse()
            problem = LeastSquares(*self.surrogate.equations(alpha))
            support = alpha.nonzero()[:, 0].tolist()
            options = []
            for position in range(len(support)):
                others = support[:position] + support[position + 1 :]
                for column in problem.additions(others, _TRIES):
                    columns = [*others, column]
                    options.append(_on(torch.tensor(columns), torch.from_numpy(problem.fit(columns)), alpha))
            if not options:
                break
            proposed = torch.stack(options)
            self.add(proposed[self.surrogate.r2(proposed).topk(min(_POLISHED, len(proposed))).indices])
            best = self.best(len(support))
            if best is None or _words(best) == _words(alpha):
                break
            alpha = best
        return alpha


def find(
    surrogate: Surrogate,
    starts: Iterable[Tensor],
    near: Iterable[Tensor],
    count: int,
    pulls: Sequence[float],
    evidence: Callable[[Tensor, Tensor], Tensor],
    pulse: Callable[[], None],
) -> Tensor:
    """Distinct weights of at most ``count`` words that explain the concept well by the surrogate, (n, words).

    Searched twice: where the concept is one token, from ``near`` with a pull towards its embedding that lessens from one of ``pulls`` to
    the next, since far from the right words the embedding, which is linear in them, is the better guide; and without, from ``starts`` and
    the best found before. Lastly `Search.ascend` looks around at the likeliest of all.
    """
    found: dict[tuple[int, ...], Tensor] = {}
    starts, near = list(starts), list(near)
    if surrogate.token is not None:
        for pull in pulls:
            pulled = Search(replace(surrogate, pull=pull), count, pulse)
            if pull != pulls[-1]:
                pulled.approach(near)
            else:
                pulled.run(near)
            found |= {words: alpha for words, (_, alpha) in pulled.found.items()}
            best = pulled.best()
            near = near if best is None else [best]
        starts += near
    free = Search(replace(surrogate, pull=0.0), count, pulse)
    free.run(starts)
    free.take(found)
    free.ascend(evidence, pulls[-1])
    return torch.stack([alpha for _, alpha in free.found.values()])


def strongest(alpha: Tensor, count: int) -> Tensor:
    """alpha without all but its largest ``count`` entries, summing to 1."""
    kept = torch.zeros_like(alpha)
    largest = alpha.topk(min(count, len(alpha))).indices
    kept[largest] = alpha[largest]
    return kept / kept.sum()


def _words(alpha: Tensor) -> tuple[int, ...]:
    return tuple(alpha.nonzero()[:, 0].tolist())


def _each_left_out(alpha: Tensor) -> Tensor:
    """alpha without each of its words in turn, (words, all), summing to 1; none where it is one word."""
    support = alpha.nonzero()[:, 0].tolist()
    if len(support) < 2:
        return alpha.repeat(0, 1)
    fewer = alpha.repeat(len(support), 1)
    fewer[range(len(support)), support] = 0
    return fewer / fewer.sum(1, keepdim=True)


def _on(support: Tensor, weights: Tensor, instead: Tensor) -> Tensor:
    """``weights`` on ``support``, summing to 1; ``instead`` when all are 0."""
    if not float(weights.sum()) > 0:
        return instead
    alpha = torch.zeros_like(instead)
    alpha[support] = (weights / weights.sum()).float()
    return alpha


def with_gauge(jacobian: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    gauge = jacobian.norm() / jacobian.shape[1] ** 0.5
    target = torch.cat([jacobian @ alpha.double() - y, gauge[None]])
    system = torch.cat([jacobian, gauge.expand(1, jacobian.shape[1])])
    if system.shape[0] <= system.shape[1]:
        return system, target
    reduced = torch.linalg.qr(system)
    return reduced.R, reduced.Q.T @ target
