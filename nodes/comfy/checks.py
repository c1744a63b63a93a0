"""What of a graph is supported, and what to connect instead where it is not."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.clip_model
import comfy.model_sampling
import comfy.sd1_clip
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...core.model import Family, UnsupportedModel

_FAMILIES: dict[tuple[str, ...], tuple[Family, int]] = {("l",): ("sd1", 0), ("h",): ("sd2", 0), ("l", "g"): ("sdxl", 2816)}
"""A CLIP's encoders: the family they belong to, and the width of its MODEL's class embedding."""

_REFINER_CHANNELS = 2560
NO_CLIP = "the CLIP is missing (the checkpoint holds no text encoder): load one with a CLIP loader and connect it"
HOOKED = "this CLIP carries hooks: connect it from before Set CLIP Hooks, and apply LoRAs with a LoRA loader"
SUPPORTED = "connect the MODEL and CLIP of an SD 1.x, SD 2.x or SDXL base checkpoint"
FLOAT = (torch.float16, torch.bfloat16, torch.float32)


def check_graph(model: ModelPatcher, clip: CLIP, vae: VAE | None = None, quantised: str = "") -> Family:
    """The family of a MODEL and CLIP that belong together. Raises UnsupportedModel otherwise, saying what to connect instead.

    quantised: what else can be done with a MODEL that is.
    """
    if clip is None:
        raise UnsupportedModel(NO_CLIP)
    base = model.model
    network = getattr(base, "diffusion_model", None)
    config = getattr(getattr(base, "model_config", None), "unet_config", {})
    if not isinstance(network, UNetModel) or config.get("use_temporal_attention") or not isinstance(config.get("context_dim"), int):
        raise UnsupportedModel(f"{type(base).__name__} models are not supported: {SUPPORTED}")
    if config["in_channels"] != 4:
        raise UnsupportedModel(
            "inpainting and instruction-editing models (with extra input channels) are not supported: "
            "connect the base model they were made from"
        )
    if base.adm_channels == _REFINER_CHANNELS:
        raise UnsupportedModel("the SDXL refiner is not supported: connect the SDXL base model")
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.EPS) or isinstance(sampling, comfy.model_sampling.IMG_TO_IMG):
        raise UnsupportedModel(f"this MODEL is sampled as {type(sampling).__mro__[1].__name__}, not by noise levels: {SUPPORTED}")
    family, class_channels = check_clip(clip)
    width = sum(map(width_of, encoders_of(clip).values()))
    if width != config["context_dim"]:
        raise UnsupportedModel(
            f"the MODEL reads text of width {config['context_dim']} but the CLIP gives {width}: connect the CLIP of the same checkpoint"
        )
    if base.adm_channels != class_channels:
        raise UnsupportedModel(f"{type(base).__name__} models with inputs beside text are not supported: {SUPPORTED}")
    _check_precision("MODEL", network, quantised)
    if vae is not None and (vae.first_stage_model is None or vae.latent_channels != 4 or vae.latent_dim != 2):
        raise UnsupportedModel("this VAE does not fit the MODEL (4 latent channels): connect the VAE of the same checkpoint")
    return family


def check_clip(clip: CLIP) -> tuple[Family, int]:
    """The family of a CLIP, and the width of the class embedding of a MODEL that goes with it."""
    if clip is None:
        raise UnsupportedModel(NO_CLIP)
    found = _FAMILIES.get(tuple(encoders_of(clip)))
    if found is None:
        raise UnsupportedModel(f"this CLIP ({type(clip.cond_stage_model).__name__}) is not of a supported family: {SUPPORTED}")
    if clip.patcher.forced_hooks is not None:
        raise UnsupportedModel(HOOKED)
    _check_precision("CLIP", clip.cond_stage_model)
    return found


def _check_precision(part: str, module: torch.nn.Module, instead: str = "") -> None:
    if _quantised(module):
        remedy = "load it in fp16, bf16 or fp32 (weight_dtype default, no GGUF or fp8 file)"
        raise UnsupportedModel(f"the {part} is quantised: {remedy}{instead}")


def check_fits(embeddings: Mapping[str, Tensor], clip: CLIP) -> None:
    """Raises UnsupportedModel, saying what to connect instead, for word embeddings (words, width) of other encoders than the CLIP's."""
    if clip is None:
        raise UnsupportedModel(NO_CLIP)
    theirs = {name: rows.shape[-1] for name, rows in embeddings.items()}
    ours = {name: width_of(encoder) for name, encoder in encoders_of(clip).items()}
    if theirs != ours:
        raise UnsupportedModel(
            f"the decomposition was made with another text encoder ({_listed(theirs)}) than this CLIP ({_listed(ours)}): "
            "connect the CLIP of the model it was made with, or decompose the concept again"
        )


def _listed(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of width {width}" for name, width in widths.items()) or "none"


def check_text(text: str) -> None:
    """Raises ValueError for a text that ComfyUI's prompts would read otherwise than word by word."""
    if "embedding:" in text or any(weight != 1 for _, weight in comfy.sd1_clip.token_weights(text, 1.0)):
        raise ValueError(f"{text!r} has a weight such as (word:1.2) or an embedding: file, which are not read here: write plain words")


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


def encoders_of(clip: CLIP) -> dict[str, comfy.sd1_clip.SDClipModel]:
    """The CLIP's text encoders by name, in the order in which their outputs are joined; {} when any is not CLIP text."""
    stage = clip.cond_stage_model
    every = [module for module in stage.modules() if isinstance(module, comfy.sd1_clip.SDClipModel)]
    named = {name: module for name in "lgh" if (module := getattr(stage, f"clip_{name}", None)) is not None}
    plain = all(isinstance(module.transformer, comfy.clip_model.CLIPTextModel) for module in every)
    return named if plain and len(named) == len(every) else {}


def width_of(encoder: comfy.sd1_clip.SDClipModel) -> int:
    return int(encoder.transformer.get_input_embeddings().weight.shape[1])


def _quantised(module: torch.nn.Module) -> bool:
    return any(p.dtype not in FLOAT or type(p.data) is not Tensor for p in module.parameters())
