"""``conceptkit decompose`` and ``conceptkit verify``: the words a concept is made of, and whether finding them works on a model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from ..phrases import parse_list
from .frame import (
    Bar,
    DeviceOption,
    Drawing,
    GuidanceOption,
    ModelOption,
    OutOption,
    OverwriteOption,
    PicturesOption,
    SeedOption,
    SideOption,
    StepsOption,
    app,
    check_free,
    eight_bit,
    file_name,
    load,
    sample_images,
    side_of,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..decompose import Decomposition
    from ..model import Model

MethodName: TypeAlias = Literal["distilled", "conceptor", "text"]
BudgetOption = Annotated[Literal["fast", "default", "thorough"], typer.Option(help="How much may be spent.")]


@app.command()
def decompose(
    concepts: Annotated[
        list[str], typer.Argument(help="The word or phrase to decompose; several, separated by commas, get a folder each under --out.")
    ],
    out: OutOption,
    model: ModelOption = "demo",
    template: Annotated[str, typer.Option(help="The prompt around the concept, with {} in its place.")] = "a photo of a {}",
    words: Annotated[int, typer.Option(min=1, help="At most so many words.")] = 5,
    method: Annotated[MethodName, typer.Option(help="By the model's own predictions, as published, or from the text alone.")] = "distilled",
    budget: BudgetOption = "default",
    candidates: Annotated[
        Path | None,
        typer.Option(
            help="A text file of words to choose from, separated by lines or commas. By default the demo model's own words, else the "
            "nearest in the vocabulary."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Choose from at most so many words, the nearest to the concept.")] = 1000,
    exclude: Annotated[
        Path | None,
        typer.Option(
            help="A text file of words to leave out, separated by lines or commas, beside the concept itself and those left out by default."
        ),
    ] = None,
    exclude_unsafe: Annotated[bool, typer.Option(help="Leave out slurs and personal names.")] = True,
    keep_concept: Annotated[bool, typer.Option(help="Let the concept itself and its near-copies be among the words.")] = False,
    select: Annotated[
        Literal["scorer", "r2"],
        typer.Option(help="What the conceptor method keeps the best by: the image scorer, or R2 where there is none."),
    ] = "scorer",
    checkpoint: Annotated[Path | None, typer.Option(help="A file that a stopped run continues from; for one concept.")] = None,
    seeds: PicturesOption = 6,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the decomposition.")] = 0,
    steps: StepsOption = 20,
    guidance: Annotated[
        float | None, typer.Option(min=1, help="Classifier-free guidance; by default the method's own, and 4 for the images.")
    ] = None,
    size: SideOption = None,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
) -> None:
    """Find the few vocabulary words a concept is made of: chart, numbers, embedding, and images of the concept beside its words'."""
    listed = parse_list("\n".join(concepts))
    if not listed:
        raise ValueError("the concept is empty: give a word or a phrase")
    if checkpoint is not None and len(listed) > 1:
        raise ValueError(f"a checkpoint belongs to one concept, and {len(listed)} are listed: leave --checkpoint out, or give one concept")
    folders = [out / file_name(concept) for concept in listed] if len(listed) > 1 else [out]
    check_free((f for concept, folder in zip(listed, folders, strict=True) for f in _decomposition_files(concept, folder)), overwrite)
    loaded = load(model, device)
    for concept, folder in zip(listed, folders, strict=True):
        decompose_to(
            loaded,
            concept,
            folder,
            Drawing(range(seeds), steps, size=size) if guidance is None else Drawing(range(seeds), steps, guidance, size),
            settings={} if guidance is None else {"guidance": guidance},
            template=template,
            words=words,
            method=method,
            budget=budget,
            candidates=candidates.read_text("utf-8") if candidates else None,
            limit=limit,
            exclude=exclude.read_text("utf-8") if exclude else (),
            exclude_unsafe=exclude_unsafe,
            keep_concept=keep_concept,
            select=select,
            checkpoint=checkpoint,
            seed=seed,
        )


@app.command()
def verify(
    out: OutOption = Path("verify"),
    model: ModelOption = "demo",
    concepts: Annotated[list[str], typer.Option("--concept", help="What to decompose; several separated by commas.")] = ["bird", "joy"],  # noqa: B006
    draws: Annotated[int, typer.Option(min=0, help="Planted mixtures to decompose, whose words are known.")] = 6,
    budget: BudgetOption = "default",
    seeds: PicturesOption = 4,
    seed: SeedOption = 0,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    size: SideOption = None,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
) -> None:
    """Check on one page whether taking words apart works on a model: planted recall, R2, cost, a decomposition or two."""
    from .. import chart
    from ..bench.verify import markdown
    from ..bench.verify import verify as measure

    listed = parse_list("\n".join(concepts))
    page_file, picture_file = out / "verify.md", out / "verify.png"
    check_free([page_file, picture_file], overwrite)
    loaded = load(model, device)
    drawing = Drawing(range(seeds), steps, guidance, size)
    report = measure(
        loaded, listed, draws=draws, side=side_of(loaded, size), budget=budget, seed=seed, on_part=lambda part: typer.echo(part, err=True)
    )
    picture = None
    if loaded.autoencoder is not None and listed:
        rows = [row for found in report.concepts for row in _beside_its_words(loaded, found, drawing)]
        labels = [label for found in report.concepts for label in (found.concept, _mixture(found))]
        picture = picture_file.name
        subtitle = "each concept above what its words draw, from the same noise"
        chart.save(picture_file, chart.picture_grid(rows, labels, drawing.labels, title=loaded.name, subtitle=subtitle))
    out.mkdir(parents=True, exist_ok=True)
    page = markdown(report, picture)
    page_file.write_text(page, "utf-8")
    typer.echo(page)
    typer.echo(f"The page and its images are in {out}.")


def decompose_to(model: Model, concept: str, out: Path, drawing: Drawing, **options: Any) -> Decomposition:
    """Take a concept apart with ``options`` of `decompose_concept`, and write everything that is known of it to ``out``."""
    from .. import chart
    from ..decompose import decompose_concept

    start = time.perf_counter()
    side = side_of(model, drawing.size)
    with Bar(f"decomposing {concept!r}") as bar:
        result = decompose_concept(model, concept, height=side, width=side, on_step=bar, **options)
    seconds = time.perf_counter() - start
    explained = "R² not measured" if result.fidelity is None else f"R² {result.r2:.3f}"
    subtitle = f'"{result.template.replace("{}", concept)}", model {model.name}; {explained}'
    bars = (result.words, result.shares, result.importance, result.fillers)
    chart.save(out / "chart.png", chart.share_bars(*bars, title=concept, subtitle=subtitle))
    (out / "decomposition.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", "utf-8")
    result.save(out / "decomposition.safetensors", overwrite=True)
    result.save_embedding(out / f"{file_name(concept)}-words.safetensors", overwrite=True)
    if model.autoencoder is not None:
        _draw_words(model, result, out, drawing, subtitle)
    typer.echo(result.summary())
    typer.echo(f"{out}: chart, numbers, embedding and images; decomposed in {seconds:.0f} s")
    return result


def _decomposition_files(concept: str, out: Path) -> list[Path]:
    """What `decompose_to` writes."""
    names = ("chart.png", "decomposition.json", "decomposition.safetensors", "pictures.png", "words.png")
    return [*(out / name for name in names), out / f"{file_name(concept)}-words.safetensors"]


def _draw_words(model: Model, result: Decomposition, out: Path, drawing: Drawing, subtitle: str) -> None:
    """The concept above its words' mixture, and a sheet of both beside what each word alone looks like."""
    from .. import chart
    from ..decompose.pictures import picture_sheet, word_pictures

    with Bar(f"generating {result.concept} and its words") as bar:
        drawn = word_pictures(model, result, seeds=drawing.seeds, **drawing.options(model), on_step=bar)
    labels, title = [result.concept, _mixture(result)], f"{result.concept} and its words"
    rows = [eight_bit(pictures) for pictures in drawn[:2]]
    chart.save(out / "pictures.png", chart.picture_grid(rows, labels, drawing.labels, title=title, subtitle=subtitle))
    chart.save(out / "words.png", picture_sheet(result, drawn, drawing.seeds))


def _beside_its_words(model: Model, result: Decomposition, drawing: Drawing) -> list[list[NDArray[np.uint8]]]:
    """Two rows of images from the same noise: the concept, and the mixture of its words."""
    conditionings = {
        result.concept: model.text.encode([result.template.replace("{}", result.concept)]),
        f"the words of {result.concept}": result.apply(model.text),
    }
    return [sample_images(model, conditioning, drawing, f"generating {label}") for label, conditioning in conditionings.items()]


def _mixture(result: Decomposition) -> str:
    return " + ".join(f"{share:.0%} {word}" for word, share in zip(result.words, result.shares, strict=True))
