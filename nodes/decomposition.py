"""What is done with a decomposition: into a CONDITIONING, adjusted, saved, loaded, made an embedding, looked at word by word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from .decompose import CHART, FOUND, TEXT, Socket, chart, check_template, conditioning, headline, image
from .files import DECOMPOSITIONS, check, locate, names, place, slug, stamp, stem, writable

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

    from ..core.decompose import Decomposition

_CATEGORY = "ConceptKit/decompose"
_ALIASES = ["conceptkit", "concept", "interpret", "explain prompt"]
_GIVEN = "What Decompose Concept found, or Load Decomposition read."
_CLIP = "The text encoder the decomposition was made with, or another of the same model family."


class DecompositionToConditioning(io.ComfyNode):
    """The node around ``Decomposition.apply``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitDecompositionToConditioning",
            display_name="Decomposition to Conditioning",
            category=_CATEGORY,
            description="The weighted words in any prompt, where a sampler can draw them.",
            search_aliases=[*_ALIASES, "encode", "token"],
            inputs=[
                Socket.Input("decomposition", tooltip=_GIVEN),
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
        from .comfy_model import check_text

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
            description="More of one word, less of another: changes what a decomposition is made of, and so what it draws.",
            search_aliases=[*_ALIASES, "reweight", "token weight", "word weight", "concept slider", "edit words"],
            inputs=[
                Socket.Input("decomposition", tooltip=_GIVEN),
                io.Clip.Input("clip", tooltip=_CLIP),
                io.String.Input(
                    "adjustments",
                    default="",
                    multiline=True,
                    placeholder="robin: 0.5\nfinch: 0\n+flame: 20%\nraven -> crow",
                    tooltip="One to a line: `word: factor` for more or less of it (0 removes it), `+word: share` for a new word, "
                    "`old -> new` for another in its place.",
                ),
            ],
            outputs=[
                Socket.Output("decomposition", tooltip="The adjusted words."),
                io.Conditioning.Output("conditioning", tooltip="The template with the adjusted words in place of the concept."),
                io.Image.Output("chart", tooltip=CHART),
                io.String.Output("text", tooltip=TEXT),
            ],
        )

    @classmethod
    def validate_inputs(cls, adjustments: str = "") -> bool | str:
        """True, or which line to change."""
        from ..core.decompose.adjust import parse_adjustments

        try:
            parse_adjustments(adjustments or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, decomposition: Decomposition, clip: CLIP, adjustments: str) -> io.NodeOutput:
        from ..core.decompose.adjust import adjust, parse_adjustments
        from .comfy_model import check_fits, graph_text

        check_fits(decomposition.embeddings, clip)
        with graph_text(clip) as text:
            adjusted = adjust(decomposition, text, parse_adjustments(adjustments)).to("cpu")
        return io.NodeOutput(adjusted, conditioning(adjusted, clip), chart(adjusted), adjusted.summary())


class SaveDecomposition(io.ComfyNode):
    """The node around ``Decomposition.save``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitSaveDecomposition",
            display_name="Save Decomposition",
            category=_CATEGORY,
            description="Keeps a decomposition as a file in models/conceptkit/decompositions, for Load Decomposition.",
            search_aliases=[*_ALIASES, "store", "keep", "export"],
            inputs=[
                Socket.Input("decomposition", tooltip=_GIVEN),
                io.String.Input(
                    "name",
                    default="",
                    placeholder="named after the concept",
                    tooltip="The start of the file's name; a short hash of the content follows. Empty takes the concept.",
                ),
            ],
            outputs=[io.String.Output("file", tooltip="The file's name, as Load Decomposition lists it.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, decomposition: Decomposition, name: str) -> io.NodeOutput:
        path = writable(DECOMPOSITIONS, stem(name, decomposition.concept, decomposition.content_hash()))
        decomposition.save(path)
        return io.NodeOutput(path.name, ui=ui.PreviewText(place(path)))


class LoadDecomposition(io.ComfyNode):
    """The node around ``Decomposition.load``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitLoadDecomposition",
            display_name="Load Decomposition",
            category="ConceptKit/loaders",
            description="Reads a decomposition that was saved, here or on another machine. Needs neither model nor time.",
            search_aliases=[*_ALIASES, "open", "read", "import"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=names(DECOMPOSITIONS),
                    tooltip="A file in models/conceptkit/decompositions. Every finished Decompose Concept leaves one there.",
                )
            ],
            outputs=[
                Socket.Output("decomposition", tooltip=FOUND),
                io.Image.Output("chart", tooltip=CHART),
                io.String.Output("text", tooltip=TEXT),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str = "") -> bool | str:
        """True, or which file is missing and where it belongs."""
        return check(DECOMPOSITIONS, file)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Changes when another file lies under the same name."""
        return stamp(DECOMPOSITIONS, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from ..core.decompose import Decomposition

        found = Decomposition.load(locate(DECOMPOSITIONS, file))
        return io.NodeOutput(found, chart(found), found.summary())


class SaveEmbedding(io.ComfyNode):
    """The node around ``Decomposition.save_embedding``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitSaveEmbedding",
            display_name="Save as Embedding",
            category=_CATEGORY,
            description="Makes the weighted words one new word: a stock textual-inversion file that works without ConceptKit.",
            search_aliases=[*_ALIASES, "textual inversion", "embedding:", "token", "export"],
            inputs=[
                Socket.Input("decomposition", tooltip=_GIVEN),
                io.String.Input(
                    "name",
                    default="",
                    placeholder="bird-words",
                    tooltip="The name in models/embeddings, to write after `embedding:` in a prompt. Empty takes the concept and -words.",
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
    def execute(cls, decomposition: Decomposition, name: str, overwrite: bool) -> io.NodeOutput:
        path = writable("embeddings", name.strip() or f"{slug(decomposition.concept)}-words")
        decomposition.save_embedding(path, overwrite=overwrite)
        # ComfyUI takes everything up to the next space for the file's name.
        prompt = decomposition.template.replace("{}", f" embedding:{path.stem} ").strip()
        return io.NodeOutput(prompt, ui=ui.PreviewText(f"embedding:{path.stem}\nin {path.parent}"))


class WordPictures(io.ComfyNode):
    """The node around ``core.decompose.pictures``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptKitWordPictures",
            display_name="Word Pictures",
            category=_CATEGORY,
            description="Draws what each word of a decomposition looks like alone, beside the concept and the mixture.",
            search_aliases=[*_ALIASES, "token", "contact sheet", "grid", "compare words", "xy plot"],
            inputs=[
                io.Model.Input("model", tooltip="The model that draws."),
                io.Clip.Input("clip", tooltip=_CLIP),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                Socket.Input("decomposition", tooltip=_GIVEN),
                io.Int.Input("pictures", default=2, min=1, max=16, tooltip="How many pictures of each, one to a row."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 17,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The seed of the first row; each row adds one. A row is what a KSampler draws with that seed.",
                ),
                io.Int.Input("steps", default=20, min=1, max=200, tooltip="Steps of the sampler, DPM++ 2M."),
                io.Float.Input("cfg", default=7.0, min=1.0, max=30.0, step=0.1, tooltip="Guidance, as in a KSampler."),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    advanced=True,
                    tooltip="Side of the square pictures in pixels. 0 takes the size the model was made for.",
                ),
            ],
            outputs=[
                io.Image.Output("sheet", tooltip="All pictures on one sheet, with the words above and the seeds beside them."),
                io.Image.Output(
                    "pictures", tooltip="The same as a batch: first all of the concept, then of the mixture, then of each word."
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
        from .comfy_model import Progress, check_fits, graph_model, send_text, trained_side

        check_fits(decomposition.embeddings, clip)
        node = cls.hidden.unique_id
        progress = Progress(node, model, decomposition.concept)
        seeds, side = range(seed, seed + pictures), size or trained_side(model)
        with graph_model(model, clip, vae, on_denoised=progress.show) as host:
            drawn = word_pictures(host, decomposition, seeds=seeds, height=side, width=side, steps=steps, guidance=cfg, on_step=progress)
        send_text(node, headline(decomposition))
        return io.NodeOutput(image(picture_sheet(decomposition, drawn, seeds)), torch.cat(drawn).movedim(1, -1))
