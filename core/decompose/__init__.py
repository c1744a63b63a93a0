"""Taking a concept apart into a few weighted vocabulary words."""

from .decompose import METHODS, decompose_concept
from .decomposition import Decomposition, Fidelity, LevelR2, Restart
from .distilled import Settings

__all__ = ["METHODS", "Decomposition", "Fidelity", "LevelR2", "Restart", "Settings", "decompose_concept"]
