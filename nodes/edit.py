"""Editing a model's concepts away: solve an edit, apply it to MODEL or CONDITIONING, combine, keep, export and look at edits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from .api import io
from .files import CACHE, EDITS, LORAS, check_name, folder, names, slug, target
from .images import as_image
from .inputs import name_input, seed_input
from .sockets import EditSocket
from .store import LoadNode, SaveNode, Store, saved

if TYPE_CHECKING:
    from pathlib import Path

    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP
    from torch import Tensor

    from ..core.edit import ContextEdit, Report

METHODS = [
    "conceptkit",
    "uce-2025",
    "uce-2025-expanded",
    "uce-2023",
    "time",
    "time-augmented",
    "mace",
    "mace-no-prior",
    "trce",
    "realera",
    "realera-isotropic",
    "rece",
    "rece-objects",
    "dp",
    "cure",
    "mist",
    "speed",
]
"""The names of those of ``core.edit.METHODS`` that erase; that module is not loaded to list a node."""

_CATEGORY = "ConceptKit/edit"
_GIVEN = "The edit, from Erase Concept, Load Edit or Combine Edits."
_SOLVED = "The edit itself, a small matrix on the text, for ConceptKit's other nodes."
_STRENGTH = (
    "How much of the edit to apply: 1 is all of it, 0 leaves everything as it is, below 0 moves prompts the other way, away from what "
    "stands in the concept's place, which is not its exact opposite."
)
_REPORT = "What the edit reaches and what it costs: each concept's trace by layer, kept words, and the neighbours that moved most."
_TEXT = "The same in words, with what such an edit cannot reach."


def _load(path: Path) -> ContextEdit:
    from ..core.edit import ContextEdit

    return ContextEdit.load(path)


STORE = Store(EDITS, _load, lambda edit: tuple(concept.text for concept in edit.concepts))


class EraseConcept(io.ComfyNode):
    """The node around ``core.edit.solve_edit``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitErase",
            display_name="Erase Concept",
            category=_CATEGORY,
            description="Makes the model stop generating a concept, or generate another in its place, in seconds and without training. "
            "The model in the graph is not changed: the edit is a patch on a copy.",
            search_aliases=[
                "unlearn",
                "forget",
                "remove concept",
                "remove object",
                "remove style",
                "delete concept",
                "replace concept",
                "ablate",
                "block concept",
                "censor",
                "nsfw",
                "safety",
                "UCE",
                "MACE",
                "RECE",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Model to edit, with any LoRAs already on it. It is not modified. SD 1.x, SD 2.x and SDXL."
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input(
                    "concepts",
                    default="circle",
                    multiline=True,
                    tooltip="What to erase, one per line or separated by commas. `circle -> square` generates a square where a prompt says "
                    'circle. Put a phrase that contains a comma in quotation marks: "a dog, running".',
                ),
                io.String.Input(
                    "keep",
                    default="",
                    multiline=True,
                    placeholder="e.g. ring, moon",
                    tooltip="Words that must stay as they are, one per line or separated by commas: best those that look or sound alike.",
                ),
                io.Combo.Input(
                    "method",
                    options=METHODS,
                    default="conceptkit",
                    tooltip="conceptkit is recommended. The others are published methods, for comparison.",
                ),
                io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="1 erases, 0 leaves everything as it is."),
                io.Boolean.Input(
                    "hard",
                    default=False,
                    tooltip="Project the concept out completely. Similar words suffer more; adversarial embeddings may still recover it.",
                ),
                seed_input("Seed of the methods that sample at random. The same seed gives the same edit.", advanced=True),
                io.Combo.Input(
                    "parts",
                    options=["keep", "erase"],
                    default="keep",
                    optional=True,
                    advanced=True,
                    tooltip="Words for parts of a concept, such as robin when bird is erased: keep leaves them as they are, as far as it "
                    "can, erase removes them too. For the method conceptkit.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model without the concepts. LoRAs can be added before and after."),
                EditSocket.Output("edit", tooltip=_SOLVED),
                io.Image.Output("report", tooltip=_REPORT),
                io.String.Output("text", tooltip=_TEXT),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, concepts: str = "-") -> bool | str:
        """True, or what to change. An input that another node gives is not known yet, and arrives here as None.

        ComfyUI reports it once for every input that is named here, so only one is.
        """
        from ..core.phrases import parse_concepts

        try:
            if concepts is not None:
                parse_concepts(concepts)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        concepts: str,
        keep: str,
        method: str,
        strength: float,
        hard: bool,
        seed: int,
        parts: Literal["keep", "erase"] = "keep",
    ) -> io.NodeOutput:
        from ..core.edit import solve_edit
        from ..core.phrases import parse_concepts, parse_list
        from .comfy import Progress, check_text, graph_reading, patch_model, send_text

        asked, kept = parse_concepts(concepts), parse_list(keep)
        for text in [*(concept.text for concept in asked), *(concept.replacement or "" for concept in asked), *kept]:
            check_text(text)
        node = cls.hidden.unique_id
        with graph_reading(model, clip) as host:
            edit = solve_edit(
                host,
                asked,
                keep=kept,
                method=method,
                strength=strength,
                hard=hard,
                parts=parts,
                cache=folder(CACHE),
                seed=seed,
                on_step=Progress(node, label="solving"),
            ).to("cpu")
        send_text(node, edit.headline())
        return io.NodeOutput(patch_model(model, edit), edit, chart(edit, edit.report), edit.summary())


class ApplyEdit(io.ComfyNode):
    """The node around ``ContextEdit.weight_patches``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitApplyEdit",
            display_name="Apply Edit to Model",
            category=_CATEGORY,
            description="Patches a model with an edit that was solved before, on this model or another of its family.",
            search_aliases=["patch model"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch, with any LoRAs already on it. It is only read."),
                EditSocket.Input("edit", tooltip=_GIVEN),
                io.Float.Input("strength", default=1.0, min=-2.0, max=2.0, step=0.01, tooltip=_STRENGTH),
            ],
            outputs=[io.Model.Output("model", tooltip="A copy of the model with the edit as a patch.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, edit: ContextEdit, strength: float) -> io.NodeOutput:
        from .comfy import patch_model

        return io.NodeOutput(patch_model(model, edit.scale(strength)))


class ApplyEditToConditioning(io.ComfyNode):
    """The node around ``ContextEdit.apply_to_conditioning``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitEditConditioning",
            display_name="Apply Edit to Conditioning",
            category=_CATEGORY,
            description="The edit without touching weights: for quantised models (fp8, GGUF), and in front of ControlNet. "
            "On positive and negative alike it equals the patched model.",
            search_aliases=["conditioning adapter", "fp8", "gguf", "quantised"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="The prompt, encoded. Use one node for the positive and one for the negative."
                ),
                EditSocket.Input("edit", tooltip=_GIVEN),
                io.Float.Input("strength", default=1.0, min=-2.0, max=2.0, step=0.01, tooltip=_STRENGTH),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="The prompt as the edited model would read it.")],
        )

    @classmethod
    def execute(cls, conditioning: list[list[Any]], edit: ContextEdit, strength: float) -> io.NodeOutput:
        from ..core.model import Conditioning

        scaled = edit.scale(strength)
        edited = []
        for context, options in conditioning:
            # ComfyUI passes a pooled text along for every CLIP; only SDXL's network reads it.
            pooled = options.get("pooled_output") if scaled.pooled is not None else None
            result = scaled.apply_to_conditioning(Conditioning(context, pooled))
            edited.append([result.context, options if pooled is None else options | {"pooled_output": result.pooled}])
        return io.NodeOutput(edited)


class CombineEdits(io.ComfyNode):
    """The node around ``ContextEdit.compose``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitCombineEdits",
            display_name="Combine Edits",
            category=_CATEGORY,
            description="Combines two edits into one, equal to patching a model with the first and then the second. "
            "Prefer erasing several concepts in one Erase Concept node.",
            search_aliases=["merge edits", "compose edits", "chain edits"],
            inputs=[
                EditSocket.Input("first", tooltip="The edit the model is patched with first."),
                EditSocket.Input("second", tooltip="The edit the patched model is patched with next."),
                io.Float.Input("first_strength", default=1.0, min=-2.0, max=2.0, step=0.01, tooltip="How much of the first edit to take."),
                io.Float.Input(
                    "second_strength", default=1.0, min=-2.0, max=2.0, step=0.01, tooltip="How much of the second edit to take."
                ),
            ],
            outputs=[EditSocket.Output("edit", tooltip=_SOLVED)],
        )

    @classmethod
    def execute(cls, first: ContextEdit, second: ContextEdit, first_strength: float, second_strength: float) -> io.NodeOutput:
        return io.NodeOutput(first.scale(first_strength).compose(second.scale(second_strength)))


class SaveEdit(SaveNode):
    """The node around ``ContextEdit.save``."""

    store = STORE

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitSaveEdit",
            display_name="Save Edit",
            category=_CATEGORY,
            description="Keeps an edit as a small file in models/conceptkit/edits, for Load Edit.",
            search_aliases=["store edit", "export edit"],
            inputs=[
                EditSocket.Input("edit", tooltip=_GIVEN),
                name_input("named after the concepts", "the concepts"),
            ],
            outputs=[io.String.Output("file", tooltip="The file's name, as Load Edit lists it.")],
            is_output_node=True,
        )


class LoadEdit(LoadNode):
    """The node around ``ContextEdit.load``."""

    store = STORE

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitLoadEdit",
            display_name="Load Edit",
            category="ConceptKit/loaders",
            description="Reads an edit that was saved, here or on another machine. Needs neither model nor time.",
            search_aliases=["open edit", "import edit"],
            inputs=[
                io.Combo.Input("file", options=names(EDITS), tooltip="A file in models/conceptkit/edits, as Save Edit writes them."),
            ],
            outputs=[EditSocket.Output("edit", tooltip=_SOLVED), io.String.Output("text", tooltip=_TEXT)],
        )

    @classmethod
    def outputs(cls, result: ContextEdit, path: Path) -> io.NodeOutput:
        return io.NodeOutput(result, result.summary())


class SaveEditAsLora(io.ComfyNode):
    """The node around ``core.edit.save_lora``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitSaveEditLora",
            display_name="Save Edit as LoRA",
            category=_CATEGORY,
            description="Saves an edit as a stock LoRA file in models/loras, which gives the same images without ConceptKit, in any tool.",
            search_aliases=["export lora", "extract lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model the LoRA is for, with the patches it will have when the LoRA is loaded."),
                EditSocket.Input("edit", tooltip=_GIVEN),
                name_input("named after the concepts", "the concepts"),
                io.Combo.Input(
                    "precision",
                    options=["fp16", "fp32"],
                    default="fp16",
                    tooltip="fp16 is half the size and what most LoRAs use; fp32 is exact.",
                ),
            ],
            outputs=[io.String.Output("file", tooltip="The file's name, as Load LoRA lists it.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str = "") -> bool | str:
        """True, or what to write instead."""
        return check_name(LORAS, name)

    @classmethod
    def execute(cls, model: ModelPatcher, edit: ContextEdit, name: str, precision: str) -> io.NodeOutput:
        import torch

        from ..core.artifact import content_hash
        from ..core.edit import lora_tensors, save_lora
        from .comfy import GraphCrossAttention

        dtype = {"fp16": torch.float16, "fp32": torch.float32}[precision]
        attention = GraphCrossAttention(model)
        # By the LoRA's own content: one edit is another LoRA for another model, and in another precision.
        content = content_hash(lora_tensors(edit, attention, dtype), {})
        path = target(LORAS, name, slug(*STORE.subject(edit)), content)
        return saved(LORAS, path, lambda path: save_lora(edit, attention, path, dtype=dtype, overwrite=True))


class EditReport(io.ComfyNode):
    """The node around ``core.edit.report_edit``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitEditReport",
            display_name="Edit Report",
            category=_CATEGORY,
            description="What an edit does to a model, without generating an image: how far each concept is gone in every layer, "
            "which other words it moves, and whether an embedding could bring it back.",
            search_aliases=["audit", "trace", "certificate", "what changed"],
            inputs=[
                io.Model.Input("model", tooltip="The model from before the edit."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                EditSocket.Input("edit", tooltip=_GIVEN),
            ],
            outputs=[
                io.Image.Output("report", tooltip=_REPORT),
                io.String.Output("text", tooltip=_TEXT),
                io.String.Output("json", tooltip="All numbers of the report as JSON."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, clip: CLIP, edit: ContextEdit) -> io.NodeOutput:
        import json
        from dataclasses import replace

        from ..core.edit import report_edit
        from .comfy import graph_reading

        with graph_reading(model, clip) as host:
            report = report_edit(host, edit, cache=folder(CACHE))
        text = replace(edit, report=report).summary()
        return io.NodeOutput(chart(edit, report), text, json.dumps(report.to_json(), indent=1))


def chart(edit: ContextEdit, report: Report | None) -> Tensor:
    """A report as an IMAGE."""
    from ..core.edit.picture import report_picture

    return as_image(report_picture(edit, report))


NODES = [
    EraseConcept,
    ApplyEdit,
    ApplyEditToConditioning,
    CombineEdits,
    SaveEdit,
    LoadEdit,
    SaveEditAsLora,
    EditReport,
]
