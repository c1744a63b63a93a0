"""An edit of what a model reads in its texts: one low-rank map on the context, whatever the weights it is applied to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from ..artifact import Header, Migration, Noun, Spec, as_list, as_mapping, as_number, as_provenance, as_text, as_texts, as_whole
from ..model import Conditioning, CrossAttention, Family, NonFinite
from ..phrases import Concept
from .layers import in_single
from .report import LIMITS, MAX_NULL_DRIFT, MAX_SHIFT, MAX_TRACE, Report
from .solve import LowRank
from .texts import words_of

FAMILIES: tuple[str, ...] = (*get_args(Family), "sd3", "flux")
"""Whose texts an edit may be for. SD3 and Flux (experimental) take it as conditioning only."""
LARGEST = 1 << 16
"""Largest width, and largest number of columns, an edit on disk may state."""
SHOWN = 3
"""Concepts that one line has room for."""
STILL = 0.5
"""Shift below which a word still means what it meant, rather than what stands in its place."""


@dataclass(frozen=True, eq=False)
class WeightPatch:
    """W' = W + up @ down. up: (out, rank), down: (rank, in), float32."""

    up: Tensor
    down: Tensor


def _from_version_1(header: Header) -> Header:
    """Version 1 joined the synonyms of all concepts into one setting, ``with``, and stored the report's ``limits``, which are no data.

    Which of several concepts a synonym belonged to was not stored: the first is given all of them, so that the report still knows them.
    """
    settings, report = dict(header["settings"]), header["report"]
    words = [word for word in settings.pop("with", "").split(", ") if word]
    synonyms: list[list[str]] = [[] for _ in header["concepts"]]
    if words:
        synonyms[0] = words
    if report is not None:
        report = {name: value for name, value in report.items() if name != "limits"}
        report |= {name: [] for name in ("parts", "unknown", "related", "clashes")}
    return {**header, "settings": settings, "synonyms": synonyms, "report": report}


@dataclass(frozen=True, eq=False)
class ContextEdit(Noun):
    """T = I + U V^T on every text context c (rows as columns here), and so on every weight that reads it: W' = W T.

    context: (width, rank) factors, float32, row-major, as a file gives them back. pooled: the same for the pooled text (SDXL), or None.
    gains: per layer path a factor per column where it is not 1 (T_l = I + U diag(g_l) V^T). What it was solved from: concepts, and per
    concept its anchor (the text it is read as) and its synonyms (words erased with it; left out, none has any), keep, and the fields of
    `Provenance`: ``model`` is the hash of the weights that read the text, ``seed`` is taken from the settings, and no model evaluations are
    spent. Nothing is ever written into a model, so leaving the edit out undoes it.

    Raises NonFinite for factors that are no numbers, ValueError unless every concept has its list of synonyms. Source: the common form of
    TIME, UCE, MACE, RECE and TRCE's closed-form edits, which share one matrix for all layers.
    """

    FORMAT: ClassVar[str] = "conceptkit-edit"
    VERSION: ClassVar[int] = 2
    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {1: _from_version_1}
    TENSORS: ClassVar[tuple[str, ...]] = ("context", "pooled")

    family: str
    context: LowRank
    pooled: LowRank | None = None
    gains: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    concepts: tuple[Concept, ...] = ()
    anchors: tuple[str, ...] = ()
    synonyms: tuple[tuple[str, ...], ...] = ()
    keep: tuple[str, ...] = ()
    report: Report | None = None
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.synonyms:
            object.__setattr__(self, "synonyms", ((),) * len(self.concepts))
        if len(self.synonyms) != len(self.concepts):
            raise ValueError(f"{len(self.concepts)} concepts need as many lists of synonyms, not {len(self.synonyms)}")
        object.__setattr__(self, "seed", int(self.settings.get("seed", 0)))
        super().__post_init__()
        for part in (self.context, self.pooled):
            if part is not None and not (torch.isfinite(part.u).all() and torch.isfinite(part.v).all()):
                raise NonFinite("the edit holds NaN or infinity: raise the ridge, or give captions to preserve")

    @property
    def rank(self) -> int:
        """Columns of U and V: 0 is the identity."""
        return self.context.rank

    @property
    def width(self) -> int:
        """Width of the context it applies to."""
        return self.context.width

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed by construction."""
        return self.rank == 0 and (self.pooled is None or self.pooled.rank == 0)

    @staticmethod
    def identity(family: str, width: int) -> ContextEdit:
        """The edit that changes nothing."""
        return ContextEdit(family, single(LowRank.identity(width)))

    def scale(self, strength: float) -> ContextEdit:
        """T = I + strength U V^T: 0 is the identity, 1 the edit itself, whose report alone holds. Raises ValueError for NaN."""
        if not math.isfinite(strength):
            raise ValueError(f"the strength is {strength}: give a number, 0 for no edit and 1 for the whole")
        if strength == 1:
            return self

        def scaled(part: LowRank) -> LowRank:
            return LowRank(part.u * strength, part.v) if strength else single(LowRank.identity(part.width))

        return replace(
            self,
            context=scaled(self.context),
            pooled=None if self.pooled is None else scaled(self.pooled),
            gains=self.gains if strength else {},
            settings={**self.settings, "strength": strength * float(self.settings.get("strength", 1.0))},
            report=None,
        )

    def compose(self, after: ContextEdit) -> ContextEdit:
        """This edit, then ``after`` solved on (or meant for) the weights this one gives: W T_self T_after. Reports are dropped.

        Raises ValueError for edits of different families or widths, and for edits that differ from layer to layer.
        """
        if (self.family, self.width) != (after.family, after.width):
            raise ValueError(
                f"an edit for {self.family} (width {self.width}) cannot follow one for {after.family} (width {after.width}): "
                "combine edits of one model family"
            )
        if self.gains or after.gains:
            raise ValueError("edits that differ from layer to layer do not combine: solve their concepts together, in one call")
        if after.is_identity:
            return self
        if self.is_identity:
            return after
        pooled = self.pooled or after.pooled
        if self.pooled is not None and after.pooled is not None:
            pooled = single(_double(self.pooled).compose(_double(after.pooled)))
        return replace(
            self,
            context=single(_double(self.context).compose(_double(after.context))),
            pooled=pooled,
            concepts=self.concepts + after.concepts,
            anchors=self.anchors + after.anchors,
            synonyms=self.synonyms + after.synonyms,
            keep=tuple(dict.fromkeys(self.keep + after.keep)),
            method=self.method if self.method == after.method else f"{self.method}, {after.method}",
            settings={},
            report=None,
        )

    def apply_to_conditioning(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning as the edited weights would read it; the same object for the identity.

        For the negative prompt too, to equal the edit of the weights exactly. Raises ValueError for a conditioning of another width and for
        an edit that differs from layer to layer.
        """
        if self.is_identity:
            return conditioning
        if self.gains:
            raise ValueError("this edit differs from layer to layer, which no conditioning can: apply it to the MODEL")
        if conditioning.context.shape[-1] != self.width:
            raise ValueError(
                f"the conditioning is {conditioning.context.shape[-1]} wide and the edit is for {self.family}, {self.width} wide: "
                "encode the prompt with the model family the edit was solved on"
            )
        pooled = conditioning.pooled
        if pooled is not None and self.pooled is not None:
            if pooled.shape[-1] != self.pooled.width:
                raise ValueError(
                    f"the pooled text is {pooled.shape[-1]} wide and the edit is for {self.pooled.width}: use its own model family"
                )
            pooled = self.pooled.apply(pooled)
        return replace(conditioning, context=self.context.apply(conditioning.context), pooled=pooled)

    def weight_patches(self, attention: CrossAttention) -> Iterator[tuple[str, WeightPatch]]:
        """Path and patch of every weight that reads the text, one at a time: W T = W + (W U) V^T, exactly, float32 on the CPU.

        ``down`` is one tensor for all layers. The identity yields nothing. Raises ValueError for weights of another width or a layer the
        edit has gains for and the model has not, UnsupportedModel for quantised weights.
        """
        missing = set(self.gains)
        if self.rank:
            u, down = self.context.u.float().cpu(), self.context.v.float().cpu().T.contiguous()
            for path, _, values in in_single(attention, self.width):
                up = values @ u
                if path in self.gains:
                    missing.discard(path)
                    up = up * torch.tensor(self.gains[path])
                yield path, WeightPatch(up, down)
        if missing:
            raise ValueError(f"the model has no layer {min(missing)}, which the edit is for: use the model family it was solved on")
        if self.pooled is not None and self.pooled.rank:
            layer = attention.pooled()
            if layer is None or layer[1].shape[1] < self.pooled.width:
                raise ValueError("the edit has a part for the pooled text and the model reads none: use the model family it was solved on")
            path, weight = layer[0], layer[1].detach().cpu()
            down = torch.zeros(self.pooled.rank, weight.shape[1])
            down[:, : self.pooled.width] = self.pooled.v.float().cpu().T
            yield path, WeightPatch(weight[:, : self.pooled.width].float() @ self.pooled.u.float().cpu(), down)

    def headline(self) -> str:
        """What matters most of what the edit does, in one short line."""
        if self.is_identity:
            return "No edit: no concept was listed, or the strength is 0. The model stays as it is."
        if self.report is None:
            return "; ".join(map(str, self.concepts[:SHOWN])) or "an edit"
        worst = sorted(self.report.concepts, key=lambda c: -c.trace)
        read_as = {concept.text: anchor for concept, anchor in zip(self.concepts, self.anchors, strict=True) if anchor.strip()}
        instead = {text: f", {anchor} instead" for text, anchor in read_as.items()}
        left = "; ".join(f"{c.text}: {max(0.0, c.trace):.0%} left{instead.get(c.text, '')}" for c in worst[:SHOWN])
        more = f"; {len(worst) - SHOWN} more" if len(worst) > SHOWN else ""
        moved = "".join(f"; moved most: {word.word} {word.shift:.0%}" for word in self.report.neighbours[:1])
        return f"{left}{more}{moved}"

    def summary(self) -> str:
        """What the edit does, in a few lines for people."""
        if self.is_identity:
            return self.headline()
        listed = [
            f"{concept} (read as {anchor!r})" if concept.replacement is None and anchor.strip() else str(concept)
            for concept, anchor in zip(self.concepts, self.anchors, strict=True)
        ]
        names = ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
        along = [f"{word} with {c.text}" for c, words in zip(self.concepts, self.synonyms, strict=True) for word in words]
        lines = [f"{names or 'an edit'}: method {self.method}, rank {self.rank}" + (f" + {self.pooled.rank} pooled" if self.pooled else "")]
        if along:
            lines.append(f"  erased as well: {', '.join(along[:12])}" + (f" and {len(along) - 12} more" if len(along) > 12 else ""))
        if self.report is not None:
            lines += [self.report.summary(), *(f"  Warning: {w}." for w in self.warnings), *(f"  {limit}" for limit in LIMITS)]
        return "\n".join(lines)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before relying on the edit, as sentences that say what can still be changed; none without a report.

        Where nothing of it can be, there is no warning: the figures are in the report all the same.
        """
        report = self.report
        if report is None:
            return ()
        found = [
            f"the model was not trained on {word!r}: neither erasing it nor its figures mean much; use a word it knows"
            for word in report.unknown
        ]
        for clash in report.clashes:
            means = "means the same as" if clash.same else "is in some images"
            given = any(concept.text == clash.concept and concept.replacement for concept in self.concepts)
            advice = "name another replacement" if given else "name a replacement"
            found.append(f"{clash.concept!r} is read as {clash.anchor!r}, which {means} {clash.word!r}, and that is erased: {advice}")
        for concept in self.concepts:
            alone = [part.word for part in report.parts if part.shift < STILL and part.word in words_of(concept.text)]
            if alone:
                words = ", ".join(map(repr, alone))
                found.append(f"{concept.text!r} is erased as one phrase; {words} alone still means what it did: list it apart to erase it")
        stronger, gentler = self._stronger(), self._gentler()
        left = [(f"{c.text!r} may still be generated ({c.trace:.0%} of it is left)", c.trace, stronger) for c in report.concepts]
        if report.pooled_leak is not None:
            label = f"the pooled text still says the concept ({report.pooled_leak:.0%})"
            left.append((label, report.pooled_leak, ["use the method conceptkit, which edits it too"] if self.pooled is None else stronger))
        found += [f"{what}: {_either(advice)}" for what, trace, advice in left if trace > MAX_TRACE and advice]
        found += [f"{w.word!r} was to be kept and moves by {w.shift:.0%}: {gentler}" for w in report.kept if w.shift > MAX_SHIFT]
        if report.null_drift > MAX_NULL_DRIFT and not self.gains:
            found.append(f"the empty prompt moves by {report.null_drift:.1%}: if that shows, edit the positive conditioning alone")
        return tuple(found)

    def _stronger(self) -> list[str]:
        """What would leave less of the concepts."""
        default = self.method == "conceptkit"
        advice = ["raise the strength to 1"] if float(self.settings.get("strength", 1.0)) < 1 else []
        advice += ["keep fewer words"] if self.keep else []
        advice += [] if default else ["use the method conceptkit"]
        advice += ["turn on hard"] if default and self.settings.get("hard") is False else []
        return advice

    def _gentler(self) -> str:
        """What would move other words less."""
        advice = ["turn off hard"] if self.settings.get("hard") is True else []
        return _either([*advice, *(["erase fewer concepts at once"] if len(self.concepts) > 1 else []), "lower the strength"])

    def _tensors(self) -> dict[str, Tensor]:
        rows = [self.gains[path] for path in sorted(self.gains)]
        return {**super()._tensors(), "gains": torch.tensor(rows, dtype=torch.float64).reshape(len(rows), self.rank)}

    def _content(self) -> Header:
        return {
            "family": self.family,
            "width": self.width,
            "rank": self.rank,
            "pooled": None if self.pooled is None else [self.pooled.width, self.pooled.rank],
            "layers": sorted(self.gains),
            "concepts": [
                {"text": c.text, "replacement": c.replacement, "attributes": [list(a) for a in c.attributes]} for c in self.concepts
            ],
            "anchors": list(self.anchors),
            "synonyms": [list(words) for words in self.synonyms],
            "keep": list(self.keep),
            "method": self.method,
            "settings": dict(self.settings),
            "model": self.model,
            "report": None if self.report is None else self.report.to_json(),
        }

    @classmethod
    def _layout(cls, header: Header) -> dict[str, Spec]:
        width, rank = (as_whole(header[name], LARGEST) for name in ("width", "rank"))
        part: Spec = (torch.float32, (width, rank))
        specs = {"context.u": part, "context.v": part, "gains": (torch.float64, (len(as_list(header["layers"])), rank))}
        if header["pooled"] is not None:
            width, rank = (as_whole(size, LARGEST) for size in header["pooled"])
            specs |= dict.fromkeys(("pooled.u", "pooled.v"), (torch.float32, (width, rank)))
        return specs

    @classmethod
    def _from(cls, header: Header, tensors: Mapping[str, Tensor]) -> ContextEdit:
        concepts = tuple(map(_concept, as_list(header["concepts"])))
        layers, anchors = as_texts(header["layers"]), as_texts(header["anchors"])
        if header["family"] not in FAMILIES:
            raise ValueError(f"unknown model family {as_text(header['family'])[:40]!r}")
        if len(anchors) != len(concepts):
            raise ValueError("concepts and anchors differ in number")
        if len(set(layers)) != len(layers):
            raise ValueError("a layer is listed twice")
        provenance = as_provenance(header)
        as_number(provenance["settings"].get("strength", 1.0))
        return cls(
            family=header["family"],
            context=LowRank(tensors["context.u"], tensors["context.v"]),
            pooled=LowRank(tensors["pooled.u"], tensors["pooled.v"]) if "pooled.u" in tensors else None,
            gains={path: tuple(row) for path, row in zip(layers, tensors["gains"].tolist(), strict=True)},
            concepts=concepts,
            anchors=anchors,
            synonyms=tuple(map(as_texts, as_list(header["synonyms"]))),
            keep=as_texts(header["keep"]),
            **provenance,
            report=None if header["report"] is None else Report.from_json(header["report"]),
        )


def _concept(value: Any) -> Concept:
    said = as_mapping(value)
    instead = said["replacement"]
    attributes = tuple((as_text(text), as_number(share)) for text, share in as_list(said["attributes"]))
    return Concept(as_text(said["text"]), None if instead is None else as_text(instead), attributes)


def single(part: LowRank) -> LowRank:
    """The factors in float32, the precision edits are kept in; columns are scaled by powers of two so that both factors fit in float16."""
    u, v = part.u.double(), part.v.double()
    sizes = torch.stack([u.abs().amax(0), v.abs().amax(0)]).clamp_min(torch.finfo(torch.float64).tiny) if part.rank else u.new_ones(2, 0)
    scale = torch.exp2(((sizes[0].log2() - sizes[1].log2()) / 2).round())
    return LowRank((u / scale).float(), (v * scale).float())


def _either(advice: Sequence[str]) -> str:
    """Advice as one phrase: one or another of it helps."""
    return ", or ".join(advice)


def _double(part: LowRank) -> LowRank:
    return LowRank(part.u.double(), part.v.double())
