"""Distilled decomposition: the weighted words under which the model predicts what it predicts for the concept itself.

The target is the model's own prediction with the concept's prompt, at the states its sampler passed through, so the loss
sum_s ||eps(x_s, alpha) - eps(x_s, concept)||^2 carries no noise and vanishes wherever the words say the same as the concept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..artifact import ArtifactError, Header, Spec, content_hash, discard, read, write_spare
from ..model import Conditioning, OutOfMemory
from .fidelity import explained, measure, picture_seeds, sampled_states
from .mixture import Mixture
from .result import RELIABLE_R2, Attempt, Decomposition
from .sparse import small_nnls
from .states import States, distances
from .surrogate import Surrogate, find, flat, strongest, with_gauge
from .task import Tally, Task
from .text import PromptSpace, prompt_space, text_code

logger = logging.getLogger(__name__)

ENOUGH = 0.9
"""R2 on the judged states at which no other way is tried."""
_PULLS = (2.0, 1.0, 0.5, 0.25)
_PREDICTION_WEIGHT, _EMBEDDING_WEIGHT, _FLOOR = 12.0, 64.0, 1e-3
_WIDE = (1, 2)
"""How many times more words than wanted the sets have that the search starts from."""
_DESCENT = 15
"""Steps over all words at once to another start: few enough that the words that are alike lead, not those that make up for each other."""
_NEAR, _PLENTY, _ALIKE = 0.1, 0.95, 0.01
"""How far below the best R2 a finalist's may be by the linearised model; the judged R2 beyond which more counts only as evidence, and the
loss that counts as none."""
_SIMPLE = "one word, or the text alone"
_CHECKPOINT = "conceptkit-distilled-checkpoint"


@dataclass(frozen=True)
class Settings:
    """How much is spent, in states and samples.

    pictures, heldout: sampled for the fit and for measuring, 2 evals a step; steps, guidance: the sampler's. rows: random projections
    that linearise the model at the concept, 3 evals each, ``batch`` at once. finalists: sets of words that the model itself compares, on
    ``judged`` states. refined: states of the Gauss-Newton step on the chosen weights. again: how often the model is linearised anew, at
    the best words so far and with half as many rows, where these explain too little.
    """

    pictures: int = 8
    heldout: int = 3
    steps: int = 10
    guidance: float = 4.0
    rows: int = 144
    batch: int = 8
    finalists: int = 5
    judged: int = 24
    refined: int = 6
    again: int = 1


BUDGETS: Mapping[str, Settings] = MappingProxyType(
    {
        "fast": Settings(pictures=4, heldout=2, steps=8, rows=96, finalists=3, judged=10, refined=5, again=0),
        "default": Settings(),
        "thorough": Settings(pictures=16, heldout=4, steps=16, rows=400, finalists=8, judged=48, refined=16, again=2),
    }
)
"""What may be spent, by name."""


def decompose_distilled(task: Task) -> Decomposition:
    """Take the task's concept apart by matching the model's own predictions for it; ``Decomposition.r2`` says how far that got.

    With ``task.checkpoint``, what was paid for is kept there, and a stopped run goes on from it to the result it would have had; the file
    goes when the result is there. Raises ArtifactError for a checkpoint of other inputs, ValueError for a concept that the model ignores.
    """
    return _Fit(task, task.choose(BUDGETS)).run()


def evidence(missed: float, cosine: float, surprise: float, candidates: int, width: int) -> float:
    """How well some out of ``candidates`` words account for a concept, in nats; only differences mean anything.

    missed: 1 - R2. cosine: between the mixture and the concept's own embedding of ``width`` numbers, 0 if unknown. Likelihoods of Gaussian
    errors of unknown size, as of 12 independent numbers that the predictions and 64 that the embedding contribute, less ``surprise``, what
    it takes to name the words: a word must pay for itself, and where predictions hardly tell two sets apart, the embedding does,
    by what exceeds the squared cosine 2 log(candidates) / width that the best of as many random directions has.
    """
    beyond_chance = max(0.0, min(cosine, 1.0) ** 2 - 2 * math.log(candidates) / width)
    return (
        -0.5 * _PREDICTION_WEIGHT * math.log(max(missed, 0.0) + _FLOOR)
        - 0.5 * _EMBEDDING_WEIGHT * math.log(1 - beyond_chance + _FLOOR)
        - surprise
    )


@dataclass
class _Progress:
    """What has been paid for: everything that the continuation depends on."""

    states: States | None = None
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    attempts: list[tuple[str, float]] = field(default_factory=list)
    alphas: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Sample:
    """States drawn from many, and what each stands for, (n,): the reciprocal of how likely it was to be among them."""

    states: States
    weights: Tensor


class _Fit:
    """One decomposition under way."""

    def __init__(self, task: Task, options: Settings) -> None:
        self.task, self.model, self.options = task, task.model, options
        self.mixture = Mixture.of(task.model, task.template, task.pool)
        self.count = min(task.words, len(self.mixture))
        self.seeds = picture_seeds(self._generator(0), options.pictures + options.heldout)
        self.token: Tensor | None = None
        if task.token is not None:
            self.token = torch.cat([normalize(task.token[name][0].cpu().double(), dim=0) for name in self.mixture.embeddings])
        harvested = 2 * len(self.seeds) * options.steps
        judging = options.judged * (options.finalists + 5) + options.refined * (self.count + 1)
        self.planned = harvested + 3 * options.rows + judging + options.heldout * options.steps * (1 + self.count)
        self.progress, evals, calls = self._resume()
        self.tally = Tally(task, self.planned, evals, calls)

    def run(self) -> Decomposition:
        options, task, progress = self.options, self.task, self.progress
        if progress.states is None:
            progress.states = sampled_states(task, self.seeds, options.steps, options.guidance, self.tally.report)
            self._save()
        states = progress.states
        fitted, heldout = states[states.picture < options.pictures], states[states.picture >= options.pictures]
        judged = self._draw(fitted, options.judged, self._generator(1))
        while (start := self._next()) is not None:
            alpha = self._simple(judged) if start == _SIMPLE else self._searched(fitted, judged)
            r2 = self._r2(judged, alpha)
            progress.attempts.append((start, r2))
            progress.alphas.append(alpha)
            self._save()
            if r2 < ENOUGH:
                logger.info("%s: R2 %.3f with %d words", start, r2, int((alpha > 0).sum()))
        return self._finish(heldout)

    def _next(self) -> str | None:
        """The way to try next, or None to stop: linearise anew while the best explains too little; lastly look at what needs no search."""
        tried = self.progress.attempts
        if not tried:
            return "linearised"
        best = max(r2 for _, r2 in tried)
        if best >= ENOUGH or tried[-1][0] == _SIMPLE:
            return None
        if len(tried) <= self.options.again:
            return "linearised again"
        return _SIMPLE if best < RELIABLE_R2 else None

    def _finish(self, heldout: States) -> Decomposition:
        options, task, attempts = self.options, self.task, self.progress.attempts
        ranked = sorted(range(len(attempts)), key=lambda i: -attempts[i][1])
        kept = ranked[0]
        if attempts[kept][1] < RELIABLE_R2:  # poor on the states fitted: then pictures not fitted decide
            unseen = _Sample(heldout, torch.ones(len(heldout), device=heldout.x.device))
            kept = max(ranked, key=lambda i: self._r2(unseen, self.progress.alphas[i]))
        weights = self.progress.alphas[kept]
        order = weights.argsort(descending=True, stable=True)[: int((weights > 0).sum())]
        chosen, alpha = self.mixture.choose(order), weights[order] / weights.sum()
        fidelity, importance = measure(chosen, alpha, heldout, self.tally.report)
        evals, calls = self.tally.evals, self.tally.calls
        if task.checkpoint is not None:
            discard(task.checkpoint)
        self.tally.finish({"r2": fidelity.heldout})
        return Decomposition(
            concept=task.name,
            template=chosen.template,
            words=chosen.words,
            ids=chosen.ids,
            alpha=alpha,
            importance=importance,
            fidelity=replace(fidelity, fitted=attempts[kept][1]),
            embeddings=chosen.embeddings,
            norms=chosen.norms,
            method="distilled",
            seed=task.seed,
            seeds=tuple(self.seeds[: options.pictures]),
            heldout_seeds=tuple(self.seeds[options.pictures :]),
            settings={name: float(value) for name, value in vars(options).items()},
            candidates=len(self.mixture),
            attempts=tuple(Attempt(start, r2, kept=i == kept) for i, (start, r2) in enumerate(attempts)),
            evals=evals,
            calls=calls,
            model=self.model.name,
        )

    def _generator(self, stage: int) -> torch.Generator:
        """Randomness of one stage, the same whether or not the stages before it ran in this process."""
        return torch.Generator().manual_seed((self.task.seed + (stage << 48)) % 2**63)

    def _weights(self, states: States) -> Tensor:
        """Probabilities of the states: mostly where the concept matters most."""
        gap = states.gap.cpu()
        return 0.8 * gap / gap.sum() + 0.2 / len(gap)

    def _draw(self, states: States, count: int, generator: torch.Generator) -> _Sample:
        """Distinct states, spread evenly over all of them (systematic sampling), at most ``count``."""
        chance = self._weights(states)
        places = (torch.arange(count) + torch.rand((), generator=generator)) / count
        picked = torch.searchsorted(chance.cumsum(0), places).clamp_max(len(states) - 1).unique()
        device = states.x.device
        return _Sample(states[picked.to(device)], (count * chance[picked]).clamp_max(1).reciprocal().to(device))

    def _searched(self, fitted: States, judged: _Sample) -> Tensor:
        """The best weights under the model linearised at the concept, and at the best words of every attempt before this one."""
        progress, known = self.progress, len(self.progress.alphas)
        while len(progress.rows) <= known:
            at = self.task.teacher
            if progress.rows:
                with torch.no_grad():
                    at = self.mixture.encode(progress.alphas[len(progress.rows) - 1][None])
            count = self.options.rows if not progress.rows else self.options.rows // 2
            progress.rows.append(self._rows(fitted, at, count, self._generator(2 + len(progress.rows))))
            self._save()
        rows, offsets = (torch.cat(parts) for parts in zip(*progress.rows, strict=True))
        empty = (flat(self.task.empty) @ rows.T - offsets).square().sum().sqrt()
        surrogate = Surrogate(self.mixture, rows / empty, offsets / empty, self.token)
        near = progress.alphas or [text_code(self.task)]
        together = surrogate.descend(_DESCENT, self._pulse)
        starts = [*self._codes, *(strongest(together, wide * self.count) for wide in _WIDE), *progress.alphas]
        found = find(surrogate, starts, near, self.count, _PULLS, partial(self._evidence, surrogate), self._pulse)
        scores = surrogate.r2(found)
        plausible = scores >= scores.max() - _NEAR
        found, scores = found[plausible], scores[plausible]
        likely = self._evidence(surrogate, found, scores).argsort(descending=True, stable=True)[: 3 * self.options.finalists]
        found, scores = surrogate.polish(found[likely])
        discord = surrogate.discord(found)
        chosen = self._finalists(self._evidence(surrogate, found, scores, discord), (found > 0).sum(1))
        finalists, reached = found[chosen], self._judge(judged, found[chosen])
        best = self._best(self._evidence(surrogate, finalists, reached, discord[chosen]), reached)
        return self._refine(fitted, judged, finalists[best])

    @cached_property
    def _prompts(self) -> PromptSpace:
        return prompt_space(self.task)

    @cached_property
    def _codes(self) -> list[Tensor]:
        """What the encoded prompts add up to: of as many words as wanted, and of more."""
        return [self._prompts.code(wide * self.count) for wide in _WIDE]

    @cached_property
    def _surprise(self) -> Tensor:
        return self._prompts.surprise(self.count)

    def _finalists(self, evidences: Tensor, sizes: Tensor) -> list[int]:
        """Which the model is to compare: the best of every number of words, then the next best."""
        ranked: list[int] = evidences.argsort(descending=True, stable=True).tolist()
        first = {int(sizes[i]): i for i in reversed(ranked)}
        chosen = [i for i in ranked if i in first.values()]
        return [*chosen, *(i for i in ranked if i not in chosen)][: self.options.finalists]

    def _best(self, evidences: Tensor, r2: Tensor) -> int:
        """The most evident of those that explain plenty, or as much as any."""
        enough = min(_PLENTY, float(r2.max()) - _ALIKE)
        return int(evidences.masked_fill(r2 < enough, -math.inf).argmax())

    def _evidence(self, surrogate: Surrogate, alphas: Tensor, r2: Tensor, discord: Tensor | None = None) -> Tensor:
        """`evidence` of each row of alphas, less what its shares say wrongly about which words matter."""
        surprises = ((alphas > 0).double() @ self._surprise).tolist()
        candidates, width = len(self.mixture), sum(rows.shape[1] for rows in self.mixture.embeddings.values())
        given = zip(r2.tolist(), surrogate.cosine(alphas).tolist(), surprises, strict=True)
        scores = torch.tensor([evidence(1 - r, cosine, surprise, candidates, width) for r, cosine, surprise in given], dtype=torch.double)
        return scores if discord is None else scores - _PREDICTION_WEIGHT * discord

    def _rows(self, states: States, at: Conditioning, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The model linearised at a conditioning: rows (n, size) and offsets (n,) of a `Surrogate`, not yet scaled.

        Each is a random projection v of one state's residual; divided by the root of the state's probability, so that sum y^2 estimates
        the sum over all states.
        """
        rows, offsets = [], []
        chance, flat_at = self._weights(states), flat(at)[0].detach().float()
        for start in range(0, count, self.options.batch):
            size = min(self.options.batch, count - start)
            picked = torch.multinomial(chance, size, replacement=True, generator=generator)
            batch = states[picked.to(states.x.device)]
            signs = (torch.randint(2, batch.x.shape, generator=generator) * 2.0 - 1).to(batch.x.device)
            row, value = self._projected(batch, signs, at)
            scale = chance[picked].rsqrt().to(row.device)
            rows.append(row * scale[:, None])
            offsets.append((row @ flat_at - value) * scale)
            self.tally.report()
        return torch.cat(rows), torch.cat(offsets)

    def _projected(self, states: States, signs: Tensor, at: Conditioning) -> tuple[Tensor, Tensor]:
        """Gradients (n, size) in the conditioning, and values (n,), of each state's residual along ``signs``; halved while too large."""
        size = len(states)
        variable = at.map(lambda t: t.detach().expand(size, *t.shape[1:]).clone().requires_grad_())
        try:
            with torch.enable_grad():
                x0 = self.model.denoise(states.x, states.sigma, variable)
                projected = ((x0 - states.teacher) / states.sigma.view(-1, 1, 1, 1) * signs).flatten(1).sum(1)
            inputs = [variable.context] if variable.pooled is None else [variable.context, variable.pooled]
            gradients = torch.autograd.grad(projected.sum(), inputs)
        except (OutOfMemory, torch.OutOfMemoryError) as error:
            if size == 1:
                raise OutOfMemory(
                    "a gradient through the model does not fit in memory even for one picture: use smaller pictures, or free memory first"
                ) from error
        else:
            row = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).float()
            return row, projected.detach().float().to(row.device)
        halves = [self._projected(states[part], signs[part], at) for part in (slice(None, size // 2), slice(size // 2, None))]
        return torch.cat([row for row, _ in halves]), torch.cat([value for _, value in halves])

    def _judge(self, sample: _Sample, alphas: Tensor) -> Tensor:
        """R2 of each row of alphas (n, words) by a sample of states, (n,): an eval a row and state."""
        with torch.no_grad():
            conditioning = self.mixture.encode(alphas)
            scores = []
            for index in range(len(alphas)):
                scores.append(explained(distances(self.model, sample.states, _row(conditioning, index)), sample.states, sample.weights))
                self.tally.report({"r2": scores[-1]})
        return torch.tensor(scores)

    def _r2(self, sample: _Sample, alpha: Tensor) -> float:
        return float(self._judge(sample, alpha[None])[0])

    def _refine(self, fitted: States, judged: _Sample, alpha: Tensor, bump: float = 0.1) -> Tensor:
        """A Gauss-Newton step on the weights of the words in ``alpha``, with secants of the model as Jacobian and a line search."""
        support = alpha.nonzero()[:, 0]
        if len(support) < 2:
            return alpha
        sample = self._draw(fitted, self.options.refined, self._generator(100 + len(self.progress.alphas)))
        states, scale = sample.states, (sample.weights.sqrt() / sample.states.sigma).view(-1, 1, 1, 1)
        probes = torch.cat([alpha[None], alpha + bump * torch.eye(len(alpha))[support]])
        with torch.no_grad():
            conditioning = self.mixture.encode(probes)
            noise = []
            for index in range(len(probes)):
                x0 = self.model.denoise(states.x, states.sigma, _row(conditioning, index))
                noise.append(((x0 - states.teacher) * scale).flatten().cpu().double())
                self.tally.report()
        solution = small_nnls(*with_gauge((torch.stack(noise[1:]) - noise[0]).T / bump, noise[0], alpha[support])).float()
        if not float(solution.sum()) > 0:
            return alpha
        goal = torch.zeros_like(alpha)
        goal[support] = solution / solution.sum()
        lines = torch.stack([alpha, goal, 0.5 * alpha + 0.5 * goal])
        return lines[int(self._judge(judged, lines).argmax())]

    def _simple(self, judged: _Sample) -> Tensor:
        """The best by the model itself of the codes by the text encoder alone, and the single words that the linearised model likes."""
        rows, offsets = self.progress.rows[0]
        empty = (flat(self.task.empty) @ rows.T - offsets).square().sum().sqrt()
        surrogate = Surrogate(self.mixture, rows / empty, offsets / empty)
        words, scores = torch.eye(len(self.mixture)), []
        for part in words.split(64):
            self._pulse()
            scores.append(surrogate.r2(part))
        likely = torch.cat(scores)
        single = words[likely.topk(min(self.options.finalists, len(words))).indices]
        finalists = torch.cat([single, torch.stack([self._codes[0], text_code(self.task)])])
        return finalists[int(self._judge(judged, finalists).argmax())]

    def _pulse(self) -> None:
        """Lets a host interrupt, and progress be shown, where no evals are spent."""
        self.model.before_call()
        self.tally.report()

    def _key(self) -> str:
        """What a checkpoint must have been made from to be continued."""
        task = self.task
        tensors = {
            "teacher": task.teacher.context,
            "empty": task.empty.context,
            **{f"words.{n}": e for n, e in self.mixture.embeddings.items()},
        }
        asked = {
            "model": task.model.name,
            "template": task.template,
            "pool": list(task.pool),
            "words": task.words,
            "seed": task.seed,
            "size": [task.height, task.width],
            "settings": vars(self.options),
        }
        return content_hash(tensors, asked)

    def _save(self) -> None:
        if self.task.checkpoint is None:
            return
        progress = self.progress
        tensors = {} if progress.states is None else {f"states.{name}": tensor for name, tensor in vars(progress.states).items()}
        for index, (rows, offsets) in enumerate(progress.rows):
            tensors |= {f"rows.{index}": rows, f"offsets.{index}": offsets}
        tensors |= {f"alpha.{index}": alpha for index, alpha in enumerate(progress.alphas)}
        header: Header = {
            "format": _CHECKPOINT,
            "version": 1,
            "key": self._key(),
            "linearised": len(progress.rows),
            "attempts": progress.attempts,
            "evals": self.tally.evals,
            "calls": self.tally.calls,
        }
        write_spare(self.task.checkpoint, tensors, header)

    def _resume(self) -> tuple[_Progress, int, int]:
        path = self.task.checkpoint
        if path is None or not path.exists():
            return _Progress(), 0, 0
        tensors, header = read(path, _CHECKPOINT, 1, _layout)
        if header["key"] != self._key():
            raise ArtifactError(f"{path} belongs to another decomposition: choose another checkpoint file, or delete it to start afresh")
        states = States(**{name: tensors[f"states.{name}"].to(self.model.denoiser.device) for name in _STATES})
        at = self.task.teacher.context.device  # where gradients in the conditioning are
        rows = [(tensors[f"rows.{i}"].to(at), tensors[f"offsets.{i}"].to(at)) for i in range(header["linearised"])]
        attempts = [(str(start), float(r2)) for start, r2 in header["attempts"]]
        alphas = [tensors[f"alpha.{i}"] for i in range(len(attempts))]
        return _Progress(states, rows, attempts, alphas), int(header["evals"]), int(header["calls"])


_STATES = ("x", "sigma", "teacher", "empty", "picture")


def _layout(header: Mapping[str, Any]) -> dict[str, Spec]:
    latents: Spec = (torch.float32, (None, None, None, None))
    linearised, attempts = header["linearised"], len(header["attempts"])
    if type(linearised) is not int or not 0 <= linearised <= attempts + 1:
        raise ValueError(f"{linearised!r} linearisations do not go with {attempts} attempts")
    layout: dict[str, Spec] = {f"states.{name}": latents for name in ("x", "teacher", "empty")}
    layout |= {"states.sigma": (torch.float32, (None,)), "states.picture": (torch.int64, (None,))}
    for index in range(linearised):
        layout |= {f"rows.{index}": (torch.float32, (None, None)), f"offsets.{index}": (torch.float32, (None,))}
    return layout | {f"alpha.{index}": (torch.float32, (None,)) for index in range(attempts)}


def _row(conditioning: Conditioning, index: int) -> Conditioning:
    return conditioning.map(lambda tensor: tensor[index : index + 1])
