"""``conceptkit …``: sample, decompose, and the demo, from a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from .decompose import Decomposition
    from .demo.world import Word, World
    from .model import Conditioning, Model

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="See what a diffusion model thinks a word is.",
)

DEMO_CONCEPTS = ("bird", "joy", "gothic")
"""What ``conceptkit demo`` decomposes: a word with several looks, one with two meanings at once, and an abstract mix."""

_PIXELS = 8 * 128 * 128  # pixels sampled at once; a batch of 8 in the demo, single pictures of a real model

ModelOption = Annotated[str, typer.Option("--model", help='"demo", or the folder of a local diffusers pipeline (SD 1.x, 2.x, SDXL).')]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write to; made if it is not there.")]
SeedOption = Annotated[int, typer.Option(min=0, help="The first seed.")]
PicturesOption = Annotated[int, typer.Option("--seeds", min=1, help="How many pictures, one per seed.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Sampling steps of the pictures.")]
GuidanceOption = Annotated[float, typer.Option(min=1, help="Classifier-free guidance; 1 turns it off.")]
SideOption = Annotated[
    int | None, typer.Option("--size", min=8, help="Side of the square pictures; by default what the model was trained on.")
]
DeviceOption = Annotated[str, typer.Option(help='Where the model runs: "cpu", "cuda", "mps".')]


def main() -> None:
    """Run the command line; a failure prints one sentence and exits with 1, wrong usage with 2."""
    try:
        app()
    except Exception as error:
        from .model import OutOfMemory  # loads torch, which help texts do without

        if not isinstance(error, (ValueError, OSError, ArithmeticError, OutOfMemory)):
            raise
        typer.echo(f"conceptkit: {' '.join(str(error).split()) or type(error).__name__}", err=True)
        sys.exit(1)


class _Bar:
    """A progress bar that follows ``OnStep`` on standard error."""

    def __init__(self, label: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=label, file=sys.stderr, leave=False, disable=None)

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], /) -> None:
        self._bar.total = total
        self._bar.set_postfix({key: f"{value:.3g}" for key, value in metrics.items()}, refresh=False)
        self._bar.update(step - self._bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: OutOption,
    model: ModelOption = "demo",
    seeds: PicturesOption = 4,
    seed: SeedOption = 0,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    size: SideOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Draw a prompt: one picture a seed, and a contact sheet."""
    from . import chart

    loaded = _load(model, device)
    numbers = range(seed, seed + seeds)
    pictures = _draw(loaded, loaded.text.encode([prompt]), numbers, steps, guidance, size, prompt)
    for number, picture in zip(numbers, pictures, strict=True):
        chart.save(out / f"seed-{number}.png", picture)
    subtitle = f"{loaded.name}, {steps} steps, guidance {guidance:g}"
    chart.save(
        out / "sheet.png", chart.picture_grid([pictures], column_labels=[f"seed {n}" for n in numbers], title=prompt, subtitle=subtitle)
    )
    typer.echo(f"{seeds} pictures and a contact sheet in {out}")


@app.command()
def decompose(
    concept: Annotated[str, typer.Argument(help="The word or words to take apart.")],
    out: OutOption,
    model: ModelOption = "demo",
    template: Annotated[str, typer.Option(help="The prompt around the concept, with {} in its place.")] = "a photo of a {}",
    words: Annotated[int, typer.Option(min=1, help="At most so many words.")] = 5,
    candidates: Annotated[
        Path | None,
        typer.Option(
            help="A text file of words to choose from. By default the demo model's own words, else the nearest in the vocabulary."
        ),
    ] = None,
    seeds: PicturesOption = 6,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the decomposition.")] = 0,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 4.0,
    size: SideOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Find the few vocabulary words a concept is made of: a chart, the numbers, and pictures of the concept beside its words'."""
    pool = candidates.read_text("utf-8").split() if candidates else None
    _decompose(_load(model, device), concept, out, pool, template, words, seed, range(seeds), steps, guidance, size)


@app.command()
def world(
    out: OutOption = Path("world"), seed: SeedOption = 0, per_word: Annotated[int, typer.Option(min=1, help="Pictures a word.")] = 8
) -> None:
    """Draw the demo model's world: pictures of every word, and what each is made of."""
    from . import chart
    from .demo.world import contact_sheet, shapes_world

    shapes = shapes_world()
    pictures, _ = contact_sheet(shapes, seed=seed, per_word=per_word)
    labels = [f"{word.text} ({word.role}): {_make_up(word)}".removesuffix(": ") for word in shapes.words.values()]
    subtitle = "rendered, not generated; beside each word its role and what it is made of"
    chart.save(out / "world.png", chart.picture_grid([list(row) for row in pictures], labels, title="The Shapes world", subtitle=subtitle))
    for label in labels:
        typer.echo(label)
    typer.echo(f"contact sheet in {out / 'world.png'}")


@app.command()
def demo(out: OutOption = Path("demo")) -> None:
    """Decompose three concepts of the demo model and print what was found beside what is known."""
    from .demo.world import shapes_world

    start = time.perf_counter()
    loaded, shapes = _load("demo", "cpu"), shapes_world()
    found = {concept: _decompose(loaded, concept, out / concept) for concept in DEMO_CONCEPTS}
    typer.echo("")
    for concept, result in found.items():
        typer.echo(_beside(shapes, concept, result))
    typer.echo(f"\nCharts, numbers and pictures in {out}, after {time.perf_counter() - start:.0f} s.")


def _decompose(
    model: Model,
    concept: str,
    out: Path,
    candidates: Sequence[str] | None = None,
    template: str = "a photo of a {}",
    words: int = 5,
    seed: int = 0,
    seeds: Sequence[int] = range(6),
    steps: int = 20,
    guidance: float = 4.0,
    size: int | None = None,
) -> Decomposition:
    from . import chart
    from .decompose import decompose_concept

    start = time.perf_counter()
    side = _side(model, size)
    with _Bar(f"decomposing {concept!r}") as bar:
        result = decompose_concept(
            model,
            concept,
            template=template,
            words=words,
            candidates=candidates,
            seed=seed,
            height=side,
            width=side,
            settings={"guidance": guidance},
            on_step=bar,
        )
    seconds = time.perf_counter() - start
    prompt = template.replace("{}", concept)
    subtitle = f'"{prompt}", model {model.name}; R² {result.r2:.3f}'
    chart.save(out / "chart.png", chart.share_bars(result.words, result.shares, result.importance, title=concept, subtitle=subtitle))
    (out / "decomposition.json").write_text(json.dumps(_numbers(result), indent=2) + "\n", "utf-8")
    if model.autoencoder is not None:
        rows = [
            _draw(model, conditioning, seeds, steps, guidance, size, f"drawing {label}")
            for label, conditioning in (
                (concept, model.text.encode([prompt])),
                ("its words", result.apply(model.text)),
            )
        ]
        labels = [concept, " + ".join(f"{share:.0%} {word}" for word, share in zip(result.words, result.shares, strict=True))]
        sheet = chart.picture_grid(rows, labels, [f"seed {n}" for n in seeds], title=f"{concept} and its words", subtitle=subtitle)
        chart.save(out / "pictures.png", sheet)
    typer.echo(result.summary())
    typer.echo(f"{out}: chart, numbers and pictures; decomposed in {seconds:.0f} s")
    return result


def _load(source: str, device: str) -> Model:
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from .hosts.diffusers import load_model

    try:
        torch.zeros(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"this PyTorch cannot use the device {device!r}: choose another, such as --device cpu") from error

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return load_model(source, device=device)


def _side(model: Model, size: int | None) -> int:
    from .hosts.diffusers import DiffusersDenoiser

    if size is None:
        return model.denoiser.side if isinstance(model.denoiser, DiffusersDenoiser) else 512
    if size % (8 * model.denoiser.downscale):
        raise ValueError(f"pictures of {size} pixels do not fit the model's grid: choose a multiple of {8 * model.denoiser.downscale}")
    return size


def _draw(
    model: Model, conditioning: Conditioning, seeds: Sequence[int], steps: int, guidance: float, size: int | None, label: str
) -> list[NDArray[np.uint8]]:
    """One picture a seed, (height, width, 3)."""
    import torch

    from .model import UnsupportedModel
    from .sampling import initial_noise, schedule
    from .sampling import sample as run

    if model.autoencoder is None:
        raise UnsupportedModel(f"{model.name} has no autoencoder to draw pictures with: choose a complete pipeline")
    side = _side(model, size)
    cells = side // model.denoiser.downscale
    batch = max(1, _PIXELS // side**2)
    negative = model.text.encode([""]) if guidance != 1 else None
    pictures: list[NDArray[np.uint8]] = []
    with torch.no_grad():
        for first in range(0, len(seeds), batch):
            noise = initial_noise(seeds[first : first + batch], model.denoiser.latent_channels, cells, cells)
            with _Bar(label) as bar:
                sigmas = schedule(model.denoiser, steps)
                latents = run(model, conditioning, negative, noise, sigmas, guidance=guidance, on_step=bar)
            pictures += list((model.autoencoder.decode(latents) * 255).round().byte().movedim(1, -1).cpu().numpy())
    return pictures


def _numbers(result: Decomposition) -> dict[str, Any]:
    columns = zip(result.words, result.ids, result.shares, result.importance, strict=True)
    return {
        "concept": result.concept,
        "template": result.template,
        "model": result.model,
        "method": result.method,
        "seed": result.seed,
        "words": [{"word": word, "id": id_, "share": share, "importance": lost} for word, id_, share, lost in columns],
        "r2": result.r2,
        "evals": result.evals,
        "calls": result.calls,
    }


def _make_up(word: Word) -> str:
    """What a word of the demo's world is made of beside itself, strongest first; nothing for a word that means itself."""
    parts = sorted(word.make_up, key=lambda part: -part[0])
    described = [" + ".join(dict.fromkeys(value for value in spec.values() if value != word.text)) for _, spec in parts]
    return ", ".join(f"{share:.0%} " * (len(parts) > 1) + text for (share, _), text in zip(parts, described, strict=True))


def _beside(world: World, concept: str, result: Decomposition) -> str:
    known = world.words[concept]
    right = {*known.related, *(word.text for word in world.words.values() if word.synonym_of in known.related)}
    found = ", ".join(
        f"{share:.0%} {word}{'' if word in right else ' (?)'}" for word, share in zip(result.words, result.shares, strict=True)
    )
    share = sum(share for word, share in zip(result.words, result.shares, strict=True) if word in right)
    return (
        f"{concept}\n  known: {_make_up(known)}\n  found: {found}\n"
        f"  {share:.0%} of the weight is on words the concept is made of; R² {result.r2:.3f}"
    )


if __name__ == "__main__":
    main()
