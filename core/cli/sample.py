"""``conceptkit sample``: images of a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from .frame import (
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
    load,
    sample_images,
)


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    out: OutOption,
    model: ModelOption = "demo",
    seeds: PicturesOption = 4,
    seed: SeedOption = 0,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    size: SideOption = None,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
) -> None:
    """Generate images of a prompt: one a seed, and a contact sheet."""
    from .. import chart

    drawing = Drawing(range(seed, seed + seeds), steps, guidance, size)
    files = [out / f"seed-{number}.png" for number in drawing.seeds]
    check_free([*files, out / "sheet.png"], overwrite)
    loaded = load(model, device)
    pictures = sample_images(loaded, loaded.text.encode([prompt]), drawing, prompt)
    for path, picture in zip(files, pictures, strict=True):
        chart.save(path, picture)
    subtitle = f"{loaded.name}, {steps} steps, guidance {guidance:g}"
    chart.save(out / "sheet.png", chart.picture_grid([pictures], column_labels=drawing.labels, title=prompt, subtitle=subtitle))
    typer.echo(f"{seeds} images and a contact sheet in {out}")
