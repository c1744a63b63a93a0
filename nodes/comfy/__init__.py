"""The one room that knows ComfyUI's insides: the graph's MODEL, CLIP and VAE as ``core.model`` sees a model.

Imported when a node runs, not when ComfyUI lists it.
"""

from __future__ import annotations

from .checks import check_fits, check_graph, check_text, trained_side
from .identity import graph_identity, scorer_identity
from .progress import Progress, fold, send_text
from .scorer import graph_scorer
from .session import graph_model, graph_reading, graph_text
from .text import graph_conditioning
from .weights import GraphCrossAttention, patch_model

__all__ = [
    "GraphCrossAttention",
    "Progress",
    "check_fits",
    "check_graph",
    "check_text",
    "fold",
    "graph_conditioning",
    "graph_identity",
    "graph_model",
    "graph_reading",
    "graph_scorer",
    "graph_text",
    "patch_model",
    "scorer_identity",
    "send_text",
    "trained_side",
]
