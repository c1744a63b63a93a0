"""ComfyUI nodes over the core: each adapts types, calls one core verb and returns."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .decompose import DecomposeConcept, DecomposeWithConceptor
from .decomposition import (
    AdjustWords,
    DecompositionToConditioning,
    LoadDecomposition,
    SaveDecomposition,
    SaveEmbedding,
    WordPictures,
)
from .demo_model import register_demo_model
from .edit import (
    ApplyEdit,
    ApplyEditToConditioning,
    CombineEdits,
    EditReport,
    EraseConcept,
    LoadEdit,
    SaveEdit,
    SaveEditAsLora,
)
from .files import register_folders
from .scorer import LoadImageScorer


class ConceptKitExtension(ComfyExtension):
    """The pack: its nodes, the demo model made known to ComfyUI's checkpoint loader, and the folders results lie in."""

    async def on_load(self) -> None:
        register_demo_model()
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            DecomposeConcept,
            DecomposeWithConceptor,
            DecompositionToConditioning,
            AdjustWords,
            SaveDecomposition,
            LoadDecomposition,
            SaveEmbedding,
            WordPictures,
            LoadImageScorer,
            EraseConcept,
            ApplyEdit,
            ApplyEditToConditioning,
            CombineEdits,
            SaveEdit,
            LoadEdit,
            SaveEditAsLora,
            EditReport,
        ]
