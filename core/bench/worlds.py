"""The demo worlds and their models, as every suite meets them: loaded once a process, sampled alike, read by the exact detectors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from ..demo import detect
from ..demo.detect import Reading
from ..demo.evaluate import GUIDANCE
from ..demo.render import SIDE
from ..demo.world import World, second_world, shapes_world
from ..hosts.diffusers import DEMO, DEMOS, load_model
from ..model import Conditioning, Model
from ..sampling import draw

WORLDS: Mapping[str, Callable[[], World]] = {"shapes": shapes_world, "second": second_world}
TEMPLATE = "a photo of a {}"
STEPS = 12
"""Of DPM++ 2M, wherever the bench samples."""
BATCH = 16


def halves(world: World) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The composite words in two halves, every other one: those defaults may be chosen on, and those that are held out for reporting."""
    words = tuple(word.text for word in world.composites)
    return words[::2], words[1::2]


@lru_cache(maxsize=1)
def load(source: str) -> Model:
    """A demo model, on one thread where the bench measures on several processes."""
    if os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(1)
    return load_model(source)


def readings(model: Model, positive: Conditioning, negative: Conditioning, seeds: Sequence[int]) -> list[Reading]:
    """What the detectors see in an image a seed: `sampling_evals` of them."""
    images = draw(model, positive, negative, seeds, height=SIDE, width=SIDE, steps=STEPS, guidance=GUIDANCE, batch=BATCH)
    return [detect.read(image) for image in images.movedim(1, -1).numpy()]


def sampling_evals(images: int) -> int:
    """The evals of sampling ``images`` with guidance."""
    return 2 * STEPS * images


def weights_digest(model: str) -> str:
    """A digest of the weights in a demo model's file, and of those it stands beside."""
    names = [DEMOS["demo"], DEMOS[model]] if model in DEMOS else []
    files = [DEMO / name for name in dict.fromkeys(names)] or [Path(model)]
    return hashlib.sha256("".join(_digest(file) for file in files).encode()).hexdigest()[:16]


def source_digests(package: str, names: Sequence[str]) -> tuple[str, ...]:
    """Digests of files of a package of the core: what a method's results depend on."""
    return tuple(_digest(Path(__file__).parents[1] / package / name) for name in names)


@lru_cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "missing"
