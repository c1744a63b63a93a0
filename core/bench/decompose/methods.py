"""The methods that ``conceptkit bench decompose`` measures: how each is called, what it may spend, and the code it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHODS = ("distilled", "text", "conceptor", "conceptor-tuned")
"""Measured unless others are named."""
DEFAULT, BASELINES = METHODS[0], METHODS[2:]
TUNED: Mapping[str, float] = {"guidance": 3.0, "rate": 1e-2, "kept": 6, "steps": 450, "refit": 50}
"""The baseline's settings that do best on this model: chosen on planted draws from 1000 on and natural words of the tuned half."""
ABLATIONS: Mapping[str, Mapping[str, float]] = {
    "without-shown": {"shown_count": 0},
    "without-embedding": {"embedding_count": 0},
    "without-predictions": {"predictions_count": 0},
    "without-fillers": {"fills": 0},
    "without-refining": {"refined": 0},
    "half-the-rows": {"rows": 48},
    "half-the-words-looked-at": {"shown": 16},
    "quarter-of-the-words-searched": {"searched": 64},
}
"""The default method without one of its ingredients, or with less of it: settings."""
_SHARED = ("decompose.py", "decomposition.py", "fidelity.py", "mixture.py", "shown.py", "sparse.py", "states.py", "task.py", "text.py")
_DISTILLED = (*_SHARED, "distilled.py", "search.py", "surrogate.py")
SOURCES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("distilled", *ABLATIONS), _DISTILLED),
    "text": _SHARED,
    **dict.fromkeys(BASELINES, ("conceptor.py",)),
}
"""The files of core/decompose that a method's results depend on. A baseline, which takes hours, is measured again for its own file alone:
a change in what it shares with the others that changes its results must raise ``PROTOCOL``."""
AS: Mapping[str, Mapping[str, Any]] = {
    "conceptor": {"words": 50},
    "conceptor-tuned": {"method": "conceptor", "settings": TUNED},
    **{name: {"method": "distilled", "settings": settings} for name, settings in ABLATIONS.items()},
}
"""How a row's method is called, where not by its name alone: options of ``decompose_concept``. The published result keeps 50 words."""
PLANNED: Mapping[str, int] = {**dict.fromkeys(("distilled", *ABLATIONS), 1_700), "text": 0, "conceptor": 10_296, "conceptor-tuned": 9_240}
"""Evals a decomposition spends at most, the images of the baselines apart: they sample 320, at 2 evals a step."""
PUBLISHED = 41_000
"""Evals of the baseline as published: 120 pictures, 500 steps of 6, and 10 validations of 20 pictures, each picture in 50 guided steps."""
