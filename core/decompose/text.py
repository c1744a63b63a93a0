"""Text decomposition: a sparse non-negative sum of other words that is nearest to the concept by the text encoder alone.

It asks the text encoder, not the model that draws: nothing is sampled to find the words. A baseline, and a start for other methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..model import Conditioning, fill
from ..vocabulary import STOP_WORDS, WORD_END, embeddings
from .decomposition import Decomposition
from .fidelity import measure, picture_seeds, sampled_states
from .mixture import Mixture
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
    """The sparse code of the concept's token embeddings or of its encoded prompt (`PromptSpace.code`), as a decomposition.

    Taken is the one whose mixture, put in the template, is encoded nearer to the concept's prompt. It is measured like any other
    decomposition where the budget pays for that.
    """
    options = task.choose(BUDGETS)
    mixture = Mixture.of(task.model, task.template, task.pool)
    codes = dict(zip(("token embeddings", "encoded prompts"), text_codes(task, prompt_space(task), task.max_words), strict=True))
    teacher = _means(task.teacher)
    with torch.no_grad():
        missed = {space: float((_means(mixture.encode(code[None])) - teacher).norm()) for space, code in codes.items()}
    space = min(missed, key=missed.__getitem__)
    code = codes[space]
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
        restarts=(),
        evals=tally.evals,
        calls=tally.calls,
        model=task.model.name,
        selected=f"the text encoder: the code of the {space}",
    )


def _token_space(task: Task) -> tuple[Tensor, Tensor]:
    """The candidates' token embeddings (pool, width), in units of their mean length, and the concept's (width,), of all encoders."""
    own = _concept(task)
    pool = embeddings(task.model.text, list(task.pool.values()))
    scale = {name: float(rows.norm(dim=1).mean()) for name, rows in pool.items()}
    atoms = torch.cat([rows.cpu().double() / scale[name] for name, rows in pool.items()], dim=1)
    return atoms, torch.cat([normalize(own[name].cpu().double(), dim=1).sum(0) for name in pool])


@dataclass(frozen=True)
class PromptSpace:
    """What the text encoder makes of the template with each candidate, and with the concept, as seen from the candidates' mean.

    atoms: (pool, width), target: (width,), both means over the positions (a phrase moves what follows it). cosines: (pool,), of the angle
    between the same at the two positions where a word shows most, its own and the next. Double, CPU.
    """

    atoms: Tensor
    target: Tensor
    cosines: Tensor

    def code(self, count: int) -> Tensor:
        """Weights (pool,) >= 0 with sum 1, at most ``count`` of them above 0, whose atoms add up to what is nearest to the target."""
        return _nearest(count, self.atoms, self.target)


@torch.no_grad()
def prompt_space(task: Task, chunk: int = 64) -> PromptSpace:
    """Costs no evals, one text encoding a candidate; ``before_call`` runs before each ``chunk`` of them."""
    words, means, places = list(task.pool), [], []
    concept, start = task.teacher.context.float().cpu().double(), None
    for first in range(0, len(words), chunk):
        task.model.before_call()
        encoded = task.model.encode([fill(task.template, word) for word in words[first : first + chunk]])
        context = encoded.context.float().cpu().double()
        if start is None:  # a causal encoder leaves what stands before the word as it is
            moved = (context - concept).abs().amax((0, 2))
            start = int((moved > 1e-3 * moved.max()).byte().argmax())
        means.append(_means(encoded))
        places.append(context[:, start : start + 2].flatten(1))
    atoms, shown = torch.cat(means), torch.cat(places)
    target = concept[0, start or 0 :][:2].flatten()
    cosines = normalize(shown - shown.mean(0), dim=1) @ normalize(target - shown.mean(0), dim=0)
    return PromptSpace(atoms - atoms.mean(0), (_means(task.teacher) - atoms.mean(0))[0], cosines)


def text_codes(task: Task, space: PromptSpace, count: int) -> list[Tensor]:
    """The concept by its token embeddings, and by its encoded prompt: weights (pool,) >= 0 with sum 1, at most ``count`` above 0.

    Non-negative lasso at several penalties, its strongest words exchanged while that helps and refitted; the one with the smallest angle to
    the target is taken. The embeddings of a concept of several tokens are the sum of their unit vectors, stop words left out: the mixture
    then holds words near each of them. Every text encoder counts alike. Costs no evals.
    """
    return [_nearest(count, *_token_space(task)), space.code(count)]


def shortlist(task: Task, space: PromptSpace, looked: int, searched: int) -> list[int]:
    """Candidates (indices of the pool): the ``looked`` nearest to the concept as encoded prompts, then the nearest by prompt and by
    embedding in turns, ``searched`` in all."""
    atoms, target = _token_space(task)
    nearest = [space.cosines, normalize(atoms, dim=1) @ normalize(target, dim=0)]
    by_prompt, by_embedding = (cosines.argsort(descending=True, stable=True).tolist() for cosines in nearest)
    turns = [i for pair in zip(by_prompt, by_embedding, strict=True) for i in pair]
    return list(dict.fromkeys([*by_prompt[:looked], *turns]))[: max(looked, searched)]


def _means(conditioning: Conditioning) -> Tensor:
    """Each context's mean over its positions, (batch, width), double, CPU."""
    return conditioning.context.float().mean(1).cpu().double()


def _nearest(count: int, atoms: Tensor, target: Tensor) -> Tensor:
    """The sparse non-negative combination of atoms (pool, width) at the smallest angle to ``target`` (width,); one word at least."""
    count = min(count, len(atoms))
    found = [x for _, x in sparse_solutions(atoms.T.contiguous(), target, count, PENALTIES)] if bool(atoms.any()) else []
    if not found:
        nearest = (normalize(atoms, dim=1) @ target).argmax()
        return torch.zeros(len(atoms)).index_fill(0, nearest, 1.0)
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
