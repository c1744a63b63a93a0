"""What benches in tests measure in other processes, which import it from here: nothing large comes along."""

from __future__ import annotations

import time
from typing import Any


def slowly(seconds: float) -> dict[str, Any]:
    """A result after some seconds; ValueError where they are negative."""
    time.sleep(seconds)
    return {"evals": 1, "square": seconds}
