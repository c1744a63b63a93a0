"""What a method needs of a diffusion model, whoever hosts it.

Everything here speaks the variance-exploding convention of k-diffusion: a noisy latent is ``x = x0 + sigma * noise`` and a
denoiser returns its estimate of ``x0``. For an epsilon model the predicted noise is ``(x - denoised) / sigma``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Family: TypeAlias = Literal["sd1", "sd2", "sdxl"]
"""The model families methods support: SD 1.x, SD 2.x and SDXL layouts (the demo model is ``sd1``)."""

Slot: TypeAlias = Mapping[str, Tensor]
"""Token embeddings standing in a prompt: per text encoder (``"l"``, ``"g"``, ``"h"``) rows of shape (n, width), or
(batch, n, width) to encode a batch of prompts that differ in this slot only. Gradients flow to the rows."""

Prompt: TypeAlias = str | Sequence[str | Slot]
"""A text, or a sequence of texts and slots that is encoded as one text."""


def split_template(template: str) -> tuple[str, str]:
    """The texts before and after the placeholder. Raises ValueError unless ``{}`` stands in the template exactly once."""
    before, *after = template.split("{}")
    if len(after) != 1:
        raise ValueError(f"the template {template!r} must contain {{}} once, where the concept goes, as in 'a photo of a {{}}'")
    return before, after[0]


def fill(template: str, concept: Prompt) -> Prompt:
    """``template`` with a concept, which may hold slots, at its placeholder."""
    before, after = split_template(template)
    return before + concept + after if isinstance(concept, str) else [before, *concept, after]


class UnsupportedModel(ValueError):
    """The model cannot be used by this method; the message says what to connect instead."""


class NonFinite(ArithmeticError):
    """The model returned NaN or infinity."""


class OutOfMemory(RuntimeError):
    """A call did not fit in memory even at the smallest batch."""


def in_chunks(work: Callable[[Tensor], Tensor], rows: Tensor, size: int, what: str, advice: str = "free memory first") -> Tensor:
    """``work`` on ``size`` rows at a time, concatenated; on half as many from where these do not fit in memory on.

    work: rows (size, ...) to a result for each. It is called again with fewer of them where it raises OutOfMemory or torch's.
    rows: (n, ...).
    size: of a first call. A larger one is faster and takes more memory.
    what, advice: of the OutOfMemory that is raised where one row is too much: what does not fit, and what to do about it.
    """
    parts, start = [], 0
    while start < len(rows):
        try:
            parts.append(work(rows[start : start + size]))
        except (OutOfMemory, torch.OutOfMemoryError) as error:
            if size == 1:
                raise OutOfMemory(f"{what} does not fit in memory: {advice}") from error
            size = max(1, min(size, len(rows) - start) // 2)
        else:
            start += size
    return torch.cat(parts)


@dataclass(frozen=True)
class Conditioning:
    """What cross-attention reads.

    context: (batch, tokens, width). pooled: (batch, width), the input of the class embedding (SDXL), or None. size: the six
    numbers of SDXL's micro-conditioning (original height, width, crop top, left, target height, width), or None.
    """

    context: Tensor
    pooled: Tensor | None = None
    size: tuple[int, int, int, int, int, int] | None = None

    def __len__(self) -> int:
        return self.context.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same conditioning with ``function`` applied to each tensor."""
        return replace(self, context=function(self.context), pooled=None if self.pooled is None else function(self.pooled))

    def expand(self, batch: int) -> Conditioning:
        """A batch-1 conditioning repeated (as a view) to ``batch``; one that already has that size is returned as it is."""
        return self if len(self) == batch else self.map(lambda t: t.expand(batch, *t.shape[1:]))

    def detach(self) -> Conditioning:
        """The same values outside any autograd graph."""
        return self.map(Tensor.detach)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Conditionings of one width and one ``size`` stacked along the batch; ValueError when they differ in kind."""
        first = parts[0]
        if any((p.pooled is None) != (first.pooled is None) or p.size != first.size for p in parts):
            raise ValueError("cannot batch conditionings of different kinds: encode all prompts with the same model")
        pooled = None if first.pooled is None else torch.cat([p.pooled for p in parts if p.pooled is not None])
        return replace(first, context=torch.cat([p.context for p in parts]), pooled=pooled)


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts to conditioning, with access to the token embeddings it reads."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Token text to id, in CLIP's form (a word's last piece ends in ``</w>``). All encoders share it."""

    @property
    def tables(self) -> Mapping[str, Tensor]:
        """Per encoder name its token embedding table, (vocabulary, width), float32, detached, as the graph's patches leave it."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of ``text`` without start, end or padding. Raises ValueError over the encoder's length (75 tokens)."""

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Encode each prompt; rows follow the prompts' order, a slot with a batch axis yielding that many rows.

        Differentiable in the slots when gradients are enabled. Raises ValueError for a prompt that does not fit.
        """


@runtime_checkable
class Denoiser(Protocol):
    """One network evaluation of the diffusion model, unguided."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side (8 for SD)."""

    @property
    def side(self) -> int:
        """Pixels along one side of the square images the model was trained on."""

    @property
    def training_sigmas(self) -> Tensor:
        """The training schedule's noise levels, ascending, (timesteps,), float32, CPU."""

    @property
    def device(self) -> torch.device: ...

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0 for noisy latents x (batch, channels, h, w) at sigma (batch,); differentiable in x and the conditioning.

        Latents are in the model's own space (unit scale), float32 in and out whatever the network computes in.
        """


@runtime_checkable
class Autoencoder(Protocol):
    """Images (batch, 3, height, width) in [0, 1] to latents in the model's own space, and back."""

    def encode(self, pictures: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class ImageScorer(Protocol):
    """A joint image-text embedding: how well a picture fits a text."""

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors (batch, width) for pictures (batch, 3, height, width) in [0, 1]."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (len(texts), width)."""

    @property
    def logit_scale(self) -> float:
        """The factor that turns a cosine into a logit."""


@runtime_checkable
class CrossAttention(Protocol):
    """The weights that read the text, as the graph's patches leave them, streamed: no two layers need to be in memory at once.

    Names are diffusers' module paths, whoever hosts the model. Tensors are detached and floating point, on any device.
    """

    def key_values(self) -> Iterator[tuple[str, Tensor]]:
        """Path ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k") and weight (out, width) of every to_k and to_v, in a fixed order.

        Raises UnsupportedModel for weights that cannot be read as numbers, such as quantised ones.
        """

    def pooled(self) -> tuple[str, Tensor] | None:
        """Path and weight (out, in) of the layer whose leading inputs are the pooled text ("add_embedding.linear_1", SDXL), or None."""


@dataclass
class Meter:
    """Counts the cost of a run in the unit every result carries.

    evals: samples x (1 for a forward, 3 for a forward and backward). calls: batched forwards. prompts: encoded by the text encoder, where
    a method does so by `Model.encode`.
    """

    evals: int = 0
    calls: int = 0
    prompts: int = 0

    def count(self, samples: int, *, backward: bool) -> None:
        self.evals += samples * (3 if backward else 1)
        self.calls += 1


@dataclass(frozen=True)
class Model:
    """A host's model as methods see it, by parts: a method that needs one that is None says so.

    ``name`` is for people; methods never branch on it.
    """

    family: Family
    name: str
    text: TextEncoder
    denoiser: Denoiser | None = None
    """None where nothing is generated: edits are solved from the text encoder and the weights that read it."""
    autoencoder: Autoencoder | None = None
    scorer: ImageScorer | None = None
    before_call: Callable[[], None] = field(default=lambda: None)
    """Runs before every denoiser call; raising from it cancels (a host's interrupt check)."""
    words: tuple[str, ...] | None = None
    """The words it was trained on, where its vocabulary is known to hold untrained ones (the demo model); None otherwise."""
    meter: Meter = field(default_factory=Meter)
    cross_attention: CrossAttention | None = None
    """Access to the weights that read the text; None where a host has none to give."""
    predicts_velocity: bool = False
    """Whether the network was trained to predict velocity, not noise: for methods that train on the same target."""

    def require_denoiser(self) -> Denoiser:
        """The denoiser. Raises UnsupportedModel for a model without one."""
        if self.denoiser is None:
            raise UnsupportedModel(f"{self.name} has no denoiser to generate images with: connect a MODEL, or choose a complete pipeline")
        return self.denoiser

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The prompts encoded, counted."""
        encoded = self.text.encode(prompts)
        self.meter.prompts += len(encoded)
        return encoded

    def denoise(self, x: Tensor, sigma: Tensor | float, conditioning: Conditioning) -> Tensor:
        """x0 for a batch, counted, cancellable and checked.

        x: (batch, channels, h, w); sigma: a number or (batch,); conditioning: batch 1 or the same batch. Out of memory without
        gradients, the batch is halved until it fits. Raises NonFinite, OutOfMemory, UnsupportedModel for a model without denoiser,
        or whatever ``before_call`` raises.
        """
        denoiser, batch = self.require_denoiser(), x.shape[0]
        sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(batch)
        conditioning = conditioning.expand(batch)
        backward = torch.is_grad_enabled() and (
            x.requires_grad or conditioning.context.requires_grad or (conditioning.pooled is not None and conditioning.pooled.requires_grad)
        )
        self.before_call()
        try:
            denoised = denoiser.denoise(x, sigmas, conditioning)
        except torch.OutOfMemoryError as error:
            if batch == 1 or backward:
                raise OutOfMemory(
                    f"a batch of {batch} latents of {x.shape[-1]}x{x.shape[-2]} does not fit in memory: "
                    "use a smaller batch or image, or free memory first"
                ) from error
        else:
            self.meter.count(batch, backward=backward)
            if not torch.isfinite(denoised.detach()).all():
                raise NonFinite(
                    "the model returned NaN or infinity: check the checkpoint and its precision (fp16 overflows on some models; "
                    "try fp32 or bf16), and any LoRA or patch on it"
                )
            return denoised
        half = batch // 2
        return torch.cat(
            [self.denoise(x[part], sigmas[part], conditioning.map(itemgetter(part))) for part in (slice(None, half), slice(half, None))]
        )
