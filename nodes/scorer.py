"""Load Image Scorer: a checkpoint's joint embedding of images and texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import folder_paths

from .api import io
from .files import holds, names, stamp
from .sockets import ScorerSocket

if TYPE_CHECKING:
    from comfy.sd import CLIP

_SHIPPED = "shapes.safetensors"
_PREFIX = "conceptkit_scorer."
"""What the names of a scorer's tensors begin with."""


class LoadImageScorer(io.ComfyNode):
    """The node around ``core.score.JointScorer``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        listed = [name for name in names("checkpoints") if _holds_scorer(name)]
        return io.Schema(
            node_id="ConceptKitLoadScorer",
            display_name="Load Image Scorer",
            category="ConceptKit/loaders",
            description="Loads a CLIP-style scorer that rates how well an image matches a text, for ConceptKit's other nodes.",
            search_aliases=["clip score", "clip vision", "image text similarity", "zero-shot", "classifier", "scorer"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=listed,
                    default=_SHIPPED if _SHIPPED in listed else None,
                    tooltip="A checkpoint that holds a scorer, such as shapes.safetensors, which comes with ConceptKit.",
                ),
                io.Clip.Input("clip", tooltip="CLIP of the same checkpoint: its text encoder encodes the texts."),
            ],
            outputs=[
                ScorerSocket.Output(
                    "scorer", tooltip="Embeds images and texts in one space: the smaller the angle between two, the better they match."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str = "") -> bool | str:
        """True, or which file to choose instead."""
        if checkpoint is None or (checkpoint in names("checkpoints") and _holds_scorer(checkpoint)):
            return True
        if not checkpoint:
            return f"no scorer is chosen: choose {_SHIPPED}, which comes with ConceptKit; if the list is empty, install ConceptKit again"
        what = "holds no image scorer" if checkpoint in names("checkpoints") else "is not among the checkpoints"
        return f"{checkpoint} {what}: choose a checkpoint that is listed, such as {_SHIPPED}, which comes with ConceptKit"

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, clip: CLIP | None = None) -> str:
        """Changes when another file lies under the same name."""
        return stamp("checkpoints", checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, clip: CLIP) -> io.NodeOutput:
        from .comfy import graph_scorer

        return io.NodeOutput(graph_scorer(folder_paths.get_full_path_or_raise("checkpoints", checkpoint), clip))


def _holds_scorer(name: str) -> bool:
    return name.endswith(".safetensors") and holds("checkpoints", name, _PREFIX)


NODES = [LoadImageScorer]
