"""``conceptkit erase`` and ``conceptkit report``: an edit of what a model reads, and what it does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..phrases import parse_concepts
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
    file_name,
    load,
    sample_images,
)

if TYPE_CHECKING:
    from ..edit import ContextEdit
    from ..model import Model

CacheOption = Annotated[
    Path | None, typer.Option(help="A folder for what depends on the checkpoint alone, which later edits of it are solved faster with.")
]


@app.command()
def erase(
    concepts: Annotated[list[str], typer.Argument(help='What to erase: "circle, red", or "circle -> square" to generate another instead.')],
    out: Annotated[Path, typer.Option("--out", help="The LoRA file to write (.safetensors), for any tool that loads LoRAs.")],
    model: ModelOption = "demo",
    keep: Annotated[str, typer.Option(help="Words that must stay as they are, separated by commas.")] = "",
    method: Annotated[str, typer.Option(help="conceptkit, or a published method to compare with.")] = "conceptkit",
    strength: Annotated[float, typer.Option(help="1 erases, 0 changes nothing.")] = 1.0,
    hard: Annotated[bool, typer.Option("--hard", help="No embedding at all is read as exactly the concept afterwards.")] = False,
    parts: Annotated[
        Literal["keep", "erase"], typer.Option(help="Words for parts of a concept, such as robin when bird is erased.")
    ] = "keep",
    precision: Annotated[Literal["fp16", "fp32"], typer.Option(help="Of the LoRA's numbers.")] = "fp16",
    edit_file: Annotated[Path | None, typer.Option("--edit", help="A file to keep the edit itself in, for `conceptkit report`.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder for images of each concept, before and after.")] = None,
    cache: CacheOption = None,
    seeds: PicturesOption = 6,
    seed: SeedOption = 0,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    size: SideOption = None,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
) -> None:
    """Erase concepts from a model, or replace them: a LoRA file, and a report on what it reaches and costs."""
    import torch

    from ..edit import save_lora, solve_edit
    from ..edit.layers import cross_attention

    asked = parse_concepts(concepts)
    sheets = [] if pictures is None else [pictures / f"{file_name(concept.text)}.png" for concept in asked]
    check_free([out, *([] if edit_file is None else [edit_file]), *sheets], overwrite)
    loaded = load(model, device)
    with Bar("solving") as bar:
        edit = solve_edit(
            loaded,
            asked,
            keep=keep,
            method=method,
            strength=strength,
            hard=hard,
            parts=parts,
            cache=cache,
            seed=seed,
            on_step=bar,
        )
    dtype = torch.float16 if precision == "fp16" else torch.float32
    save_lora(edit, cross_attention(loaded), out, dtype=dtype, overwrite=True)
    if edit_file is not None:
        edit.save(edit_file, overwrite=True)
    typer.echo(edit.summary())
    if sheets:
        _before_and_after(loaded, edit, sheets, Drawing(range(seed, seed + seeds), steps, guidance, size))
        typer.echo(f"before and after in {', '.join(map(str, sheets))}")
    typer.echo(f"LoRA in {out}")


@app.command()
def report(
    edit_file: Annotated[Path, typer.Argument(metavar="EDIT", help="A file that `conceptkit erase --edit` or the node Save Edit wrote.")],
    out: OutOption,
    model: ModelOption = "demo",
    cache: CacheOption = None,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
) -> None:
    """What an edit does to a model, without generating an image: a chart, and the figures as JSON."""
    from .. import chart
    from ..edit import ContextEdit, report_edit
    from ..edit.picture import report_picture

    picture_file, json_file = out / "report.png", out / "report.json"
    check_free([picture_file, json_file], overwrite)
    edit = ContextEdit.load(edit_file)
    figures = report_edit(load(model, device), edit, cache=cache)
    chart.save(picture_file, report_picture(edit, figures))
    json_file.write_text(json.dumps(figures.to_json(), indent=1) + "\n", "utf-8")
    typer.echo(replace(edit, report=figures).summary())
    typer.echo(f"chart and figures in {out}")


def _before_and_after(model: Model, edit: ContextEdit, sheets: Sequence[Path], drawing: Drawing) -> None:
    """A sheet a concept: its images, and those of the edited model from the same seeds."""
    from .. import chart

    for concept, path in zip(edit.concepts, sheets, strict=True):
        prompt = f"a photo of a {concept.text}"
        conditioning = model.text.encode([prompt])
        rows = [sample_images(model, conditioning, drawing, f"generating {concept.text}", applied) for applied in (None, edit)]
        chart.save(path, chart.picture_grid(rows, ["before", "after"], drawing.labels, title=prompt, subtitle=str(concept)))
