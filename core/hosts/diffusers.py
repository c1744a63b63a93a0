"""The headless host: local diffusers pipeline folders of SD 1.x, 2.x and SDXL, and the demo model, as ``core.model.Model``.

Conventions follow ComfyUI's, so that the same weights give the same numbers there: prompts are padded to 77 tokens with the end token
(CLIP-L) or with 0 (OpenCLIP H and bigG); SDXL reads second-to-last layers without the final norm, SD 2.x the second-to-last with it;
a noise level is mapped to the nearest training timestep; text encoders compute in float32. Nothing is fetched: only local safetensors
files are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from ..model import Conditioning, Family, Model, Prompt, Slot, UnsupportedModel
from ..score import JointScorer
from .checkpoint import assign_weights, first_line, from_single_file, read_checkpoint, scorer_network

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

DEMO = Path(__file__).resolve().parent.parent / "demo" / "data"
DEMOS = {"demo": "shapes.safetensors", "demo-second": "second.delta"}
"""The models that come with the project: of the Shapes world, and of a second world in the same looks. The second file holds only what
differs from the first, which no other loader understands; hence its ending, which checkpoint lists do not show."""
LENGTH = 77
"""Tokens a CLIP text encoder reads, start and end included."""

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise schedule of Stable Diffusion, which the demo model shares."""

_SUPPORTED = "supported are Stable Diffusion 1.x, 2.x and SDXL base models"
_TIMESTEPS = 100_000  # more than any schedule has; a damaged file must not allocate what it likes
_ROWS = 64  # prompts per text encoder call; activations of more would outweigh the model


@dataclass(frozen=True)
class _Encoder:
    """One CLIP text encoder. ``layers`` of it run; ``final_norm`` says whether its final layer norm follows."""

    name: str
    module: CLIPTextModel | CLIPTextModelWithProjection
    layers: int
    final_norm: bool
    pad: int

    @property
    def core(self) -> Any:
        # transformers before 5 nests the network of CLIPTextModel too.
        return getattr(self.module, "text_model", self.module)

    @property
    def table(self) -> Tensor:
        weight: Tensor = self.core.embeddings.token_embedding.weight
        return weight

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings (batch, 77, width) to the context and to the last layer's normed states, both (batch, 77, width)."""
        x = x + self.core.embeddings.position_embedding.weight
        context = x
        for index, layer in enumerate(self.core.encoder.layers):
            normed, attention = layer.layer_norm1(x), layer.self_attn
            q, k, v = (
                projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
            x = x + _mlp(layer.mlp, layer.layer_norm2(x))
            if index == self.layers - 1:
                context = x
        last = self.core.final_layer_norm(x)
        return (self.core.final_layer_norm(context) if self.final_norm else context), last


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """``mlp(x)``, bit for bit; where no gradient is wanted CLIP's activation x sigmoid(1.702 x) is computed in place.

    That is a quarter of the time of encoding on a CPU, which spends it on getting memory for what lives for one product.
    """
    hidden: Tensor = mlp.fc1(x)
    if torch.is_grad_enabled() or mlp.config.hidden_act != "quick_gelu":
        hidden = mlp.activation_fn(hidden)
    else:
        hidden.mul_((hidden * 1.702).sigmoid_())
    out: Tensor = mlp.fc2(hidden)
    return out


class DiffusersText:
    """``core.model.TextEncoder`` over transformers' CLIP text encoders and tokenizer."""

    def __init__(self, tokenizer: CLIPTokenizer, encoders: Sequence[_Encoder]) -> None:
        self._tokenizer = tokenizer
        self._encoders = tuple(encoders)
        self._start, self._end = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Token text to id."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return vocabulary

    @cached_property
    def tables(self) -> Mapping[str, Tensor]:
        """Per encoder name its token embeddings, (vocabulary, width), float32."""
        return {encoder.name: encoder.table.detach().float() for encoder in self._encoders}

    def tokenize(self, text: str) -> list[int]:
        """The ids of ``text`` without start, end or padding. Raises ValueError over 75 tokens."""
        ids = self._ids(text)
        _check_length(len(ids))
        return ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Encode each prompt, batched; see ``core.model.TextEncoder``. Context (rows, 77, width of the UNet's cross-attention)."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError("encode takes a non-empty list of prompts")
        encoded = {encoder.name: self._run(prompts, encoder) for encoder in self._encoders}
        contexts = [context for context, _ in encoded.values()]
        if len({len(context) for context in contexts}) > 1:
            raise ValueError("a slot has different batch sizes for different encoders: give every encoder the same number of rows")
        pooled = self._encoders[-1].module.text_projection(encoded["g"][1]) if "g" in encoded else None
        return Conditioning(torch.cat(contexts, dim=-1), pooled)

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """The first encoder's last normed state at the end token, (len(texts), width): what an image-text scorer projects."""
        return self._run(texts, self._encoders[0])[1]

    def _run(self, prompts: Sequence[Prompt], encoder: _Encoder) -> tuple[Tensor, Tensor]:
        """Context (rows, 77, width), and the last layer's normed state at each row's end token, (rows, width)."""
        spliced = [self._splice(prompt, encoder) for prompt in prompts]
        ends = torch.tensor([end for rows, end in spliced for _ in range(len(rows))], device=encoder.table.device)
        contexts, pooled = [], []
        for rows, end in zip(torch.cat([rows for rows, _ in spliced]).split(_ROWS), ends.split(_ROWS), strict=True):
            context, last = encoder(rows)
            contexts.append(context)
            pooled.append(last[torch.arange(len(last), device=last.device), end])
        return torch.cat(contexts), torch.cat(pooled)

    def _splice(self, prompt: Prompt, encoder: _Encoder) -> tuple[Tensor, int]:
        """Token embeddings (rows, 77, width) of a prompt, and the position of its first end token."""
        table = encoder.table
        ids: list[int] = []  # -1 where a slot stands
        parts: list[Tensor] = []
        looked_up = 0

        def look_up() -> None:
            """The embeddings of the tokens since the last slot, all at once."""
            nonlocal looked_up
            parts.append(table[torch.tensor(ids[looked_up:], dtype=torch.long, device=table.device)][None])
            looked_up = len(ids)

        ids.append(self._start)
        for piece in (prompt,) if isinstance(prompt, str) else prompt:
            if isinstance(piece, str):
                ids.extend(self._ids(piece))
            else:
                look_up()
                rows = _slot_rows(piece, encoder.name, table)
                ids.extend([-1] * rows.shape[1])
                looked_up = len(ids)
                parts.append(rows)
        _check_length(len(ids) - 1)
        end = len(ids)
        ids.extend([self._end] + [encoder.pad] * (LENGTH - 1 - end))
        look_up()
        batches = {len(part) for part in parts} - {1}
        if len(batches) > 1:
            raise ValueError(f"slots of one prompt have different batch sizes {sorted(batches)}: give them the same")
        batch = batches.pop() if batches else 1
        return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1), ids.index(self._end)


def _check_length(tokens: int) -> None:
    if tokens > LENGTH - 2:
        raise ValueError(f"the prompt has {tokens} tokens and the text encoder reads at most {LENGTH - 2}: shorten it")


def _slot_rows(slot: Slot, name: str, table: Tensor) -> Tensor:
    """A slot's rows for one encoder as (batch, n, width)."""
    if name not in slot:
        raise ValueError(f"the slot has embeddings for {', '.join(map(repr, slot)) or 'no encoder'} and this model needs {name!r}")
    rows = slot[name]
    if rows.ndim not in (2, 3) or rows.shape[-1] != table.shape[1]:
        raise ValueError(
            f"the slot's embeddings for {name!r} have shape {tuple(rows.shape)}: this text encoder takes (n, {table.shape[1]}) "
            f"or (batch, n, {table.shape[1]})"
        )
    return (rows if rows.ndim == 3 else rows[None]).to(table)


class DiffusersDenoiser:
    """``core.model.Denoiser`` over diffusers' UNet2DConditionModel, for epsilon and v prediction."""

    def __init__(self, unet: UNet2DConditionModel, sigmas: Tensor, *, v_prediction: bool, downscale: int) -> None:
        self._unet = unet
        self._sigmas = sigmas
        self._v_prediction = v_prediction
        self._downscale = downscale

    @property
    def latent_channels(self) -> int:
        return int(self._unet.config.in_channels)

    @property
    def downscale(self) -> int:
        return self._downscale

    @property
    def side(self) -> int:
        """Pixels along one side of the pictures the model was trained on."""
        size = self._unet.config.sample_size
        return int(max(size) if isinstance(size, (list, tuple)) else size or 64) * self._downscale

    @property
    def training_sigmas(self) -> Tensor:
        return self._sigmas

    @property
    def device(self) -> torch.device:
        return next(self._unet.parameters()).device

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0 for x (batch, channels, h, w) at sigma (batch,): input scaled by 1/sqrt(sigma^2 + 1), timestep the nearest in log sigma.

        Raises ValueError when the conditioning comes from another kind of model.
        """
        config = self._unet.config
        if conditioning.context.shape[-1] != config.cross_attention_dim:
            raise ValueError(
                f"the conditioning is {conditioning.context.shape[-1]} wide and this model reads {config.cross_attention_dim}: "
                "encode the prompt with this model's own text encoder"
            )
        device, dtype = self.device, self._unet.dtype
        x, sigma = x.to(device, torch.float32), sigma.to(device, torch.float32)
        log_sigmas = self._sigmas.log().to(device)
        timesteps = (sigma.log()[None] - log_sigmas[:, None]).abs().argmin(0)
        scale = sigma.view(-1, 1, 1, 1)
        norm = (scale.square() + 1).sqrt()
        added = None
        if config.addition_embed_type == "text_time":
            if conditioning.pooled is None:
                raise ValueError("the conditioning has no pooled text and SDXL needs it: encode the prompt with this model's text encoders")
            height, width = (side * self._downscale for side in x.shape[-2:])
            size = conditioning.size or (height, width, 0, 0, height, width)
            added = {
                "text_embeds": conditioning.pooled.to(device, dtype),
                "time_ids": torch.tensor([size], device=device, dtype=torch.float32).expand(len(x), -1),
            }
        output = self._unet(
            (x / norm).to(dtype),
            timesteps,
            encoder_hidden_states=conditioning.context.to(device, dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0].float()
        return x / norm.square() - output * (scale / norm) if self._v_prediction else x - output * scale


class DiffusersCrossAttention:
    """``core.model.CrossAttention`` over diffusers' UNet2DConditionModel."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet = unet

    def key_values(self) -> Iterator[tuple[str, Tensor]]:
        for path, module in self._unet.named_modules():
            if path.endswith(("attn2.to_k", "attn2.to_v")):
                yield path, module.weight.detach()

    def pooled(self) -> tuple[str, Tensor] | None:
        if self._unet.config.addition_embed_type != "text_time":
            return None
        return "add_embedding.linear_1", self._unet.add_embedding.linear_1.weight.detach()


class DiffusersAutoencoder:
    """``core.model.Autoencoder`` over diffusers' AutoencoderKL (the posterior's mode) or AutoencoderTiny.

    Differentiable both ways when gradients are enabled; 0 where a decoded image was clamped.
    """

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny) -> None:
        self._vae = vae
        self._scale = float(vae.config.scaling_factor)
        self._shift = float(vae.config.shift_factor or 0.0)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents at unit scale. Raises ValueError unless the sides are multiples of the downscale."""
        downscale = _downscale(self._vae.config)
        if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[-1] % downscale or pictures.shape[-2] % downscale:
            raise ValueError(
                f"images have shape {tuple(pictures.shape)}: give (batch, 3, height, width) with sides that are multiples of {downscale}"
            )
        encoded = self._vae.encode((pictures * 2 - 1).to(self._vae.device, self._vae.dtype), return_dict=False)[0]
        latents: Tensor = encoded if isinstance(encoded, Tensor) else encoded.mode()
        return (latents.float() - self._shift) * self._scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], clamped."""
        latents = latents / self._scale + self._shift
        pictures: Tensor = self._vae.decode(latents.to(self._vae.device, self._vae.dtype), return_dict=False)[0]
        return ((pictures.float() + 1) / 2).clamp(0, 1)


def load_model(source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    """The model behind ``source``: one of ``DEMOS``, a local diffusers pipeline folder, or a single file in the demo's layout.

    dtype: what UNet and autoencoder compute in, float32 unless given (an autoencoder marked ``force_upcast`` stays in float32, and so do
    text encoders). All weights are frozen; no global random state is touched. Raises FileNotFoundError, UnsupportedModel for another
    family, or ValueError for files that are damaged or do not belong together.
    """
    dtype = dtype or torch.float32
    if source in DEMOS:
        return _load_single(DEMO / DEMOS[str(source)], str(source), torch.device(device), dtype)
    path = Path(source)
    if path.is_file():
        return _load_single(path, path.stem, torch.device(device), dtype)
    if not path.is_dir():
        raise FileNotFoundError(f'there is no {path}: give "demo" or the folder of a diffusers pipeline')
    with torch.random.fork_rng(devices=[]):  # libraries may draw initial weights before they load the stored ones
        return _load_folder(path, torch.device(device), dtype)


def _load_single(path: Path, name: str, device: torch.device, dtype: torch.dtype) -> Model:
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tensors, header = read_checkpoint(path)
    unet_sd, text_sd, vae_sd, scorer_sd = from_single_file(tensors)
    try:
        with torch.device("meta"):  # names and shapes are checked before anything of a header's size is allocated
            unet = UNet2DConditionModel(**header["unet"])
            text = CLIPTextModel(CLIPTextConfig(**header["text"]))
            vae = AutoencoderTiny(**header["autoencoder"])
        prefix = "text_model." if hasattr(text, "text_model") else ""
        assign_weights(unet, unet_sd)
        assign_weights(text, {prefix + key: value for key, value in text_sd.items()})
        assign_weights(vae, vae_sd)
    except _load_errors() as error:
        raise ValueError(f"the weights in {path.name} do not fit its header ({first_line(error)}): fetch or export it again") from error
    scheduler, words = header.get("scheduler", SCHEDULE), header.get("words")
    if not isinstance(scheduler, dict) or not (words is None or (isinstance(words, list) and all(isinstance(w, str) for w in words))):
        raise ValueError(f"the header of {path.name} has no schedule or no list of words where one is expected: fetch or export it again")
    model = _assemble("sd1", name, _tokenizer(DEMO), [text], unet, vae, scheduler, device, dtype)
    if words is not None:
        model = replace(model, words=tuple(words))
    if not scorer_sd or not isinstance(model.text, DiffusersText):
        return model
    return replace(model, scorer=JointScorer(scorer_network(scorer_sd, header, path.name).to(device), model.text.pooled))


def _load_folder(path: Path, device: torch.device, dtype: torch.dtype) -> Model:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    index = _json(path / "model_index.json", "choose the folder of a whole diffusers pipeline")
    parts = {key: value[-1] for key, value in index.items() if isinstance(value, list) and value and value[-1]}
    kind = index.get("_class_name")
    if parts.get("unet") != "UNet2DConditionModel":
        raise UnsupportedModel(f"{path.name} is a {kind}, which has no UNet this can use: {_SUPPORTED}")
    unet_config = _json(path / "unet" / "config.json", "fetch the pipeline again")
    _check_unet(unet_config, path.name)
    if "text_encoder" not in parts:
        what = "the SDXL refiner" if "text_encoder_2" in parts else f"a {kind} without a text encoder"
        raise UnsupportedModel(f"{path.name} is {what}: {_SUPPORTED}")
    texts = [_component(CLIPTextModel, path / "text_encoder")]
    if unet_config.get("addition_embed_type") == "text_time":
        if "text_encoder_2" not in parts:
            raise ValueError(f"{path.name} has the UNet of SDXL and no second text encoder: choose a complete pipeline")
        texts.append(_component(CLIPTextModelWithProjection, path / "text_encoder_2"))
    vae = None
    if "vae" in parts:
        kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
        if parts["vae"] not in kinds:
            raise UnsupportedModel(f"{path.name} has an autoencoder of kind {parts['vae']}: supported are {' and '.join(kinds)}")
        vae = _component(kinds[parts["vae"]], path / "vae", torch_dtype=torch.float32)
    family: Family = "sdxl" if len(texts) == 2 else "sd2" if unet_config.get("use_linear_projection") else "sd1"
    scheduler = _json(path / "scheduler" / "scheduler_config.json", "fetch the pipeline again")
    unet = _component(UNet2DConditionModel, path / "unet", torch_dtype=dtype)
    return _assemble(family, path.name, _tokenizer(path / "tokenizer"), texts, unet, vae, scheduler, device, dtype)


def _assemble(
    family: Family,
    name: str,
    tokenizer: CLIPTokenizer,
    texts: Sequence[CLIPTextModel | CLIPTextModelWithProjection],
    unet: UNet2DConditionModel,
    vae: AutoencoderKL | AutoencoderTiny | None,
    scheduler: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Model:
    # The text encoders, with the layers and the padding that the family's UNet was trained on.
    names = {"sd1": "l", "sd2": "h", "sdxl": "lg"}[family]
    encoders = []
    for encoder_name, text in zip(names, texts, strict=True):
        layers = int(text.config.num_hidden_layers)
        if family == "sdxl":
            layers -= 1
        elif family == "sd2":
            # Pipelines usually ship OpenCLIP H without its last layer, which the UNet was not trained on; some ship all 24.
            layers = min(layers, 23)
        # CLIP-L is padded with the end token, the OpenCLIP encoders with 0.
        pad = int(tokenizer.eos_token_id) if encoder_name == "l" else 0
        encoders.append(_Encoder(encoder_name, _frozen(text, device, torch.float32), layers, family != "sdxl", pad))
    # Parts of different models may load without an error, and mean nothing to each other.
    width = sum(encoder.table.shape[1] for encoder in encoders)
    if width != unet.config.cross_attention_dim:
        raise ValueError(
            f"the text encoder of {name} is {width} wide and its UNet reads {unet.config.cross_attention_dim}: "
            "they do not belong together, choose a complete pipeline"
        )
    rows = min(encoder.table.shape[0] for encoder in encoders)
    if max(tokenizer.get_vocab().values(), default=rows) >= rows:
        raise ValueError(f"the tokenizer of {name} has tokens its text encoder ({rows} rows) does not know: choose a complete pipeline")
    if family == "sdxl":
        wanted = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
        if encoders[-1].module.text_projection.out_features != wanted:
            raise ValueError(f"the second text encoder of {name} does not fit its UNet, which reads a pooled text {wanted} wide")
    # The parts as methods see them.
    sigmas, v_prediction = _noise_levels(scheduler, name)
    autoencoder, downscale = None, 8
    if vae is not None:
        if vae.config.latent_channels != unet.config.in_channels or getattr(vae.config, "latents_mean", None):
            raise UnsupportedModel(f"the latents of {name}'s autoencoder are not those of its UNet: {_SUPPORTED}")
        downscale = _downscale(vae.config)
        autoencoder = DiffusersAutoencoder(_frozen(vae, device, torch.float32 if vae.config.force_upcast else dtype))
    denoiser = DiffusersDenoiser(_frozen(unet, device, dtype), sigmas, v_prediction=v_prediction, downscale=downscale)
    attention = DiffusersCrossAttention(unet)
    return Model(
        family,
        name,
        DiffusersText(tokenizer, encoders),
        denoiser,
        autoencoder,
        cross_attention=attention,
        predicts_velocity=v_prediction,
    )


def _check_unet(config: Mapping[str, Any], name: str) -> None:
    channels = config.get("in_channels", 4)
    if channels == 9:
        raise UnsupportedModel(f"{name} is an inpainting model (9 input channels): choose the base model it was made from")
    if channels != 4:
        raise UnsupportedModel(f"{name} takes {channels} input channels (4 are expected): {_SUPPORTED}")
    if (
        config.get("addition_embed_type") not in (None, "text_time")
        or config.get("class_embed_type")
        or config.get("num_class_embeds")
        or config.get("encoder_hid_dim_type")
        or not isinstance(config.get("cross_attention_dim"), int)
    ):
        raise UnsupportedModel(f"{name} has a UNet with other inputs than text (unCLIP, Kandinsky and the like): {_SUPPORTED}")


def _noise_levels(config: Mapping[str, Any], name: str) -> tuple[Tensor, bool]:
    """The training schedule's sigmas, ascending, (timesteps,), float32; and whether the model predicts v. Computed in float64."""
    prediction = config.get("prediction_type", "epsilon")
    if (
        prediction not in ("epsilon", "v_prediction")
        or "num_train_timesteps" not in config
        or "FlowMatch" in str(config.get("_class_name"))
    ):
        raise UnsupportedModel(f"{name} was trained to predict {prediction!r} ({config.get('_class_name')}): {_SUPPORTED}")
    kind = config.get("beta_schedule", "linear")
    if kind not in ("linear", "scaled_linear") and config.get("trained_betas") is None:
        raise UnsupportedModel(f"{name} was trained with the noise schedule {kind!r}: supported are 'scaled_linear' and 'linear'")
    damaged = f"the scheduler of {name} has a damaged noise schedule: fetch the pipeline again"
    try:
        betas = _betas(config, root=kind == "scaled_linear")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(damaged) from error
    if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(damaged)
    kept = (1 - betas).cumprod(0)
    if config.get("rescale_betas_zero_snr"):
        root = kept.sqrt()
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
        kept[-1] = 4.8973451890853435e-08  # ComfyUI's stand-in for 0, where sigma would be infinite
    return ((1 - kept) / kept).sqrt().float(), prediction == "v_prediction"


def _betas(config: Mapping[str, Any], *, root: bool) -> Tensor:
    """The training schedule's betas, float64: those listed, or evenly spaced, or with evenly spaced roots."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    steps = int(config["num_train_timesteps"])
    if not 2 <= steps <= _TIMESTEPS:
        raise ValueError(f"{steps} timesteps")
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if root:
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _component(kind: Any, folder: Path, **options: Any) -> Any:
    """One network of a pipeline, from local safetensors files that hold all of its weights."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors weights (pickle files are not read): convert them or fetch them again")
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                weights.keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated, damaged or no safetensors file ({error}): fetch it again") from error
    try:
        module, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **_variant(files), **options
        )
    except _load_errors() as error:
        raise ValueError(f"{folder} does not load as a {kind.__name__} ({first_line(error)}): fetch the pipeline again") from error
    lacking = [*report["missing_keys"], *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])]
    if lacking:
        raise ValueError(f"{folder} lacks weights of a {kind.__name__} or has them in other sizes (such as {lacking[0]}): fetch it again")
    return module


def _variant(files: Sequence[Path]) -> dict[str, str]:
    """The option that selects files such as ``model.fp16.safetensors`` where a folder holds no plain ones."""
    variants = [file.name.split(".")[1].split("-")[0] if file.name.count(".") == 2 else None for file in files]
    return {} if None in variants else {"variant": min(v for v in variants if v)}


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer from a vocabulary and its merges alone.

    Pipelines of SD 2.x and SDXL declare "!" as their padding token, which would make it special in prompts too; ComfyUI does not.
    """
    from transformers import CLIPTokenizer

    try:
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = _json(folder / "vocab.json", "fetch it again")
            lines = (folder / "merges.txt").read_text("utf-8").splitlines()
            merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        else:
            stored = _json(folder / "tokenizer.json", "fetch it again, or vocab.json and merges.txt")["model"]
            vocabulary = stored["vocab"]
            merges = [tuple(merge.split() if isinstance(merge, str) else merge) for merge in stored["merges"]]
        return CLIPTokenizer(vocab=vocabulary, merges=merges)
    except FileNotFoundError:
        raise
    except _load_errors() as error:
        raise ValueError(f"the tokenizer in {folder} is damaged ({first_line(error)}): fetch it again") from error


def _load_errors() -> tuple[type[Exception], ...]:
    """What the libraries raise over a configuration or weights that make no sense."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        ArithmeticError,
        AttributeError,
        KeyError,
        OSError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
        TypeError,
        ValueError,
    )


def _json(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: {remedy}")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: {remedy}")
    return value


def _frozen(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    # Not through diffusers' own `to`, which warns at every cast of parts to be kept in fp32, even where there are none.
    return torch.nn.Module.to(module, device, dtype).eval().requires_grad_(False)


def _downscale(config: Any) -> int:
    """Pixels per latent cell along one side of an autoencoder."""
    blocks = getattr(config, "encoder_block_out_channels", None) or config.block_out_channels
    return int(2 ** (len(blocks) - 1))
