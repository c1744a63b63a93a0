"""What is done with a decomposition: into a CONDITIONING, adjusted, saved, loaded, made an embedding, looked at word by word."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from .api import io, ui
from .files import DECOMPOSITIONS, EMBEDDINGS, check_name, listed, names, slug, target, writing
from .images import as_image
from .inputs import check_template, name_input, seed_input, size_input
from .sockets import DecompositionSocket
from .store import LoadNode, SaveNode
from .words import CHART, FOUND, STORE, TEXT, chart, conditioning, headline

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

    from ..core.decompose import Decomposition

_CATEGORY = "ConceptKit/decompose"
_GIVEN = "What Decompose Concept found, or Load Decomposition read."
_CLIP = "The text encoder the decomposition was made with, or another of the same model family."
_UNREAD = re.compile(r"[\s()\[\],]")  # where the name of an embedding ends in a prompt


class DecompositionToConditioning(io.ComfyNode):
    """The node around ``Decomposition.apply``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitDecompositionToConditioning",
            display_name="Decomposition to Conditioning",
            category=_CATEGORY,
            description="Encodes any prompt with the weighted words in it, as conditioning for a sampler.",
            search_aliases=["weighted prompt", "encode words", "words to conditioning"],
            inputs=[
                DecompositionSocket.Input("decomposition", tooltip=_GIVEN),
                io.Clip.Input("clip", tooltip=_CLIP),
                io.String.Input(
                    "template",
                    default="",
                    placeholder="a photo of a {}",
                    tooltip="The prompt around the words, with {} in their place. Empty takes the one the decomposition was made with.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="The prompt with the weighted words in it, for a sampler.")],
        )

    @classmethod
    def validate_inputs(cls, template: str = "") -> bool | str:
        """True, or what to change."""
        return check_template(template, empty=True)

    @classmethod
    def execute(cls, decomposition: Decomposition, clip: CLIP, template: str) -> io.NodeOutput:
        from .comfy import check_text

        check_text(template)
        return io.NodeOutput(conditioning(decomposition, clip, template or None))


class AdjustWords(io.ComfyNode):
    """The node around ``core.decompose.adjust``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitAdjustWords",
            display_name="Adjust Words",
            category=_CATEGORY,
            description="More of one word, less of another: changes what a decomposition is made of, and so the images it stands for.",
            search_aliases=["reweight", "token weight", "word weight", "concept slider", "edit words"],
            inputs=[
                DecompositionSocket.Input("decomposition", tooltip=_GIVEN),
                io.Clip.Input("clip", tooltip=_CLIP),
                io.String.Input(
                    "adjustments",
                    default="",
                    multiline=True,
                    placeholder="e.g.\nrobin: 0.5\nfinch: 0\n+flame: 20%\nraven -> crow",
                    tooltip="One per line or separated by commas: `word: factor` for more or less of it (0 removes it), "
                    "`+word: share` for a new word at this share of the whole, `old -> new` for another in its place.",
                ),
            ],
            outputs=[
                DecompositionSocket.Output("decomposition", tooltip="The adjusted words."),
                io.Conditioning.Output("conditioning", tooltip="The template with the adjusted words in place of the concept."),
                io.Image.Output("chart", tooltip=CHART),
                io.String.Output("text", tooltip=TEXT),
            ],
        )

    @classmethod
    def validate_inputs(cls, adjustments: str = "") -> bool | str:
        """True, or which item to change."""
        from ..core.phrases import parse_adjustments

        try:
            parse_adjustments(adjustments or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, decomposition: Decomposition, clip: CLIP, adjustments: str) -> io.NodeOutput:
        from ..core.decompose.adjust import adjust
        from .comfy import check_fits, graph_text

        check_fits(decomposition.embeddings, clip)
        with graph_text(clip) as text:
            adjusted = adjust(decomposition, text, adjustments).to("cpu")
        return io.NodeOutput(adjusted, conditioning(adjusted, clip), chart(adjusted), adjusted.summary())


class SaveDecomposition(SaveNode):
    """The node around ``Decomposition.save``."""

    store = STORE

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitSaveDecomposition",
            display_name="Save Decomposition",
            category=_CATEGORY,
            description="Keeps a decomposition as a file in models/conceptkit/decompositions, for Load Decomposition.",
            search_aliases=["store words", "export decomposition"],
            inputs=[
                DecompositionSocket.Input("decomposition", tooltip=_GIVEN),
                name_input("named after the concept", "the concept and its first words"),
            ],
            outputs=[io.String.Output("file", tooltip="The file's name, as Load Decomposition lists it.")],
            is_output_node=True,
        )


class LoadDecomposition(LoadNode):
    """The node around ``Decomposition.load``."""

    store = STORE

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitLoadDecomposition",
            display_name="Load Decomposition",
            category="ConceptKit/loaders",
            description="Reads a decomposition that was saved, here or on another machine. Needs neither model nor time.",
            search_aliases=["open words", "import decomposition"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=names(DECOMPOSITIONS),
                    tooltip="A file in models/conceptkit/decompositions, named after the concept, its first words and a content hash. "
                    "The text says which model, template and seed it was made with.",
                )
            ],
            outputs=[
                DecompositionSocket.Output("decomposition", tooltip=FOUND),
                io.Image.Output("chart", tooltip=CHART),
                io.String.Output("text", tooltip=f"{TEXT[:-1]}, and what it was made with."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def outputs(cls, result: Decomposition, path: Path) -> io.NodeOutput:
        from .comfy import send_text

        made = origin(result)
        send_text(cls.hidden.unique_id, f"{headline(result)}\n{made}\nfile of {date.fromtimestamp(path.stat().st_mtime)}")
        return io.NodeOutput(result, chart(result), f"{result.summary()}\n{made}")


class SaveEmbedding(io.ComfyNode):
    """The node around ``Decomposition.save_embedding``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitSaveEmbedding",
            display_name="Save as Embedding",
            category=_CATEGORY,
            description="Saves the weighted words as one new word: a stock textual-inversion embedding that works without ConceptKit.",
            search_aliases=["textual inversion", "embedding:", "pseudo-token", "export embedding"],
            inputs=[
                DecompositionSocket.Input("decomposition", tooltip=_GIVEN),
                io.String.Input(
                    "name",
                    default="",
                    placeholder="bird-words",
                    tooltip="The name in models/embeddings, to write after `embedding:` in a prompt; in a folder if you like "
                    "(`birds/bird`), with placeholders as in Save Image. Empty takes the concept and -words.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    advanced=True,
                    tooltip="Replace an embedding of this name that holds something else.",
                ),
            ],
            outputs=[
                io.String.Output("prompt", tooltip="The decomposition's template with the embedding in it, for CLIP Text Encode."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str = "") -> bool | str:
        """True, or what to write instead."""
        unread = None if name is None else _UNREAD.search(name.strip())
        if unread is not None:
            return f"a prompt would read {unread[0]!r} in `embedding:{name.strip()[:80]}` as the end of the name: write - instead"
        return check_name(EMBEDDINGS, name, hashed=False)

    @classmethod
    def execute(cls, decomposition: Decomposition, name: str, overwrite: bool) -> io.NodeOutput:
        # A name that another node gives is known only now.
        said = cls.validate_inputs(name)
        if isinstance(said, str):
            raise ValueError(said)
        path = target(EMBEDDINGS, name, f"{slug(decomposition.concept)}-words")
        with writing(path):
            decomposition.save_embedding(path, overwrite=overwrite)
        word = f"embedding:{Path(listed(EMBEDDINGS, path)).with_suffix('').as_posix()}"
        # ComfyUI takes everything up to the next space for the file's name.
        return io.NodeOutput(decomposition.template.replace("{}", f" {word} ").strip(), ui=ui.PreviewText(word))


class WordPictures(io.ComfyNode):
    """The node around ``core.decompose.pictures``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitWordPictures",
            display_name="Word Pictures",
            category=_CATEGORY,
            description="Generates images of each word of a decomposition alone, beside the concept and the mixture.",
            search_aliases=["contact sheet", "word grid", "compare words", "xy plot"],
            inputs=[
                io.Model.Input("model", tooltip="Model to sample from. It is not modified."),
                io.Clip.Input("clip", tooltip=_CLIP),
                io.Vae.Input("vae", tooltip="VAE of the same checkpoint."),
                DecompositionSocket.Input("decomposition", tooltip=_GIVEN),
                io.Int.Input("pictures", default=2, min=1, max=16, tooltip="How many images of each, one per row."),
                seed_input("Seed of the first row; each row adds one. A row is what a KSampler generates with that seed.", most=2**63 - 17),
                io.Int.Input("steps", default=20, min=1, max=200, tooltip="Sampling steps (DPM++ 2M)."),
                io.Float.Input("cfg", default=7.0, min=1.0, max=30.0, step=0.1, tooltip="Guidance scale; the demo model wants 3."),
                size_input(),
            ],
            outputs=[
                io.Image.Output("sheet", tooltip="All images on one sheet, with the words above and the seeds beside them."),
                io.Image.Output(
                    "pictures", tooltip="The same as a batch: first all images of the concept, then of the mixture, then of each word."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        decomposition: Decomposition,
        pictures: int,
        seed: int,
        steps: int,
        cfg: float,
        size: int,
    ) -> io.NodeOutput:
        import torch

        from ..core.decompose.pictures import picture_sheet, word_pictures
        from .comfy import Progress, check_fits, graph_model, send_text, trained_side

        check_fits(decomposition.embeddings, clip)
        node = cls.hidden.unique_id
        progress = Progress(node, model, decomposition.concept)
        seeds, side = range(seed, seed + pictures), size or trained_side(model)
        with graph_model(model, clip, vae, on_denoised=progress.show) as host:
            drawn = word_pictures(host, decomposition, seeds=seeds, height=side, width=side, steps=steps, guidance=cfg, on_step=progress)
        send_text(node, headline(decomposition))
        return io.NodeOutput(as_image(picture_sheet(decomposition, drawn, seeds)), torch.cat(drawn).movedim(1, -1))


def origin(found: Decomposition) -> str:
    """What a decomposition was made with, in one line."""
    made = f"made with “{found.template}” on {found.model or 'an unnamed model'} by {found.method}"
    size = " at {1}×{0}".format(*found.size) if all(found.size) else ""
    return f"{made}{f' ({found.budget})' if found.budget else ''}{size}, seed {found.seed}"


NODES = [
    DecompositionToConditioning,
    AdjustWords,
    SaveDecomposition,
    LoadDecomposition,
    SaveEmbedding,
    WordPictures,
]
