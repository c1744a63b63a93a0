"""Taking a concept apart into a few weighted vocabulary words."""

from .distilled import Settings, decompose_concept
from .result import Attempt, Decomposition, Fidelity, LevelR2

__all__ = ["Attempt", "Decomposition", "Fidelity", "LevelR2", "Settings", "decompose_concept"]
