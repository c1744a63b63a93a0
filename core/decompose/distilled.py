"""Distilled decomposition: the weighted words under which the model predicts what it predicts for the concept itself.

The target is the model's own prediction with the concept's prompt, at the states its sampler passed through, so the loss
sum_s ||eps(x_s, alpha) - eps(x_s, concept)||^2 carries no noise and vanishes wherever the words say the same as the concept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..model import Conditioning
from .fidelity import by_level, explained
from .mixture import Mixture, SimplexDescent
from .result import RELIABLE_R2, Attempt, Decomposition, Fidelity, fill
from .sparse import proposals, small_nnls, sparse_solutions
from .states import States, distances, harvest
from .task import Task

logger = logging.getLogger(__name__)


ENOUGH = 0.95
"""R2 on the judged states at which no further search is made."""
_SECANT_PENALTIES = (0.3, 0.1, 0.03, 0.01)


@dataclass(frozen=True)
class Settings:
    """How much is spent, in states and samples.

    pictures, heldout: sampled for the fit and for measuring; steps, guidance: the sampler's. judged: states by which proposals are
    compared. rows: random projections of the linearisation at the concept (3 evals each). pursuits: searches along secants, each of
    ``screened`` words at ``probed`` states. refined: states of a Gauss-Newton step on the chosen words. descent: gradient steps of
    ``batch`` states, taken only where everything else explains the concept poorly.
    """

    pictures: int = 4
    heldout: int = 2
    steps: int = 12
    guidance: float = 4.0
    judged: int = 8
    rows: int = 96
    pursuits: int = 3
    screened: int = 48
    probed: int = 4
    refined: int = 6
    descent: int = 60
    batch: int = 8


BUDGETS: Mapping[str, Settings] = MappingProxyType({"default": Settings()})
"""What may be spent, by name."""


def decompose_distilled(task: Task) -> Decomposition:
    """Take the task's concept apart by matching the model's own predictions for it; ``Decomposition.r2`` says how far that got."""
    return _Fit(task, task.choose(BUDGETS)).run()


class _Fit:
    """One decomposition under way."""

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task, self.model, self.settings, self.seed = task, task.model, settings, task.seed
        self.mixture = Mixture.of(task.model, task.template, task.pool)
        self.teacher, self.empty, self.own, self.on_step = task.teacher, task.empty, task.token, task.on_step
        self.evals, self.calls = self.model.meter.evals, self.model.meter.calls
        self.generator = torch.Generator().manual_seed(task.seed)
        pictures = settings.pictures + settings.heldout
        pursuit = 3 * settings.judged + settings.probed * (settings.screened + 6) + 16 * settings.judged
        self._planned = 2 * pictures * settings.steps + 3 * settings.rows + settings.pursuits * pursuit + 60 * settings.refined

    def run(self) -> Decomposition:
        options, concept = self.settings, self.task.name
        seeds = torch.randint(2**31, (options.pictures + options.heldout,), generator=self.generator).tolist()
        states = harvest(
            self.model,
            self.teacher,
            self.empty,
            seeds,
            height=self.task.height,
            width=self.task.width,
            steps=options.steps,
            guidance=options.guidance,
            on_step=self._report,
        )
        fitted, heldout = states[states.picture < options.pictures], states[states.picture >= options.pictures]
        if not float(states.gap.sum()) > 0:
            raise ValueError(
                f"the model ignores {concept!r}: its predictions equal those of the empty prompt, so there is nothing to explain"
            )
        judged = fitted[self._draw(fitted, options.judged)]
        count = min(self.task.words, len(self.mixture))
        attempts: list[Attempt] = []
        best: tuple[float, Tensor] | None = None
        for start, alpha in self._solutions(fitted, judged, count):
            r2 = self._r2(heldout, alpha)
            attempts.append(Attempt(start, r2, kept=False))
            if best is None or r2 > best[0]:
                best = (r2, alpha)
            if best[0] >= RELIABLE_R2:
                break
            logger.info("%s: R2 %.3f on held-out pictures; trying another way", start, r2)
        assert best is not None
        every, alpha = best
        attempts = [Attempt(a.start, a.r2, kept=a.r2 == every) for a in attempts]
        alpha = self._fewest(fitted, judged, alpha)
        per_state = distances(self.model, heldout, self.mixture.encode(alpha[None]))
        order = alpha.argsort(descending=True)[: int((alpha > 0).sum())]
        importance = tuple(self._importance(heldout, alpha, order, explained(per_state, heldout)))
        chosen, final = self.mixture.choose(order), alpha[order] / alpha.sum()
        fidelity = Fidelity(explained(per_state, heldout), self._r2(judged, alpha), by_level(per_state, heldout), every)
        evals, calls = self.model.meter.evals - self.evals, self.model.meter.calls - self.calls
        self.on_step(evals, evals, {"r2": fidelity.heldout})
        return Decomposition(
            concept=concept,
            template=chosen.template,
            words=chosen.words,
            ids=chosen.ids,
            alpha=final,
            importance=importance,
            fidelity=fidelity,
            embeddings=chosen.embeddings,
            norms=chosen.norms,
            method="distilled",
            seed=self.seed,
            seeds=tuple(seeds[: options.pictures]),
            heldout_seeds=tuple(seeds[options.pictures :]),
            settings={name: float(value) for name, value in vars(options).items()},
            candidates=len(self.mixture),
            attempts=tuple(attempts),
            evals=evals,
            calls=calls,
            model=self.model.name,
        )

    def _report(self, step: int = 0, total: int = 0, metrics: Mapping[str, float] | None = None) -> None:
        spent = self.model.meter.evals - self.evals
        self.on_step(min(spent, self._planned - 1), self._planned, metrics or {})

    def _draw(self, states: States, count: int) -> Tensor:
        """Distinct states, mostly where the concept matters most."""
        gap = states.gap.cpu()
        weight = 0.8 * gap / gap.sum() + 0.2 / len(gap)
        return torch.multinomial(weight, min(count, len(gap)), generator=self.generator).to(states.x.device)

    def _solutions(self, fitted: States, judged: States, count: int) -> Iterator[tuple[str, Tensor]]:
        """Weights of at most ``count`` words, by one way after another for as long as the caller is not content."""
        best, reached, wanted = self._linearised(fitted, judged, count)
        even = torch.full((len(self.mixture),), 1 / len(self.mixture))
        alpha, method = even, "linearised"
        for _ in range(self.settings.pursuits):
            if reached >= ENOUGH:
                break
            alpha, score = self._pursue(fitted, judged, alpha, wanted, count)
            if score > reached:
                best, reached, method = alpha, score, "secants"
        yield method, self._refine(fitted, judged, best)
        yield "descent", self._refine(fitted, judged, _strongest(self._descend(fitted, even), count))

    def _linearised(self, fitted: States, judged: States, count: int) -> tuple[Tensor, float, Tensor]:
        """The best sparse solution of the model's linearisation at the concept's own token, its R2, and how much each word was wanted.

        Exact where the concept is a mixture of few words, for then the equations hold however far off the words are.
        """
        rows, values = self._rows(fitted, self.own if self.own is not None else self._nearest_token())
        atoms = torch.cat([e.cpu() for e in self.mixture.embeddings.values()], dim=1)
        token = None if self.own is None else torch.cat([self.own[name][0].detach().cpu() for name in self.mixture.embeddings])
        found, wanted = proposals(rows, values, atoms, token, count)
        options = torch.stack(found)
        options = options[self._judge(judged[:3], options).topk(min(4, len(options))).indices]
        scores = self._judge(judged, options)
        best, reached = options[int(scores.argmax())], float(scores.max())
        if reached < ENOUGH:
            best = self._refine(fitted, judged, best, rounds=1)
            reached = float(self._judge(judged, best[None])[0])
        return best, reached, wanted

    def _pursue(self, fitted: States, judged: States, alpha: Tensor, wanted: Tensor, count: int) -> tuple[Tensor, float]:
        """The best sparse solution of what the model shows half-way from ``alpha`` to each of the promising words, and its R2.

        Secants this long see past the curvature that makes a gradient misleading: they ask what a word does to the picture.
        """
        present = _strongest(alpha, count).nonzero()[:, 0]
        support = torch.tensor(sorted({*self._promising(fitted, alpha, wanted), *present.tolist()}))
        states = fitted[self._draw(fitted, self.settings.probed)]
        system, target = self._secants(states, alpha, support, 0.5)
        reduced = torch.linalg.qr(system)
        options = torch.zeros(0, len(alpha))
        for _, solution in sparse_solutions(reduced.R, reduced.Q.T @ target, count, _SECANT_PENALTIES):
            full = torch.zeros_like(alpha)
            full[support] = solution
            options = torch.cat([options, full[None], _strongest(0.5 * alpha + 0.5 * full, count)[None]])
        if not len(options):
            return _strongest(alpha, count), -torch.inf
        best = self._refine(fitted, judged, options[int(self._judge(judged, options).argmax())], rounds=1)
        return best, float(self._judge(judged, best[None])[0])

    def _promising(self, fitted: States, alpha: Tensor, wanted: Tensor) -> list[int]:
        """Words towards which the loss falls fastest from ``alpha``, and as many wanted ones; all of them if they are few."""
        if len(alpha) <= self.settings.screened + self.settings.screened // 2:
            return list(range(len(alpha)))
        batch = fitted[self._draw(fitted, self.settings.judged)]
        variable = alpha.clone().requires_grad_()
        with torch.enable_grad():
            x0 = self.model.denoise(batch.x, batch.sigma, self.mixture.encode(variable[None]))
            loss = batch.distance(x0).sum()
        half = self.settings.screened // 2
        falling = torch.autograd.grad(loss, variable)[0].cpu().argsort()[:half]
        return [*falling.tolist(), *wanted.argsort(descending=True)[:half].tolist()]

    def _secants(self, states: States, alpha: Tensor, support: Tensor, bump: float) -> tuple[Tensor, Tensor]:
        """Equations system @ weights = target for the weights of ``support`` under which the model agrees with the teacher.

        Columns are differences of the model between alpha + bump * word and alpha. Predictions do not change with the scale of
        alpha, so the differential of the prediction vanishes along alpha and the sum of the weights gets an equation of its own.
        """
        probes = torch.cat([alpha[None], alpha + bump * torch.eye(len(alpha))[support]])
        with torch.no_grad():
            conditioning = self.mixture.encode(probes)
            noise = []
            for index in range(len(probes)):
                x0 = self.model.denoise(states.x, states.sigma, _row(conditioning, index))
                noise.append(((x0 - states.teacher) / states.sigma.view(-1, 1, 1, 1)).flatten().cpu().double())
                self._report()
        jacobian = (torch.stack(noise[1:]) - noise[0]).T / bump
        gauge = jacobian.norm() / len(support) ** 0.5
        return torch.cat([jacobian, gauge.expand(1, len(support))]), torch.cat([-noise[0], gauge[None]])

    def _nearest_token(self, steps: int = 200) -> dict[str, Tensor]:
        """The free token whose conditioning is nearest to that of a concept of several tokens; costs no evals."""
        token = {name: rows.mean(0, keepdim=True).requires_grad_() for name, rows in self.mixture.embeddings.items()}
        optimizer = torch.optim.Adam(list(token.values()), lr=0.02 * min(self.mixture.norms.values()))
        for _ in range(steps):
            with torch.enable_grad():
                loss = (self.model.text.encode([fill(self.mixture.template, [token])]).context - self.teacher.context).square().sum()
            gradients = torch.autograd.grad(loss, list(token.values()))
            for row, gradient in zip(token.values(), gradients, strict=True):
                row.grad = gradient
            optimizer.step()
        return {name: row.detach() for name, row in token.items()}

    def _rows(self, states: States, token: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Equations rows @ w = values for the token w (all encoders' side by side) that makes the model predict the teacher's noise.

        Each is a random projection v of one state's residual, linearised at ``token``: (v J) w = (v J) token - v r.
        """
        rows: list[Tensor] = []
        values: list[Tensor] = []
        while len(rows) * self.settings.batch < self.settings.rows:
            batch = states[self._draw(states, self.settings.batch)]
            slots = {name: row.to(torch.float32).expand(len(batch), 1, -1).clone().requires_grad_() for name, row in token.items()}
            signs = (torch.randint(2, batch.x.shape, generator=self.generator) * 2.0 - 1).to(batch.x.device)
            with torch.enable_grad():
                x0 = self.model.denoise(batch.x, batch.sigma, self.model.text.encode([fill(self.mixture.template, [slots])]))
                residual = ((x0 - batch.teacher) / batch.sigma.view(-1, 1, 1, 1) * signs).flatten(1).sum(1)
            gradients = torch.autograd.grad(residual.sum(), list(slots.values()))
            row = torch.cat([gradient[:, 0].cpu() for gradient in gradients], dim=1)
            rows.append(row)
            values.append(row @ torch.cat([t[0].detach().cpu().float() for t in token.values()]) - residual.detach().cpu())
            self._report()
        return torch.cat(rows), torch.cat(values)

    def _judge(self, states: States, alphas: Tensor) -> Tensor:
        """R2 of each row of alphas (n, words) on ``states``, (n,): n * len(states) evals."""
        with torch.no_grad():
            conditioning = self.mixture.encode(alphas)
            scores = []
            for index in range(len(alphas)):
                scores.append(explained(distances(self.model, states, _row(conditioning, index)), states))
                self._report(metrics={"r2": scores[-1]})
        return torch.tensor(scores)

    def _refine(self, fitted: States, judged: States, alpha: Tensor, rounds: int = 2) -> Tensor:
        """Gauss-Newton steps on the weights of the words in ``alpha``, with secants of the model as Jacobian and a line search."""
        support = alpha.nonzero()[:, 0]
        if len(support) < 2:
            return alpha
        for round_ in range(rounds):
            states = fitted[self._draw(fitted, self.settings.refined)]
            solution = small_nnls(*self._secants(states, alpha, support, 0.1 / (1 + 3 * round_))).float()
            if not float(solution.sum()) > 0:
                return alpha
            goal = torch.zeros_like(alpha)
            goal[support] = solution / solution.sum()
            lines = torch.stack([alpha, *(alpha + t * (goal - alpha) for t in (1.0, 0.5, 0.25))])
            alpha = lines[int(self._judge(judged, lines).argmax())]
        return alpha

    def _descend(self, states: States, alpha: Tensor) -> Tensor:
        """Gradient steps on the distance to the teacher over all candidates, each on a fresh batch of the most telling states."""
        descent = SimplexDescent(alpha, self.settings.descent)
        scale = float(states.gap.mean())
        for _ in range(self.settings.descent):
            batch = states[self._draw(states, self.settings.batch)]
            alpha = descent.alpha.requires_grad_()
            with torch.enable_grad():
                x0 = self.model.denoise(batch.x, batch.sigma, self.mixture.encode(alpha[None]))
                loss = batch.distance(x0).mean() / scale
            descent.step(torch.autograd.grad(loss, alpha)[0].cpu())
            self._report(metrics={"loss": float(loss.detach())})
        return descent.alpha

    def _fewest(self, fitted: States, judged: States, alpha: Tensor) -> Tensor:
        """As few of the strongest words as leave half as much again unexplained as all of them do (or 0.2 %), refitted.

        A fixed loss of R2 would drop true words where the words explain nearly everything, and keep idle ones where they do not.
        """
        counts = range(1, int((alpha > 0).sum()) + 1)
        nested = torch.stack([_strongest(alpha, k) for k in counts])
        missed = 1 - self._judge(judged, nested)
        fewest = int((missed <= 1.5 * missed[-1].clamp_min(0) + 0.002).nonzero()[0, 0])
        return self._refine(fitted, judged, nested[fewest], rounds=1) if fewest + 1 < len(counts) else alpha

    def _importance(self, states: States, alpha: Tensor, order: Tensor, r2: float) -> Iterator[float]:
        for index in order.tolist():
            without = alpha.clone()
            without[index] = 0
            yield r2 - (self._r2(states, without) if len(order) > 1 else 0.0)

    def _r2(self, states: States, alpha: Tensor) -> float:
        return float(self._judge(states, alpha[None])[0])


def _row(conditioning: Conditioning, index: int) -> Conditioning:
    return conditioning.map(lambda tensor: tensor[index : index + 1])


def _strongest(alpha: Tensor, count: int) -> Tensor:
    """alpha without all but its largest ``count`` entries, summing to 1."""
    kept = torch.zeros_like(alpha)
    largest = alpha.topk(min(count, len(alpha))).indices
    kept[largest] = alpha[largest]
    return kept / kept.sum()
