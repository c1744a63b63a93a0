"""``conceptkit …``: sample, decompose, verify, benchmarks and the demo, from a terminal."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from .phrases import parse_concepts, parse_list

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from .bench.frame import Suite
    from .decompose import Decomposition
    from .demo.world import Word, World
    from .edit import ContextEdit
    from .model import Conditioning, Model

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="See what a diffusion model thinks a word is.",
)
bench = typer.Typer(no_args_is_help=True, help="Benchmarks on the demo model, whose concepts are known.")
app.add_typer(bench, name="bench")

DEMO_CONCEPTS = ("bird", "joy", "gothic")
"""What ``conceptkit demo`` decomposes: a category of several things, a feeling of a colour and two shapes, and a style."""

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
DemoOption = Annotated[str, typer.Option("--model", help='"demo", or a checkpoint in its layout.')]
DeviceOption = Annotated[str, typer.Option(help='Where the model runs: "cpu", "cuda", "mps".')]
MethodName: TypeAlias = Literal["distilled", "conceptor", "text"]
BudgetOption = Annotated[Literal["fast", "default", "thorough"], typer.Option(help="How much may be spent.")]
JsonOption = Annotated[Path, typer.Option("--json", help="The file of the rows; made or replaced.")]
ProfileOption = Annotated[Literal["quick", "full"], typer.Option(help="Minutes on two cores, or hours.")]
ProcessesOption = Annotated[
    int | None, typer.Option(min=0, help="How many measure side by side, one thread each; by default one a core, at most 4.")
]
PartsOption = Annotated[
    Path | None, typer.Option(help="The folder of single measurements, which a stopped run goes on from; by default beside the JSON.")
]
CacheOption = Annotated[
    Path | None, typer.Option(help="A folder for what depends on the checkpoint alone, which later edits of it are solved faster with.")
]
ShardOption = Annotated[
    str, typer.Option(metavar="I/N", help="Measure one of N parts of everything, as on N machines whose --parts are put together later.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")]
ShipOption = Annotated[bool, typer.Option("--ship", help="Measure all baselines, whatever the limit, and store them with the package.")]


def main() -> None:
    """Run the command line; a failure prints one sentence and exits with 1, wrong usage with 2."""
    try:
        app()
    except Exception as error:
        import torch  # not needed for help texts

        from .model import OutOfMemory

        if not isinstance(error, (ValueError, OSError, ArithmeticError, OutOfMemory, torch.OutOfMemoryError)):
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
    overwrite: OverwriteOption = False,
) -> None:
    """Draw a prompt: one picture a seed, and a contact sheet."""
    from . import chart

    drawing = _Drawing(range(seed, seed + seeds), steps, guidance, size)
    files = [out / f"seed-{number}.png" for number in drawing.seeds]
    _check_free([*files, out / "sheet.png"], overwrite)
    loaded = _load(model, device)
    pictures = _draw(loaded, loaded.text.encode([prompt]), drawing, prompt)
    for path, picture in zip(files, pictures, strict=True):
        chart.save(path, picture)
    subtitle = f"{loaded.name}, {steps} steps, guidance {guidance:g}"
    chart.save(out / "sheet.png", chart.picture_grid([pictures], column_labels=drawing.labels, title=prompt, subtitle=subtitle))
    typer.echo(f"{seeds} pictures and a contact sheet in {out}")


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
        float | None, typer.Option(min=1, help="Classifier-free guidance; by default the method's own, and 4 for the pictures.")
    ] = None,
    size: SideOption = None,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
) -> None:
    """Find the few vocabulary words a concept is made of: chart, numbers, embedding, and pictures of the concept beside its words'."""
    listed = parse_list("\n".join(concepts))
    if not listed:
        raise ValueError("the concept is empty: give a word or a phrase")
    if checkpoint is not None and len(listed) > 1:
        raise ValueError(f"a checkpoint belongs to one concept, and {len(listed)} are listed: leave --checkpoint out, or give one concept")
    folders = [out / _file_name(concept) for concept in listed] if len(listed) > 1 else [out]
    _check_free((f for concept, folder in zip(listed, folders, strict=True) for f in _decomposition_files(concept, folder)), overwrite)
    loaded = _load(model, device)
    for concept, folder in zip(listed, folders, strict=True):
        _decompose(
            loaded,
            concept,
            folder,
            _Drawing(range(seeds), steps, size=size) if guidance is None else _Drawing(range(seeds), steps, guidance, size),
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
    draws: Annotated[int, typer.Option(min=0, help="Planted mixtures to take apart, whose words are known.")] = 6,
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
    from . import chart
    from .bench.verify import markdown
    from .bench.verify import verify as measure

    listed = parse_list("\n".join(concepts))
    page_file, picture_file = out / "verify.md", out / "verify.png"
    _check_free([page_file, picture_file], overwrite)
    loaded = _load(model, device)
    drawing = _Drawing(range(seeds), steps, guidance, size)
    report = measure(
        loaded, listed, draws=draws, side=_side(loaded, size), budget=budget, seed=seed, on_part=lambda part: typer.echo(part, err=True)
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
    typer.echo(f"The page and its pictures are in {out}.")


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
    pictures: Annotated[Path | None, typer.Option(help="A folder for pictures of each concept, before and after.")] = None,
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

    from .edit import save_lora, solve_edit
    from .edit.layers import cross_attention

    asked = parse_concepts(concepts)
    sheets = [] if pictures is None else [pictures / f"{_file_name(concept.text)}.png" for concept in asked]
    _check_free([out, *([] if edit_file is None else [edit_file]), *sheets], overwrite)
    loaded = _load(model, device)
    with _Bar("solving") as bar:
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
        _before_and_after(loaded, edit, sheets, _Drawing(range(seed, seed + seeds), steps, guidance, size))
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
    """What an edit does to a model, without drawing a picture: a chart, and the figures as JSON."""
    from . import chart
    from .edit import ContextEdit, report_edit
    from .edit.picture import report_picture

    picture_file, json_file = out / "report.png", out / "report.json"
    _check_free([picture_file, json_file], overwrite)
    edit = ContextEdit.load(edit_file)
    figures = report_edit(_load(model, device), edit, cache=cache)
    chart.save(picture_file, report_picture(edit, figures))
    json_file.write_text(json.dumps(figures.to_json(), indent=1) + "\n", "utf-8")
    typer.echo(replace(edit, report=figures).summary())
    typer.echo(f"chart and figures in {out}")


@bench.command("edit")
def bench_edit(
    json_: JsonOption,
    profile: ProfileOption = "quick",
    model: DemoOption = "demo",
    methods: Annotated[str, typer.Option(help="Which methods, separated by commas; by default those of the profile.")] = "",
    processes: ProcessesOption = None,
    parts: PartsOption = None,
    shard: ShardOption = "1/1",
    ship: ShipOption = False,
) -> None:
    """Measure edits where the answer is known: concepts of the demo model before and after, attacks on them, and speed at real sizes."""
    from .bench.edit import EditSuite
    from .edit import METHODS

    erasing = [name for name, preset in METHODS.items() if not preset.balances]
    _bench(EditSuite(profile, model, _among(erasing, methods)), json_, parts, processes, ship, shard)


def _before_and_after(model: Model, edit: ContextEdit, sheets: Sequence[Path], drawing: _Drawing) -> None:
    """A sheet a concept: its pictures, and those of the edited model from the same seeds."""
    from . import chart

    for concept, path in zip(edit.concepts, sheets, strict=True):
        prompt = f"a photo of a {concept.text}"
        conditioning = model.text.encode([prompt])
        rows = [_draw(model, conditioning, drawing, f"drawing {concept.text}", applied) for applied in (None, edit)]
        chart.save(path, chart.picture_grid(rows, ["before", "after"], drawing.labels, title=prompt, subtitle=str(concept)))


@bench.command("decompose")
def bench_decompose(
    json_: JsonOption,
    profile: ProfileOption = "quick",
    model: DemoOption = "demo",
    methods: Annotated[str, typer.Option(help="Which methods, separated by commas; docs/bench.md names those of the ablation.")] = (
        "distilled,text,conceptor,conceptor-tuned"
    ),
    processes: ProcessesOption = None,
    parts: PartsOption = None,
    shard: ShardOption = "1/1",
    ship: ShipOption = False,
) -> None:
    """Measure decompositions where the answer is known: planted mixtures, and the composite words of the demo's worlds."""
    from .bench.decompose import ABLATIONS, METHODS, DecomposeSuite
    from .hosts.diffusers import DEMO, DEMOS

    second = "demo-second" if (DEMO / DEMOS["demo-second"]).is_file() else None
    _bench(DecomposeSuite(profile, model, second, _among((*METHODS, *ABLATIONS), methods)), json_, parts, processes, ship, shard)


def _among(known: Sequence[str], asked: str) -> tuple[str, ...]:
    """The methods of a list separated by commas. Raises ValueError for one that the benchmark does not know."""
    chosen = parse_list(asked)
    if not set(chosen) <= set(known):
        raise ValueError(f"there is no method {', '.join(sorted(set(chosen) - set(known)))}: choose from {', '.join(known)}")
    return chosen


def _bench(suite: Suite, path: Path, parts: Path | None, processes: int | None, ship: bool, shard: str = "1/1") -> None:
    """Run a suite, write its JSON, and say which bars are met."""
    from .bench import frame

    parts = parts or path.with_suffix(".parts")
    count = min(os.cpu_count() or 1, 4) if processes is None else processes
    asked = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
    if asked is None or int(asked[1]) > int(asked[2]):
        raise ValueError(f"{shard!r} is no part of a whole: write 2/4 for the second of four")
    report = frame.run(suite, parts, processes=count, say=typer.echo, shard=(int(asked[1]) - 1, int(asked[2])), whole=ship)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", "utf-8")
    typer.echo(frame.summary(report))
    typer.echo(f"rows in {path}; single measurements in {parts}")
    if ship:
        typer.echo(f"{frame.ship(suite, parts)} baseline measurements are stored with the package")


@app.command()
def world(
    out: OutOption = Path("world"), seed: SeedOption = 0, per_word: Annotated[int, typer.Option(min=1, help="Pictures a word.")] = 8
) -> None:
    """Draw the demo model's world: pictures of every word, and what each is made of; and write all that is known of it as JSON."""
    from . import chart
    from .demo.world import contact_sheet, shapes_world

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
    """Decompose three concepts of the demo model, draw them and their words, and print what was found beside what is known."""
    from .demo.world import shapes_world

    start = time.perf_counter()
    loaded, shapes = _load("demo", "cpu"), shapes_world()
    found = {concept: _decompose(loaded, concept, out / concept, _Drawing(range(6))) for concept in DEMO_CONCEPTS}
    typer.echo("")
    for concept, result in found.items():
        typer.echo(_beside(shapes, concept, result))
    typer.echo(f"\nCharts, numbers and pictures in {out}, after {time.perf_counter() - start:.0f} s.")


@dataclass(frozen=True)
class _Drawing:
    """How pictures are drawn."""

    seeds: Sequence[int]
    steps: int = 20
    guidance: float = 4.0
    size: int | None = None

    @property
    def labels(self) -> list[str]:
        """What stands above the pictures."""
        return [f"seed {seed}" for seed in self.seeds]

    def options(self, model: Model) -> dict[str, Any]:
        """The keyword arguments of `core.sampling.draw`, and of `word_pictures`."""
        side = _side(model, self.size)
        at_once = max(1, _PIXELS // side**2)
        return {"height": side, "width": side, "steps": self.steps, "guidance": self.guidance, "batch": at_once}


def _check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """Raises ValueError for a file that would be replaced, or written twice: what lies there may have cost hours."""
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"two results would be written to {path}: ask for one of them at a time")
        seen.add(path)
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: write to another place, or add --overwrite to replace it")


def _decomposition_files(concept: str, out: Path) -> list[Path]:
    """What `_decompose` writes."""
    names = ("chart.png", "decomposition.json", "decomposition.safetensors", "pictures.png", "words.png")
    return [*(out / name for name in names), out / f"{_file_name(concept)}-words.safetensors"]


def _decompose(model: Model, concept: str, out: Path, drawing: _Drawing, **options: Any) -> Decomposition:
    """Take a concept apart with ``options`` of `decompose_concept`, and write everything that is known of it to ``out``."""
    from . import chart
    from .decompose import decompose_concept

    start = time.perf_counter()
    side = _side(model, drawing.size)
    with _Bar(f"decomposing {concept!r}") as bar:
        result = decompose_concept(model, concept, height=side, width=side, on_step=bar, **options)
    seconds = time.perf_counter() - start
    explained = "R² not measured" if result.fidelity is None else f"R² {result.r2:.3f}"
    subtitle = f'"{result.template.replace("{}", concept)}", model {model.name}; {explained}'
    bars = (result.words, result.shares, result.importance, result.fillers)
    chart.save(out / "chart.png", chart.share_bars(*bars, title=concept, subtitle=subtitle))
    (out / "decomposition.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", "utf-8")
    result.save(out / "decomposition.safetensors", overwrite=True)
    result.save_embedding(out / f"{_file_name(concept)}-words.safetensors", overwrite=True)
    if model.autoencoder is not None:
        _draw_words(model, result, out, drawing, subtitle)
    typer.echo(result.summary())
    typer.echo(f"{out}: chart, numbers, embedding and pictures; decomposed in {seconds:.0f} s")
    return result


def _draw_words(model: Model, result: Decomposition, out: Path, drawing: _Drawing, subtitle: str) -> None:
    """The concept above its words' mixture, and a sheet of both beside what each word alone looks like."""
    from . import chart
    from .decompose.pictures import picture_sheet, word_pictures

    with _Bar(f"drawing {result.concept} and its words") as bar:
        drawn = word_pictures(model, result, seeds=drawing.seeds, **drawing.options(model), on_step=bar)
    labels, title = [result.concept, _mixture(result)], f"{result.concept} and its words"
    rows = [_eight_bit(pictures) for pictures in drawn[:2]]
    chart.save(out / "pictures.png", chart.picture_grid(rows, labels, drawing.labels, title=title, subtitle=subtitle))
    chart.save(out / "words.png", picture_sheet(result, drawn, drawing.seeds))


def _beside_its_words(model: Model, result: Decomposition, drawing: _Drawing) -> list[list[NDArray[np.uint8]]]:
    """Two rows of pictures from the same noise: the concept, and the mixture of its words."""
    conditionings = {
        result.concept: model.text.encode([result.template.replace("{}", result.concept)]),
        f"the words of {result.concept}": result.apply(model.text),
    }
    return [_draw(model, conditioning, drawing, f"drawing {label}") for label, conditioning in conditionings.items()]


def _mixture(result: Decomposition) -> str:
    return " + ".join(f"{share:.0%} {word}" for word, share in zip(result.words, result.shares, strict=True))


def _file_name(concept: str) -> str:
    """The concept as part of a file name, which is also how an embedding is called in a prompt."""
    return re.sub(r"[^\w-]+", "-", concept.strip().lower()).strip("-") or "concept"


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
    denoiser = model.require_denoiser()
    if size is None:
        return denoiser.side
    if size % (8 * denoiser.downscale):
        raise ValueError(f"pictures of {size} pixels do not fit the model's grid: choose a multiple of {8 * denoiser.downscale}")
    return size


def _draw(
    model: Model, conditioning: Conditioning, drawing: _Drawing, label: str, edit: ContextEdit | None = None
) -> list[NDArray[np.uint8]]:
    """One picture a seed, (height, width, 3), of the model or of the edited model."""
    from .sampling import draw

    negative = model.text.encode([""]) if drawing.guidance != 1 else None
    if edit is not None:
        conditioning = edit.apply_to_conditioning(conditioning)
        negative = None if negative is None else edit.apply_to_conditioning(negative)
    with _Bar(label) as bar:
        return _eight_bit(draw(model, conditioning, negative, drawing.seeds, **drawing.options(model), on_step=bar))


def _eight_bit(pictures: Tensor) -> list[NDArray[np.uint8]]:
    """Pictures (n, 3, height, width) in [0, 1] as n of (height, width, 3)."""
    return list((pictures * 255).round().byte().movedim(1, -1).numpy())


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


if __name__ == "__main__":
    main()
