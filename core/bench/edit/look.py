"""Sampling a model with or without an edit, and reading what the images show.

The edited model is run in the conditioning form, which equals the weight form (a law with a test of its own) and costs no copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...demo.detect import Reading, present
from ...demo.world import World
from ...edit import ContextEdit
from ...model import Conditioning, Model
from ..worlds import BATCH, readings
from .cases import Case


def judged(world: World, listed: Sequence[Case], seen: Sequence[Reading]) -> list[int]:
    """1 where a picture shows the word it is judged by."""
    return [int(present(world.words[case.word], reading)) for case, reading in zip(listed, seen, strict=True)]


def look(model: Model, listed: Sequence[Case], edit: ContextEdit | None) -> list[Reading]:
    """What the pictures of an edited model (or the model itself) show."""
    found: list[Reading] = []
    for first in range(0, len(listed), BATCH):
        part = listed[first : first + BATCH]
        with torch.no_grad():
            prompts = model.text.encode([case.prompt for case in part])
        found += sampled(model, prompts, [case.seed for case in part], edit)
    return found


@torch.no_grad()
def sampled(model: Model, positive: Conditioning, seeds: Sequence[int], edit: ContextEdit | None) -> list[Reading]:
    """What an image a seed shows, the edit acting on what guidance adds and on what it subtracts alike."""
    negative = model.text.encode([""])
    if edit is not None:
        positive, negative = edit.apply_to_conditioning(positive), edit.apply_to_conditioning(negative)
    return readings(model, positive, negative, seeds)
