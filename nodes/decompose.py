"""Decompose Concept: a word as a few weighted vocabulary words."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .files import code_hash

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE
    from torch import Tensor

    from ..core.decompose import Decomposition
    from ..core.model import ImageScorer
    from .comfy_model import Progress

logger = logging.getLogger(__name__)

Socket = io.Custom("CONCEPTKIT_DECOMPOSITION")
FOUND = "The words with their shares and how much they explain, for ConceptKit's other nodes."
CHART = "A bar for each word's share, beside how much is lost without the word."
TEXT = "The same in words, with how far the result can be trusted."


class DecomposeConcept(io.ComfyNode):
    """The node around ``core.decompose.decompose_concept``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitDecompose",
            display_name="Decompose Concept",
            category="ConceptKit/decompose",
            description="Finds the few weighted vocabulary words that make the model draw what it draws for a concept.",
            search_aliases=[
                "conceptkit",
                "explain prompt",
                "explain word",
                "interpret",
                "concept",
                "token",
                "what is a word",
                "conceptor",
                "textual inversion",
                "word mix",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to ask. It is only read. SD 1.x, SD 2.x and SDXL, with any LoRAs or merges."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input(
                    "concept",
                    default="bird",
                    tooltip="The word or phrase to take apart. Plain words, without weights. A list runs one by one.",
                ),
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
                # Optional, so that API workflows from before they were added still run.
                io.Combo.Input(
                    "budget",
                    options=["fast", "default", "thorough"],
                    default="default",
                    optional=True,
                    tooltip="How much may be spent on it: fast for a first look, thorough for words that are hard to find.",
                ),
                io.Combo.Input(
                    "method",
                    options=["distilled", "conceptor", "text"],
                    default="distilled",
                    optional=True,
                    tooltip="distilled asks the model what it predicts. conceptor is the published training, for comparison: slow, and it "
                    "needs VAE and scorer. text looks at the text encoder alone: instant, and often wrong.",
                ),
                io.String.Input(
                    "exclude",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Words that must not be used, separated by commas or lines. The concept itself is never used.",
                ),
                io.Boolean.Input(
                    "exclude_unsafe",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Leave slurs and people's names out of the words to choose from.",
                ),
                io.Combo.Input(
                    "select",
                    options=["scorer", "r2"],
                    default="scorer",
                    optional=True,
                    advanced=True,
                    tooltip="For conceptor: its best checkpoint is picked by the scorer, as published, or by how much the words explain.",
                ),
                io.Boolean.Input(
                    "reuse",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the result in models/conceptkit/decompositions and find it there when everything is the same. "
                    "Off: compute anew and keep nothing.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the same checkpoint. Only conceptor needs it."),
                io.Custom("CONCEPTKIT_SCORER").Input(
                    "scorer", optional=True, tooltip="What judges pictures, from Load Image Scorer. Only conceptor needs it."
                ),
            ],
            outputs=[
                Socket.Output("decomposition", tooltip=FOUND),
                io.Conditioning.Output(
                    "conditioning", tooltip="The template with the weighted words in place of the concept: sample it to see what they say."
                ),
                io.Image.Output("chart", tooltip=CHART),
                io.String.Output("text", tooltip=TEXT),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, concept: str = "-", template: str = "{}") -> bool | str:
        """True, or what to change. An input that another node gives is not known yet, and arrives here as None."""
        if concept is not None and not concept.strip():
            return "the concept is empty: write a word or a phrase"
        return check_template(template)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        concept: str,
        template: str,
        words: int,
        seed: int,
        size: int,
        budget: str = "default",
        method: str = "distilled",
        exclude: str = "",
        exclude_unsafe: bool = True,
        select: str = "scorer",
        reuse: bool = True,
        vae: VAE | None = None,
        scorer: ImageScorer | None = None,
    ) -> io.NodeOutput:
        from .comfy_model import Progress, check_graph, check_text, send_text, trained_side
        from .store import checkpoint, forget_unfinished, found_again, keep

        check_graph(model, clip, vae)
        check_text(concept)
        check_text(template)
        if method != "conceptor":
            vae = scorer = None
        asked: dict[str, Any] = {
            "concept": concept.strip(),
            "template": template,
            "words": words,
            "seed": seed,
            "height": size or trained_side(model),
            "width": size or trained_side(model),
            "budget": budget,
            "method": method,
            "exclude": sorted({word.strip().lower() for word in re.split(r"[,\n]", exclude)} - {""}),
            "exclude_unsafe": exclude_unsafe,
            "select": select,
        }
        node = cls.hidden.unique_id
        question = _question(asked, model, clip, vae, scorer) if reuse else None
        kept = None if question is None else found_again(question)
        if kept is not None:
            found, file = kept
            send_text(node, f"{headline(found)}  (found in {file})")
        else:
            progress = Progress(node, model, asked["concept"])
            unfinished = None if question is None else checkpoint(question, asked["concept"])
            found = _computed(asked, (model, clip, vae, scorer), unfinished, progress)
            forget_unfinished()
            wrong = "" if question is None else keep(question, found)
            send_text(node, f"{headline(found)}\nNot kept: {wrong}" if wrong else headline(found))
        return io.NodeOutput(found, conditioning(found, clip), chart(found), found.summary())


def check_template(template: str | None, *, empty: bool = False) -> bool | str:
    """True, or what to change; None, which is not known yet, passes, and so does an empty one where it stands for another."""
    if template is not None and not (empty and not template) and template.count("{}") != 1:
        return f"the template {template!r} must contain {{}} once, where the concept goes, as in 'a photo of a {{}}'"
    return True


def conditioning(found: Decomposition, clip: CLIP, template: str | None = None) -> list[list[Any]]:
    """A decomposition's words in ``template`` (its own by default) as a CONDITIONING."""
    from .comfy_model import check_fits, graph_conditioning, graph_text

    check_fits(found.embeddings, clip)
    with graph_text(clip) as text:
        return graph_conditioning(found.apply(text, template))


def chart(found: Decomposition) -> Tensor:
    """A decomposition's chart as an IMAGE."""
    from ..core.chart import share_bars

    prompt = found.template.replace("{}", found.concept)
    measured = (
        "how much the words explain is not known"
        if found.fidelity is None
        else f"the words explain {found.r2:.0%} of what the concept changes"
    )
    picture = share_bars(found.words, found.shares, found.importance, title=found.concept, subtitle=f"“{prompt}”: {measured}")
    return image(picture)


def image(picture: Any) -> Tensor:
    """A drawn picture, (height, width, 3) of bytes, as an IMAGE."""
    import torch

    return torch.from_numpy(picture).float().div(255)[None]


def headline(found: Decomposition) -> str:
    """The first line of a decomposition's summary."""
    return found.summary().splitlines()[0]


def _question(asked: dict[str, Any], model: ModelPatcher, clip: CLIP, vae: VAE | None, scorer: ImageScorer | None) -> str | None:
    """A hash of all that the answer depends on; None when the model cannot be told from another."""
    from ..core.artifact import content_hash
    from .comfy_model import graph_identity, scorer_identity

    identity = graph_identity(model, clip, *([] if vae is None else [vae]))
    if identity is None:
        logger.info("This MODEL or CLIP carries code from other nodes: what is found for it is not kept on disk")
        return None
    given = asked | {"model": identity, "scorer": scorer and scorer_identity(scorer), "code": code_hash("decompose")}
    return content_hash({}, given)[:16]


def _computed(
    asked: dict[str, Any],
    wired: tuple[ModelPatcher, CLIP, VAE | None, ImageScorer | None],
    checkpoint: Path | None,
    progress: Progress,
) -> Decomposition:
    """The answer, gone on with from ``checkpoint``; afresh where what lies there is damaged or was made by a text encoder that rounds
    otherwise, on another device or machine: nobody who queues a graph can choose another file."""
    from ..core.artifact import ArtifactError, discard
    from ..core.decompose import decompose_concept
    from .comfy_model import graph_model

    resumed = checkpoint is not None and os.path.isfile(checkpoint)
    with graph_model(*wired, progress.show) as host:
        try:
            found = decompose_concept(host, **asked, checkpoint=checkpoint, on_step=progress)
        except ArtifactError as error:
            if checkpoint is None or not resumed:
                raise
            logger.warning("%s; it is computed afresh", error)
            found = decompose_concept(host, **asked, checkpoint=checkpoint if discard(checkpoint) else None, on_step=progress)
    return found.to("cpu")
