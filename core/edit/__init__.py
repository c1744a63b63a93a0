"""Erasing and replacing concepts in closed form: one matrix T = I + U V^T on the text, whatever reads it."""

from ..phrases import Concept, parse_concepts
from .context_edit import ContextEdit, WeightPatch
from .erase import METHODS, report_edit, solve_edit
from .export import lora_tensors, save_lora
from .presets import Preset
from .report import Report
from .solve import LowRank

__all__ = [
    "METHODS",
    "Concept",
    "ContextEdit",
    "LowRank",
    "Preset",
    "Report",
    "WeightPatch",
    "lora_tensors",
    "parse_concepts",
    "report_edit",
    "save_lora",
    "solve_edit",
]
