"""Load Image Scorer: a checkpoint's joint embedding of pictures and texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import folder_paths
from comfy_api.latest import io

from .files import stamp

if TYPE_CHECKING:
    from comfy.sd import CLIP


class LoadImageScorer(io.ComfyNode):
    """The node around ``core.score.JointScorer``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitLoadScorer",
            display_name="Load Image Scorer",
            category="ConceptKit/loaders",
            description="Loads what judges how well a picture fits a text, for ConceptKit's other nodes.",
            search_aliases=["conceptkit", "clip score", "clip vision", "image text similarity", "zero-shot", "classifier", "scorer"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=[name for name in folder_paths.get_filename_list("checkpoints") if name.endswith(".safetensors")],
                    tooltip="The checkpoint that holds a scorer: shapes.safetensors, which comes with ConceptKit.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint: its text encoder reads the texts."),
            ],
            outputs=[
                io.Custom("CONCEPTKIT_SCORER").Output(
                    "scorer", tooltip="Pictures and texts as directions in one space: the closer two are, the better they fit."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, clip: CLIP | None = None) -> str:
        """Changes when another file lies under the same name."""
        return stamp("checkpoints", checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, clip: CLIP) -> io.NodeOutput:
        from .comfy_model import graph_scorer

        return io.NodeOutput(graph_scorer(folder_paths.get_full_path_or_raise("checkpoints", checkpoint), clip))
