"""Distilled decomposition: the weighted words under which the model predicts what it predicts for the concept itself.

The target is the model's own prediction with the concept's prompt, at the states its sampler passed through, so the loss
sum_s ||eps(x_s, alpha) - eps(x_s, concept)||^2 carries no noise and vanishes wherever the words say the same as the concept. Three
splits of the sampled images keep apart what fits (``pictures``), what chooses (``validation``) and what is reported (``heldout``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..artifact import Header, Spec, as_number
from ..gradient import vjp
from ..model import Conditioning, fill
from .decomposition import Decomposition, Restart
from .fidelity import explained, fidelity, importance, picture_seeds, sampled_states
from .mixture import Mixture, top_k
from .search import Evidence, Search, padded, support
from .shown import Shown, show
from .sparse import small_nnls
from .states import States, distances
from .surrogate import Surrogate, fix_scale, flat, on_support
from .task import Tally, Task
from .text import prompt_space, shortlist, text_codes

logger = logging.getLogger(__name__)

PLENTY = 0.95
"""Validation R2 from which no word is sought that fills in."""
TOLD = 0.5
"""Share of a concept that words must show by themselves for others to fill in around them; below, any words are as good."""
_EXPANSIONS = 24
"""Sets that a search looks around at, about: for the progress bar alone."""
_START = 6
"""Words of the largest start from the text encoder: each further one rarely pays for being named."""
_CHECKPOINT = "conceptkit-distilled-checkpoint"


@dataclass(frozen=True)
class Settings:
    """How much is spent, in states and samples.

    pictures, validation, heldout: images sampled for the fit, for choosing and for measuring, 2 evals a step; steps, guidance: the
    sampler's. shown: words whose own predictions are looked at, at ``looked`` states. searched: words that sets are made of. rows: random
    projections that linearise the model at the concept, 3 evals each, ``batch`` at once. finalists: sets of words that the model itself
    compares on ``judged`` states. refined: states of the Gauss-Newton step on the chosen weights. The rest weighs the `Evidence`:
    measurements that the predictions of a mixture, what words show by themselves and the token's embedding count as, the last at most;
    fills: measurements that predictions count as where words only fill in.
    """

    pictures: int = 6
    validation: int = 3
    heldout: int = 3
    steps: int = 10
    guidance: float = 4.0
    shown: int = 32
    looked: int = 12
    searched: int = 256
    rows: int = 96
    batch: int = 8
    finalists: int = 3
    judged: int = 20
    refined: int = 5
    predictions_count: float = 12
    shown_count: float = 24
    embedding_count: float = 96
    fills: float = 96


BUDGETS: Mapping[str, Settings] = MappingProxyType(
    {
        "fast": Settings(pictures=4, validation=2, heldout=2, steps=8, shown=24, looked=8, rows=64, finalists=2, judged=12),
        "default": Settings(),
        "thorough": Settings(
            pictures=12, validation=6, heldout=6, steps=16, shown=80, looked=24, rows=240, finalists=6, judged=48, refined=16
        ),
    }
)
"""What may be spent, by name."""


def decompose_distilled(task: Task) -> Decomposition:
    """Take the task's concept apart by matching the model's own predictions for it; ``Decomposition.r2`` says how far that got.

    With ``task.checkpoint``, intermediate results are saved there; an interrupted run resumes and gives the identical result,
    after which the file is deleted. Raises ArtifactError for a checkpoint of other inputs, ValueError for a concept that the model ignores.
    """
    return _Fit(task, task.choose(BUDGETS)).run()


@dataclass
class _Progress:
    """What has been paid for: everything that the continuation depends on."""

    states: States | None = None
    shown: Shown | None = None
    rows: tuple[Tensor, Tensor] | None = None
    found: tuple[Tensor, float] | None = None


@dataclass(frozen=True)
class _Sample:
    """States drawn from many, and what each stands for, (n,): the reciprocal of how likely it was to be among them."""

    states: States
    weights: Tensor


class _Fit:
    """One decomposition under way."""

    def __init__(self, task: Task, options: Settings) -> None:
        self.task, self.model, self.options = task, task.model, options
        images = options.pictures + options.validation + options.heldout
        self.seeds = picture_seeds(self._generator(0), images)
        space = prompt_space(task)
        pool = Mixture.of(task.model, task.template, task.pool)
        codes = text_codes(task, space, min(task.max_words, _START))
        chosen = shortlist(task, space, options.shown, max(options.searched, task.max_words))
        chosen = list(dict.fromkeys([*chosen, *(i for code in codes for i in support(code))]))
        self.mixture, self.codes = pool.choose(torch.tensor(chosen)), [code[chosen] for code in codes]
        self.looked = min(options.shown, len(self.mixture))
        self.count = min(task.max_words, len(self.mixture))
        self.token: Tensor | None = None
        if task.token is not None:
            self.token = torch.cat([normalize(task.token[name][0].cpu().double(), dim=0) for name in self.mixture.embeddings])
        tried = options.judged * (options.finalists + 4) + options.refined * (self.count + 1)
        measuring = options.steps * (options.validation * self.count + options.heldout)
        encoding = len(self.mixture) * _EXPANSIONS
        self.planned = 2 * images * options.steps + options.looked * self.looked + 3 * options.rows + tried + measuring
        words = {f"words.{name}": rows for name, rows in self.mixture.embeddings.items()}
        self.checkpoint = task.resumable(_CHECKPOINT, 3, options, words, {"words": task.max_words})
        self.progress, evals, calls = self._resume()
        self.tally = Tally(task, self.planned, evals, calls, prompts=encoding)

    def run(self) -> Decomposition:
        options, progress = self.options, self.progress
        # What the model predicts for the concept, on images that fit, that choose and that measure.
        if progress.states is None:
            progress.states = sampled_states(self.task, self.seeds, options.steps, options.guidance, self.tally.report)
            self._save()
        states, chooses = progress.states, options.pictures + options.validation
        fitted = states[states.picture < options.pictures]
        validation = states[(states.picture >= options.pictures) & (states.picture < chooses)]
        # What the likeliest words show by themselves.
        if progress.shown is None:
            looked = self._draw(fitted, options.looked, self._generator(50))
            prompts = self.model.encode([fill(self.task.template, word) for word in self.mixture.words[: self.looked]])
            progress.shown = show(self.model, prompts, looked.states, looked.weights, self.tally.report).extended(len(self.mixture))
            self._save()
        # Search under the model linearised at the concept.
        judged = self._draw(validation, options.judged, self._generator(1))
        if progress.rows is None:
            progress.rows = self._rows(fitted, self._generator(2))
            self._save()
        if progress.found is None:
            progress.found = self._refine(fitted, judged, *self._searched(progress.rows, progress.shown, judged))
            self._save()
        return self._finish(*progress.found, validation, states[states.picture >= chooses])

    def _finish(self, alpha: Tensor, r2: float, validation: States, heldout: States) -> Decomposition:
        options, task = self.options, self.task
        chosen, alpha = self.mixture.choose(alpha.nonzero()[:, 0]), alpha[alpha > 0]
        lost = importance(chosen, validation, self.tally.report)
        measured = fidelity(chosen, alpha, heldout, self.tally.report)
        evals, calls = self.tally.evals, self.tally.calls
        self.checkpoint.discard()
        self.tally.finish({"r2": measured.heldout})
        return Decomposition(
            concept=task.name,
            template=chosen.template,
            words=chosen.words,
            ids=chosen.ids,
            alpha=alpha / alpha.sum(),
            importance=lost,
            fidelity=replace(measured, fitted=r2),
            embeddings=chosen.embeddings,
            norms=chosen.norms,
            method="distilled",
            seed=task.seed,
            seeds=tuple(self.seeds[: options.pictures + options.validation]),
            heldout_seeds=tuple(self.seeds[options.pictures + options.validation :]),
            settings={name: float(value) for name, value in vars(options).items()},
            candidates=len(task.pool),
            restarts=(Restart("linearised", r2, kept=True),),
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

    def _searched(self, linearised: tuple[Tensor, Tensor], shown: Shown, judged: _Sample) -> tuple[Tensor, float]:
        """The weights that account best for the concept by the model linearised at it, as the model judges them, and their R2."""
        (rows, offsets), options, evidence = linearised, self.options, self._evidence()
        empty = (flat(self.task.empty) @ rows.T - offsets).square().sum().sqrt()
        surrogate = Surrogate(self.mixture, rows / empty, offsets / empty, self.token)
        found: dict[tuple[int, ...], tuple[Tensor, float]] = {}
        # Two searches that share what they find: by predictions and embedding; then by predictions and what words show.
        mixed = Search(surrogate, shown, replace(evidence, shown=0), self.count, self._pulse, found)
        mixed.add(top_k(code, size) for code in self.codes for size in range(1, self.count + 1))
        mixed.run()
        drawn = Search(surrogate, shown, replace(evidence, embedding=0), self.count, self._pulse, found)
        drawn.add(self._equal(subset) for subset in shown.first(min(self.count, _START)))
        drawn.run()
        # The model itself compares the best of both, on states that fitted nothing.
        finalists = list(dict.fromkeys([*drawn.best(1), *mixed.best(options.finalists - 1)]))
        alphas = torch.stack([found[subset][0] for subset in finalists])
        r2, told = self._judge(judged, alphas), shown.r2(padded(finalists))
        sizes = torch.tensor([len(subset) for subset in finalists])
        best = int(evidence(r2, told, surrogate.cosine(alphas), sizes).argmax())
        alpha, reached = alphas[best], float(r2[best])
        # Where that explains too little, other words may fill in.
        if reached < PLENTY and len(finalists[best]) < self.count:
            kept = finalists[best] if float(told[best]) >= TOLD else ()
            alone = replace(evidence, predictions=options.fills, shown=0, embedding=0)
            filled = Search(surrogate, shown, alone, self.count, self._pulse, found, kept)
            filled.run()
            fuller = torch.stack([found[subset][0] for subset in filled.best(2)])
            r2 = self._judge(judged, fuller)
            if float(r2.max()) > reached:
                alpha, reached = fuller[int(r2.argmax())], float(r2.max())
        return alpha, reached

    def _evidence(self) -> Evidence:
        options, width = self.options, sum(rows.shape[1] for rows in self.mixture.embeddings.values())
        known = 0.0 if self.token is None else min(options.embedding_count, width)
        return Evidence(len(self.mixture), options.predictions_count, options.shown_count, known)

    def _equal(self, subset: tuple[int, ...]) -> Tensor:
        """Equal shares of some words."""
        alpha = torch.zeros(len(self.mixture))
        alpha[list(subset)] = 1 / len(subset)
        return alpha

    def _rows(self, states: States, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The model linearised at the concept: rows (n, size) and offsets (n,) of a `Surrogate`, not yet scaled.

        Each is a random projection v of one state's residual; divided by the root of the state's probability, so that sum y^2 estimates
        the sum over all states.
        """
        rows, offsets = [], []
        chance, concept = self._weights(states), flat(self.task.teacher)[0].detach().float()
        for start in range(0, self.options.rows, self.options.batch):
            size = min(self.options.batch, self.options.rows - start)
            picked = torch.multinomial(chance, size, replacement=True, generator=generator)
            batch = states[picked.to(states.x.device)]
            signs = (torch.randint(2, batch.x.shape, generator=generator) * 2.0 - 1).to(batch.x.device)
            row, value = self._projected(batch, signs)
            scale = chance[picked].rsqrt().to(row.device)
            rows.append(row * scale[:, None])
            offsets.append((row @ concept - value) * scale)
            self.tally.report()
        return torch.cat(rows), torch.cat(offsets)

    def _projected(self, states: States, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (n, size) in the concept's conditioning, and values (n,), of each state's residual along ``signs``."""
        variable = self.task.teacher.map(lambda t: t.detach().expand(len(states), *t.shape[1:]).clone().requires_grad_())

        def projected(rows: slice) -> Tensor:
            part = states[rows]
            x0 = self.model.denoise(part.x, part.sigma, variable.map(itemgetter(rows)))
            return ((x0 - part.teacher) / part.sigma.view(-1, 1, 1, 1) * signs[rows]).flatten(1).sum(1)

        inputs = [variable.context] if variable.pooled is None else [variable.context, variable.pooled]
        values, gradients = vjp(projected, inputs, len(states))
        row = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).float()
        return row, values.float().to(row.device)

    def _judge(self, sample: _Sample, alphas: Tensor) -> Tensor:
        """R2 of each row of alphas (n, words) by a sample of states, (n,): an eval a row and state."""
        with torch.no_grad():
            conditioning = self.mixture.encode(alphas)
            scores = []
            for index in range(len(alphas)):
                scores.append(explained(distances(self.model, sample.states, _row(conditioning, index)), sample.states, sample.weights))
                self.tally.report({"r2": scores[-1]})
        return torch.tensor(scores, dtype=torch.double)

    def _refine(self, fitted: States, judged: _Sample, alpha: Tensor, r2: float, bump: float = 0.1) -> tuple[Tensor, float]:
        """A Gauss-Newton step on the weights of the words in ``alpha``, with secants of the model as Jacobian and a line search."""
        support = alpha.nonzero()[:, 0]
        if len(support) < 2 or not self.options.refined:
            return alpha, r2
        sample = self._draw(fitted, self.options.refined, self._generator(100))
        states, scale = sample.states, (sample.weights.sqrt() / sample.states.sigma).view(-1, 1, 1, 1)
        probes = torch.cat([alpha[None], alpha + bump * torch.eye(len(alpha))[support]])
        with torch.no_grad():
            conditioning = self.mixture.encode(probes)
            noise = []
            for index in range(len(probes)):
                x0 = self.model.denoise(states.x, states.sigma, _row(conditioning, index))
                noise.append(((x0 - states.teacher) * scale).flatten().cpu().double())
                self.tally.report()
        goal = on_support(support, small_nnls(*fix_scale((torch.stack(noise[1:]) - noise[0]).T / bump, noise[0], alpha[support])), alpha)
        lines = torch.stack([goal, 0.5 * alpha + 0.5 * goal])
        scores = self._judge(judged, lines)
        best = int(scores.argmax())
        return (lines[best], float(scores[best])) if float(scores[best]) > r2 else (alpha, r2)

    def _pulse(self) -> None:
        """Lets a host interrupt, and progress be shown, where no evals are spent."""
        self.model.before_call()
        self.tally.report()

    def _save(self) -> None:
        progress = self.progress
        tensors = {} if progress.shown is None else {"shown": progress.shown.gram}
        tensors |= {} if progress.states is None else {f"states.{name}": tensor for name, tensor in vars(progress.states).items()}
        tensors |= {} if progress.rows is None else dict(zip(("rows", "offsets"), progress.rows, strict=True))
        tensors |= {} if progress.found is None else {"alpha": progress.found[0]}
        header: Header = {
            "held": [name for name in _STAGES if getattr(progress, name) is not None],
            "r2": None if progress.found is None else progress.found[1],
            "evals": self.tally.evals,
            "calls": self.tally.calls,
        }
        self.checkpoint.save(tensors, header)

    def _resume(self) -> tuple[_Progress, int, int]:
        stopped = self.checkpoint.load(_layout)
        if stopped is None:
            return _Progress(), 0, 0
        tensors, header = stopped
        device = self.model.require_denoiser().device
        states = States(**{name: tensors[f"states.{name}"].to(device) for name in States.layout("")})
        held, at = header["held"], self.task.teacher.context.device  # where gradients in the conditioning are
        progress = _Progress(
            states,
            Shown(tensors["shown"]) if "shown" in held else None,
            (tensors["rows"].to(at), tensors["offsets"].to(at)) if "rows" in held else None,
            (tensors["alpha"], float(header["r2"])) if "found" in held else None,
        )
        return progress, int(header["evals"]), int(header["calls"])


_STAGES = ("shown", "rows", "found")
"""What is saved after the states, in this order."""


def _layout(header: Header) -> dict[str, Spec]:
    held = header["held"]
    if held != list(_STAGES[: len(held)]):
        raise ValueError(f"{held!r} are no stages in their order")
    if "found" in held:
        as_number(header["r2"])
    later: dict[str, dict[str, Spec]] = {
        "shown": {"shown": (torch.float64, (None, None, None))},
        "rows": {"rows": (torch.float32, (None, None)), "offsets": (torch.float32, (None,))},
        "found": {"alpha": (torch.float32, (None,))},
    }
    return States.layout("states.") | {name: spec for stage in held for name, spec in later[stage].items()}


def _row(conditioning: Conditioning, index: int) -> Conditioning:
    return conditioning.map(lambda tensor: tensor[index : index + 1])
