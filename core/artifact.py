"""Artifacts: what a method leaves behind, as one safetensors file with one metadata key of canonical JSON.

Equal content has an equal hash and equal bytes on disk, so headers hold no times, machines or paths. A file read is untrusted: size,
header, format, version, names, types, shapes and values are checked before a tensor is handed out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)

KEY = "conceptkit"
"""The one metadata key."""

Header: TypeAlias = dict[str, Any]
"""JSON values under string keys. Holds ``format`` (text) and ``version`` (a whole number)."""

Spec: TypeAlias = tuple[torch.dtype, tuple[int | None, ...]]
"""A tensor's type and shape; None leaves that size free."""

Layout: TypeAlias = Callable[[Header], Mapping[str, Spec]]
"""The tensors a header promises: every one must be there, and nothing else."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_DIGITS = 300
"""Whole numbers of more do not become floating-point numbers."""


class ArtifactError(ValueError):
    """A file or its content cannot be used; the message names it and says what to do."""


def canonical(header: Mapping[str, Any]) -> str:
    """``header`` as JSON that is equal when the header is: sorted keys, no spaces, ASCII. ArtifactError for what JSON cannot hold."""
    try:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
        same = json.loads(text) == _listed(header)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"the header is not JSON ({error}): use text, finite numbers, booleans, lists and mappings") from error
    if not same:
        raise ArtifactError("the header has keys that are not text: use text keys, so that it reads back as it was written")
    return text


def content_hash(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the header and of every tensor's name, type, shape and values, in order of name.

    Independent of device, strides and insertion order, and of how a file lays its content out.
    """
    digest = hashlib.sha256()
    for part in _parts(tensors, header):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write an artifact, completely or not at all.

    Writing what is already there changes nothing. Raises ArtifactError for a header without format and version or not JSON, for NaN or
    infinity, for a tensor type artifacts do not hold, and, unless ``overwrite``, for a path that holds something else.
    """
    _identity(header, "the header")
    for name, tensor in tensors.items():
        if name == "__metadata__" or not (name.isascii() and name.isprintable()):
            raise ArtifactError(f"{name!r} cannot name a tensor: use printable ASCII")
        if tensor.dtype not in _DTYPES.values():
            raise ArtifactError(f"tensor {name!r} is {tensor.dtype}: convert it to float32, float16, bfloat16, int64 or bool")
        _finite(name, tensor, "nothing was written: look for the step that produced it")
    content = save({name: _owned(tensor) for name, tensor in tensors.items()}, {KEY: canonical(header)})
    write_bytes(path, content, overwrite=overwrite)


def write_bytes(path: str | Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write a file completely or not at all; ArtifactError for a path that holds something else, unless ``overwrite``."""
    path = Path(path)
    if not overwrite and path.exists():
        if path.read_bytes() == content:
            return
        raise ArtifactError(f"{path} exists with other content: choose another name, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """A fresh name in the same folder, for a file that is to be moved to ``path``; however long that name is, this one is short."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp")


def write_spare(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bool:
    """Like ``write`` with ``overwrite``, for what can be computed again: a disk that refuses it is a warning in the log, and False."""
    try:
        write(path, tensors, header, overwrite=True)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the work goes on without it", path, error.strerror or error)
        return False
    return True


def discard(path: Path) -> bool:
    """Delete a file that is no longer needed, if it is there; a disk that refuses is a warning in the log, and False."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be deleted (%s)", path, error.strerror or error)
        return False
    return True


def read(path: str | Path, format: str, version: int, layout: Layout) -> tuple[dict[str, Tensor], Header]:
    """Tensors (CPU, owning their memory) and header of an artifact of this format and version.

    Raises ArtifactError for a missing, truncated or hostile file, another format or version, a header that ``layout`` cannot make
    sense of, a tensor that is missing, unexpected or of another type or shape, and NaN or infinity. Memory is bounded by the file's
    real length, whatever its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file: check the name, or make the artifact again")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata())
            _expect(path, header, format, version)
            return _tensors(path, file, _promised(path, header, layout)), header
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged or no safetensors file ({error}): copy it again, or make it again") from error


def _header(path: Path, metadata: Mapping[str, str] | None) -> Header:
    if metadata is None or set(metadata) != {KEY}:
        raise ArtifactError(f"{path} is not a ConceptKit artifact: its metadata is not the one key {KEY!r}; choose a file this pack wrote")
    try:
        header = json.loads(metadata[KEY], parse_constant=_not_a_number, parse_float=_finite_number, parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} has a header that is not JSON ({error}): make it again") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path} has a header that is no mapping: make it again")
    _identity(header, str(path))
    return header


def _identity(header: Mapping[str, Any], of: str) -> None:
    if not isinstance(header.get("format"), str) or type(header.get("version")) is not int:
        raise ArtifactError(f"{of} names no format (text) and version (a whole number): use a header that has both")


def _expect(path: Path, header: Header, format: str, version: int) -> None:
    if header["format"] != format:
        raise ArtifactError(f"{path} is a {header['format'][:80]!r}, not a {format!r}: connect or choose a file of that kind")
    if header["version"] > version:
        raise ArtifactError(f"{path} is {format} version {header['version']}, newer than {version}: update ConceptKit to read it")
    if header["version"] < version:
        raise ArtifactError(f"{path} is {format} version {header['version']}, older than {version}: make it again with this ConceptKit")


def _promised(path: Path, header: Header, layout: Layout) -> Mapping[str, Spec]:
    try:
        return layout(header)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{path} has an incomplete header ({type(error).__name__}: {error}): make it again") from error


def _tensors(path: Path, file: Any, promised: Mapping[str, Spec]) -> dict[str, Tensor]:
    present = set(file.keys())
    if present != set(promised):
        names = ", ".join(repr(name[:80]) for name in sorted(present ^ set(promised))[:4])
        raise ArtifactError(f"{path} lacks tensors its header promises, or has others ({names}): make it again")
    tensors = {}
    for name, (dtype, shape) in sorted(promised.items()):
        piece = file.get_slice(name)
        found = tuple(piece.get_shape())
        fits = len(found) == len(shape) and all(s in (None, f) for s, f in zip(shape, found, strict=True))
        if _DTYPES.get(piece.get_dtype()) != dtype or not fits:
            expected = "x".join("?" if s is None else str(s) for s in shape) or "a number"
            raise ArtifactError(f"{path}: tensor {name!r} is {piece.get_dtype()} {list(found)}, not {dtype} {expected}: make it again")
        # A copy, so that nothing keeps the file mapped: it may be replaced while the artifact is in use.
        tensors[name] = _finite(name, file.get_tensor(name).clone(), f"{path} cannot be used: make it again")
    return tensors


def _finite(name: str, tensor: Tensor, advice: str) -> Tensor:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ArtifactError(f"tensor {name!r} holds NaN or infinity; {advice}")
    return tensor


def _owned(tensor: Tensor) -> Tensor:
    """A copy in row-major memory of its own, which safetensors asks for."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _parts(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> list[bytes]:
    parts = [canonical(header).encode()]
    for name in sorted(tensors):
        tensor = _owned(tensors[name])
        parts += [f"{name}\0{tensor.dtype}\0{list(tensor.shape)}".encode(), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()]
    return parts


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no JSON number")


def _finite_number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_a_number(text)


def _whole_number(text: str) -> int:
    return int(text) if len(text) <= _DIGITS else _not_a_number(text)
