"""The graph's MODEL, CLIP and VAE as ``core.model`` sees a model.

Nodes run in inference mode on weights that several clones share and that ComfyUI's model manager moves about. ``graph_model`` gives
differentiable access to them as they are wired (LoRAs, merges, clip skip, other samplings) and leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import comfy.clip_model
import comfy.model_management as management
import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...core.model import ImageScorer, Model, TextEncoder
from .checks import check_clip, check_graph
from .denoiser import GraphDenoiser
from .gradients import casts, gradients_or_a_sentence, out_of_place, override, recomputed
from .residency import Resident, lasting
from .text import GraphTextEncoder
from .vae import GraphAutoencoder
from .weights import GraphCrossAttention


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
        patcher, text, text_patcher = lasting(stack, model), clip, lasting(stack, clip.patcher)
        if text_patcher is not clip.patcher:
            text = clip.clone()
            text.patcher, text.cond_stage_model = text_patcher, text_patcher.model
        stack.enter_context(gradients_or_a_sentence())
        stack.callback(text.cond_stage_model.reset_clip_options)
        stack.callback(patcher.cleanup)
        side = 128 if family == "sdxl" else 64
        # Planned once for a batch of four pictures of the family's size: a later plan could move weights that a graph still needs.
        resident = Resident(patcher, text.patcher, memory=patcher.memory_required([4, 4, side, side]))
        resident.load()
        patcher.pre_run()
        override(stack, text.cond_stage_model, comfy.clip_model.CLIPLayer, out_of_place)
        if casts(patcher):
            override(stack, patcher.model.diffusion_model, BasicTransformerBlock, recomputed)
        yield Model(
            family=family,
            name=type(model.model.model_config).__name__,
            text=GraphTextEncoder(text, resident),
            denoiser=GraphDenoiser(patcher, resident, on_denoised),
            autoencoder=None if vae is None else GraphAutoencoder(vae, patcher, partial(lasting, stack), (patcher, text.patcher)),
            scorer=scorer,
            before_call=management.throw_exception_if_processing_interrupted,
            words=getattr(text.cond_stage_model, "trained_words", None),
            predicts_velocity=isinstance(patcher.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION),
        )


@contextmanager
def graph_text(clip: CLIP) -> Iterator[TextEncoder]:
    """The graph's CLIP alone, without gradients, inside the ``with`` block. Raises UnsupportedModel, saying what to connect instead."""
    check_clip(clip)
    with torch.inference_mode(False), torch.no_grad():
        try:
            yield GraphTextEncoder(clip, Resident(clip.patcher))
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
            before_call=management.throw_exception_if_processing_interrupted,
            words=getattr(clip.cond_stage_model, "trained_words", None),
            cross_attention=GraphCrossAttention(model),
        )
