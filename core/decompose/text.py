"""Text decomposition: the concept's own token embeddings as a sparse non-negative sum of other words' embeddings.

It asks the vocabulary, not the model that draws: nothing is sampled to find the words. A baseline, and a start for other methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..vocabulary import STOP_WORDS, WORD_END, embeddings
from .fidelity import measure, picture_seeds, sampled_states
from .mixture import Mixture
from .result import Decomposition
from .sparse import PENALTIES, sparse_solutions
from .task import Tally, Task


@dataclass(frozen=True)
class Settings:
    """What the result is measured on: ``heldout`` pictures of ``steps`` steps at ``guidance``. Without pictures nothing is measured."""

    heldout: int = 2
    steps: int = 12
    guidance: float = 4.0


BUDGETS: Mapping[str, Settings] = MappingProxyType(
    {"fast": Settings(heldout=0), "default": Settings(), "thorough": Settings(heldout=4, steps=20)}
)
"""What may be spent, by name: nothing at all; 72 evals and 24 for each word; 240 evals and 80 for each word."""


def decompose_text(task: Task) -> Decomposition:
    """The sparse code of the concept's own embeddings (`text_code`) as a decomposition, measured like any other where that is paid for."""
    options = task.choose(BUDGETS)
    mixture = Mixture.of(task.model, task.template, task.pool)
    code = text_code(task)
    order = code.argsort(descending=True, stable=True)[: int((code > 0).sum())]
    chosen, alpha = mixture.choose(order), code[order] / code.sum()
    seeds = picture_seeds(torch.Generator().manual_seed(task.seed), options.heldout)
    planned = options.heldout * options.steps * (3 + len(order))
    tally = Tally(task, planned)
    fidelity = importance = None
    if seeds:
        states = sampled_states(task, seeds, options.steps, options.guidance, tally.report)
        fidelity, importance = measure(chosen, alpha, states, tally.report)
    tally.finish({} if fidelity is None else {"r2": fidelity.heldout})
    return Decomposition(
        concept=task.name,
        template=chosen.template,
        words=chosen.words,
        ids=chosen.ids,
        alpha=alpha,
        importance=importance,
        fidelity=fidelity,
        embeddings=chosen.embeddings,
        norms=chosen.norms,
        method="text",
        seed=task.seed,
        seeds=(),
        heldout_seeds=tuple(seeds),
        settings={name: float(value) for name, value in vars(options).items()},
        candidates=len(mixture),
        attempts=(),
        evals=tally.evals,
        calls=tally.calls,
        model=task.model.name,
    )


def text_code(task: Task) -> Tensor:
    """Weights (pool,) >= 0 with sum 1, at most ``task.words`` of them above 0, whose mixture lies nearest to the concept's embeddings.

    Non-negative lasso at several penalties, its strongest words exchanged while that helps and refitted; the one with the smallest
    angle to the target is taken. The target of a concept of several tokens is the sum of their unit vectors, stop words left out: the
    mixture then holds words near each of them. Every text encoder counts alike. Costs no evals.
    """
    own = _concept(task)
    pool = embeddings(task.model.text, list(task.pool.values()))
    scale = {name: float(rows.norm(dim=1).mean()) for name, rows in pool.items()}
    atoms = torch.cat([rows.double().cpu() / scale[name] for name, rows in pool.items()], dim=1)
    target = torch.cat([normalize(own[name].double().cpu(), dim=1).sum(0) for name in pool])
    count = min(task.words, len(atoms))
    found = [solution for _, solution in sparse_solutions(atoms.T.contiguous(), target, count, PENALTIES)]
    if not found:
        raise ValueError(f"no candidate word lies in the direction of {task.name!r}: give other candidates, or choose another method")
    cosines = torch.stack([normalize(solution.double() @ atoms, dim=0) @ target for solution in found])
    return found[int(cosines.argmax())]


def _concept(task: Task) -> dict[str, Tensor]:
    """The concept's token embeddings per encoder, (tokens, width)."""
    if not isinstance(task.concept, str):
        return {name: rows.detach().reshape(-1, rows.shape[-1]) for name, rows in task.concept.items()}
    text = task.model.text
    ids = text.tokenize(task.concept)
    dull = {text.vocabulary.get(word + WORD_END) for word in STOP_WORDS}
    return embeddings(text, [index for index in ids if index not in dull] or ids)
