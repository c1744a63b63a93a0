"""``conceptkit world`` and ``conceptkit demo``: what is known of the demo model's words, and what decomposing finds of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .decompose import decompose_to
from .frame import Drawing, OutOption, SeedOption, app, load

if TYPE_CHECKING:
    from ..decompose import Decomposition
    from ..demo.world import Word, World

DEMO_CONCEPTS = ("bird", "joy", "gothic")
"""What ``conceptkit demo`` decomposes: a category of several things, a feeling of a colour and two shapes, and a style."""


@app.command()
def world(
    out: OutOption = Path("world"), seed: SeedOption = 0, per_word: Annotated[int, typer.Option(min=1, help="Images a word.")] = 8
) -> None:
    """Render the demo model's world: images of every word, and what each is made of; and write all that is known of it as JSON."""
    from .. import chart
    from ..demo.world import contact_sheet, shapes_world

    shapes = shapes_world()
    pictures, _ = contact_sheet(shapes, seed=seed, per_word=per_word)
    labels = [f"{word.text} ({word.role}): {_make_up(word)}".removesuffix(": ") for word in shapes.words.values()]
    subtitle = "rendered, not generated; beside each word its role and what it is made of"
    chart.save(out / "world.png", chart.picture_grid([list(row) for row in pictures], labels, title="The Shapes world", subtitle=subtitle))
    (out / "world.json").write_text(json.dumps(shapes.describe(), indent=1) + "\n", "utf-8")
    for label in labels:
        typer.echo(label)
    typer.echo(f"contact sheet and world file in {out}")


@app.command()
def demo(out: OutOption = Path("demo")) -> None:
    """Decompose three concepts of the demo model, generate images of them and their words, and print the findings beside the truth."""
    from ..demo.world import shapes_world

    start = time.perf_counter()
    loaded, shapes = load("demo", "cpu"), shapes_world()
    found = {concept: decompose_to(loaded, concept, out / concept, Drawing(range(6))) for concept in DEMO_CONCEPTS}
    typer.echo("")
    for concept, result in found.items():
        typer.echo(_beside(shapes, concept, result))
    typer.echo(f"\nCharts, numbers and images in {out}, after {time.perf_counter() - start:.0f} s.")


def _make_up(word: Word) -> str:
    """What a word of the demo's world is made of beside itself, strongest first; nothing for a word that means itself."""
    parts = sorted(word.make_up, key=lambda part: -part[0])
    described = [" + ".join(dict.fromkeys(value for value in spec.values() if value != word.text)) for _, spec in parts]
    return ", ".join(f"{share:.0%} " * (len(parts) > 1) + text for (share, _), text in zip(parts, described, strict=True))


def _beside(world: World, concept: str, result: Decomposition) -> str:
    known = world.words[concept]
    right = world.right_words(concept)
    telling = [word for word in result.words if word not in result.fillers]
    found = ", ".join(f"{word}{'' if word in right else ' (?)'}" for word in telling)
    filling = f" (fill in: {', '.join(result.fillers)})" if result.fillers else ""
    return f"{concept}\n  known: {_make_up(known)}\n  found: {found}{filling}\n  R² {result.r2:.3f}"
