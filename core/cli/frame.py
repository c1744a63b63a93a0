"""What the commands share: the application, common options, progress bars, loading a model, and sampling images."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..edit import ContextEdit
    from ..model import Conditioning, Model

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="See what a diffusion model thinks a word is.",
)

_PIXELS = 8 * 128 * 128  # pixels sampled at once; a batch of 8 in the demo, single pictures of a real model

ModelOption = Annotated[str, typer.Option("--model", help='"demo", or the folder of a local diffusers pipeline (SD 1.x, 2.x, SDXL).')]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write to; made if it is not there.")]
SeedOption = Annotated[int, typer.Option(min=0, help="The first seed.")]
PicturesOption = Annotated[int, typer.Option("--seeds", min=1, help="How many images, one per seed.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Sampling steps of the images.")]
GuidanceOption = Annotated[float, typer.Option(min=1, help="Classifier-free guidance; 1 turns it off.")]
SideOption = Annotated[
    int | None, typer.Option("--size", min=8, help="Side of the square images in pixels; by default what the model was trained on.")
]
DeviceOption = Annotated[str, typer.Option(help='Where the model runs: "cpu", "cuda", "mps".')]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")]


def main() -> None:
    """Run the command line; a failure prints one sentence and exits with 1, wrong usage with 2."""
    try:
        app()
    except Exception as error:
        import torch  # not needed for help texts

        from ..model import OutOfMemory

        if not isinstance(error, (ValueError, OSError, ArithmeticError, OutOfMemory, torch.OutOfMemoryError)):
            raise
        typer.echo(f"conceptkit: {' '.join(str(error).split()) or type(error).__name__}", err=True)
        sys.exit(1)


class Bar:
    """A progress bar that follows ``OnStep`` on standard error."""

    def __init__(self, label: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=label, file=sys.stderr, leave=False, disable=None)

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], /) -> None:
        self._bar.total = total
        self._bar.set_postfix({key: f"{value:.3g}" for key, value in metrics.items()}, refresh=False)
        self._bar.update(step - self._bar.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()


@dataclass(frozen=True)
class Drawing:
    """How images are generated."""

    seeds: Sequence[int]
    steps: int = 20
    guidance: float = 4.0
    size: int | None = None

    @property
    def labels(self) -> list[str]:
        """What stands above the images."""
        return [f"seed {seed}" for seed in self.seeds]

    def options(self, model: Model) -> dict[str, Any]:
        """The keyword arguments of `core.sampling.draw`, and of `word_pictures`."""
        side = side_of(model, self.size)
        at_once = max(1, _PIXELS // side**2)
        return {"height": side, "width": side, "steps": self.steps, "guidance": self.guidance, "batch": at_once}


def check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """Raises ValueError for a file that would be replaced, or written twice: what lies there may have cost hours."""
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"two results would be written to {path}: ask for one of them at a time")
        seen.add(path)
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: write to another place, or add --overwrite to replace it")


def file_name(concept: str) -> str:
    """The concept as part of a file name, which is also how an embedding is called in a prompt."""
    return re.sub(r"[^\w-]+", "-", concept.strip().lower()).strip("-") or "concept"


def load(source: str, device: str) -> Model:
    """The model of ``--model``, without what libraries say while they load it. Raises ValueError for a device that PyTorch cannot use."""
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from ..hosts.diffusers import load_model

    try:
        torch.zeros(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"this PyTorch cannot use the device {device!r}: choose another, such as --device cpu") from error

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return load_model(source, device=device)


def side_of(model: Model, size: int | None) -> int:
    """The side of the images in pixels: ``size``, or what the model was trained on. Raises ValueError where it does not fit the model."""
    denoiser = model.require_denoiser()
    if size is None:
        return denoiser.side
    if size % (8 * denoiser.downscale):
        raise ValueError(f"images of {size} pixels do not fit the model's grid: choose a multiple of {8 * denoiser.downscale}")
    return size


def sample_images(
    model: Model, conditioning: Conditioning, drawing: Drawing, label: str, edit: ContextEdit | None = None
) -> list[NDArray[np.uint8]]:
    """One image a seed, (height, width, 3), of the model or of the edited model."""
    from ..sampling import draw

    negative = model.text.encode([""]) if drawing.guidance != 1 else None
    if edit is not None:
        conditioning = edit.apply_to_conditioning(conditioning)
        negative = None if negative is None else edit.apply_to_conditioning(negative)
    with Bar(label) as bar:
        return eight_bit(draw(model, conditioning, negative, drawing.seeds, **drawing.options(model), on_step=bar))


def eight_bit(pictures: Tensor) -> list[NDArray[np.uint8]]:
    """Images (n, 3, height, width) in [0, 1] as n of (height, width, 3)."""
    return list((pictures * 255).round().byte().movedim(1, -1).numpy())
