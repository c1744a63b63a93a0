"""The graph's MODEL, CLIP and VAE as ``core.model`` sees a model: the one module that knows ComfyUI's insides.

Nodes run in inference mode on weights that several clones share and that ComfyUI's model manager moves about. ``graph_model`` gives
differentiable access to them as they are wired (LoRAs, merges, clip skip, other samplings) and leaves everything as it was.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

import comfy.clip_model
import comfy.lora
import comfy.model_base
import comfy.model_management as management
import comfy.model_sampling
import comfy.sd1_clip
import comfy.utils
import latent_preview
import torch
from blake3 import blake3
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.sd import CLIP, VAE
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.hosts.checkpoint import read_scorer
from ..core.model import Conditioning, Family, ImageScorer, Model, Prompt, TextEncoder, UnsupportedModel
from ..core.score import JointScorer

if TYPE_CHECKING:
    from ..core.edit import ContextEdit

ENCODE_ROWS = 64
"""Prompts per call of the text encoder."""

_FAMILIES: dict[tuple[str, ...], tuple[Family, int]] = {("l",): ("sd1", 0), ("h",): ("sd2", 0), ("l", "g"): ("sdxl", 2816)}
"""A CLIP's encoders: the family they belong to, and the width of its MODEL's class embedding."""

_REFINER_CHANNELS = 2560
_NO_CLIP = "the CLIP is missing (the checkpoint holds no text encoder): load one with a CLIP loader and connect it"
_HOOKED = "this CLIP carries hooks: connect it from before Set CLIP Hooks, and apply LoRAs with a LoRA loader"
_SUPPORTED = "connect the MODEL and CLIP of an SD 1.x, SD 2.x or SDXL base checkpoint"
_FLOAT = (torch.float16, torch.bfloat16, torch.float32)

_Row: TypeAlias = list[int | Tensor]


@contextmanager
def graph_model(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE | None = None,
    scorer: ImageScorer | None = None,
    on_denoised: Callable[[Tensor], None] | None = None,
) -> Iterator[Model]:
    """The graph's model, usable and differentiable inside the ``with`` block; afterwards the graph is as it was.

    Loads through ComfyUI's model manager. Guidance, ControlNets and patches on the sampler (as opposed to the network) are no part
    of a denoiser and are not applied. ``on_denoised`` is shown every x0. Raises UnsupportedModel, saying what to connect instead.
    """
    family = check_graph(model, clip, vae)
    with torch.inference_mode(False), ExitStack() as stack:
        patcher, text, text_patcher = _lasting(stack, model), clip, _lasting(stack, clip.patcher)
        if text_patcher is not clip.patcher:
            text = clip.clone()
            text.patcher, text.cond_stage_model = text_patcher, text_patcher.model
        stack.enter_context(_gradients_or_a_sentence())
        stack.callback(text.cond_stage_model.reset_clip_options)
        stack.callback(patcher.cleanup)
        side = 128 if family == "sdxl" else 64
        # Planned once for a batch of four pictures of the family's size: a later plan could move weights that a graph still needs.
        resident = _Resident(patcher, text.patcher, memory=patcher.memory_required([4, 4, side, side]))
        resident.load()
        patcher.pre_run()
        _override(stack, text.cond_stage_model, comfy.clip_model.CLIPLayer, _out_of_place)
        if _casts(patcher):
            _override(stack, patcher.model.diffusion_model, BasicTransformerBlock, _recomputed)
        yield Model(
            family=family,
            name=type(model.model.model_config).__name__,
            text=GraphTextEncoder(text, resident),
            denoiser=GraphDenoiser(patcher, resident, on_denoised),
            autoencoder=None if vae is None else GraphAutoencoder(vae, patcher),
            scorer=scorer,
            before_call=management.throw_exception_if_processing_interrupted,
            words=getattr(text.cond_stage_model, "trained_words", None),
            predicts_velocity=isinstance(patcher.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION),
        )


def check_graph(model: ModelPatcher, clip: CLIP, vae: VAE | None = None, quantised: str = "") -> Family:
    """The family of a MODEL and CLIP that belong together. Raises UnsupportedModel otherwise, saying what to connect instead.

    quantised: what else can be done with a MODEL that is.
    """
    if clip is None:
        raise UnsupportedModel(_NO_CLIP)
    base = model.model
    network = getattr(base, "diffusion_model", None)
    config = getattr(getattr(base, "model_config", None), "unet_config", {})
    if not isinstance(network, UNetModel) or config.get("use_temporal_attention") or not isinstance(config.get("context_dim"), int):
        raise UnsupportedModel(f"{type(base).__name__} models are not supported: {_SUPPORTED}")
    if config["in_channels"] != 4:
        raise UnsupportedModel(
            "inpainting and instruction-editing models (with extra input channels) are not supported: "
            "connect the base model they were made from"
        )
    if base.adm_channels == _REFINER_CHANNELS:
        raise UnsupportedModel("the SDXL refiner is not supported: connect the SDXL base model")
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.EPS) or isinstance(sampling, comfy.model_sampling.IMG_TO_IMG):
        raise UnsupportedModel(f"this MODEL is sampled as {type(sampling).__mro__[1].__name__}, not by noise levels: {_SUPPORTED}")
    family, class_channels = _check_clip(clip)
    width = sum(map(_width, _encoders(clip).values()))
    if width != config["context_dim"]:
        raise UnsupportedModel(
            f"the MODEL reads text of width {config['context_dim']} but the CLIP gives {width}: connect the CLIP of the same checkpoint"
        )
    if base.adm_channels != class_channels:
        raise UnsupportedModel(f"{type(base).__name__} models with inputs beside text are not supported: {_SUPPORTED}")
    _check_precision("MODEL", network, quantised)
    if vae is not None and (vae.first_stage_model is None or vae.latent_channels != 4 or vae.latent_dim != 2):
        raise UnsupportedModel("this VAE does not fit the MODEL (4 latent channels): connect the VAE of the same checkpoint")
    return family


def _check_clip(clip: CLIP) -> tuple[Family, int]:
    """The family of a CLIP, and the width of the class embedding of a MODEL that goes with it."""
    if clip is None:
        raise UnsupportedModel(_NO_CLIP)
    found = _FAMILIES.get(tuple(_encoders(clip)))
    if found is None:
        raise UnsupportedModel(f"this CLIP ({type(clip.cond_stage_model).__name__}) is not of a supported family: {_SUPPORTED}")
    if clip.patcher.forced_hooks is not None:
        raise UnsupportedModel(_HOOKED)
    _check_precision("CLIP", clip.cond_stage_model)
    return found


def _check_precision(part: str, module: torch.nn.Module, instead: str = "") -> None:
    if _quantised(module):
        remedy = "load it in fp16, bf16 or fp32 (weight_dtype default, no GGUF or fp8 file)"
        raise UnsupportedModel(f"the {part} is quantised: {remedy}{instead}")


@contextmanager
def graph_text(clip: CLIP) -> Iterator[TextEncoder]:
    """The graph's CLIP alone, without gradients, inside the ``with`` block. Raises UnsupportedModel, saying what to connect instead."""
    _check_clip(clip)
    with torch.inference_mode(False), torch.no_grad():
        try:
            yield GraphTextEncoder(clip, _Resident(clip.patcher))
        finally:
            clip.cond_stage_model.reset_clip_options()


@contextmanager
def graph_reading(model: ModelPatcher, clip: CLIP) -> Iterator[Model]:
    """The graph's model for what only encodes texts and reads weights, without gradients: the MODEL is not loaded for it.

    Raises UnsupportedModel, saying what to connect instead.
    """
    family = check_graph(model, clip, quantised=", and give the edit made with that to Apply Edit to Conditioning")
    with torch.inference_mode(False), graph_text(clip) as text:
        yield Model(
            family=family,
            name=type(model.model.model_config).__name__,
            text=text,
            denoiser=GraphDenoiser(model, _Resident(model)),
            before_call=management.throw_exception_if_processing_interrupted,
            words=getattr(clip.cond_stage_model, "trained_words", None),
            cross_attention=GraphCrossAttention(model),
        )


def patch_model(model: ModelPatcher, edit: ContextEdit) -> ModelPatcher:
    """A clone of the MODEL with an edit as patches on its cross-attention, which add to LoRAs before and after it.

    Raises UnsupportedModel, saying what to connect instead, for a MODEL that is quantised or that the edit does not fit.
    """
    patched = model.clone()
    if edit.is_identity:
        return patched
    with torch.inference_mode(False), torch.no_grad():
        attention = GraphCrossAttention(model)
        patches = {
            attention.keys[path]: LoRAAdapter(set(), (patch.up, patch.down, None, None, None, None))
            for path, patch in edit.weight_patches(attention)
        }
    lacking = patches.keys() - set(patched.add_patches(patches))
    if lacking:
        raise UnsupportedModel(f"this MODEL has no {min(lacking)} to patch: use Apply Edit to Conditioning instead")
    return patched


def graph_scorer(path: str, clip: CLIP) -> ImageScorer:
    """The image scorer in a checkpoint, which reads texts with the graph's CLIP as it is wired (LoRAs, but no clip skip).

    Usable inside and outside of ``graph_model``, and differentiable in the pictures. Raises as ``read_scorer`` does, and
    UnsupportedModel for a CLIP that the scorer was not trained with.
    """
    if clip is None:
        raise UnsupportedModel(_NO_CLIP)
    with torch.inference_mode(False):
        network = read_scorer(path)
        encoders = _encoders(clip)
        if not encoders:
            raise UnsupportedModel(
                f"this CLIP ({type(clip.cond_stage_model).__name__}) is not CLIP text: connect the CLIP of the same checkpoint"
            )
        wanted, width = network.text_projection.in_features, _width(next(iter(encoders.values())))
        if width != wanted:
            raise UnsupportedModel(
                f"the scorer reads text of width {wanted} but the CLIP gives {width}: connect the CLIP of the same checkpoint"
            )
        if clip.patcher.forced_hooks is not None:
            raise UnsupportedModel(_HOOKED)
        # A megabyte: it stays where the CLIP computes, and ComfyUI's model manager need not know of it.
        return JointScorer(network.to(clip.patcher.load_device), GraphTextEncoder(clip, _Resident(clip.patcher)).pooled)


def graph_identity(*parts: ModelPatcher | CLIP | VAE) -> str | None:
    """A hash of models as they are wired: their weights, LoRAs, merges, samplings and clip skip, whatever is loaded at the moment.

    None when it cannot be told, because a node changed how the model computes by code of its own (FreeU, LoRAs in bypass mode).
    """
    digest = blake3(max_threads=torch.get_num_threads())
    try:
        for part in parts:
            _hash(digest, [type(part), getattr(part, "layer_idx", None), type(getattr(part, "tokenizer", None))])
            _hash(digest, _content(part if isinstance(part, ModelPatcher) else part.patcher))
    except _Opaque:
        return None
    return digest.hexdigest()


def _content(patcher: ModelPatcher) -> list[Any]:
    """Everything that decides what a patcher's network computes."""
    base, options = patcher.model, patcher.model_options
    dtype = base.get_dtype_inference() if isinstance(base, comfy.model_base.BaseModel) else None
    names = {*patcher.object_patches, *(["model_sampling"] if hasattr(base, "model_sampling") else [])}
    objects = {name: patcher.get_model_object(name) for name in names}
    prefixes = tuple(f"{name}." for name in names)
    weights = {key: weight for key, weight in patcher.model_state_dict().items() if not key.startswith(prefixes)}
    # The live weights may be those of another clone; what they were before lies aside.
    weights |= {key: saved.weight for key, saved in patcher.backup.items() if key in weights}
    weights |= {key: saved[0] for key, saved in patcher.hook_backup.items() if key in weights}
    code = [patcher.weight_wrapper_patches, patcher.injections, patcher.wrappers, patcher.callbacks, patcher.additional_models]
    code += [options["transformer_options"], options.get("model_function_wrapper")]
    return [type(base), type(getattr(base, "model_config", None)), dtype, weights, objects, patcher.patches, code]


class _Opaque(Exception):
    """A value that cannot be hashed by what it holds."""


def _hash(digest: blake3, value: Any) -> None:
    """Add a value to a hash by what it holds; raises _Opaque for anything that does not say what it does."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        text = f"{type(value).__name__} {value}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    elif isinstance(value, Mapping):
        _hash(digest, [f"mapping {len(value)}", *(part for key in sorted(value, key=repr) for part in (repr(key), value[key]))])
    elif isinstance(value, (list, tuple)):
        _hash(digest, f"list {len(value)}")
        for item in value:
            _hash(digest, item)
    elif isinstance(value, type):
        _hash(digest, [f"{kind.__module__}.{kind.__qualname__}" for kind in value.__mro__])
    elif isinstance(value, WeightAdapterBase):
        _hash(digest, [type(value), value.weights])
    elif isinstance(value, torch.nn.Module):
        settings = {name: item for name, item in vars(value).items() if not name.startswith("_")}
        _hash(digest, [type(value), dict(value.named_parameters()), dict(value.named_buffers()), settings])
    elif isinstance(value, FunctionType) and not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
        _hash(digest, [f"{value.__module__}.{value.__qualname__}", value.__code__.co_code.hex()])
    else:
        raise _Opaque(type(value))


def scorer_identity(scorer: ImageScorer) -> str:
    """A hash of what a scorer makes of a picture and a text."""
    digest = blake3()
    with torch.inference_mode():
        picture = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
        _hash(digest, [scorer.embed_pictures(picture), scorer.embed_texts(["a photo of a red bird"]), scorer.logit_scale])
    return digest.hexdigest()


def check_fits(embeddings: Mapping[str, Tensor], clip: CLIP) -> None:
    """Raises UnsupportedModel, saying what to connect instead, for word embeddings (words, width) of other encoders than the CLIP's."""
    if clip is None:
        raise UnsupportedModel(_NO_CLIP)
    theirs = {name: rows.shape[-1] for name, rows in embeddings.items()}
    ours = {name: _width(encoder) for name, encoder in _encoders(clip).items()}
    if theirs != ours:
        raise UnsupportedModel(
            f"the decomposition was made with another text encoder ({_listed(theirs)}) than this CLIP ({_listed(ours)}): "
            "connect the CLIP of the model it was made with, or decompose the concept again"
        )


def _listed(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of width {width}" for name, width in widths.items()) or "none"


def trained_side(model: ModelPatcher) -> int:
    """Side in pixels of the square pictures a supported MODEL was made for."""
    base = model.model
    stated: int | None = getattr(type(base.model_config), "trained_side", None)
    if stated is not None:
        return stated
    if base.adm_channels:
        return 1024
    v_prediction = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
    return 768 if v_prediction and base.model_config.unet_config["context_dim"] == 1024 else 512


def check_text(text: str) -> None:
    """Raises ValueError for a text that ComfyUI's prompts would read otherwise than word by word."""
    if "embedding:" in text or any(weight != 1 for _, weight in comfy.sd1_clip.token_weights(text, 1.0)):
        raise ValueError(f"{text!r} has a weight such as (word:1.2) or an embedding: file, which are not read here: write plain words")


def graph_conditioning(conditioning: Conditioning) -> list[list[Any]]:
    """A CONDITIONING for the graph."""
    device = management.intermediate_device()
    pooled = {} if conditioning.pooled is None else {"pooled_output": conditioning.pooled.to(device)}
    return [[conditioning.context.to(device), pooled]]


class Progress:
    """An ``OnStep`` that moves a node's progress bar, previews what is sampled, writes under the node, and raises on interrupt.

    node_id: None outside of a graph. model: what samples; without it there are no previews. label: what comes before the numbers.
    """

    EVERY = 0.25
    """Seconds between two messages, however many steps there are."""

    def __init__(self, node_id: str | None, model: ModelPatcher | None = None, label: str = "") -> None:
        self._node, self._label = node_id, label
        self._previewer = None if model is None else latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._bar: comfy.utils.ProgressBar | None = None
        self._latent: Tensor | None = None
        self._first: tuple[float, int] | None = None
        self._sent, self._ended = 0.0, False

    def show(self, denoised: Tensor) -> None:
        """Take x0 (batch, channels, h, w) for the next preview."""
        self._latent = denoised

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], /) -> None:
        management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        # A resumed method begins with what was done before, which says nothing about its pace.
        self._first = self._first or (now, step)
        ends = step >= total and not self._ended
        if now - self._sent < self.EVERY and not ends:
            return
        self._sent, self._ended = now, self._ended or ends
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total, node_id=self._node)
        preview = None
        if self._previewer is not None and self._latent is not None:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", self._latent[:1].float())
        self._bar.update_absolute(step, total, preview)
        done = f"{step}/{total}{_remaining(now - self._first[0], step - self._first[1], total - step)}"
        figures = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
        head = f"{self._label}  {done}".strip()
        parts = [head] if len(head) <= LINE else [self._label, done]
        send_text(self._node, "\n".join([*parts, figures]))


def _remaining(seconds: float, done: int, left: int) -> str:
    """How long the rest will take at the pace so far; nothing before the pace can be told, or when little is left."""
    if done <= 0 or seconds < 2:
        return ""
    expected = seconds * left / done
    if expected < 2:
        return ""
    return f", {expected:.0f} s left" if expected < 100 else f", {expected / 60:.0f} min left"


LINE, LINES = 40, 4
"""Characters and lines of a text under a node: the classic renderer breaks longer lines within words, and more lines need a taller node."""


def send_text(node_id: str | None, text: str) -> None:
    """Show ``text`` under a node, as much of it as fits; nothing happens without a server or a node."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(fold(text), node_id)


def fold(text: str) -> str:
    """``text`` in at most ``LINES`` lines of ``LINE`` characters, broken between words; an ellipsis stands for what is left out.

    Each of its own lines is begun, so that a long first one leaves room for the others.
    """
    lines: list[str] = []
    parts = text.splitlines()[:LINES]
    for later, part in zip(reversed(range(len(parts))), parts, strict=True):
        own, room = _wrapped(part, LINE), LINES - len(lines) - later
        lines += own if len(own) <= room else [*(cut := _wrapped(part, LINE - 2))[: room - 1], f"{cut[room - 1]} …"]
    # Nodes 2.0 reads it as Markdown: two spaces end a line, and a sign before an ordinary space would begin a list.
    return "  \n".join(re.sub(r"^([-+*#>]|\d+[.)]) ", "\\1\N{NO-BREAK SPACE}", line) for line in lines)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


class _Resident:
    """Keeps models loaded together, with weights that autograd can save, and ``memory`` bytes free for their computations."""

    def __init__(self, *patchers: ModelPatcher, memory: float = 0) -> None:
        self._patchers, self._memory = patchers, memory
        self._ready = False

    def load(self) -> None:
        """Load them, unless they still are."""
        held = [entry.model for entry in management.current_loaded_models]
        if self._ready and all(any(patcher is model for model in held) for patcher in self._patchers):
            return
        models = [model for patcher in self._patchers for model in (patcher, *patcher.get_nested_additional_models())]
        with torch.inference_mode():
            management.load_models_gpu(models, memory_required=self._memory)
        with torch.inference_mode(False):
            for patcher in self._patchers:
                if not _dynamic(patcher):
                    _make_plain(patcher.model)
        self._ready = True


class GraphTextEncoder:
    """A CLIP as a ``TextEncoder``. Texts are read as they stand: weights in parentheses and embedding files are not interpreted."""

    def __init__(self, clip: CLIP, resident: _Resident) -> None:
        self._clip, self._resident = clip, resident
        self._encoders = _encoders(clip)
        self._tokenizer = getattr(clip.tokenizer, f"clip_{next(iter(self._encoders))}").tokenizer
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self._tables: dict[str, Tensor] = {}

    @property
    def vocabulary(self) -> Mapping[str, int]:
        return self._vocabulary

    @property
    def tables(self) -> Mapping[str, Tensor]:
        if not self._tables:
            self._resident.load()
            device = self._clip.patcher.load_device
            for name, encoder in self._encoders.items():
                embeddings = encoder.transformer.get_input_embeddings()
                ids = torch.arange(embeddings.weight.shape[0], device=device)
                with torch.no_grad():
                    self._tables[name] = embeddings(ids, out_dtype=torch.float32)
        return self._tables

    @property
    def _length(self) -> int:
        return min(encoder.max_length for encoder in self._encoders.values()) - 2

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self._fits(len(ids))
        return ids

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        encoded = self._run(prompts, {} if self._clip.layer_idx is None else {"layer": self._clip.layer_idx})
        context = torch.cat([context for context, _ in encoded.values()], dim=-1)
        return Conditioning(context, encoded["g"][1] if "g" in encoded else None)

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """The first encoder's last normed state at the end token, (len(texts), width), without gradient: what an image scorer projects."""
        with torch.inference_mode():
            _, state = next(iter(self._run(texts, {"projected_pooled": False}).values()))
        self._clip.cond_stage_model.reset_clip_options()
        return state.clone()

    def _run(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        """Per encoder its context (rows, tokens, width) and its state at each row's end token (rows, width), under CLIP ``options``."""
        if not prompts:
            raise ValueError("there is no prompt to encode")
        self._resident.load()
        stage = self._clip.cond_stage_model
        stage.reset_clip_options()
        stage.set_clip_options({**options, "execution_device": self._clip.patcher.load_device})
        encoded = {}
        for name, encoder in self._encoders.items():
            rows = [row for prompt in prompts for row in self._rows(prompt, name, encoder)]
            parts = []
            for start in range(0, len(rows), ENCODE_ROWS):
                management.throw_exception_if_processing_interrupted()
                parts.append(encoder.encode(rows[start : start + ENCODE_ROWS]))
            encoded[name] = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return encoded

    def _fits(self, tokens: int) -> None:
        if tokens > self._length:
            raise ValueError(f"the prompt has {tokens} tokens, the text encoder reads {self._length}: shorten it")

    def _rows(self, prompt: Prompt, name: str, encoder: comfy.sd1_clip.SDClipModel) -> list[_Row]:
        """A prompt's rows for one encoder: ids and stacks of embeddings, with start, end and padding."""
        pieces: list[list[int] | Tensor] = []
        for part in [prompt] if isinstance(prompt, str) else prompt:
            if isinstance(part, str):
                pieces.append(self.tokenize(part))
                continue
            if name not in part:
                raise ValueError(f"a slot lacks the embeddings of text encoder {name!r}: it has {sorted(part)}")
            width = _width(encoder)
            shape = tuple(part[name].shape)
            if len(shape) not in (2, 3) or shape[-1] != width:
                raise ValueError(f"a slot of text encoder {name!r} must be (n, {width}) or (batch, n, {width}), and is {shape}")
            pieces.append(part[name])
        sizes = {len(piece) for piece in pieces if isinstance(piece, Tensor) and piece.ndim == 3}
        if len(sizes) > 1:
            raise ValueError(f"the slots of a prompt differ in their batch: {sorted(sizes)}")
        used = sum(piece.shape[-2] if isinstance(piece, Tensor) else len(piece) for piece in pieces)
        self._fits(used)
        special = encoder.special_tokens
        tail = [special["end"]] + [special["pad"]] * (encoder.max_length - 2 - used)
        rows: list[_Row] = []
        for index in range(max(sizes, default=1)):
            row: _Row = [special["start"]]
            for piece in pieces:
                if isinstance(piece, Tensor):
                    row.append(piece[index] if piece.ndim == 3 else piece)
                else:
                    row.extend(piece)
            rows.append(row + tail)
        return rows


class GraphDenoiser:
    """A MODEL as a ``Denoiser``."""

    def __init__(self, patcher: ModelPatcher, resident: _Resident, on_denoised: Callable[[Tensor], None] | None = None) -> None:
        self._patcher, self._resident, self._on_denoised = patcher, resident, on_denoised
        self._sigmas = patcher.get_model_object("model_sampling").sigmas.detach().float().cpu().clone()

    @property
    def latent_channels(self) -> int:
        return int(self._patcher.model.latent_format.latent_channels)

    @property
    def downscale(self) -> int:
        return 8

    @property
    def side(self) -> int:
        return trained_side(self._patcher)

    @property
    def training_sigmas(self) -> Tensor:
        return self._sigmas

    @property
    def device(self) -> torch.device:
        return self._patcher.load_device

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self._resident.load()
        device = self.device
        x, sigma = _plain(x).to(device, torch.float32), _plain(sigma).to(device, torch.float32)
        conditioning = conditioning.map(lambda t: _plain(t).to(device))
        options = dict(self._patcher.model_options["transformer_options"])
        options |= {"wrappers": self._patcher.wrappers, "callbacks": self._patcher.callbacks, "sigmas": sigma}
        options |= {"cond_or_uncond": [0], "uuids": [self._patcher.patches_uuid]}
        # The fast attentions have no backward, and the CPU's default loses it when it works in chunks.
        if torch.is_grad_enabled() or "optimized_attention_override" not in options:
            options["optimized_attention_override"] = _attention
        if torch.is_grad_enabled() and "patches" in options:
            options["patches"] = {name: list(map(_saving, patches)) for name, patches in options["patches"].items()}
        inputs: dict[str, Any] = {"c_crossattn": conditioning.context, "transformer_options": options}
        if conditioning.pooled is not None:
            inputs["y"] = self._class_embedding(x, conditioning)
        apply = self._patcher.model.apply_model
        wrapper = self._patcher.model_options.get("model_function_wrapper")
        if wrapper is not None:
            denoised = wrapper(apply, {"input": x, "timestep": sigma, "c": inputs, "cond_or_uncond": [0]})
        else:
            denoised = apply(x, sigma, **inputs)
        if self._on_denoised is not None:
            self._on_denoised(denoised.detach())
        return denoised

    def _class_embedding(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2] * self.downscale, x.shape[-1] * self.downscale
        size = conditioning.size or (height, width, 0, 0, height, width)
        names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
        y = self._patcher.model.encode_adm(pooled_output=conditioning.pooled, device=self.device, **dict(zip(names, size, strict=True)))
        return y.to(self.device)


class GraphCrossAttention:
    """A MODEL's cross-attention as ``core.model.CrossAttention``: its weights as its patches leave them, whatever is loaded at the moment.

    Raises UnsupportedModel for a network without cross-attention on a text.
    """

    def __init__(self, patcher: ModelPatcher) -> None:
        network = getattr(patcher.model, "diffusion_model", None)
        config = getattr(getattr(patcher.model, "model_config", None), "unet_config", {})
        if not isinstance(network, UNetModel) or not isinstance(config.get("context_dim"), int):
            raise UnsupportedModel(f"{type(patcher.model).__name__} models cannot be edited: {_SUPPORTED}")
        self._patcher = patcher
        weights = network.state_dict().keys()
        diffusers = comfy.utils.unet_to_diffusers(config)
        self.keys = {
            path.removesuffix(".weight"): f"diffusion_model.{key}"
            for path, key in diffusers.items()
            if key in weights and (path.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) or path == "add_embedding.linear_1.weight")
        }
        """Per module, named as diffusers names it, the key of its weight."""

    def key_values(self) -> Iterator[tuple[str, Tensor]]:
        for path, key in self.keys.items():
            if "attn2" in path:
                yield path, self._seen(key)

    def pooled(self) -> tuple[str, Tensor] | None:
        path = "add_embedding.linear_1"
        return (path, self._seen(self.keys[path])) if path in self.keys else None

    def _seen(self, key: str) -> Tensor:
        weight, _, convert = get_key_weight(self._patcher.model, key)
        # Clones share modules: what is live may be another clone's, and what it was before lies aside.
        if key in self._patcher.backup:
            weight = self._patcher.backup[key].weight
        elif key in self._patcher.hook_backup:
            weight = self._patcher.hook_backup[key][0]
        if weight.dtype not in _FLOAT or type(weight.data) is not Tensor:
            raise UnsupportedModel(
                "the MODEL is quantised, so its weights cannot be patched exactly: use Apply Edit to Conditioning on positive and negative "
                "instead (solve the edit on the fp16, bf16 or fp32 file of the same checkpoint)"
            )
        patches = self._patcher.patches.get(key, [])
        wrappers = self._patcher.weight_wrapper_patches.get(key, [])
        if convert is None and not patches and not wrappers:
            return weight.detach()
        with torch.inference_mode(False), torch.no_grad():
            seen = weight.to(torch.float32, copy=True)
            if convert is not None:
                seen = convert(seen, inplace=True)
            seen = comfy.lora.calculate_weight(patches, seen, key)
            for change in wrappers:
                seen = change(seen)
        return seen


class GraphAutoencoder:
    """A VAE as an ``Autoencoder``, in the latent space of the MODEL it belongs to; not differentiable."""

    def __init__(self, vae: VAE, patcher: ModelPatcher) -> None:
        self._vae, self._patcher = vae, patcher

    def encode(self, pictures: Tensor) -> Tensor:
        with torch.inference_mode():
            latents = self._patcher.model.process_latent_in(self._vae.encode(pictures.movedim(1, -1)))
        return latents.to(self._patcher.load_device, torch.float32).clone()

    def decode(self, latents: Tensor) -> Tensor:
        with torch.inference_mode():
            pictures = self._vae.decode(self._patcher.model.process_latent_out(latents.detach().cpu())).movedim(-1, 1)
        return pictures.to(self._patcher.load_device, torch.float32).clone()


def _encoders(clip: CLIP) -> dict[str, comfy.sd1_clip.SDClipModel]:
    """The CLIP's text encoders by name, in the order in which their outputs are joined; {} when any is not CLIP text."""
    stage = clip.cond_stage_model
    every = [module for module in stage.modules() if isinstance(module, comfy.sd1_clip.SDClipModel)]
    named = {name: module for name in "lgh" if (module := getattr(stage, f"clip_{name}", None)) is not None}
    plain = all(isinstance(module.transformer, comfy.clip_model.CLIPTextModel) for module in every)
    return named if plain and len(named) == len(every) else {}


def _width(encoder: comfy.sd1_clip.SDClipModel) -> int:
    return int(encoder.transformer.get_input_embeddings().weight.shape[1])


def _quantised(module: torch.nn.Module) -> bool:
    return any(p.dtype not in _FLOAT or type(p.data) is not Tensor for p in module.parameters())


def _dynamic(patcher: ModelPatcher) -> bool:
    """Whether the weights lie in evictable memory."""
    return hasattr(patcher, "is_dynamic") and bool(patcher.is_dynamic())


def _lasting(stack: ExitStack, patcher: ModelPatcher) -> ModelPatcher:
    """The patcher itself; for a model in evictable memory, which autograd must not keep views of, a copy of its own."""
    # No clone otherwise: ComfyUI cannot take a bypassed LoRA back out of the shared layers once the clone that put it there is gone.
    if not _dynamic(patcher):
        return patcher
    if patcher.cached_patcher_init is None:
        raise UnsupportedModel(
            "this model cannot be copied out of dynamic memory: load it with one of ComfyUI's own loaders, or start ComfyUI with "
            "--disable-dynamic-vram"
        )
    copy = patcher.clone(disable_dynamic=True, force_deepcopy=True)
    stack.callback(management.unload_model_and_clones, copy)
    return copy


def _plain(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _make_plain(module: torch.nn.Module) -> None:
    """Let autograd save the weights: an inference tensor is replaced by an ordinary one on the same memory, and none wants a gradient."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.is_inference():
                child._parameters[name] = torch.nn.Parameter(_on_the_same_memory(parameter), requires_grad=False)
            else:
                parameter.requires_grad_(False)
        for name, buffer in child.named_buffers(recurse=False):
            if buffer.is_inference():
                child._buffers[name] = _on_the_same_memory(buffer)
        # A LoRA in bypass mode adds its own product to the layer's output.
        adapter = getattr(getattr(child.forward, "__self__", None), "adapter", None)
        if isinstance(adapter, WeightAdapterBase) and isinstance(adapter.weights, (list, tuple)):
            adapter.weights = type(adapter.weights)(
                _on_the_same_memory(w) if isinstance(w, Tensor) and w.is_inference() else w for w in adapter.weights
            )


def _on_the_same_memory(tensor: Tensor) -> Tensor:
    """An ordinary tensor with the memory of an inference tensor; nothing is copied."""
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _override(stack: ExitStack, module: torch.nn.Module, kind: type, make: Callable[[Any], Callable[..., Tensor]]) -> None:
    """Give the layers of a kind another forward for the length of ``stack``; those that another pack overrode keep theirs."""
    for layer in module.modules():
        if isinstance(layer, kind) and "forward" not in vars(layer):
            layer.forward = make(layer)
            stack.callback(delattr, layer, "forward")


def _casts(patcher: ModelPatcher) -> bool:
    """Whether weights are cast or fetched anew at every call: autograd would keep all those copies at once."""
    base = patcher.model
    return bool(base.model_lowvram) or base.get_dtype() != base.get_dtype_inference()


@contextmanager
def _gradients_or_a_sentence() -> Iterator[None]:
    """Raises UnsupportedModel where autograd fails on what a patch of another node did to tensors."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("Inference tensors", "modified by an inplace operation")):
            raise
        raise UnsupportedModel(
            "a patch on this MODEL computes with tensors that have no gradient: connect the MODEL from before that node"
        ) from error


def _saving(patch: Any) -> Any:
    """A patch on hidden states, such as FreeU's, that may write into them: autograd keeps copies of what it needs."""
    if not callable(patch):  # a type of layer and its handler, which replaces the layer
        return patch

    def saved(*args: Any, **kwargs: Any) -> Any:
        own = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
            return patch(*own, **kwargs)

    return saved


def _recomputed(block: BasicTransformerBlock) -> Callable[..., Tensor]:
    """The block's forward, run again for the gradient instead of being remembered."""
    inner = block.forward

    def forward(x: Tensor, context: Tensor | None = None, transformer_options: Mapping[str, Any] | None = None) -> Tensor:
        # A copy: the next block writes its own number into the options before this one is run again.
        options = dict(transformer_options or {})
        if not torch.is_grad_enabled():
            return inner(x, context=context, transformer_options=options)
        return checkpoint(inner, x, context=context, transformer_options=options, use_reentrant=False)

    return forward


def _out_of_place(layer: comfy.clip_model.CLIPLayer) -> Callable[..., Tensor]:
    """The layer's forward without writing into its input, which autograd needs."""

    def forward(x: Tensor, mask: Tensor | None = None, optimized_attention: Any = None) -> Tensor:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
        return x + layer.mlp(layer.layer_norm2(x))

    return forward


def _attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)
