"""Results found again by what they were made from, and what an interrupted run left for the next one. Not needed to list a node."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths

from ..core.artifact import ArtifactError, Spec, discard, read, write_spare
from ..core.decompose import Decomposition
from .files import CACHE, DECOMPOSITIONS, folder, listed, slug, target, writing

logger = logging.getLogger(__name__)

_ENTRY, _VERSION = "conceptkit-found", 1
_CHECKPOINT = ".checkpoint"
_UNFINISHED_DAYS = 14
"""How long an interrupted run can be gone on with. A running one writes its checkpoint far more often."""


def decomposition_file(found: Decomposition, name: str = "") -> Path:
    """Where a decomposition is kept: under ``name``, or its concept and first words, and a short hash of its content, so that equal ones
    are one file. Raises ValueError for a name that cannot be one, with what to write instead."""
    return target(DECOMPOSITIONS, name, slug(found.concept, *found.words[:3]), found.content_hash())


def keep(question: str, found: Decomposition) -> str:
    """Write the answer to a question, which is a hash of all it was made from. Returns what went wrong, or nothing: where the folder
    cannot be written, the result is worth more than its file."""
    path = decomposition_file(found)
    try:
        with writing(path):
            try:
                found.save(path)
            except ArtifactError as error:
                # The hash in its name says what belongs there.
                logger.warning("%s; it is replaced", error)
                found.save(path, overwrite=True)
    except OSError as error:
        logger.warning("%s. This decomposition is not kept", error)
        return str(error)
    write_spare(_entry(question), {}, {"format": _ENTRY, "version": _VERSION, "file": listed(DECOMPOSITIONS, path)})
    return ""


def found_again(question: str) -> tuple[Decomposition, str] | None:
    """The answer kept for a question, and its file's name; None when there is none, or none that can be read."""
    entry = _entry(question)
    if not os.path.isfile(entry):
        return None
    try:
        _, header = read(entry, _ENTRY, _VERSION, _layout)
        path = folder_paths.get_full_path(DECOMPOSITIONS, header["file"])
        if path is not None:
            return Decomposition.load(path), header["file"]
    except ArtifactError as error:
        logger.warning("%s; it is computed again", error)
    else:
        discard(entry)
    return None


def checkpoint(question: str, concept: str) -> Path:
    """Where a run for this question writes what it can be gone on with."""
    return folder(CACHE) / f"{slug(concept)}-{question}{_CHECKPOINT}"


def forget_unfinished() -> None:
    """Delete checkpoints that nobody went on with for two weeks; those of runs under way, here or on another machine, are newer."""
    oldest = time.time() - _UNFINISHED_DAYS * 86400
    for path in folder(CACHE).glob(f"*{_CHECKPOINT}"):
        try:
            stale = path.stat().st_mtime < oldest
        except FileNotFoundError:
            continue  # the run it belonged to has just finished
        if stale:
            discard(path)


def _entry(question: str) -> Path:
    return folder(CACHE) / f"found-{question}.safetensors"


def _layout(header: Mapping[str, Any]) -> dict[str, Spec]:
    if type(header["file"]) is not str:
        raise TypeError("the file's name is no text")
    return {}
