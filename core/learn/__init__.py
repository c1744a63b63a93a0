"""Learning concepts from images."""

from .invert import invert_concept

__all__ = ["invert_concept"]
