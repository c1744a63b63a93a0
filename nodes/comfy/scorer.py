"""An image scorer that reads texts with the graph's CLIP."""

from __future__ import annotations

import torch
from comfy.sd import CLIP

from ...core.hosts.checkpoint import read_scorer
from ...core.model import ImageScorer, UnsupportedModel
from ...core.score import JointScorer
from .checks import HOOKED, NO_CLIP, encoders_of, width_of
from .residency import Resident
from .text import GraphTextEncoder


def graph_scorer(path: str, clip: CLIP) -> ImageScorer:
    """The image scorer in a checkpoint, which reads texts with the graph's CLIP as it is wired (LoRAs, but no clip skip).

    Usable inside and outside of ``graph_model``, and differentiable in the pictures. Raises as ``read_scorer`` does, and
    UnsupportedModel for a CLIP that the scorer was not trained with.
    """
    if clip is None:
        raise UnsupportedModel(NO_CLIP)
    with torch.inference_mode(False):
        network = read_scorer(path)
        encoders = encoders_of(clip)
        if not encoders:
            raise UnsupportedModel(
                f"this CLIP ({type(clip.cond_stage_model).__name__}) is not CLIP text: connect the CLIP of the same checkpoint"
            )
        wanted, width = network.text_projection.in_features, width_of(next(iter(encoders.values())))
        if width != wanted:
            raise UnsupportedModel(
                f"the scorer reads text of width {wanted} but the CLIP gives {width}: connect the CLIP of the same checkpoint"
            )
        if clip.patcher.forced_hooks is not None:
            raise UnsupportedModel(HOOKED)
        # A megabyte: it stays where the CLIP computes, and ComfyUI's model manager need not know of it.
        return JointScorer(network.to(clip.patcher.load_device), GraphTextEncoder(clip, Resident(clip.patcher)).pooled)
