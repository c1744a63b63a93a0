"""Nodes of API-format graphs."""

from __future__ import annotations

from typing import Any


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def decompose(model: tuple[str, int] = ("loader", 0), clip: tuple[str, int] = ("loader", 1), **inputs: Any) -> dict[str, Any]:
    """By the method that takes a moment, unless another is asked for."""
    given = {
        "concept": "bird",
        "template": "a photo of a {}",
        "words": 3,
        "seed": 0,
        "size": 0,
        "budget": "fast",
        "method": "text",
    } | inputs
    return node("ConceptKitDecompose", model=list(model), clip=list(clip), **given)
