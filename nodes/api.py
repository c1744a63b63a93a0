"""The version of ComfyUI's node API that the pack is written for; every other module imports it from here.

Importing a numbered version keeps ComfyUI from changing it under the pack. 0.0.2 is the first with schemas (``io``), text under a node
(``ui``) and extensions, and the pack needs nothing that only ``latest`` has.
"""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io, ui

__all__ = ["ComfyExtension", "io", "ui"]
