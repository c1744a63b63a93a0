"""A concept as a few weighted vocabulary words, and what that explains."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..artifact import (
    Header,
    Migration,
    Noun,
    Spec,
    as_flag,
    as_list,
    as_mapping,
    as_number,
    as_provenance,
    as_text,
    as_texts,
    as_whole,
    write_bytes,
)
from ..model import Conditioning, TextEncoder, fill, split_template
from ..vocabulary import token_of

RELIABLE_R2 = 0.8
"""Held-out R2 from which a decomposition is taken to explain its concept."""
FILLS_IN = 0.02
"""Importance below which a word only fills in: it helps the mixture and shows next to nothing of the concept. The largest round number that
leaves every right word of the demo model's tuned half (0.021 and more); its other fillers have 0.009 at most."""
_EMBEDDING_KEYS = {"l": "clip_l", "g": "clip_g", "h": "clip_h"}  # what ComfyUI calls the text encoders


def mix(embeddings: Mapping[str, Tensor], norms: Mapping[str, float], alpha: Tensor) -> dict[str, Tensor]:
    """Pseudo-tokens w = m * (sum_i alpha_i e_i) / ||sum_i alpha_i e_i|| per text encoder, (batch, 1, width).

    embeddings: (words, width); norms: m; alpha: (batch, words), whose scale does not matter. Differentiable in alpha.
    """
    return {name: (norms[name] * normalize(alpha.to(rows.device) @ rows, dim=-1)).unsqueeze(-2) for name, rows in embeddings.items()}


@dataclass(frozen=True)
class LevelR2:
    """R2 on the held-out states with ``low`` <= sigma <= ``high``."""

    low: float
    high: float
    r2: float


@dataclass(frozen=True)
class Fidelity:
    """How much of what the concept changes in the model's predictions its words change alike.

    R2_cond = 1 - sum ||eps_w - eps_c||^2 / sum ||eps_empty - eps_c||^2: 1 is the concept itself, 0 no better than the empty prompt.
    ``heldout``: on images that neither fitted nor chose; ``fitted``: on those by which the result was chosen; ``levels``: held out, from
    the noisiest third of the steps (layout) to the cleanest (detail); ``every_word``: held out, before all but the strongest words were
    dropped. None where a method has no such number.
    """

    heldout: float
    fitted: float | None
    levels: tuple[LevelR2, ...]
    every_word: float | None


@dataclass(frozen=True)
class Restart:
    """One descent of the fit: how it was started, the R2 it reached on the states it was judged by, and whether it was kept."""

    start: str
    r2: float
    kept: bool


def _from_version_1(header: Header) -> Header:
    """Before fillers were told apart. Importance was measured otherwise there, and is no longer comparable."""
    return {**header, "fillers": [], "importance": None}


@dataclass(frozen=True, eq=False)
class Decomposition(Noun):
    """A concept w* = normalised sum of ``alpha_i`` times the token embeddings of ``words``.

    ``alpha``: (words,), >= 0, sums to 1, float32, CPU. ``importance`` (delta R2): what the words show of the concept by themselves
    (`core.decompose.shown`) that they no longer show without it, the others fitted anew. ``fillers``: words of next to no importance, which
    only help the mixture. Words stand in order of importance where it was measured, else of their shares.
    ``embeddings``: the words' token embeddings per text encoder, (words, width), float32; ``norms``: the length w* is scaled to there.
    ``seeds``: of the pictures fitted, ``heldout_seeds``: of those it was measured on; ``size``: their height and width in pixels.
    ``candidates``: how many words could be chosen, ``excluded``: which could not, in one phrase. ``clusters``: words that say nearly the
    same, so that only their shares together mean much. ``selected``: what chose among several results of a method, if anything did.
    ``edits``: how it was changed since; ``fidelity`` and ``importance`` are None then, as they are where nothing was measured.
    ``versions``: of what computed it. Further fields are those of `Provenance`.

    Raises ValueError when lengths disagree, weights are no point of the simplex, or the template lacks its ``{}``.
    Source: Chefer et al., "The Hidden Language of Diffusion Models", ICLR 2024, for the object.
    """

    FORMAT: ClassVar[str] = "conceptkit-decomposition"
    VERSION: ClassVar[int] = 2
    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {1: _from_version_1}
    TENSORS: ClassVar[tuple[str, ...]] = ("alpha", "embeddings")
    UNHASHED: ClassVar[Header] = {"versions": {}, "model": "", "excluded": "", "selected": ""}

    concept: str
    template: str
    words: tuple[str, ...]
    ids: tuple[int, ...]
    alpha: Tensor
    importance: tuple[float, ...] | None
    fidelity: Fidelity | None
    embeddings: Mapping[str, Tensor]
    norms: Mapping[str, float]
    seeds: tuple[int, ...]
    heldout_seeds: tuple[int, ...]
    candidates: int
    restarts: tuple[Restart, ...]
    budget: str = ""
    size: tuple[int, int] = (0, 0)
    excluded: str = ""
    selected: str = ""
    clusters: tuple[tuple[str, ...], ...] = ()
    fillers: tuple[str, ...] = ()
    edits: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        split_template(self.template)
        count = len(self.words)
        if not count or len(set(self.words)) < count or not all(self.words):
            raise ValueError(f"a decomposition needs at least one word, and none twice: {self.words[:20]}")
        lengths = {len(self.ids), *self.alpha.shape, *(len(rows) for rows in self.embeddings.values())}
        if lengths != {count} or self.alpha.ndim != 1 or (self.importance is not None and len(self.importance) != count):
            raise ValueError(f"{count} words need as many ids, weights, embeddings and importances")
        if {self.alpha.dtype, *(rows.dtype for rows in self.embeddings.values())} != {torch.float32}:
            raise ValueError("weights and embeddings are float32")
        if not bool((self.alpha >= 0).all()) or abs(float(self.alpha.sum()) - 1) > 1e-4:
            raise ValueError("the weights of a decomposition are at least 0 and sum to 1")
        if not self.norms or set(self.norms) != set(self.embeddings) or not set(self.norms) <= set(_EMBEDDING_KEYS):
            raise ValueError(f"embeddings and lengths belong to the text encoders {', '.join(_EMBEDDING_KEYS)}, the same for both")
        if not all(0 < norm < math.inf for norm in self.norms.values()):
            raise ValueError("the pseudo-token's length must be positive")
        inside = [word for cluster in self.clusters for word in cluster]
        if not set(inside) <= set(self.words) or len(set(inside)) < len(inside):
            raise ValueError("clusters are made of the words, each in one cluster at most")
        if not set(self.fillers) <= set(self.words):
            raise ValueError("fillers are some of the words")
        object.__setattr__(self, "alpha", self.alpha.cpu())
        super().__post_init__()

    @property
    def shares(self) -> tuple[float, ...]:
        """What each word contributes, summing to 1."""
        return tuple((self.alpha / self.alpha.sum()).tolist())

    @property
    def r2(self) -> float:
        """The held-out R2: the number to look at before believing the words. NaN where it was not measured."""
        return math.nan if self.fidelity is None else self.fidelity.heldout

    @property
    def reliable(self) -> bool:
        """Whether the words were measured to explain the concept: held-out R2 of at least 0.8."""
        return self.r2 >= RELIABLE_R2

    @property
    def token(self) -> dict[str, Tensor]:
        """The pseudo-token w* per text encoder: (1, width), a slot for ``TextEncoder.encode``."""
        return {name: rows[0] for name, rows in mix(self.embeddings, self.norms, self.alpha[None]).items()}

    def apply(self, text: TextEncoder, template: str | None = None) -> Conditioning:
        """The conditioning of ``template`` (its own by default) with w* in place of the concept, batch 1."""
        return text.encode([fill(self.template if template is None else template, [self.token])])

    def by_importance(self) -> Decomposition:
        """The same with its words in order of importance, those below ``FILLS_IN`` as fillers (never all); itself where nothing was
        measured."""
        if self.importance is None:
            return self
        importance = torch.tensor(self.importance, dtype=torch.double)
        order = importance.argsort(descending=True, stable=True)
        words = [self.words[i] for i in order.tolist()]
        return replace(
            self,
            words=tuple(words),
            ids=tuple(self.ids[i] for i in order.tolist()),
            alpha=self.alpha[order],
            importance=tuple(importance[order].tolist()),
            embeddings={name: rows[order.to(rows.device)] for name, rows in self.embeddings.items()},
            fillers=tuple(words[i] for i in range(1, len(words)) if float(importance[order[i]]) < FILLS_IN),
        )

    def reweighted(self, multipliers: Mapping[str, float]) -> Decomposition:
        """Each word's weight times its multiplier (1 where none is given; 0 removes the word), renormalised, strongest word first.

        Multipliers of 1 give this very object. Raises ValueError for a word that is not here, a negative or infinite multiplier, or when
        no word is left. Source: Chefer et al. 2024, section on concept manipulation.
        """
        unknown = [word for word in multipliers if word not in self.words]
        if unknown:
            raise ValueError(f"not among the words of {self.concept!r}: {', '.join(unknown)}. Its words are {', '.join(self.words)}")
        if not all(0 <= factor < math.inf for factor in multipliers.values()):
            raise ValueError("multipliers must be 0 or more: 0 removes a word, 1 leaves it, 2 doubles it")
        changes = {word: float(factor) for word, factor in multipliers.items() if factor != 1}
        if not changes:
            return self
        alpha = self.alpha * torch.tensor([changes.get(word, 1.0) for word in self.words])
        return self._with(alpha, self.embeddings, self.words, self.ids, [f"{word} x {factor:g}" for word, factor in changes.items()])

    def with_words(self, text: TextEncoder, shares: Mapping[str, float]) -> Decomposition:
        """With each word of ``shares`` at its share of the whole, all at once; the other words take the rest in their proportions.

        A word that is already here is set to its share. text: the encoder of the model that was decomposed. Raises ValueError for shares
        that are not above 0 or not below 1 together, a word that is not one whole token, no other word left for the rest, or another
        model's encoder.
        """
        asked = {word.strip().lower(): float(share) for word, share in shares.items()}
        total = math.fsum(asked.values())
        if not all(share > 0 for share in asked.values()) or not total < 1:
            got = ", ".join(f"{share:g}" for share in asked.values())
            raise ValueError(f"a share lies between 0 and 1, and all of them together below 1, got {got}")
        if not asked:
            return self
        found = {word: self._look_up(text, word) for word in asked}
        fresh = [word for word in asked if word not in self.words]
        others = self.alpha * torch.tensor([float(word not in asked) for word in self.words])
        if not float(others.sum()) > 0:
            raise ValueError(f"no other word is left beside {', '.join(map(repr, asked))}: add another one")
        alpha = torch.cat([(1 - total) * others / others.sum(), torch.zeros(len(fresh))])
        words, ids = (*self.words, *fresh), (*self.ids, *(found[word][0] for word in fresh))
        for word, share in asked.items():
            alpha[words.index(word)] = share
        joined = {name: torch.cat([own, *(found[word][1][name].to(own) for word in fresh)]) for name, own in self.embeddings.items()}
        edits = [f"{'+ ' if word in fresh else ''}{word} = {share:g}" for word, share in asked.items()]
        return self._with(alpha, joined, words, ids, edits)

    def replaced(self, text: TextEncoder, old: str, new: str) -> Decomposition:
        """With ``new`` in place of ``old`` at the same share; where ``new`` is already here, it takes over that share.

        text: the encoder of the model that was decomposed. Raises ValueError when ``old`` is not here, ``new`` is not one whole token, or
        the encoder is another model's.
        """
        if old not in self.words:
            raise ValueError(f"{old!r} is not among the words of {self.concept!r}: {', '.join(self.words)}")
        index, rows = self._look_up(text, new)
        new, place = new.strip().lower(), self.words.index(old)
        if new == old:
            return self
        edits = [f"{old} -> {new}"]
        if new in self.words:
            alpha = self.alpha.clone()
            alpha[self.words.index(new)] += alpha[place]
            alpha[place] = 0
            return self._with(alpha, self.embeddings, self.words, self.ids, edits)
        changed = {name: torch.cat([own[:place], rows[name].to(own), own[place + 1 :]]) for name, own in self.embeddings.items()}
        words, ids = list(self.words), list(self.ids)
        words[place], ids[place] = new, index
        return self._with(self.alpha, changed, words, ids, edits)

    def _look_up(self, text: TextEncoder, word: str) -> tuple[int, dict[str, Tensor]]:
        """The token of ``word`` and its embedding per encoder, (1, width)."""
        index = token_of(text, word)
        rows = {name: table[index : index + 1].float() for name, table in text.tables.items()}
        if {name: row.shape[1] for name, row in rows.items()} != {name: own.shape[1] for name, own in self.embeddings.items()}:
            raise ValueError(f"{self.concept!r} was taken apart in a model of another kind: connect the text encoder of that model")
        return index, rows

    def _with(
        self, alpha: Tensor, embeddings: Mapping[str, Tensor], words: Sequence[str], ids: Sequence[int], edits: Sequence[str]
    ) -> Decomposition:
        """Other weights and words, strongest first, without those of weight 0, and with nothing measured."""
        if not 0 < float(alpha.sum()) < math.inf:
            raise ValueError("no word is left: keep at least one multiplier above 0")
        order = alpha.argsort(descending=True, stable=True)[: int((alpha > 0).sum())]
        kept = [words[i] for i in order.tolist()]
        clusters = [tuple(word for word in cluster if word in kept) for cluster in self.clusters]
        return replace(
            self,
            words=tuple(kept),
            ids=tuple(ids[i] for i in order.tolist()),
            alpha=alpha[order] / alpha.sum(),
            embeddings={name: rows[order.to(rows.device)] for name, rows in embeddings.items()},
            importance=None,
            fidelity=None,
            clusters=tuple(cluster for cluster in clusters if len(cluster) > 1),
            fillers=(),
            edits=(*self.edits, *edits),
        )

    def save_embedding(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write w* as a textual-inversion embedding (safetensors) that works where this project is not installed.

        ComfyUI reads it as ``embedding:name``. With one text encoder (SD 1.x, 2.x) the one tensor is named after the concept, as in
        ``<bird>``, which diffusers' ``load_textual_inversion`` takes for the token; SDXL's file holds ``clip_l`` and ``clip_g``.
        Raises ArtifactError unless ``overwrite`` when the path holds something else.
        """
        token = {name: row.detach().float().cpu().contiguous() for name, row in self.token.items()}
        if len(token) == 1:
            name = re.sub(r"[^\w]+", "-", self.concept).strip("-") or "concept"
            tensors = {f"<{name}>": row for row in token.values()}
        else:
            tensors = {_EMBEDDING_KEYS[name]: row for name, row in token.items()}
        write_bytes(path, safetensors.torch.save(tensors), overwrite=overwrite)

    def to_json(self) -> dict[str, Any]:
        """Everything but the embeddings, as JSON values; what was not measured is null."""
        columns = zip(self.words, self.ids, self.shares, self.importance or [None] * len(self.words), strict=True)
        rest = {name: value for name, value in self._header().items() if name not in ("words", "ids", "importance", "norms", "fillers")}
        return {
            **rest,
            "r2": None if self.fidelity is None else self.r2,
            "reliable": self.reliable,
            "words": [
                {"word": word, "id": index, "share": share, "importance": lost, "fills_in": word in self.fillers}
                for word, index, share, lost in columns
            ],
            "hash": self.content_hash(),
        }

    def summary(self) -> str:
        """What was found, in a few lines for people."""
        shares = dict(zip(self.words, self.shares, strict=True))
        telling = [word for word in self.words if word not in self.fillers]
        named = " + ".join(f"{shares[word]:.0%} {word}" for word in telling)
        filling = ", ".join(f"{shares[word]:.0%} {word}" for word in self.fillers)
        lines = [f"{self.concept} = {named}" + (f" (fill in: {filling})" if filling else "")]
        losses = [""] * len(self.words) if self.importance is None else [f", importance {lost:.3f}" for lost in self.importance]
        fills = [", fills in" if word in self.fillers else "" for word in self.words]
        lines += [f"  {w}: share {shares[w]:.3f}{loss}{fill}" for w, loss, fill in zip(self.words, losses, fills, strict=True)]
        lines += [f"  {', '.join(cluster)} say nearly the same: read their shares together" for cluster in self.clusters]
        if self.edits:
            lines.append(f"changed by hand ({'; '.join(self.edits)}), so how much it explains is not known")
        elif self.fidelity is None:
            lines.append(f"how much it explains was not measured ({self.method} method)")
        else:
            explains = f"explains {self.r2:.1%}" if self.r2 > 0 else f"explains nothing (R2 {self.r2:.2f})"
            lines.append(f"{explains} of what the concept changes (held-out images), {self.evals} evals in {self.calls} calls")
            if not self.reliable:
                lines.append(
                    "These words do not explain the concept well: decompose it again with more words, or with another template or seed."
                )
        if self.selected:
            lines.append(f"selected by {self.selected}")
        if self.excluded:
            lines.append(f"left out: {self.excluded}")
        return "\n".join(lines)

    def _content(self) -> Header:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*self.TENSORS, "restarts")}
        own |= {name: dict(own[name]) for name in ("norms", "settings", "versions")}
        fidelity = None if self.fidelity is None else asdict(self.fidelity)
        return {**own, "fidelity": fidelity, "attempts": [asdict(restart) for restart in self.restarts]}

    @classmethod
    def _layout(cls, header: Header) -> dict[str, Spec]:
        count = len(as_texts(header["words"]))
        rows: Spec = (torch.float32, (count, None))
        return {"alpha": (torch.float32, (count,)), **{f"embeddings.{name}": rows for name in as_mapping(header["norms"])}}

    @classmethod
    def _from(cls, header: Header, tensors: Mapping[str, Tensor]) -> Decomposition:
        fidelity, importance = header["fidelity"], header["importance"]
        height, width = map(as_whole, as_list(header["size"]))
        plain: dict[str, Any] = {
            **as_provenance(header),
            **{name: as_text(header[name]) for name in ("concept", "template", "budget", "excluded", "selected")},
            **{name: as_texts(header[name]) for name in ("words", "fillers", "edits")},
            **{name: tuple(map(as_whole, as_list(header[name]))) for name in ("ids", "seeds", "heldout_seeds")},
        }
        return cls(
            **plain,
            candidates=as_whole(header["candidates"]),
            importance=None if importance is None else tuple(map(as_number, as_list(importance))),
            fidelity=None if fidelity is None else _fidelity(as_mapping(fidelity)),
            restarts=tuple(_restart(as_mapping(restart)) for restart in as_list(header["attempts"])),
            clusters=tuple(map(as_texts, as_list(header["clusters"]))),
            size=(height, width),
            norms={name: as_number(value) for name, value in as_mapping(header["norms"]).items()},
            versions={name: as_text(value) for name, value in as_mapping(header["versions"]).items()},
            alpha=tensors["alpha"],
            embeddings={name: tensors[f"embeddings.{name}"] for name in header["norms"]},
        )


def _fidelity(value: Mapping[str, Any]) -> Fidelity:
    levels = tuple(
        LevelR2(*(as_number(level[name]) for name in ("low", "high", "r2"))) for level in map(as_mapping, as_list(value["levels"]))
    )
    fitted, every_word = (None if value[name] is None else as_number(value[name]) for name in ("fitted", "every_word"))
    return Fidelity(as_number(value["heldout"]), fitted, levels, every_word)


def _restart(value: Mapping[str, Any]) -> Restart:
    return Restart(as_text(value["start"]), as_number(value["r2"]), as_flag(value["kept"]))
