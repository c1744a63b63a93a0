"""Decompose Concept: a word as a few weighted vocabulary words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP


class DecomposeConcept(io.ComfyNode):
    """The node around ``core.decompose.decompose_concept``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitDecompose",
            display_name="Decompose Concept",
            category="ConceptKit/decompose",
            description="Finds the few weighted vocabulary words that make the model draw what it draws for a concept.",
            search_aliases=["conceptkit", "explain word", "what is a word", "conceptor", "interpret", "textual inversion", "word mix"],
            inputs=[
                io.Model.Input("model", tooltip="The model to ask. It is only read. SD 1.x, SD 2.x and SDXL, with any LoRAs or merges."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input("concept", default="bird", tooltip="The word or phrase to take apart. Plain words, without weights."),
                io.String.Input(
                    "template",
                    default="a photo of a {}",
                    tooltip="The prompt around the concept, with {} in its place. Use the kind of prompt you draw with.",
                ),
                io.Int.Input(
                    "words",
                    default=5,
                    min=1,
                    max=50,
                    tooltip="The most words to keep. Fewer are returned where fewer explain as much.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Which pictures the model is asked about. The same seed gives the same words.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    advanced=True,
                    tooltip="Side of the square pictures the model is asked about, in pixels. 0 takes the size the model was made for.",
                ),
            ],
            outputs=[
                io.Custom("CONCEPTKIT_DECOMPOSITION").Output(
                    "decomposition", tooltip="The words with their shares and how much they explain, for ConceptKit's other nodes."
                ),
                io.Conditioning.Output(
                    "conditioning", tooltip="The template with the weighted words in place of the concept: sample it to see what they say."
                ),
                io.Image.Output("chart", tooltip="A bar for each word's share, beside how much is lost without the word."),
                io.String.Output("text", tooltip="The same in words, with how far the result can be trusted."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, concept: str = "-", template: str = "{}") -> bool | str:
        """True, or what to change. An input that another node gives is not known yet, and arrives here as None."""
        if concept is not None and not concept.strip():
            return "the concept is empty: write a word or a phrase"
        if template is not None and template.count("{}") != 1:
            return f"the template {template!r} must contain {{}} once, where the concept goes, as in 'a photo of a {{}}'"
        return True

    @classmethod
    def execute(cls, model: ModelPatcher, clip: CLIP, concept: str, template: str, words: int, seed: int, size: int) -> io.NodeOutput:
        import torch

        from ..core.chart import share_bars
        from ..core.decompose import decompose_concept
        from .comfy_model import check_text, graph_conditioning, graph_model, progress, send_text, trained_side

        check_text(concept)
        check_text(template)
        side = size or trained_side(model)
        node = cls.hidden.unique_id
        with graph_model(model, clip) as host:
            found = decompose_concept(
                host, concept, template=template, words=words, seed=seed, height=side, width=side, on_step=progress(node)
            ).to("cpu")
            with torch.no_grad():
                conditioning = graph_conditioning(found.apply(host.text))
        text = found.summary()
        send_text(node, text.splitlines()[0])
        chart = share_bars(
            found.words,
            found.shares,
            found.importance,
            title=found.concept,
            subtitle=f"“{template.replace('{}', found.concept)}”: the words explain {found.r2:.0%} of what the concept changes",
        )
        return io.NodeOutput(found, conditioning, torch.from_numpy(chart).float().div(255)[None], text)
