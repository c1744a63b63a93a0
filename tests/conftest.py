"""Fixtures every suite shares. Nothing here may need more than pytest: the ComfyUI suite runs in ComfyUI's environment."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root, which is the package."""
    return Path(__file__).resolve().parents[1]
