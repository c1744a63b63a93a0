"""What is asked of a method: one concept in one template, and the words it may be taken apart into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

from torch import Tensor

from ..artifact import Checkpoint, Header
from ..model import Conditioning, Model, Slot
from ..progress import OnStep, silent

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)

Budget: TypeAlias = Literal["fast", "default", "thorough"]
Select: TypeAlias = Literal["scorer", "r2"]


@dataclass(frozen=True)
class Task:
    """Checked input of a method.

    concept: the word, phrase or slot; ``name``: what to call it. max_words: of the result. pool: candidate words and their token ids.
    teacher, empty: the conditioning of the concept's own prompt and of the empty one, batch 1. token: the concept as one token per
    encoder, (1, width), or None when it is several. height, width: latent cells. excluded: what was kept out of the pool, in one phrase.
    settings: single settings of the method that replace its budget's.
    """

    model: Model
    concept: str | Slot
    name: str
    template: str
    max_words: int
    pool: Mapping[str, int]
    excluded: str
    teacher: Conditioning
    empty: Conditioning
    token: Mapping[str, Tensor] | None
    height: int
    width: int
    seed: int = 0
    budget: str = "default"
    settings: Mapping[str, float] = field(default_factory=dict)
    select: str = "scorer"
    checkpoint: Path | None = None
    on_step: OnStep = silent

    def choose(self, budgets: Mapping[str, Settings]) -> Settings:
        """The method's settings for this task's budget. Raises ValueError for a budget or a setting the method does not know."""
        if self.budget not in budgets:
            raise ValueError(f"unknown budget {self.budget!r}: choose one of {', '.join(budgets)}")
        chosen = budgets[self.budget]
        known = [f.name for f in fields(chosen)]
        unknown = sorted(set(self.settings) - set(known))
        if unknown:
            raise ValueError(f"this method has no setting {', '.join(unknown)}: choose from {', '.join(known)}")
        return replace(chosen, **self.settings)

    def resumable(self, format: str, version: int, settings: DataclassInstance, tensors: Mapping[str, Tensor], asked: Header) -> Checkpoint:
        """The checkpoint of a run of this task.

        format, version: of the method's own files. Raise the version when what is stored changes.
        settings: the method's. A file of a run with others is refused.
        tensors, asked: what else the method's result depends on, beside the model's name, prompts, candidates, seed and size.
        """
        own = {"teacher": self.teacher.context, "empty": self.empty.context}
        size = [self.height, self.width]
        base = {"model": self.model.name, "template": self.template, "pool": list(self.pool), "seed": self.seed, "size": size}
        return Checkpoint(self.checkpoint, format, version, {**own, **tensors}, {**base, "settings": vars(settings), **asked})


class Tally:
    """What a method has spent on its task, reported as steps of ``planned`` evals and ``prompts`` text encodings, ``PROMPTS`` to a step.

    ``evals`` and ``calls`` were spent before.
    """

    PROMPTS = 8
    """Prompts that take about the time of one eval."""

    def __init__(self, task: Task, planned: int, evals: int = 0, calls: int = 0, prompts: int = 0) -> None:
        self._meter, self._on_step = task.model.meter, task.on_step
        self._planned, self._encoding = planned, prompts // self.PROMPTS
        self._evals, self._calls, self._prompts = self._meter.evals - evals, self._meter.calls - calls, self._meter.prompts

    @property
    def evals(self) -> int:
        return self._meter.evals - self._evals

    @property
    def calls(self) -> int:
        return self._meter.calls - self._calls

    @property
    def prompts(self) -> int:
        """Text encodings since this object was made."""
        return self._meter.prompts - self._prompts

    def report(self, metrics: Mapping[str, float] = MappingProxyType({})) -> None:
        """Say how far the method is; the last step is kept for ``finish``."""
        total = self._planned + self._encoding
        done = min(self.evals, self._planned) + min(self.prompts // self.PROMPTS, self._encoding)
        self._on_step(min(done, total - 1), total, metrics)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Say that it is done."""
        total = max(self._planned + self._encoding, 1)
        self._on_step(total, total, metrics)
