"""Where a kind of result lies: saved and loaded by nodes, found again by what it was made from, gone on with where it was interrupted."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import folder_paths

from .api import io, ui
from .files import CACHE, check, check_name, folder, listed, locate, slug, stamp, target, writing

if TYPE_CHECKING:
    from ..core.artifact import Spec

logger = logging.getLogger(__name__)

_ENTRY, _VERSION = "conceptkit-found", 1
_CHECKPOINT = ".checkpoint"
_UNFINISHED_DAYS = 14
"""How long an interrupted run can be gone on with. A running one writes its checkpoint far more often."""


class Result(Protocol):
    """What a store keeps."""

    def content_hash(self) -> str: ...

    def save(self, path: Path, *, overwrite: bool = False) -> None: ...


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Store(Generic[R]):
    """The files of one kind of result.

    key: its folder. load: reads a file, importing the kind only then. subject: texts of a result that its file is named after.
    """

    key: str
    load: Callable[[Path], R]
    subject: Callable[[R], tuple[str, ...]]

    def file(self, result: R, name: str = "") -> Path:
        """Where a result is kept: under ``name``, or its subject, and a short hash of its content, so that equal ones are one file.

        Raises ValueError for a name that cannot be one, with what to write instead.
        """
        return target(self.key, name, slug(*self.subject(result)), result.content_hash())

    def keep(self, question: str, result: R) -> str:
        """Write the answer to a question, which is a hash of all it was made from. Returns what went wrong, or nothing: where the folder
        cannot be written, the result is worth more than its file."""
        from ..core.artifact import ArtifactError, write_spare

        path = self.file(result)
        try:
            with writing(path):
                try:
                    result.save(path)
                except ArtifactError as error:
                    # The hash in its name says what belongs there.
                    logger.warning("%s; it is replaced", error)
                    result.save(path, overwrite=True)
        except OSError as error:
            logger.warning("%s. This result is not kept", error)
            return str(error)
        write_spare(_entry(question), {}, {"format": _ENTRY, "version": _VERSION, "file": listed(self.key, path)})
        return ""

    def found_again(self, question: str) -> tuple[R, str] | None:
        """The answer kept for a question, and its file's name; None when there is none, or none that can be read."""
        from ..core.artifact import ArtifactError, discard, read

        entry = _entry(question)
        if not os.path.isfile(entry):
            return None
        try:
            _, header = read(entry, _ENTRY, _VERSION, _layout)
            path = folder_paths.get_full_path(self.key, header["file"])
            if path is not None:
                return self.load(Path(path)), header["file"]
        except ArtifactError as error:
            logger.warning("%s; it is computed again", error)
        else:
            discard(entry)
        return None


class SaveNode(io.ComfyNode):
    """A node that saves what comes in beside its name, in a store."""

    store: ClassVar[Store[Any]]

    @classmethod
    def validate_inputs(cls, name: str = "") -> bool | str:
        """True, or what to write instead."""
        return check_name(cls.store.key, name)

    @classmethod
    def execute(cls, name: str, **wired: Result) -> io.NodeOutput:
        (result,) = wired.values()
        return saved(cls.store.key, cls.store.file(result, name), result.save)


class LoadNode(io.ComfyNode):
    """A node that reads a file of a store; what it returns of it is ``outputs``'s to say."""

    store: ClassVar[Store[Any]]

    @classmethod
    def validate_inputs(cls, file: str = "") -> bool | str:
        """True, or which file is missing and where it belongs."""
        return check(cls.store.key, file)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Changes when another file lies under the same name."""
        return stamp(cls.store.key, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = locate(cls.store.key, file)
        return cls.outputs(cls.store.load(path), path)

    @classmethod
    def outputs(cls, result: Any, path: Path) -> io.NodeOutput:
        """What the node returns of a result read from ``path``."""
        raise NotImplementedError


def saved(key: str, path: Path, write: Callable[[Path], object]) -> io.NodeOutput:
    """Write a file, and return its name as loaders list it, which is shown on the node."""
    with writing(path):
        write(path)
    file = listed(key, path)
    return io.NodeOutput(file, ui=ui.PreviewText(file))


def checkpoint(question: str, subject: str) -> Path:
    """Where a run for this question writes what it can be gone on with. subject: what its file is named after."""
    return folder(CACHE) / f"{slug(subject)}-{question}{_CHECKPOINT}"


def forget_unfinished() -> None:
    """Delete checkpoints that nobody went on with for two weeks; those of runs under way, here or on another machine, are newer."""
    from ..core.artifact import discard

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
