"""Decompose Concept: a word as a few weighted vocabulary words."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .api import io
from .files import code_hash
from .inputs import check_template, seed_input, size_input
from .sockets import DecompositionSocket, ScorerSocket
from .store import checkpoint, forget_unfinished
from .words import CHART, FOUND, STORE, TEXT, chart, conditioning, headline

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE
    from torch import Tensor

    from ..core.decompose import Decomposition
    from ..core.model import ImageScorer
    from ..core.progress import OnStep

logger = logging.getLogger(__name__)

_MODEL = "Model to analyse. It is not modified. SD 1.x, SD 2.x and SDXL, with any LoRAs or merges."
_SELECT = "What picks the best of the training's checkpoints: the scorer, as published, or r2, how much the words explain."
_EACH = " One for each concept."
_NOT_KEPT = "\nNot kept: "


def _question_inputs() -> list[io.Input]:
    """What every method is asked, in the order in which shared workflows store it."""
    return [
        io.String.Input(
            "concept",
            default="bird",
            multiline=True,
            tooltip="Word or phrase to decompose, in plain words without weights. Several, one per line or separated by commas, give "
            'lists. Put a phrase that contains a comma in quotation marks: "a dog, running".',
        ),
        io.String.Input(
            "template",
            default="a photo of a {}",
            tooltip="Prompt around the concept, with {} in its place. Use the kind of prompt you generate images with.",
        ),
        io.Int.Input(
            "words",
            default=5,
            min=1,
            max=50,
            tooltip="Maximum number of words. More words take longer to find; fewer are returned where fewer explain as much.",
        ),
        seed_input("Seed of the images the model is analysed on. The same seed gives the same words."),
        size_input(" the model is analysed on,"),
        # Optional, so that API workflows from before they were added still run.
        io.Combo.Input(
            "budget",
            options=["fast", "default", "thorough"],
            default="default",
            optional=True,
            tooltip="How many model evaluations to spend: fast for a first look, thorough for words that are hard to find.",
        ),
    ]


def _exclude_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "exclude",
            default="",
            multiline=True,
            optional=True,
            placeholder="words to leave out",
            tooltip="Single words that must not be used, one per line or separated by commas. The concept itself is never used.",
        ),
        io.Boolean.Input(
            "exclude_unsafe",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Leave slurs and people's names out of the words to choose from.",
        ),
    ]


def _reuse_input() -> io.Input:
    return io.Boolean.Input(
        "reuse",
        default=True,
        optional=True,
        advanced=True,
        tooltip="Save the result in models/conceptkit/decompositions and find it there when everything is the same. "
        "Off: compute it anew and save nothing.",
    )


def _outputs() -> list[io.Output]:
    return [
        DecompositionSocket.Output("decomposition", is_output_list=True, tooltip=FOUND + _EACH),
        io.Conditioning.Output(
            "conditioning",
            is_output_list=True,
            tooltip="The template with the weighted words in place of the concept: sample it to see what they stand for." + _EACH,
        ),
        io.Image.Output("chart", is_output_list=True, tooltip=CHART + _EACH),
        io.String.Output("text", is_output_list=True, tooltip=TEXT + _EACH),
    ]


class DecomposeNode(io.ComfyNode):
    """What the nodes of all methods do."""

    @classmethod
    def validate_inputs(cls, template: str = "{}") -> bool | str:
        """True, or what to change. ComfyUI reports it once for every input that is named here, so only one is."""
        return check_template(template)

    @classmethod
    def decomposed(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE | None = None,
        scorer: ImageScorer | None = None,
        *,
        concept: str,
        template: str,
        words: int,
        seed: int,
        size: int,
        method: str,
        budget: str = "default",
        exclude: str = "",
        exclude_unsafe: bool = True,
        select: str = "scorer",
        reuse: bool = True,
    ) -> io.NodeOutput:
        """A decomposition of every concept that is listed, found again or computed, and what the node shows and returns of them."""
        from ..core.phrases import parse_list
        from .comfy import check_graph, check_text, send_text, trained_side

        listed = parse_list(concept)
        if not listed:
            raise ValueError("the concept is empty: write a word or a phrase")
        check_graph(model, clip, vae)
        for text in (*listed, template):
            check_text(text)
        side = size or trained_side(model)
        asked = {
            "template": template,
            "words": words,
            "seed": seed,
            "height": side,
            "width": side,
            "budget": budget,
            "method": method,
            "exclude": sorted(word.lower() for word in parse_list(exclude)),
            "exclude_unsafe": exclude_unsafe,
            "select": select,
        }
        node, found, notes = cls.hidden.unique_id, [], []
        for number, one in enumerate(listed):
            answer, note = _answer(node, (model, clip, vae, scorer), asked | {"concept": one}, (number, len(listed)), reuse)
            found.append(answer)
            notes.append(note)
        if len(found) == 1:
            send_text(node, headline(found[0]) + notes[0])
        else:
            send_text(
                node,
                f"{len(found)} concepts: {', '.join(listed[:8])}{' …' if len(listed) > 8 else ''}"
                + next((note for note in notes if note.startswith(_NOT_KEPT)), ""),
            )
        return io.NodeOutput(
            found, [conditioning(one, clip) for one in found], [chart(one) for one in found], [one.summary() for one in found]
        )


class DecomposeConcept(DecomposeNode):
    """The node around ``core.decompose.decompose_concept``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitDecompose",
            display_name="Decompose Concept",
            category="ConceptKit/decompose",
            description="Finds the few weighted vocabulary words that make the model generate what it generates for a concept.",
            search_aliases=[
                "explain",
                "explain prompt",
                "explain word",
                "interpret",
                "interpretability",
                "bias",
                "what does the model think",
                "what is a word",
                "analyse concept",
                "analyze concept",
                "meaning of a prompt",
                "word mix",
            ],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                *_question_inputs(),
                io.Combo.Input(
                    "method",
                    options=["distilled", "conceptor", "text"],
                    default="distilled",
                    optional=True,
                    tooltip="distilled analyses the model's own predictions. text analyses the text encoder alone: instant, often wrong. "
                    "conceptor is the published training method, which needs vae and scorer: see Decompose with Conceptor.",
                ),
                *_exclude_inputs(),
                # Read by conceptor alone, which has a node of its own; its place among the stored values stays.
                io.Combo.Input(
                    "select",
                    options=["scorer", "r2"],
                    default="scorer",
                    optional=True,
                    advanced=True,
                    tooltip=f"For the method conceptor. {_SELECT}",
                    extra_dict={"hidden": True},
                ),
                _reuse_input(),
                io.Vae.Input("vae", optional=True, tooltip="Only the method conceptor reads it: the VAE of the same checkpoint."),
                ScorerSocket.Input(
                    "scorer", optional=True, tooltip="Only the method conceptor reads it: a scorer, from Load Image Scorer."
                ),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        method: str = "distilled",
        select: str = "scorer",
        vae: VAE | None = None,
        scorer: ImageScorer | None = None,
        **asked: Any,
    ) -> io.NodeOutput:
        if method != "conceptor":
            vae = scorer = None
        elif select == "scorer" and (vae is None or scorer is None):
            raise ValueError(
                "the method conceptor chooses its result by an image scorer: connect a VAE and a scorer, or use Decompose with Conceptor, "
                "which needs neither when select is r2"
            )
        return cls.decomposed(model, clip, vae, scorer, method=method, select=select, **asked)


class DecomposeWithConceptor(DecomposeNode):
    """The node around ``core.decompose.decompose_concept`` by the published training method."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitConceptor",
            display_name="Decompose with Conceptor",
            category="ConceptKit/decompose",
            description="Decomposes a concept by the published training method, to compare Decompose Concept with. Many times slower.",
            search_aliases=["conceptor", "hidden language of diffusion models", "published decomposition"],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                *_question_inputs(),
                *_exclude_inputs(),
                io.Combo.Input(
                    "select",
                    options=["scorer", "r2"],
                    default="scorer",
                    optional=True,
                    tooltip=f"{_SELECT} r2 needs neither vae nor scorer.",
                ),
                _reuse_input(),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the same checkpoint. Not needed with select = r2."),
                ScorerSocket.Input("scorer", optional=True, tooltip="A scorer, from Load Image Scorer. Not needed with select = r2."),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, clip: CLIP, **asked: Any) -> io.NodeOutput:
        return cls.decomposed(model, clip, method="conceptor", **asked)


def _answer(
    node: str | None,
    wired: tuple[ModelPatcher, CLIP, VAE | None, ImageScorer | None],
    asked: dict[str, Any],
    place: tuple[int, int],
    reuse: bool,
) -> tuple[Decomposition, str]:
    """One concept's decomposition, and what to say where it was found again or could not be kept. place: its number, of how many."""
    from ..core.progress import part_of
    from .comfy import Progress

    question = _question(asked, *wired) if reuse else None
    kept = None if question is None else STORE.found_again(question)
    if kept is not None:
        found, file = kept
        return found, f"  (found in {file})"
    number, count = place
    label = asked["concept"] if count == 1 else f"{asked['concept']} ({number + 1} of {count})"
    progress = Progress(node, wired[0], label)
    unfinished = None if question is None else checkpoint(question, asked["concept"])
    found = _computed(asked, wired, unfinished, part_of(progress, number, count), progress.show)
    forget_unfinished()
    wrong = "" if question is None else STORE.keep(question, found)
    return found, f"{_NOT_KEPT}{wrong}" if wrong else ""


def _question(asked: dict[str, Any], model: ModelPatcher, clip: CLIP, vae: VAE | None, scorer: ImageScorer | None) -> str | None:
    """A hash of all that the answer depends on; None when the model cannot be told from another."""
    from ..core.artifact import content_hash
    from .comfy import graph_identity, scorer_identity

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
    on_step: OnStep,
    show: Callable[[Tensor], None],
) -> Decomposition:
    """The answer, gone on with from ``checkpoint``; afresh where what lies there is damaged or was made by a text encoder that rounds
    otherwise, on another device or machine: nobody who queues a graph can choose another file."""
    from ..core.artifact import ArtifactError, discard
    from ..core.decompose import decompose_concept
    from .comfy import graph_model

    resumed = checkpoint is not None and os.path.isfile(checkpoint)
    with graph_model(*wired, show) as host:
        try:
            found = decompose_concept(host, **asked, checkpoint=checkpoint, on_step=on_step)
        except ArtifactError as error:
            if checkpoint is None or not resumed:
                raise
            logger.warning("%s; it is computed afresh", error)
            found = decompose_concept(host, **asked, checkpoint=checkpoint if discard(checkpoint) else None, on_step=on_step)
    return found.to("cpu")


NODES = [DecomposeConcept, DecomposeWithConceptor]
