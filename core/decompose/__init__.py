"""Taking a concept apart into a few weighted vocabulary words."""

from .decompose import METHODS, decompose_concept
from .distilled import Settings
from .result import Attempt, Decomposition, Fidelity, LevelR2

__all__ = ["METHODS", "Attempt", "Decomposition", "Fidelity", "LevelR2", "Settings", "decompose_concept"]
