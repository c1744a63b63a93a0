"""ComfyUI nodes over the core: each adapts types, calls one core verb and returns."""

from __future__ import annotations

from . import decompose, decomposition, edit, scorer
from .api import ComfyExtension, io
from .demo_model import register_demo_model
from .files import register_folders

FAMILIES = (decompose, decomposition, scorer, edit)
"""The modules of nodes, in the order in which ComfyUI lists what is in their ``NODES``."""


class ConceptKitExtension(ComfyExtension):
    """The pack: its nodes, the demo model made known to ComfyUI's checkpoint loader, and the folders results lie in."""

    async def on_load(self) -> None:
        register_demo_model()
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]
