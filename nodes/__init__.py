"""ComfyUI nodes over the core: each adapts types, calls one core verb and returns."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .decompose import DecomposeConcept
from .demo_model import register_demo_model
from .scorer import LoadImageScorer


class ConceptKitExtension(ComfyExtension):
    """The pack: its nodes, and the demo model made known to ComfyUI's checkpoint loader."""

    async def on_load(self) -> None:
        register_demo_model()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DecomposeConcept, LoadImageScorer]
