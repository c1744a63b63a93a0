"""The sockets that carry ConceptKit's results from node to node."""

from __future__ import annotations

from .api import io

DecompositionSocket = io.Custom("CONCEPTKIT_DECOMPOSITION")
EditSocket = io.Custom("CONCEPTKIT_EDIT")
ScorerSocket = io.Custom("CONCEPTKIT_SCORER")
