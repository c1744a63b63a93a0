"""ConceptKit: see what a diffusion model thinks a word is, and change it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import ConceptKitExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ConceptKitExtension:
    """The extension ComfyUI loads; everything is imported here so that importing the package costs nothing."""
    from .nodes import ConceptKitExtension

    return ConceptKitExtension()
