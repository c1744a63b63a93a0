"""Inputs that several nodes have, so that they look and behave alike, and what is checked of them before a graph runs."""

from __future__ import annotations

from .api import io
from .files import NAME


def seed_input(tooltip: str, *, most: int = 2**63 - 1, advanced: bool | None = None) -> io.Input:
    """A seed that stays as it is from run to run unless told otherwise. most: where a node adds to it, less than the largest."""
    fixed = io.ControlAfterGenerate.fixed
    return io.Int.Input("seed", default=0, min=0, max=most, advanced=advanced, control_after_generate=fixed, tooltip=tooltip)


def size_input(which: str = "") -> io.Input:
    """The side of the square images that a node samples. which: what tells them from others, for the tooltip."""
    tooltip = f"Side of the square images{which} in pixels. 0 takes the size the model was trained on."
    return io.Int.Input("size", default=0, min=0, max=2048, step=64, advanced=True, tooltip=tooltip)


def name_input(placeholder: str, empty: str) -> io.Input:
    """The name of a file to save. empty: what an empty name takes."""
    return io.String.Input("name", default="", placeholder=placeholder, tooltip=f"{NAME} Empty takes {empty}.")


def check_template(template: str | None, *, empty: bool = False) -> bool | str:
    """True, or what to change; None, which is not known yet, passes, and so does an empty one where it stands for another."""
    if template is not None and not (empty and not template) and template.count("{}") != 1:
        return f"the template {template!r} must contain {{}} once, where the concept goes, as in 'a photo of a {{}}'"
    return True
