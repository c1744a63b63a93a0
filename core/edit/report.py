"""What an edit does to a model's weights, measured without drawing a picture.

Distances are those the model's cross-attention makes: ||x||_G = ||G^1/2 x|| with G = sum_l W_l^T W_l.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..artifact import as_flag, as_number, as_text
from .solve import LowRank, root

MAX_TRACE, MAX_SHIFT, MAX_NULL_DRIFT = 0.2, 0.3, 1e-2
"""Figures above which an edit warns: of a concept, of a word to keep, of the empty prompt."""

LIMITS = (
    "The edit blocks prompts, not the model's knowledge: images inverted with the empty prompt can still show the concept.",
    "An embedding learned on the edited model, or chosen freely, may still recover it, as far as 'an embedding could bring back' says.",
    "The text encoder is unchanged: other models that use it know the concept as before.",
)
"""What no edit of this kind can reach: shown with every report and stored in none, so that a sentence may change and no hash with it."""


@dataclass(frozen=True)
class ConceptTrace:
    """What is left of a concept. trace: 1 intact, 0 read as its anchor, below 0 pushed past it, over all layers; highest: in any one layer.

    regenerable_plausible, regenerable_any: how much of the way from the anchor back to the concept some other embedding leads, at most:
    among embeddings no less likely than the concept's own, and among all. 0 nothing, 1 everything.
    """

    text: str
    trace: float
    highest: float
    regenerable_plausible: float
    regenerable_any: float


@dataclass(frozen=True)
class WordShift:
    """How far a word is moved, as a share of what it says: 0 untouched, 1 as far as the word is from the empty prompt."""

    word: str
    shift: float


@dataclass(frozen=True)
class Clash:
    """A concept is read as ``anchor``, which is drawn as ``word``, and that is erased: always where ``same``, else in some images."""

    concept: str
    anchor: str
    word: str
    same: bool


@dataclass(frozen=True)
class Report:
    """Figures of an edit. layers: path to trace, over all concepts. distortion: E ||(T - I) c||_G^2 / E ||c||_G^2 over captions.

    null_drift: the most any position of the empty prompt moves, relative. pooled_leak: the trace of the pooled text (1: not edited), None
    for models that have none. neighbours: words the edit was not about, most moved first. parts: words of concepts of several words, each
    by itself. unknown: words of concepts that the model was not trained on, where it says what it was. related: parts of the concepts and
    words that hold them (robin and pet, of bird), of those not erased; most moved first. clashes: anchors that bring an erased word back.
    """

    concepts: tuple[ConceptTrace, ...]
    layers: Mapping[str, float]
    kept: tuple[WordShift, ...]
    neighbours: tuple[WordShift, ...]
    distortion: float
    null_drift: float
    pooled_leak: float | None
    parts: tuple[WordShift, ...] = ()
    unknown: tuple[str, ...] = ()
    related: tuple[WordShift, ...] = ()
    clashes: tuple[Clash, ...] = ()

    def summary(self) -> str:
        """The figures in a few lines for people."""
        lines = [
            f"  {c.text}: {c.trace:.1%} left (at most {c.highest:.1%} in a layer); an embedding could bring back "
            f"{c.regenerable_plausible:.0%} if it must be plausible, {c.regenerable_any:.0%} if not"
            for c in self.concepts[:12]
        ]
        pooled = "" if self.pooled_leak is None else f", the pooled text keeps {self.pooled_leak:.0%} of the concepts"
        lines.append(f"  captions change by {self.distortion:.2%}, the empty prompt by {self.null_drift:.2%}{pooled}")
        for label, words in (("kept", self.kept), ("parts and wider words", self.related), ("most moved", self.neighbours)):
            if words:
                lines.append(f"  {label}: " + ", ".join(f"{w.word} {w.shift:.0%}" for w in words[:8]))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        plain: dict[str, Any] = asdict(self)
        return {**plain, "layers": dict(self.layers)}

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Report:
        """A report from plain data. Raises KeyError, TypeError or ValueError for anything else."""
        leak = plain["pooled_leak"]
        return Report(
            concepts=tuple(
                ConceptTrace(
                    as_text(c["text"]), *(as_number(c[key]) for key in ("trace", "highest", "regenerable_plausible", "regenerable_any"))
                )
                for c in plain["concepts"]
            ),
            layers={as_text(path): as_number(value) for path, value in plain["layers"].items()},
            kept=tuple(WordShift(as_text(w["word"]), as_number(w["shift"])) for w in plain["kept"]),
            neighbours=tuple(WordShift(as_text(w["word"]), as_number(w["shift"])) for w in plain["neighbours"]),
            distortion=as_number(plain["distortion"]),
            null_drift=as_number(plain["null_drift"]),
            pooled_leak=None if leak is None else as_number(leak),
            parts=tuple(WordShift(as_text(w["word"]), as_number(w["shift"])) for w in plain["parts"]),
            unknown=tuple(map(as_text, plain["unknown"])),
            related=tuple(WordShift(as_text(w["word"]), as_number(w["shift"])) for w in plain["related"]),
            clashes=tuple(
                Clash(as_text(c["concept"]), as_text(c["anchor"]), as_text(c["word"]), as_flag(c["same"])) for c in plain["clashes"]
            ),
        )


def trace(edit: LowRank, columns: Tensor, anchors: Tensor, gram: Tensor) -> float:
    """tau = (T c - a)^T G (c - a) / (c - a)^T G (c - a), numerator and denominator summed over columns (d, N)."""
    away = columns - anchors
    weighted = gram @ away
    return _ratio(float((_mapped(edit, columns) - anchors).mul(weighted).sum()), float(away.mul(weighted).sum()))


def shift(edit: LowRank, columns: Tensor, origin: Tensor, gram: Tensor) -> float:
    """||(T - I) c||_G / ||c - o||_G over columns (d, N) and what they would be without the word (d, N)."""
    moved = _mapped(edit, columns) - columns
    away = columns - origin
    return _root(_ratio(float(moved.mul(gram @ moved).sum()), float(away.mul(gram @ away).sum())))


def distortion(edit: LowRank, covariance: Tensor, gram: Tensor) -> float:
    """tr(E Sigma E^T G) / tr(Sigma G) with E = T - I: the share of what captions say that is changed."""
    if not edit.rank:
        return 0.0
    changed = (edit.v.T @ (covariance @ edit.v)).mul_(edit.u.T @ (gram @ edit.u))
    return float(changed.sum() / covariance.flatten().dot(gram.flatten()))


class Adversary:
    """The closed-form attacker: which embedding e does the edited model read most like a given one?

    min_e ||T e - c||_G over e^T Sigma^-1 e <= radius^2 (secular equation in one multiplier) or over all e. One eigendecomposition an edit.
    """

    def __init__(self, edit: LowRank, gram: Tensor, covariance: Tensor) -> None:
        self._edit, self._gram = edit, gram
        # A little of everything: directions that no caption takes would be free to the attacker otherwise by rounding alone.
        self._ball = root(covariance)
        moved = self._ball + edit.u @ (edit.v.T @ self._ball)
        self._back = moved.T @ gram
        self._sizes, self._axes = torch.linalg.eigh(self._back @ moved)

    def derive(self, target: Tensor) -> Tensor:
        """The embedding (d,) no less plausible than ``target`` (d,) that comes nearest to it after the edit."""
        radius = torch.linalg.solve_triangular(self._ball, target[:, None], upper=False).norm()
        b = self._axes.T @ (self._back @ target)
        sizes = self._sizes.clamp_min(0)

        def length(multiplier: float) -> float:
            return float((b / (sizes + multiplier)).norm())

        low, high = 1e-12 * float(sizes[-1]), float(sizes[-1])
        while length(high) > radius and high < 1e12 * float(sizes[-1]):
            high *= 10
        if length(low) > radius:
            for _ in range(80):
                middle = math.sqrt(low * high)
                low, high = (middle, high) if length(middle) > radius else (low, middle)
        else:
            high = low
        return self._ball @ (self._axes @ (b / (sizes + high)))

    def plausible(self, target: Tensor, anchor: Tensor) -> float:
        """1 - ||T e* - c||_G / ||c - a||_G at the derived embedding, at least 0."""
        found = self.derive(target)[:, None]
        return self._recovered(_mapped(self._edit, found)[:, 0] - target, target - anchor)

    def anything(self, target: Tensor, anchor: Tensor) -> float:
        """The same over all embeddings: 1 unless T is singular, whose range is {x : Y^T x = 0} with Y = V null(I + U^T V)."""
        null = self._closed
        if not null.shape[1]:
            return 1.0
        inside = torch.linalg.solve(null.T @ torch.linalg.solve(self._gram, null), null.T @ target)
        missed = torch.linalg.solve(self._gram, null @ inside)
        return self._recovered(missed, target - anchor)

    @cached_property
    def _closed(self) -> Tensor:
        """Y, orthonormal (d, k): empty unless T is singular."""
        edit = self._edit
        # The factors are float32 in the end, so a singular value is zero up to that.
        left, sizes, _ = torch.linalg.svd(torch.eye(edit.rank, dtype=torch.float64) + edit.v.T @ edit.u)
        null, _ = torch.linalg.qr(edit.v @ left[:, sizes < 1e-5 * sizes[:1].clamp_min(1)])
        return null

    def _recovered(self, missed: Tensor, away: Tensor) -> float:
        return max(0.0, 1 - _root(_ratio(float(missed @ self._gram @ missed), float(away @ self._gram @ away))))


def _mapped(edit: LowRank, columns: Tensor) -> Tensor:
    return columns + edit.u @ (edit.v.T @ columns)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _root(ratio: float) -> float:
    """The root of what is no less than 0 but for rounding."""
    return math.sqrt(max(0.0, ratio))
